"""Divergence of the policy from a teacher at each target, and its slope with respect to the policy's logits.

Everything here sees a block of a few targets at a time, never all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.core.errors import RunError
from tunesmith.objectives.wanted import Divergence

_FLOOR = -1e4
"""Log-probability below which a token counts as impossible; finite, so that 0 times it is 0."""
_REST = 1e-7
"""Least probability of what lies outside of a teacher's likeliest tokens: fp32 tells no smaller one from 0."""


@dataclass(frozen=True, slots=True)
class TopTeacher:
    """A teacher known by its likeliest tokens. ids, log_probs: [targets, k], the ids of a target all different.

    All other tokens are one bucket, of the teacher's remaining probability, on both sides.
    """

    ids: Tensor
    log_probs: Tensor

    def part(self, rows: slice) -> TopTeacher:
        """The same for some of the targets."""
        return TopTeacher(self.ids[rows], self.log_probs[rows])


def check_vocabulary(teacher: int, policy: int) -> None:
    """Raises RunError where a teacher's vocabulary (or its largest id + 1) does not fit the policy's."""
    if teacher != policy:
        raise RunError(
            f"the teacher has a vocabulary of {teacher:,} tokens and the policy one of {policy:,}: their probabilities cannot be compared.",
            hints=["Nearest that works here:  train on texts that the teacher writes  (objective: sft)"],
        )


def buffers(how: Divergence | None, teacher: Tensor | TopTeacher | None) -> int:
    """How many wide matrices of the size of a block `diverge` works in."""
    if how is None:
        return 0
    return 2 if isinstance(teacher, TopTeacher) else 4 + (0 < how.beta < 1)


def diverge(logits: Tensor, teacher: Tensor | TopTeacher, how: Divergence, room: Tensor, *, slope: bool) -> tuple[Tensor, Tensor | None]:
    """(value [block], d value / d logits [block, vocab] or None where slope is False).

    logits: of the policy, [block, vocab]. teacher: its logits, likewise, or its likeliest tokens. room: `buffers` wide
    matrices to work in, [buffers, block, vocab]; the slope is one of them.
    """
    log_s, s, *more = room
    widened(logits, how.temperature, log_s, s)
    if isinstance(teacher, TopTeacher):
        value, pull = _by_buckets(log_s, s, teacher, how.beta, slope)
    else:
        widened(teacher, how.temperature, more[0], more[1])
        value, pull = _compare(log_s, s, more[0], more[1], how.beta, more[2:])
    return value, pull.div_(how.temperature) if slope and pull is not None else None


def widened(logits: Tensor, temperature: float, log_p: Tensor, p: Tensor) -> None:
    """Fill log_p and p, [block, vocab], with log softmax(logits / temperature) and its exponential.

    No new memory is taken, which would cost more than the arithmetic does.
    """
    log_p.copy_(logits)
    if temperature != 1:
        log_p.div_(temperature)
    torch.softmax(log_p, -1, out=p)
    log_p.sub_((log_p.amax(-1) - p.amax(-1).log_())[:, None]).clamp_(min=_FLOOR)


def _by_buckets(log_s: Tensor, s: Tensor, teacher: TopTeacher, beta: float, slope: bool) -> tuple[Tensor, Tensor | None]:
    """Over k tokens and the rest. Within the rest, the policy's own shape is left as it is."""
    outside = s.scatter_(1, teacher.ids, 0.0)
    rest = outside.sum(-1, keepdim=True)
    mine = torch.cat([log_s.gather(1, teacher.ids), rest.log().clamp_(min=_FLOOR)], -1)
    known = teacher.log_probs.to(log_s.dtype)
    left = (1 - known.exp().sum(-1, keepdim=True)).clamp_(min=_REST)
    theirs = torch.log_softmax(torch.cat([known.clamp(min=_FLOOR), left.log()], -1), -1)
    value, pull = _compare(mine, mine.exp(), theirs, theirs.exp(), beta, [torch.empty_like(mine)])
    if not slope:
        return value, None
    tiny = torch.finfo(rest.dtype).tiny
    return value, outside.mul_(pull[:, -1:] / rest.clamp(min=tiny)).scatter_(1, teacher.ids, pull[:, :-1])


def _compare(log_s: Tensor, s: Tensor, log_t: Tensor, t: Tensor, beta: float, room: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Value and d value / d logit of each bucket: s (g - sum s g) with g = d value / d s.

    All arguments are overwritten. room: one matrix more, where beta lies between 0 and 1.
    """
    dot = torch.linalg.vecdot
    if beta == 0:
        return dot(t, log_t.sub_(log_s)), s.sub_(t)
    if beta == 1:
        gap = log_s.sub_(log_t)
        value = dot(s, gap)
        return value, gap.sub_(value[:, None]).mul_(s)
    log_m = torch.lerp(s, t, beta, out=room[0]).clamp_(min=torch.finfo(s.dtype).tiny).log_()
    gap = log_s.sub_(log_m)
    own = dot(s, gap)
    value = beta * dot(t, log_t.sub_(log_m)) + (1 - beta) * own
    return value, gap.sub_(own[:, None]).mul_(s).mul_(1 - beta)
