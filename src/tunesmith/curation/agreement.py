"""How far a judge agrees with people on pairs: agreement, kappa, the biases of place and length, and what its verdicts are worth.

Everything is counted in shares between 0 and 1. `human` and `judge` are, for each pair, the probability that its first answer is
the better one. Which answer a file calls first says nothing, so each pair is counted both ways round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.evaluation.resampling import RESAMPLES, Interval, bca_levels, quantile, ratio_bootstrap, rounds
from tunesmith.evaluation.statistics import FEW, unseen, wilson

Floats = NDArray[np.float64]

EVEN = 1e-9
"""A probability this near to one half takes no side."""


@dataclass(frozen=True, slots=True)
class Share:
    """A value with its interval. of: pairs it was measured on."""

    value: float
    low: float
    high: float
    of: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with how many pairs it is of."""
        return {"value": self.value, "low": self.low, "high": self.high, "pairs": self.of}


def sides(probability: Sequence[float]) -> NDArray[np.int8]:
    """1 where the first answer is taken for the better one, -1 where the second is, 0 where neither, [pairs]."""
    p = np.asarray(probability, np.float64) - 0.5
    return np.where(np.abs(p) <= EVEN, 0, np.sign(p)).astype(np.int8)


def agreement(human: Sequence[float], judge: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Share:
    """How often the judge sides with the majority of people, on pairs that have one; a judge's tie is half.

    Wilson's interval, or, with ties or clusters, the BCa bootstrap over clusters. Raises ValueError where no pair has a majority.
    """
    people, said = sides(human), sides(judge)
    decided = np.flatnonzero(people).tolist()
    if not decided:
        raise ValueError("people took no side on any pair")
    right = np.where(said[decided] == 0, 0.5, said[decided] == people[decided])
    return share(right, None if clusters is None else [clusters[place] for place in decided])


def single_rater(human: Sequence[float], judge: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Share:
    """How often the judge sides with one rater drawn at random: the mean of the share of raters on its side, a tie being half."""
    people, said = np.asarray(human, np.float64), sides(judge)
    return share(np.where(said > 0, people, np.where(said < 0, 1 - people, 0.5)), clusters)


def share(values: Sequence[float] | Floats, clusters: Sequence[Hashable] | None = None) -> Share:
    """The mean of values between 0 and 1 with its 95 % interval: Wilson's for zeros and ones without clusters, else the BCa
    bootstrap over clusters, widened for what few of them leave open."""
    own = np.asarray(values, np.float64)
    if not len(own):
        raise ValueError("there is nothing to take the mean of")
    mean = float(own.mean())
    if clusters is None and bool(np.isin(own, (0.0, 1.0)).all()):
        found = wilson(int(own.sum()), len(own))
        return Share(mean, found.low, found.high, len(own))
    sums, sizes = grouped([own, np.ones_like(own)], clusters).T
    found = ratio_bootstrap(sums, sizes)
    if found.low == found.high or len(sums) < FEW:
        left = unseen(2 * mean - 1, len(sums), 0.95)
        found = Interval(min(found.low, (left.low + 1) / 2), max(found.high, (left.high + 1) / 2))
    return Share(mean, max(found.low, 0.0), min(found.high, 1.0), len(own))


def grouped(columns: Sequence[Floats], clusters: Sequence[Hashable] | None) -> Floats:
    """Sums of each column over each cluster, [clusters, columns]; each pair is its own where there are none."""
    table = np.stack([np.asarray(column, np.float64) for column in columns], axis=1)
    if clusters is None:
        return table
    numbers: dict[Hashable, int] = {}
    member = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    out = np.zeros((len(numbers), table.shape[1]))
    np.add.at(out, member, table)
    return out


def kappa(human: Sequence[float], judge: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Share:
    """Cohen's kappa (Cohen 1960) of the sides taken: first, second, or neither; 1 - disagreement observed / disagreement by chance.

    Each pair counts both ways round, so both have even margins, and without ties kappa is 2 * agreement - 1. 0 where nothing could
    disagree. BCa bootstrap over clusters.
    """
    people, said = sides(human), sides(judge)
    cells = [((people == sign * a) & (said == sign * b)) for a in (1, 0, -1) for b in (1, 0, -1) for sign in (1, -1)]
    both = [cells[at].astype(np.float64) + cells[at + 1] for at in range(0, len(cells), 2)]
    return _bootstrapped(grouped(both, clusters), _kappa_of, len(people))


def _kappa_of(tables: Floats) -> Floats:
    """Kappa of tables of 3 by 3 counts, [draws, 9] -> [draws]."""
    table = tables.reshape(-1, 3, 3)
    total = table.sum((1, 2))
    seen = 1 - np.trace(table, axis1=1, axis2=2) / total
    chance = 1 - (table.sum(2) * table.sum(1)).sum(1) / total**2
    found: Floats = np.divide(chance - seen, chance, out=np.zeros_like(chance), where=chance > 0)
    return found


def weighted_kappa(human: Sequence[float], judge: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Share:
    """Kappa with quadratic weights (Cohen 1968) of two probabilities: 1 - mean (h - j)^2 / the same for pairs put together by chance.

    Of graded scales it equals Cohen's table formula, and of numbers Lin's concordance (Lin 1989). Each pair counts both ways round.
    """
    h, j = np.asarray(human, np.float64) - 0.5, np.asarray(judge, np.float64) - 0.5
    sums = grouped([(h - j) ** 2, h**2, j**2], clusters)
    return _bootstrapped(sums, _weighted_of, len(h))


def _weighted_of(sums: Floats) -> Floats:
    """Both ways round the means are 0, so chance is the sum of the two mean squares."""
    apart, by_chance = sums[:, 0], sums[:, 1] + sums[:, 2]
    return np.divide(by_chance - apart, by_chance, out=np.zeros_like(apart), where=by_chance > 0)


def _bootstrapped(units: Floats, statistic: Callable[[Floats], Floats], pairs: int, seed: int = 0) -> Share:
    """A statistic of sums over units, [units, columns], with its BCa interval (Efron 1987)."""
    total = units.sum(0)
    estimate = float(statistic(total[None])[0])
    rng = np.random.default_rng(seed)
    drawn = []
    for size in rounds(RESAMPLES, len(units) * units.shape[1]):
        times = rng.multinomial(len(units), np.full(len(units), 1 / len(units)), size=size).astype(np.float64)
        drawn.append(statistic(times @ units))
    values = np.concatenate(drawn)
    if np.ptp(values) < EVEN or len(units) < 2:
        return Share(estimate, estimate, estimate, pairs)
    low, high = np.quantile(values, bca_levels(values, statistic(total - units), estimate, 0.95))
    return Share(estimate, float(low), float(high), pairs)


@dataclass(frozen=True, slots=True)
class Corrected:
    """A share corrected for the errors of whoever measured it, with its 95 % interval; None where there is nothing to correct with."""

    value: float
    low: float
    high: float


def corrected_rate(rate: float, n: int, right: float, m: int, level: float = 0.95) -> Corrected | None:
    """What a win rate by an imperfect judge says of the win rate by people (Rogan & Gladen 1978, Am. J. Epidemiol. 107:71, eq. 3).

    rate: share of n comparisons that the judge gave to the system. right: how often the judge sides with people, from m pairs. Both
    ways round a judge errs alike on wins and losses, so sensitivity = specificity = right, and rate = true * right + (1 - true) *
    (1 - right), solved for true: (rate + right - 1) / (2 * right - 1). The interval is by the delta method, the errors of rate and right
    being independent: var = (rate (1 - rate) / n + (1 - 2 true)^2 right (1 - right) / m) / (2 right - 1)^2. Cut to 0 to 1.
    None where the judge is at or below chance. Raises ValueError for shares outside 0 to 1.
    """
    if not (0 <= rate <= 1 and 0 <= right <= 1) or n < 1 or m < 1:
        raise ValueError("shares lie between 0 and 1, and counts are at least 1")
    slope = 2 * right - 1
    if slope <= EVEN:
        return None
    true = (rate + right - 1) / slope
    spread = math.sqrt(rate * (1 - rate) / n + (1 - 2 * true) ** 2 * right * (1 - right) / m) / slope
    reach = quantile(level) * spread
    return Corrected(*(min(max(value, 0.0), 1.0) for value in (true, true - reach, true + reach)))


def corrected_agreement(human: Sequence[float], judge: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Share | None:
    """How often the judge would side with people if no single label were noise.

    The same formula with the rater as the imperfect measure: agreement with one rater = q c + (1 - q)(1 - c), c being how often one rater
    sides with the majority, so q = (agreement + c - 1) / (2 c - 1). Without soft labels c is 1 and q is the agreement. BCa bootstrap
    over clusters. Pairs on which people took no side are left out. None where raters agree no better than chance.
    """
    people, said = np.asarray(human, np.float64), sides(judge)
    decided = np.flatnonzero(sides(human)).tolist()
    if not decided:
        return None
    own, side = people[decided], said[decided]
    with_one = np.where(side > 0, own, np.where(side < 0, 1 - own, 0.5))
    majority = np.maximum(own, 1 - own)
    sums = grouped([with_one, majority, np.ones_like(own)], None if clusters is None else [clusters[place] for place in decided])

    def solved(of: Floats) -> Floats:
        a, c = of[:, 0] / of[:, 2], of[:, 1] / of[:, 2]
        return np.clip(np.divide(a + c - 1, 2 * c - 1, out=np.full_like(a, 0.5), where=2 * c - 1 > EVEN), 0.0, 1.0)

    return _bootstrapped(sums, solved, len(decided))


def difference(a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Share:
    """mean(a) - mean(b) of the same pairs with its BCa interval."""
    gap = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    sums, sizes = grouped([gap, np.ones_like(gap)], clusters).T
    found = ratio_bootstrap(sums, sizes)
    return Share(float(gap.mean()), found.low, found.high, len(gap))
