"""The table of objectives: what each reads and by what its sum is divided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tunesmith.core.loss import Loss
from tunesmith.core.registry import Registry


@dataclass(frozen=True, slots=True)
class Objective:
    """name; function: the formula; reads: "tokens" (a log-probability a supervised token); denominator: over the step."""

    name: str
    function: Callable[..., Loss]
    reads: str
    denominator: str


OBJECTIVES: Registry[Objective] = Registry("objective")


def objective(name: str, *, reads: str, denominator: str) -> Callable[[Callable[..., Loss]], Callable[..., Loss]]:
    """Enter a loss function into the table."""

    def enter(function: Callable[..., Loss]) -> Callable[..., Loss]:
        OBJECTIVES.add(name, Objective(name, function, reads, denominator))
        return function

    return enter
