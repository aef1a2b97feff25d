"""Choosing the next token: what the options mean, the draws, and a choice confined to given answers.

Every draw is a function of the row's own seed, of its place in the answer and of that row's logits, of nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.core.errors import SpecError

_HEADS = (256, 4096)
"""Likeliest words that are sorted first; a row whose cut lies deeper takes the next, or is sorted whole."""

_BLOCK = 256
"""Words whose probabilities are summed before the sums are."""

_ROWS = 8
"""Rows computed at a time: 8 x 49,152 words x 4 bytes stay in the cache."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; top_p, top_k, min_p cut the tail; stop: strings that end an answer."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        tail = 0 < self.top_p <= 1 and self.top_k >= 0 and 0 <= self.min_p < 1
        if not (0 <= self.temperature < math.inf and tail and self.max_new_tokens >= 1 and all(self.stop)):
            hints = ["temperature >= 0, 0 < top_p <= 1, top_k >= 0, 0 <= min_p < 1, max_new_tokens >= 1, no empty stop string"]
            raise SpecError(f"sampling options out of range: {self}.", hints=hints)

    @property
    def cuts(self) -> bool:
        """Is a tail of the distribution left out?"""
        return bool(self.top_k or self.min_p or self.top_p < 1)


@torch.no_grad()
def choose(
    logits: Tensor, sampling: Sampling, draws: Sequence[tuple[int, int]], allowed: Sequence[Sequence[int] | None] | None = None
) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-probability: (ids [rows], nats fp32 [rows]).

    logits [rows, vocab]; draws: (seed, position) of each row. allowed: for each row the ids to choose among, None for all.

    Sampling is by the inverse of the cumulative distribution at one uniform number a row. The order of the words does not
    matter to the distribution: without cuts it is that of their ids, with cuts that of falling probability, of which
    top-k, top-p (Holtzman et al. 2020) and min-p (Nguyen et al. 2024) keep a head. The log-probability is that under
    softmax(logits / temperature), over all words, before any cut and whatever was allowed; at temperature 0 as at 1.
    """
    ids, log_probs = [], []
    for at in range(0, len(draws), _ROWS):
        part = logits[at : at + _ROWS].float()
        if sampling.temperature not in (0, 1):
            part = part / sampling.temperature
        p = torch.softmax(part, -1)
        sums = _blocks(p, Tensor.sum).double()
        uniform = torch.tensor([[_uniform(*draw)] for draw in draws[at : at + _ROWS]], dtype=torch.float64, device=p.device)
        if sampling.temperature == 0:
            chosen = _likeliest(part)
        elif sampling.cuts:
            chosen = _from_head(p, sums.sum(-1, keepdim=True), uniform, sampling)
        else:
            chosen = _from_all(p, sums, uniform)
        found = p.gather(1, chosen[:, None])[:, 0].log()
        for row, among in enumerate(allowed[at : at + _ROWS] if allowed else []):
            if among is not None:
                chosen[row] = _among(part[row], among, uniform[row], sampling)
                found[row] = torch.log_softmax(part[row], -1)[chosen[row]]  # its probability may be below what fp32 holds
        ids.append(chosen)
        log_probs.append(found)
    return torch.cat(ids), torch.cat(log_probs)


def _blocks(x: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """A figure of every block of words, [rows, blocks]."""
    whole = x.shape[-1] // _BLOCK * _BLOCK
    parts = [reduce(x[:, :whole].unflatten(-1, (-1, _BLOCK)), -1)] if whole else []
    if whole < x.shape[-1]:
        parts.append(reduce(x[:, whole:], -1, keepdim=True))
    return torch.cat(parts, -1)


def _likeliest(logits: Tensor) -> Tensor:
    """argmax, the first of equals, several times as fast as torch's over a large vocabulary on a CPU."""
    block = _blocks(logits, Tensor.amax).argmax(-1, keepdim=True)
    index = (block * _BLOCK + torch.arange(_BLOCK, device=logits.device)).clamp(max=logits.shape[-1] - 1)
    chosen: Tensor = index.gather(1, logits.gather(1, index).argmax(-1, keepdim=True))[:, 0]
    return chosen


def _from_all(p: Tensor, sums: Tensor, uniform: Tensor) -> Tensor:
    """A draw from p in the order of ids: first the block, then the word in it."""
    reached = sums.cumsum(-1)
    aim = uniform * reached[:, -1:]
    block = (reached <= aim).sum(-1, keepdim=True).clamp(max=sums.shape[-1] - 1)
    index = block * _BLOCK + torch.arange(_BLOCK, device=p.device)
    inside = p.gather(1, index.clamp(max=p.shape[-1] - 1)).double()
    inside = torch.where(index < p.shape[-1], inside, 0.0).cumsum(-1)
    left = (aim - (reached.gather(1, block) - sums.gather(1, block))).clamp(min=0)
    within = (inside <= left.minimum(inside[:, -1:] * (1 - 1e-12))).sum(-1, keepdim=True)
    chosen: Tensor = index.gather(1, within.clamp(max=_BLOCK - 1))[:, 0]
    return chosen


def _from_head(p: Tensor, total: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """A draw from the kept head, of which no more is sorted than the row needs."""
    chosen = torch.zeros(p.shape[0], dtype=torch.long, device=p.device)
    rows = torch.arange(p.shape[0], device=p.device)
    for size in (*_HEADS, p.shape[-1]):
        if not len(rows) or size > p.shape[-1]:
            continue
        part = p[rows]
        best, order = part.topk(size, dim=-1) if 2 * size <= p.shape[-1] else part.sort(dim=-1, descending=True, stable=True)
        chosen[rows] = _draw(best, order, total[rows], uniform[rows], sampling)
        rows = rows[~_enough(best, total[rows], sampling)]
    return chosen


def _enough(best: Tensor, total: Tensor, sampling: Sampling) -> Tensor:
    """Does the kept head end within these words? best: the likeliest, falling, [rows, words]."""
    enough = best[:, -1] < sampling.min_p * best[:, 0]
    if 0 < sampling.top_k <= best.shape[1]:
        return torch.ones_like(enough)
    if not sampling.top_k and not sampling.min_p:
        return enough | (best.double().sum(-1) >= sampling.top_p * total[:, 0] * (1 + 1e-6))
    return enough


def _draw(p: Tensor, order: Tensor, total: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """p: falling, of which `total` is the sum over all words, [rows, kept or all]."""
    if sampling.top_k:
        p = torch.where(torch.arange(p.shape[-1], device=p.device) < sampling.top_k, p, 0.0)
    if sampling.min_p:
        p = torch.where(p >= sampling.min_p * p[:, :1], p, 0.0)
    reached = p.double().cumsum(-1)
    if sampling.top_p < 1:
        left = reached[:, -1:] if sampling.top_k or sampling.min_p else total
        p = torch.where(reached - p < sampling.top_p * left, p, 0.0)
        reached = p.double().cumsum(-1)
    picked = (reached <= uniform * reached[:, -1:]).sum(-1, keepdim=True)
    chosen: Tensor = order.gather(1, picked.minimum((p > 0).sum(-1, keepdim=True) - 1))[:, 0]
    return chosen


def _among(logits: Tensor, ids: Sequence[int], uniform: Tensor, sampling: Sampling) -> int:
    """A choice among some words of one row. logits [vocab], divided by the temperature."""
    if len(ids) == 1:
        return ids[0]
    own = torch.tensor(ids, device=logits.device)
    kept = logits[own]
    if sampling.temperature == 0:
        return ids[int(kept.argmax())]
    p, order = (kept - kept.max()).exp().double().sort(descending=True, stable=True)
    return ids[int(_draw(p[None], order[None], p.sum()[None, None], uniform[None], sampling))]


def _uniform(seed: int, position: int) -> float:
    """SplitMix64 of (seed, position), in [0, 1): the random number is a function of the row and its place, nothing else."""
    wrap = (1 << 64) - 1
    x = (seed + (position + 1) * 0x9E3779B97F4A7C15) & wrap
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wrap
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wrap
    return float((x ^ (x >> 31)) >> 11) / (1 << 53)


@dataclass(slots=True)
class Choices:
    """Given answers as a tree of tokens. follows: what may come next; whole: an answer may end here."""

    follows: dict[int, Choices] = field(default_factory=dict)
    whole: bool = False

    def next_ids(self, ends: Sequence[int]) -> list[int]:
        """Ids to choose among; the end tokens too where an answer is whole and another goes on."""
        return [*self.follows, *(ends if self.whole else ())]


def choices_of(answers: Sequence[Sequence[int]], ends: Sequence[int], max_new_tokens: int) -> Choices:
    """The tree of some answers. Raises SpecError for none, for an empty one, for one that is too long, and for one that
    begins another where no token could end it."""
    root = Choices()
    if not answers or not all(len(answer) for answer in answers):
        raise SpecError("a choice needs answers to choose among, none of them empty.")
    longest = max(len(answer) for answer in answers)
    if longest > max_new_tokens:
        raise SpecError(f"an answer to choose has {longest} tokens, and {max_new_tokens} may be said.", hints=["Raise max_new_tokens."])
    for answer in answers:
        here = root
        for token in answer:
            here = here.follows.setdefault(int(token), Choices())
        here.whole = True
    if not ends and any(node.whole and node.follows for node in _nodes(root)):
        raise SpecError("one answer begins another, and the model has no end token to tell them apart.")
    return root


def _nodes(root: Choices) -> list[Choices]:
    return [root, *(node for child in root.follows.values() for node in _nodes(child))]
