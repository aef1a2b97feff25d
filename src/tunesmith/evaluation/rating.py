"""How near predicted numbers come to the right ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its parts load when they are first used

from tunesmith.evaluation.resampling import Floats, Interval, paired_bootstrap, rounds

_RESAMPLES = 1999


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure beside the score, with its 95 % interval."""

    name: str
    value: float
    low: float
    high: float


def closeness(gold: Sequence[float], found: Sequence[float]) -> list[float]:
    """1 less the distance from the right number, in ranges of all the right numbers (where these are all alike, in units); at least 0.

    Its mean is 1 less the mean absolute error over the range: a score between 0 and 1 that two systems can be compared by,
    question by question.
    """
    truth, said = np.asarray(gold, np.float64), np.asarray(found, np.float64)
    spread = float(np.ptp(truth)) or 1.0
    return [float(value) for value in np.clip(1 - np.abs(truth - said) / spread, 0.0, 1.0)]


def figures_of(gold: Sequence[float], found: Sequence[float]) -> list[Figure]:
    """MSE and MAE (BCa bootstrap), Pearson's and Spearman's correlation (percentile bootstrap).

    A correlation is left out where the numbers, or the predictions, are all alike: there is none.
    """
    truth, said = np.asarray(gold, np.float64), np.asarray(found, np.float64)
    error = said - truth
    out = []
    for name, per_question in (("mse", error**2), ("mae", np.abs(error))):
        interval = paired_bootstrap(per_question.tolist(), [0.0] * len(error))
        out.append(Figure(name, float(per_question.mean()), interval.low, interval.high))
    if np.ptp(truth) == 0 or np.ptp(said) == 0:
        return out
    for name, ranks in (("pearson", _as_they_are), ("spearman", _ranks)):
        interval = _resampled(truth, said, ranks)
        out.append(Figure(name, float(_correlation(ranks(truth[None]), ranks(said[None]))[0]), interval.low, interval.high))
    return out


def _as_they_are(values: Floats) -> Floats:
    return values


def _ranks(values: Floats) -> Floats:
    """Ranks within each row, equal values sharing their mean rank."""
    return np.asarray(scipy.stats.rankdata(values, axis=1), np.float64)


def _correlation(a: Floats, b: Floats) -> Floats:
    """Pearson's correlation of each row, 0 where one side does not vary, [rows]."""
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    scale = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    found: Floats = np.divide((a * b).sum(axis=1), scale, out=np.zeros_like(scale), where=scale > 0)
    return found


def _resampled(truth: Floats, said: Floats, ranks: Callable[[Floats], Floats]) -> Interval:
    rng, drawn = np.random.default_rng(0), []
    for count in rounds(_RESAMPLES, len(truth)):
        chosen = rng.integers(0, len(truth), size=(count, len(truth)))
        drawn.append(_correlation(ranks(truth[chosen]), ranks(said[chosen])))
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    return Interval(float(low), float(high))
