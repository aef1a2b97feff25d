"""What the options of an objective may be: checked as a spec is read, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import SpecError
from tunesmith.objectives.registry import Wants
from tunesmith.objectives.wanted import Wanted


@dataclass(frozen=True, slots=True)
class Range:
    """said: the values it holds, as a sentence goes on after "must be". holds: is a value among them?"""

    said: str
    holds: Callable[[Any], bool]

    def __or__(self, other: Range) -> Range:
        return Range(f"{self.said} or {other.said}", lambda value: self.holds(value) or other.holds(value))


def number(said: str, holds: Callable[[float], bool]) -> Range:
    """Finite numbers of which something holds; true and false are none."""
    return Range(f"a number {said}", lambda value: type(value) in (int, float) and math.isfinite(value) and holds(value))


def one_of(*words: str) -> Range:
    """One of these words."""
    return Range(" or ".join(words), lambda value: value in words)


NONE = Range("none", lambda value: value is None)
ABOVE_0 = number("above 0", lambda value: value > 0)
ABOVE_1 = number("above 1", lambda value: value > 1)
NOT_BELOW_0 = number("of at least 0", lambda value: value >= 0)
SHARE = number("in [0, 1]", lambda value: 0 <= value <= 1)
PART = number("in (0, 1)", lambda value: 0 < value < 1)
DOUBT = number("in [0, 0.5)", lambda value: 0 <= value < 0.5)
SOME_DOUBT = number("in (0, 0.5)", lambda value: 0 < value < 0.5)
COUNT = Range("a whole number of at least 1", lambda value: type(value) is int and value >= 1)


def check(name: str, options: dict[str, Any], **ranges: Range) -> None:
    """Raises SpecError for the first option that is given and lies out of its range."""
    for key, value in options.items():
        if key in ranges and not ranges[key].holds(value):
            hints = [f"What it is:  tunesmith objectives {name}"]
            raise SpecError(f"objective {name}: {key} must be {ranges[key].said}, not {value!r}.", hints=hints)


def checked(name: str, **ranges: Range) -> Wants:
    """The `wants` of an objective that asks nothing of the head but the targets' log-probabilities."""

    def wants(logging: bool, **options: Any) -> Wanted:
        check(name, options, **ranges)
        return Wanted()

    return wants
