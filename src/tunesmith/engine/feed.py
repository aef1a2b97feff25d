"""What a step learns from: rows that are there from the start, or whatever makes them as the run goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from tunesmith.core.row import Row
from tunesmith.spec import Spec


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of a step. weight: what the sum of their losses is divided by, where it is more than these rows say themselves.
    figures: what else is to be known of the step, for the metrics; without rows nothing is learned in it."""

    rows: Sequence[Row]
    weight: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


class Feed(Protocol):
    """Where a run's steps take their rows from. total: optimiser steps of the run."""

    total: int

    def batch(self, step: int) -> Batch:
        """The rows of a step, counted from 0. Steps are asked for in order, and after `recall` from where it was."""

    def first(self) -> Sequence[Row]:
        """Rows that the run begins with, for what has to look at some before the first step; may be empty."""

    def tokens(self) -> float:
        """Tokens of a step, about."""

    def memory(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, plain values) that a checkpoint has to hold, so that the steps after it are what they would have been."""

    def recall(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take back what `memory` gave."""


class Fixed:
    """The same rows every epoch, in an order of its own each time. What a step gets follows from its number."""

    def __init__(self, rows: Sequence[Row], spec: Spec) -> None:
        self.rows, self.size, self.seed = rows, spec.train.batch, spec.train.seed
        self.total = total_steps(spec, len(rows))

    def batch(self, step: int) -> Batch:
        return Batch([self.rows[index] for index in rows_of_step(step, len(self.rows), self.size, self.seed)])

    def first(self) -> Sequence[Row]:
        return self.rows

    def tokens(self) -> float:
        return self.size * mean_tokens(self.rows)

    def memory(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def recall(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Nothing: the step number says it all."""


def total_steps(spec: Spec, rows: int) -> int:
    """Optimiser steps of the run: as given, or from epochs (3 if neither is given)."""
    if spec.train.steps is not None:
        return spec.train.steps
    return max(1, math.ceil((spec.train.epochs or 3.0) * rows / min(rows, spec.train.batch)))


def mean_tokens(rows: Sequence[Row], sample: int = 1000) -> float:
    """Tokens of a row, the mean over at most so many, evenly spread."""
    some = range(0, len(rows), max(1, len(rows) // sample))
    return sum(rows[index].tokens for index in some) / len(some)


def rows_of_step(step: int, rows: int, batch: int, seed: int) -> list[int]:
    """Indices of a step's rows. Each epoch is a permutation of its own, laid end to end; batches run across the seams."""
    batch = min(batch, rows)
    out: list[int] = []
    at = step * batch
    while len(out) < batch:
        epoch, offset = divmod(at, rows)
        taken = _order(epoch, rows, seed)[offset : offset + batch - len(out)]
        out += taken.tolist()
        at += len(taken)
    return out


@lru_cache(maxsize=2)
def _order(epoch: int, rows: int, seed: int) -> np.ndarray:
    """The permutation of an epoch, kept while its steps last."""
    return np.random.default_rng([seed, epoch]).permutation(rows)
