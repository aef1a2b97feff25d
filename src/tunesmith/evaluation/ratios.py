"""Scores that are a ratio of two sums over questions, such as F1 over the spans of all sentences: intervals and paired comparisons.

Such a score is no mean of scores of single questions, so the questions themselves are resampled, or swapped between systems.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy  # its parts load when they are first used

from tunesmith.evaluation.resampling import (
    RESAMPLES,
    Floats,
    Interval,
    all_flips,
    bca_levels,
    drawn_flips,
    quantile,
    ratio_bootstrap,
    rounds,
)
from tunesmith.evaluation.statistics import FEW, Measured, unseen


@dataclass(frozen=True, slots=True)
class Ratio:
    """top, bottom: what each question adds to the two sums, [questions]."""

    top: Floats
    bottom: Floats

    @property
    def value(self) -> float:
        """The score; 0 where there is nothing to divide by."""
        return float(_divided(self.top.sum(), self.bottom.sum()))

    def interval(self) -> Interval:
        """95 %: the BCa bootstrap over questions."""
        return ratio_bootstrap(self.top, self.bottom)


def compared(a: Ratio, b: Ratio, wins: int, losses: int, *, alpha: float = 0.05, seed: int = 0) -> Measured:
    """The paired comparison of two systems on the same questions.

    interval: of the difference, the BCa bootstrap, the same questions being drawn for both. p: of swapping the two systems'
    answers to each question (approximate randomisation, Noreen 1989; Yeh 2000), exact where the patterns are few enough.
    wins, losses: questions on which a, or b, does better. Raises ValueError for unequal numbers of questions.
    """
    if len(a.top) != len(b.top) or not len(a.top):
        raise ValueError(f"paired scores need one of each a question, got {len(a.top)} and {len(b.top)}")
    difference = a.value - b.value
    interval = _bootstrap(a, b, 1 - alpha, seed)
    if interval.low == interval.high or len(a.top) < FEW:
        left = unseen(difference, len(a.top), 1 - alpha)
        interval = Interval(min(interval.low, left.low), max(interval.high, left.high))
    return Measured(wins, losses, difference, interval, _permutation(a, b, seed), lambda level: _needed(a, b, level))


def _divided(top: Floats, bottom: Floats) -> Floats:
    return np.divide(top, bottom, out=np.zeros_like(top * bottom), where=bottom != 0)


def _gap(a_top: Floats, a_bottom: Floats, b_top: Floats, b_bottom: Floats) -> Floats:
    return _divided(a_top, a_bottom) - _divided(b_top, b_bottom)


def _bootstrap(a: Ratio, b: Ratio, level: float, seed: int) -> Interval:
    sums = [a.top, a.bottom, b.top, b.bottom]
    estimate = float(_gap(*(each.sum() for each in sums)))
    if np.array_equal(a.top, b.top) and np.array_equal(a.bottom, b.bottom):
        return Interval(estimate, estimate)
    rng, drawn = np.random.default_rng(seed), []
    for count in rounds(RESAMPLES, len(a.top)):
        chosen = rng.integers(0, len(a.top), size=(count, len(a.top)))
        drawn.append(_gap(*(each[chosen].sum(axis=1) for each in sums)))
    found, left_out = np.concatenate(drawn), _gap(*(each.sum() - each for each in sums))
    low, high = np.quantile(found, bca_levels(found, left_out, estimate, level))
    return Interval(float(low), float(high))


def _permutation(a: Ratio, b: Ratio, seed: int) -> float:
    """Two-sided p that the systems' answers to each question are interchangeable; never 0 where patterns are drawn."""
    apart = (a.top != b.top) | (a.bottom != b.bottom)
    top, bottom = b.top[apart] - a.top[apart], b.bottom[apart] - a.bottom[apart]
    exact = 2 ** len(top) <= RESAMPLES
    patterns = all_flips(len(top)) if exact else drawn_flips(len(top), RESAMPLES, seed)
    totals = (a.top.sum(), a.bottom.sum(), b.top.sum(), b.bottom.sum())
    observed = abs(float(_gap(*totals)))
    gaps = [
        _gap(totals[0] + flips @ top, totals[1] + flips @ bottom, totals[2] - flips @ top, totals[3] - flips @ bottom) for flips in patterns
    ]
    found = np.abs(np.concatenate(gaps))
    extreme = int(np.sum(found >= observed - 1e-9))
    return extreme / len(found) if exact else (extreme + 1) / (RESAMPLES + 1)


def _needed(a: Ratio, b: Ratio, alpha: float, power: float = 0.8) -> int | None:
    """Further questions for the power, by the normal approximation, from how much each question moves the difference."""
    n, difference = len(a.top), a.value - b.value
    if n < 2 or abs(difference) < 1e-12:
        return None
    pull = [each.top - each.value * each.bottom for each in (a, b)]
    moved = _divided(pull[0], np.full(n, a.bottom.mean())) - _divided(pull[1], np.full(n, b.bottom.mean()))
    error = math.sqrt(float(np.sum(moved**2)) / (n - 1) / n)
    ratio = (quantile(1 - alpha) + float(scipy.stats.norm.ppf(power))) * error / abs(difference)
    return max(math.ceil(n * ratio**2 - n), 0)
