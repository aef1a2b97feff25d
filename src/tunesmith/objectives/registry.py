"""The table of objectives: what each reads and by what its sum is divided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.loss import Loss
from tunesmith.core.registry import Registry
from tunesmith.objectives.wanted import Wanted

Wants = Callable[..., Wanted]
"""(logging, **options) -> what the head is to be asked. Raises SpecError for options out of range."""

Counts = Callable[[NDArray[np.float32]], int]

Unit = Literal["tokens", "labels", "scores", "pairs", "rankings", "answers", "actions"]
"""What an objective looks at: supervised tokens, what a task head is asked, the scores that it gives to answers in order of rank,
two answers to a prompt, several in order of rank, each answer for itself, or the tokens of answers that the policy sampled."""


@dataclass(frozen=True, slots=True)
class Amounts:
    """What the rows of a whole step hold. tokens: supervised ones. answers: segments with supervised tokens, or at which a head
    is asked. groups: of answers to one prompt that are ranked against one another."""

    tokens: int
    answers: int
    groups: int


Weigh = Callable[[Amounts, Mapping[str, Any]], float | None]
"""(amounts of the step, options) -> what the sum over the step is divided by; None: the mean of the micro-batches' own means."""


def _supervised_tokens(amounts: Amounts, options: Mapping[str, Any]) -> float:
    return float(amounts.tokens)


def by_unit(unit: Unit) -> Weigh:
    """A step's denominator where the unit alone says it."""
    what = {"scores": "groups", "pairs": "groups", "rankings": "groups", "answers": "answers"}.get(unit)
    return _supervised_tokens if what is None else lambda amounts, options: float(getattr(amounts, what))


@dataclass(frozen=True, slots=True)
class Objective:
    """One formula of the table.

    function: its positional parameters are the readings that `reads` names, in that order; its keyword parameters are the
    options. wants: what has to be asked for them. denominator: what the sum is divided by, over the step, in words; weigh: as
    a number. counts: of an objective that reads labels, how many of that a row's labels are, [reads].
    """

    name: str
    function: Callable[..., Loss]
    reads: tuple[str, ...]
    denominator: str
    wants: Wants
    counts: Counts = len
    unit: Unit = "tokens"
    weigh: Weigh = _supervised_tokens

    @property
    def reads_labels(self) -> bool:
        """Does it read a task head and labels, rather than the words that come next?"""
        return self.unit in ("labels", "scores")

    @property
    def reads_reference(self) -> bool:
        """Does it hold the policy against its reference?"""
        return any(name.endswith("reference") for name in self.reads)

    @property
    def samples(self) -> bool:
        """Does it learn from answers that the policy gives while it is trained?"""
        return self.unit == "actions"

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
    name: str,
    *,
    reads: str | tuple[str, ...],
    denominator: str,
    wants: Wants = _only_targets,
    counts: Counts = len,
    unit: Unit | None = None,
    weigh: Weigh | None = None,
) -> Callable[[Callable[..., Loss]], Callable[..., Loss]]:
    """Enter a loss function into the table. reads: names of readings, such as "log_probs" (a value a supervised token). unit:
    what they are values of; weigh: the step's denominator, where the unit does not say it."""

    def enter(function: Callable[..., Loss]) -> Callable[..., Loss]:
        names = (reads,) if isinstance(reads, str) else reads
        of: Unit = unit or ("labels" if "labels" in names else "tokens")
        OBJECTIVES.add(name, Objective(name, function, names, denominator, wants, counts, of, weigh or by_unit(of)))
        return function

    return enter
