"""Generation: a prefix that all prompts share is computed once, rows that finish leave the batch.

Runs under the model's own attention with its key-value cache (left padding needs a mask, which packs have not). Each
row draws from its own counter-based random numbers, so what it says does not depend on its neighbours' seeds.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from tunesmith.core.errors import RunError, SpecError
from tunesmith.engine.forward import Forward

_SHARE = 24
"""Tokens from which a common prefix is worth a cache of its own."""


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


@dataclass(frozen=True, slots=True)
class Completion:
    """ids: generated tokens, the end-of-turn token included if there was one. text: decoded, special tokens left out.
    finished: "end", "stop" or "length"."""

    ids: list[int]
    text: str
    finished: str


@torch.no_grad()
def generate(
    forward: Forward,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    *,
    ends: Sequence[int] = (),
    batch: int = 32,
    on_text: Callable[[int, str], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Answers to prompts (token ids, each ending in the answer's header), in order.

    ends: ids that end an answer, beside the tokenizer's and the model's own. on_text: called with (prompt, piece) as text
    appears, for chat. progress: called with the number of answers just finished. Raises RunError for an empty prompt or
    one that leaves no room in the context.
    """
    sampling = sampling or Sampling()
    asked = [[int(token) for token in prompt] for prompt in prompts]
    _check(forward, asked, sampling)
    job = _Job(forward, tokenizer, sampling, frozenset([*ends, *_own_ends(forward, tokenizer)]), on_text)
    alone = not _can_batch(forward)
    prefix = [] if alone or _slides(forward, asked, sampling) else _common_prefix(asked)
    order = sorted(range(len(asked)), key=lambda index: len(asked[index]))
    out: list[Completion | None] = [None] * len(asked)
    with forward.attention(forward.own_attention):
        shared = job.prefill(prefix) if len(prefix) >= _SHARE and len(asked) > 1 else None
        cut = len(prefix) if shared is not None else 0
        size = 1 if alone else batch
        for at in range(0, len(order), size):
            members = order[at : at + size]
            for index, done in zip(members, job.decode(members, [asked[i][cut:] for i in members], shared, cut), strict=True):
                out[index] = done
            if progress:
                progress(len(members))
    return [done for done in out if done is not None]


def _check(forward: Forward, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    context = getattr(forward.model.config.get_text_config(), "max_position_embeddings", None)
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise RunError(f"prompt {number + 1} is empty.")
        if context and len(prompt) + sampling.max_new_tokens > context:
            raise RunError(
                f"prompt {number + 1} has {len(prompt):,} tokens; with {sampling.max_new_tokens} to come it exceeds the context of "
                f"{context:,}.",
                hints=["Shorten the prompt, use fewer demonstrations, or lower task.max_new_tokens."],
            )


def _own_ends(forward: Forward, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = getattr(forward.model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return [end for end in [*ends, tokenizer.eos_token_id] if end is not None]


def _can_batch(forward: Forward) -> bool:
    """Models with recurrent state have no cache that padding and selection leave exact; they run a row at a time."""
    return not getattr(forward.model, "_is_stateful", False)


def _slides(forward: Forward, prompts: Sequence[Sequence[int]], sampling: Sampling) -> bool:
    """Can a token lie outside of a sliding window? Padding between a shared prefix and a prompt would then narrow the window."""
    config = forward.model.config.get_text_config()
    width = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    return width is not None and max(map(len, prompts), default=0) + sampling.max_new_tokens > width


def _common_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """Tokens that all prompts start with, leaving each at least one of its own."""
    if not prompts:
        return []
    first, last = min(prompts), max(prompts)
    limit = min(len(prompt) for prompt in prompts) - 1
    n = 0
    while n < limit and first[n] == last[n]:
        n += 1
    return first[:n]


class _Job:
    """What stays the same over the batches of one call."""

    def __init__(
        self,
        forward: Forward,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        ends: frozenset[int],
        on_text: Callable[[int, str], None] | None,
    ) -> None:
        self.model, self.tokenizer, self.sampling, self.ends, self.on_text = forward.model, tokenizer, sampling, ends, on_text
        self.device = next(forward.model.parameters()).device
        recurrent = "cache_params" in inspect.signature(forward.model.forward).parameters
        self.cache_name = "cache_params" if recurrent else "past_key_values"

    def prefill(self, ids: Sequence[int]) -> Any:
        """The cache of a prefix, for one row."""
        cache = DynamicCache(config=self.model.config)
        self.model(input_ids=torch.tensor([list(ids)], device=self.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def decode(self, members: Sequence[int], prompts: Sequence[Sequence[int]], shared: Any, cut: int) -> list[Completion]:
        """Answers of one batch. prompts: what follows the shared prefix of `cut` tokens."""
        ids, mask = self._left_pad(prompts, cut)
        cache = copy.deepcopy(shared) if shared is not None else None
        if cache is not None:
            cache.batch_repeat_interleave(len(prompts))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, cut:]
        answers = [_Answer(self, index) for index in members]
        rows = list(range(len(members)))  # answers still in the batch, in its order
        for _ in range(self.sampling.max_new_tokens):
            arguments: dict[str, Any] = {"input_ids": ids, self.cache_name: cache, "use_cache": True, "logits_to_keep": 1}
            if len(members) > 1:
                arguments |= {"attention_mask": mask, "position_ids": positions}
            out = self.model(**arguments)
            cache = out[self.cache_name]
            chosen = choose(out.logits[:, -1].float(), self.sampling, [(answers[row].seed, len(answers[row].ids)) for row in rows])
            going = [at for at, row in enumerate(rows) if answers[row].take(int(chosen[at]))]
            if not going:
                break
            if len(going) < len(rows):
                keep = torch.tensor(going, device=self.device)
                cache.batch_select_indices(keep)
                mask, positions, chosen = mask[keep], positions[keep], chosen[keep]
                rows = [rows[at] for at in going]
            ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], -1)
            positions = positions[:, -1:] + 1
        return [answer.done() for answer in answers]

    def _left_pad(self, prompts: Sequence[Sequence[int]], cut: int) -> tuple[Tensor, Tensor]:
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[1] * cut + [0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        return ids, mask


class _Answer:
    """One answer in the making."""

    def __init__(self, job: _Job, index: int) -> None:
        self.job, self.index = job, index
        self.seed = int(np.random.SeedSequence([job.sampling.seed, index]).generate_state(1, np.uint64)[0])
        self.ids: list[int] = []
        self.finished = "length"
        self.text: str | None = None
        self._said = ""

    def take(self, token: int) -> bool:
        """Add a token; False when the answer is complete."""
        self.ids.append(token)
        if token in self.job.ends:
            self.finished = "end"
        elif self.job.sampling.stop or self.job.on_text:
            text = self._decode()
            hits = [text.index(word) for word in self.job.sampling.stop if word in text]
            if hits:
                self.finished, self.text = "stop", text[: min(hits)]
            self._say(self.text if self.text is not None else text[: self._settled(text)])
        return self.finished == "length"

    def done(self) -> Completion:
        text = self._decode() if self.text is None else self.text
        self._say(text)
        return Completion(self.ids, text, self.finished)

    def _decode(self) -> str:
        ids = self.ids[:-1] if self.ids and self.ids[-1] in self.job.ends else self.ids
        return str(self.job.tokenizer.decode(ids, skip_special_tokens=True))

    def _settled(self, text: str) -> int:
        """Characters that the next tokens cannot take back: no half character and no beginning of a stop string at the end."""
        end = len(text.rstrip("\ufffd"))
        longest = max((len(word) for word in self.job.sampling.stop), default=0)
        for at in range(max(0, end - longest + 1), end):
            if any(word.startswith(text[at:end]) for word in self.job.sampling.stop):
                return at
        return end

    def _say(self, text: str) -> None:
        if self.job.on_text and len(text) > len(self._said):
            self.job.on_text(self.index, text[len(self._said) :])
            self._said = text


def choose(logits: Tensor, sampling: Sampling, draws: Sequence[tuple[int, int]]) -> Tensor:
    """The next token of each row. logits [rows, vocab], fp32; draws: (seed, position) of each row -> [rows].

    Sampling is by the inverse of the cumulative distribution at one uniform number a row, in the order of falling
    probability; top-k, top-p (Holtzman et al. 2020) and min-p (Nguyen et al. 2024) keep a head of that order.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    p, order = torch.softmax(logits / sampling.temperature, -1).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        p = torch.where(torch.arange(p.shape[-1], device=p.device) < sampling.top_k, p, 0.0)
    if sampling.min_p:
        p = torch.where(p >= sampling.min_p * p[:, :1], p, 0.0)
    if sampling.top_p < 1:
        before = p.cumsum(-1) - p
        p = torch.where(before < sampling.top_p * p.sum(-1, keepdim=True), p, 0.0)
    reached = p.double().cumsum(-1)
    uniform = torch.tensor([[_uniform(*draw)] for draw in draws], dtype=torch.float64, device=p.device)
    picked = (reached <= uniform * reached[:, -1:]).sum(-1, keepdim=True).clamp(max=p.shape[-1] - 1)
    chosen: Tensor = order.gather(1, picked)[:, 0]
    return chosen


def _uniform(seed: int, position: int) -> float:
    """SplitMix64 of (seed, position), in [0, 1): the random number is a function of the row and its place, nothing else."""
    wrap = (1 << 64) - 1
    x = (seed + (position + 1) * 0x9E3779B97F4A7C15) & wrap
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wrap
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wrap
    return float((x ^ (x >> 31)) >> 11) / (1 << 53)
