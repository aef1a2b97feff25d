"""What is read off a block of logits, and the slope of each reading: the arithmetic of the head without its products.

A block is a few rows of logits, widened to fp32 (fp64 where the model computes in it) in a small buffer that stays in the
cache: no more of them is ever wide at a time. Every entry of softmax is formed once, by torch's own fused kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tunesmith.engine.divergence import TopTeacher, buffers, diverge, widened
from tunesmith.objectives.wanted import Wanted

_ROWS = 16
"""Rows of a block on a CPU: 16 x 49,152 words x 4 bytes = 3 MB."""
_ROWS_ELSEWHERE = 256
_NEVER = -1e4
"""Log-probability below which a token counts as impossible; finite, so that 0 times it is 0."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What is asked at n targets. target: token ids, [n]. given: more ids at each, [n, k]. tops: a teacher known by them."""

    target: Tensor
    wanted: Wanted
    given: Tensor | None = None
    tops: TopTeacher | None = None

    def part(self, rows: slice) -> Ask:
        """The same at some of the targets."""
        given = None if self.given is None else self.given[rows]
        return Ask(self.target[rows], self.wanted, given, None if self.tops is None else self.tops.part(rows))


@dataclass(slots=True)
class Readings:
    """Values at each target, nats, fp32 (fp64 where the model computes in it); None where not asked for.

    log_probs: of the target, [targets]. mean: of log p over the vocabulary. best: log p of the likeliest token. entropy.
    divergence: from the teacher; all [targets]. given: log p of the given ids, [targets, k]. top_ids, top: the likeliest
    tokens and their log p, [targets, top_k]. The last two and `best` carry no gradient.
    """

    log_probs: Tensor
    mean: Tensor | None = None
    best: Tensor | None = None
    entropy: Tensor | None = None
    divergence: Tensor | None = None
    given: Tensor | None = None
    top_ids: Tensor | None = None
    top: Tensor | None = None

    @classmethod
    def empty(cls, ask: Ask, dtype: torch.dtype) -> Readings:
        """Room for what is asked."""
        count, wanted, where = len(ask.target), ask.wanted, ask.target.device

        def room(*shape: int, on: bool = True, kind: torch.dtype = dtype) -> Tensor | None:
            return torch.empty(count, *shape, dtype=kind, device=where) if on else None

        ids, k = ask.given, wanted.top_k
        log_probs = torch.empty(count, dtype=dtype, device=where)
        given = None if ids is None else room(ids.shape[1])
        top_ids, top = room(k, on=k > 0, kind=torch.long), room(k, on=k > 0)
        far = room(on=wanted.divergence is not None)
        return cls(log_probs, room(on=wanted.mean), room(on=wanted.best), room(on=wanted.entropy), far, given, top_ids, top)

    @classmethod
    def of(cls, values: Iterable[Tensor | None]) -> Readings:
        """From the fields in order; the first is there always."""
        first, *others = values
        if first is None:
            raise ValueError("the log-probabilities are missing")
        return cls(first, *others)

    def astuple(self) -> tuple[Tensor | None, ...]:
        """The fields in order."""
        return tuple(getattr(self, each.name) for each in fields(Readings))

    def part(self, rows: slice) -> Readings:
        """Views of some of the targets."""
        return Readings.of(None if value is None else value[rows] for value in self.astuple())


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that readings of logits of this type are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def read(logits: Tensor, ask: Ask, out: Readings, slopes: Mapping[str, Tensor], teacher: Tensor | None) -> None:
    """Fill `out` from a chunk of logits [chunk, vocab], and each of `slopes` [chunk, vocab]:

    "p": the probabilities, which may overwrite the logits. "entropy": d entropy / d (logits / temperature).
    "divergence": d divergence / d logits. teacher: its logits, [chunk, vocab], where the divergence is from a whole one.
    """
    for rows, here, room, far in _blocks(logits, ask, teacher):
        z, mine = logits[rows], out.part(rows)
        if mine.divergence is not None and far is not None and ask.wanted.divergence is not None:
            value, pull = diverge(z, far, ask.wanted.divergence, room[2:], slope="divergence" in slopes)
            mine.divergence.copy_(value)
            if pull is not None:
                slopes["divergence"][rows] = pull
        p = _softmax(z, room, here, mine)
        if mine.entropy is not None:
            torch.neg(torch.linalg.vecdot(p, room[1]), out=mine.entropy)
            if "entropy" in slopes:
                slopes["entropy"][rows] = room[1].add_(mine.entropy[:, None]).mul_(p).neg_()
        if "p" in slopes:
            slopes["p"][rows] = p


def _softmax(z: Tensor, room: Tensor, ask: Ask, out: Readings) -> Tensor:
    """p, in room[0], and log p in room[1] where the entropy is wanted; fills in what is linear in the log-probabilities."""
    scale, work = ask.wanted.temperature, room[0]
    work.copy_(z)
    if scale != 1:
        work.div_(scale)
    gold, largest = work.gather(1, ask.target[:, None])[:, 0], work.amax(-1)
    mean = None if out.mean is None else work.mean(-1)
    given = None if ask.given is None else work.gather(1, ask.given)
    likeliest = None if out.top is None else work.topk(ask.wanted.top_k)
    if out.entropy is not None:
        room[1].copy_(work)
    torch.softmax(work, -1, out=work)
    best = work.amax(-1).log_()  # the likeliest token's probability is 1 over the sum of exponentials

    def log_p(logits: Tensor) -> Tensor:
        """Of some tokens of each target, [block, any]. Exactly `best` for the likeliest one, which the order of the sum decides."""
        return (logits - largest[:, None]).add_(best[:, None])

    out.log_probs.copy_(log_p(gold[:, None])[:, 0])
    if out.best is not None:
        out.best.copy_(best)
    if out.mean is not None and mean is not None:
        out.mean.copy_(log_p(mean[:, None])[:, 0])
    if out.given is not None and given is not None:
        out.given.copy_(log_p(given))
    if out.top is not None and out.top_ids is not None and likeliest is not None:
        out.top.copy_(log_p(likeliest.values))
        out.top_ids.copy_(likeliest.indices)
    if out.entropy is not None:
        room[1].sub_((largest - best)[:, None]).clamp_(min=_NEVER)
    return work


def pull(logits: Tensor, ask: Ask, grads: Readings, teacher: Tensor | None) -> None:
    """Overwrite a chunk of logits by the loss's gradient with respect to them, given that with respect to each reading."""
    scale = ask.wanted.temperature
    for rows, here, room, far in _blocks(logits, ask, teacher):
        z, g, apart = logits[rows], grads.part(rows), None
        if g.divergence is not None and far is not None and ask.wanted.divergence is not None:
            _, apart = diverge(z, far, ask.wanted.divergence, room[2:], slope=True)
        p, log_p = room[0], room[1]
        widened(z, scale, log_p, p)
        if g.entropy is not None:
            log_p.sub_(torch.linalg.vecdot(p, log_p)[:, None]).mul_(p).mul_(-g.entropy[:, None])
        p.mul_(-_mass(g)[:, None])
        if g.entropy is not None:
            p.add_(log_p)
        if g.mean is not None:
            p.add_(g.mean[:, None] / p.shape[1])
        p.scatter_add_(1, here.target[:, None], g.log_probs[:, None])
        if g.given is not None and here.given is not None:
            p.scatter_add_(1, here.given, g.given)
        if scale != 1:
            p.div_(scale)
        if apart is not None and g.divergence is not None:
            p.addcmul_(apart, g.divergence[:, None])
        z.copy_(p)


def _mass(g: Readings) -> Tensor:
    """What pulls at the log-sum-exp of each target, [targets]."""
    total = g.log_probs
    if g.mean is not None:
        total = total + g.mean
    return total if g.given is None else total + g.given.sum(-1)


def _blocks(logits: Tensor, ask: Ask, teacher: Tensor | None) -> Iterator[tuple[slice, Ask, Tensor, Tensor | TopTeacher | None]]:
    """The blocks of a chunk: their rows, what is asked there, wide matrices to work in, and the teacher.

    The first two matrices are for p and log p, the others for the divergence; all of them are used again by the next block.
    """
    most = min(_ROWS if logits.device.type == "cpu" else _ROWS_ELSEWHERE, len(logits))
    other = ask.tops if teacher is None else teacher
    room = logits.new_empty(2 + buffers(ask.wanted.divergence, other), most, logits.shape[1], dtype=wide(logits.dtype))
    for at in range(0, len(logits), max(1, most)):
        rows = slice(at, min(at + most, len(logits)))
        here = ask.part(rows)
        yield rows, here, room[:, : rows.stop - at], here.tops if teacher is None else teacher[rows]
