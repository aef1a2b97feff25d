"""The table of rewards, and what a reward is: a function of answers.

A module that adds one decorates its maker; what the maker takes by keyword are the reward's options:

    @reward("loud")
    def loud(*, share: float = 0.5) -> Scoring:
        def score(samples: Sequence[Sample]) -> list[float | None]: ...
        return score

The maker checks its options at once and leaves what is heavy to the first call. `score` may be `async def`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import RunError
from tunesmith.core.registry import Registry
from tunesmith.rollout.sample import Sample

Scoring = Callable[[Sequence[Sample]], Any]
"""Answers -> a number each, or None where it says nothing of one; or an awaitable of these.

One that compares is called with the answers to one prompt, and returns the place of the best one (a pick), all places with the best one
first (an order), or a matrix of the probabilities that the first is preferred to the second, [size, size]; or None."""


def is_async(function: Callable[..., Any]) -> bool:
    """Has what it returns to be awaited? Objects that are called are looked into."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


class RewardError(RunError):
    """A reward failed, or is not a number."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A reward of the table. make: takes the options, returns the scoring. compares: does it hold answers against one another?"""

    name: str
    make: Callable[..., Scoring]
    compares: bool = False

    @property
    def doc(self) -> str:
        """The first line of what it is."""
        return (self.make.__doc__ or "").strip().split("\n")[0]


REWARDS: Registry[Kind] = Registry("reward")


def reward(name: str, *, compares: bool = False) -> Callable[[Callable[..., Scoring]], Callable[..., Scoring]]:
    """Put a maker into the table under a name."""

    def put(make: Callable[..., Scoring]) -> Callable[..., Scoring]:
        REWARDS.add(name, Kind(name, make, compares))
        return make

    return put
