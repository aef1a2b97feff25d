"""Resampling: how far a figure would move had other questions been asked, and how often chance alone would move it so far."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # its parts load when they are first used
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 9999
TIE = 1e-12  # scores closer than this are the same
_BATCH = 2**21  # numbers drawn at once: bounds the memory of resampling whatever the number of questions


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval, both ends included."""

    low: float
    high: float

    def within(self, margin: float) -> bool:
        """Whether the whole interval lies between -margin and +margin."""
        return -margin <= self.low and self.high <= margin


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Interval of mean(a) - mean(b) over the same questions: the BCa bootstrap (Efron 1987).

    clusters: what each question belongs to (its document, its dialogue); clusters are resampled whole. Coverage at 95 %,
    simulated: 95 % from 100 clusters (questions, if none are given) on, 94 % with 50, 93 % with 20, 90 % with 10, 81 %
    with 5. Where all clusters have the same mean difference there is nothing to resample: the interval has no width.
    Raises ValueError for no questions, unequal lengths, or a score that is not finite.
    """
    sums, sizes = units_of(a, b, clusters)
    return ratio_bootstrap(sums, sizes, level=level, resamples=resamples, seed=seed)


def ratio_bootstrap(sums: Floats, sizes: Floats, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Interval of sum(sums) / sum(sizes), units being resampled whole: the BCa bootstrap (Efron 1987); 0 / 0 is 0.

    sums, sizes: of each unit, [units]. Where all units have the same ratio the interval has no width.
    """
    estimate = _ratio(sums.sum(), sizes.sum())
    if np.allclose(sums, estimate * sizes, rtol=0, atol=TIE):
        return Interval(float(estimate), float(estimate))
    rng = np.random.default_rng(seed)
    drawn = np.concatenate([_resample(sums, sizes, count, rng) for count in rounds(resamples, len(sums))])
    left_out = _ratio(sums.sum() - sums, sizes.sum() - sizes)
    low, high = np.quantile(drawn, bca_levels(drawn, left_out, float(estimate), level))
    return Interval(float(low), float(high))


def _ratio(sums: Floats, sizes: Floats) -> Floats:
    return np.divide(sums, sizes, out=np.zeros_like(sums * sizes), where=sizes != 0)


def _resample(sums: Floats, sizes: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Means over units drawn with replacement, [count]."""
    chosen = rng.integers(0, len(sums), size=(count, len(sums)))
    return _ratio(sums[chosen].sum(axis=1), sizes[chosen].sum(axis=1))


def bca_levels(drawn: Floats, left_out: Floats, estimate: float, level: float) -> Floats:
    """The two quantiles to read off, corrected for bias and acceleration (Efron & Tibshirani 1993, eq. 14.10 to 14.15).

    Own code because scipy's jackknife takes time and memory by the square of the number of questions.
    """
    below = (np.mean(drawn < estimate) + np.mean(drawn <= estimate)) / 2
    bias = scipy.stats.norm.ppf(np.clip(below, 1 / len(drawn), 1 - 1 / len(drawn)))
    influence = left_out.mean() - left_out
    spread = np.sum(influence**2)
    acceleration = np.sum(influence**3) / (6 * spread**1.5) if spread else 0.0
    shifted = bias + np.array([-1, 1]) * quantile(level)
    return np.asarray(scipy.stats.norm.cdf(bias + shifted / (1 - acceleration * shifted)))


def paired_permutation(
    a: Sequence[float],
    b: Sequence[float],
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """Two-sided p that a and b are interchangeable: the signs of the paired differences are flipped.

    Exact where all the sign patterns are no more than `resamples` (13 differing questions by default); else drawn at
    random, the observed one counted in, so that p is never 0. clusters: flipped whole. Raises as `paired_bootstrap`.
    """
    sums, _ = units_of(a, b, clusters)
    differing = sums[np.abs(sums) > TIE]  # a flipped zero changes nothing, and leaving it out keeps more cases exact
    observed, tolerance = abs(differing.sum()), 1e-9 * np.abs(differing).sum()
    exact = 2 ** len(differing) <= resamples
    patterns = all_flips(len(differing)) if exact else drawn_flips(len(differing), resamples, seed)
    totals = np.concatenate([differing.sum() - 2 * (flips @ differing) for flips in patterns])
    extreme = int(np.sum(np.abs(totals) >= observed - tolerance))
    return extreme / len(totals) if exact else (extreme + 1) / (resamples + 1)


def all_flips(units: int) -> Iterator[Floats]:
    """Every pattern of flipped signs at once, [2^units, units], 1.0 where flipped."""
    yield ((np.arange(2**units)[:, None] >> np.arange(units)) & 1).astype(np.float64)


def drawn_flips(units: int, count: int, seed: int) -> Iterator[Floats]:
    """Random patterns of flipped signs, [at most a batch, units] at a time, 1.0 where flipped."""
    rng = np.random.default_rng(seed)
    for size in rounds(count, units):
        yield rng.integers(0, 2, size=(size, units), dtype=np.int8).astype(np.float64)


def units_of(a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    """Sum of the differences and number of questions of each cluster (of each question if there are none), [units]."""
    scores = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(a) == 0 or len(a) != len(b) or (clusters is not None and len(clusters) != len(a)):
        raise ValueError(f"paired scores need one of each a question, got {len(a)} and {len(b)}")
    if not all(np.isfinite(s).all() for s in scores):
        raise ValueError("a score is not a finite number")
    differences = scores[0] - scores[1]
    if clusters is None:
        return differences, np.ones_like(differences)
    numbers: dict[Hashable, int] = {}
    member = [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
    sums, sizes = np.bincount(member, weights=differences), np.bincount(member)
    return np.asarray(sums, dtype=np.float64), np.asarray(sizes, dtype=np.float64)


def rounds(count: int, width: int) -> list[int]:
    """`count` resamples of `width` numbers, cut into rounds that fit in memory."""
    batch = max(1, _BATCH // width)
    return [min(batch, count - start) for start in range(0, count, batch)]


def quantile(level: float) -> float:
    return float(scipy.stats.norm.ppf((1 + level) / 2))
