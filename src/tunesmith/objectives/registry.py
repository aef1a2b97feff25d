"""The table of objectives: what each reads and by what its sum is divided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.loss import Loss
from tunesmith.core.registry import Registry
from tunesmith.objectives.wanted import Wanted

Wants = Callable[..., Wanted]
"""(logging, **options) -> what the head is to be asked. Raises SpecError for options out of range."""

Counts = Callable[[NDArray[np.float32]], int]


@dataclass(frozen=True, slots=True)
class Objective:
    """One formula of the table.

    function: its positional parameters are the readings that `reads` names, in that order; its keyword parameters are the
    options. wants: what has to be asked for them. denominator: what the sum is divided by, over the step. counts: of an
    objective that reads labels, how many of that a row's labels are, [reads].
    """

    name: str
    function: Callable[..., Loss]
    reads: tuple[str, ...]
    denominator: str
    wants: Wants
    counts: Counts = len

    @property
    def reads_labels(self) -> bool:
        """Does it read a task head and labels, rather than the words that come next?"""
        return "labels" in self.reads

    def wanted(self, options: Mapping[str, Any], *, logging: bool = False) -> Wanted:
        """What to ask of the head for these options; with `logging`, what its metrics take as well.

        Raises SpecError for an option out of range.
        """
        return self.wants(logging, **options)

    def loss(self, readings: Any, options: Mapping[str, Any]) -> Loss:
        """The loss from an object that has the readings as attributes; metrics where the readings for them are there."""
        return self.function(*(getattr(readings, name) for name in self.reads), **options)


OBJECTIVES: Registry[Objective] = Registry("objective")


def _only_targets(logging: bool, **options: Any) -> Wanted:
    return Wanted()


def objective(
    name: str, *, reads: str | tuple[str, ...], denominator: str, wants: Wants = _only_targets, counts: Counts = len
) -> Callable[[Callable[..., Loss]], Callable[..., Loss]]:
    """Enter a loss function into the table. reads: names of readings, such as "log_probs" (a value a supervised token)."""

    def enter(function: Callable[..., Loss]) -> Callable[..., Loss]:
        names = (reads,) if isinstance(reads, str) else reads
        OBJECTIVES.add(name, Objective(name, function, names, denominator, wants, counts))
        return function

    return enter
