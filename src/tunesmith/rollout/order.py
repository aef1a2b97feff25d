"""What an iteration, an epoch and a mini-batch are made of: functions of the seed and of numbers that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Place:
    """Where a step stands. iteration, epoch (of the iteration), part (mini-batch of the epoch): counted from 0."""

    iteration: int
    epoch: int
    part: int

    @property
    def first(self) -> bool:
        """Is the policy still the one that sampled?"""
        return self.epoch == self.part == 0


def place_of(step: int, epochs: int, parts: int) -> Place:
    """Where a step, counted from 0, stands."""
    iteration, rest = divmod(step, epochs * parts)
    return Place(iteration, *divmod(rest, parts))


def drawn(position: int, count: int, prompts: int, seed: int) -> list[int]:
    """The next `count` prompts after so many were drawn. Each pass over all prompts is a permutation of its own, laid end to end."""
    out: list[int] = []
    while len(out) < count:
        epoch, offset = divmod(position + len(out), prompts)
        order = np.random.default_rng([seed, epoch]).permutation(prompts)
        out += order[offset : offset + count - len(out)].tolist()
    return out


def groups_of(place: Place, groups: Sequence[int], parts: int, seed: int) -> list[int]:
    """The groups of a mini-batch: each epoch deals all of an iteration's groups out anew."""
    if parts == 1:
        return list(groups)
    order = np.random.default_rng([seed, place.iteration, place.epoch, 1]).permutation(len(groups))
    return [groups[index] for index in sorted(np.array_split(order, parts)[place.part].tolist())]
