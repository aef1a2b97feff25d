"""What an objective may ask of the vocabulary head, besides the log-probability of each target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.core.errors import SpecError

DIFFERENTIABLE = ("log_probs", "mean", "entropy", "divergence", "given")
"""Readings that carry a gradient, unless they are asked for as numbers only."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far the policy (s) is from a teacher (t), both at `temperature`.

    beta 0: KL(t || s). beta 1: KL(s || t). Between: the generalised Jensen-Shannon divergence,
    beta KL(t || m) + (1 - beta) KL(s || m) with m = (1 - beta) s + beta t (Agarwal et al. 2024, 2306.13649).
    Raises SpecError for values out of range.
    """

    beta: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise SpecError(
                f"beta must lie in [0, 1], not {self.beta!r}.", hints=["0 is the forward KL, 1 the reverse, 0.5 Jensen-Shannon."]
            )
        _check_temperature(self.temperature)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Readings at each target, under softmax(logits / temperature); what is not asked for is not computed.

    mean: of log p over the vocabulary. best: log p of the likeliest token. entropy: in nats. top_k: the likeliest tokens.
    divergence: from a teacher. detached: names among DIFFERENTIABLE that are read as numbers, without the work that their
    gradient takes. Raises SpecError for values out of range.
    """

    mean: bool = False
    best: bool = False
    entropy: bool = False
    top_k: int = 0
    temperature: float = 1.0
    divergence: Divergence | None = None
    detached: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        if type(self.top_k) is not int or self.top_k < 0:
            raise SpecError(f"top_k must be a whole number of at least 0, not {self.top_k!r}.")
        if unknown := sorted(self.detached.difference(DIFFERENTIABLE)):
            raise ValueError(f"{unknown[0]} is no reading with a gradient")


def together(wanted: Sequence[Wanted]) -> Wanted:
    """All that several objectives ask for. Raises SpecError where they read at other temperatures, or two divergences."""
    if len(wanted) == 1:
        return wanted[0]
    if len({each.temperature for each in wanted}) > 1 or len({each.divergence for each in wanted} - {None}) > 1:
        raise SpecError("a mix of objectives reads the policy at one temperature, and from one teacher in one way.")
    return Wanted(
        mean=any(each.mean for each in wanted),
        best=any(each.best for each in wanted),
        entropy=any(each.entropy for each in wanted),
        top_k=max(each.top_k for each in wanted),
        temperature=wanted[0].temperature,
        divergence=next((each.divergence for each in wanted if each.divergence is not None), None),
        detached=frozenset.intersection(*(each.detached for each in wanted)),
    )


def _check_temperature(value: float) -> None:
    if not 0 < value < math.inf:
        raise SpecError(f"temperature must be a number above 0, not {value!r}.")
