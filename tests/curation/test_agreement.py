"""Statistics of judges: against numbers worked by hand, against statsmodels, and on judges whose faults are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.inter_rater import cohens_kappa

from tunesmith.curation.agreement import (
    agreement,
    corrected_agreement,
    corrected_rate,
    kappa,
    share,
    single_rater,
    weighted_kappa,
)

PAIRS = st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=4, max_size=40)


def test_agreement_counts_sides_and_half_of_a_judges_ties_and_leaves_out_peoples_ties() -> None:
    human, judge = [1.0, 0.8, 0.6, 0.5, 1.0], [0.9, 0.2, 0.5, 1.0, 0.7]
    found = agreement(human, judge)
    assert (found.value, found.of) == (pytest.approx((1 + 0 + 0.5 + 1) / 4), 4)
    assert found.low < found.value < found.high


def test_agreement_with_one_rater_is_the_mean_share_of_raters_on_the_judges_side() -> None:
    assert single_rater([0.8, 0.6, 0.7], [1.0, 0.0, 0.5]).value == pytest.approx((0.8 + 0.4 + 0.5) / 3)


def test_rights_and_wrongs_get_wilsons_interval_and_clusters_widen_it() -> None:
    human, judge = [1.0] * 40, [1.0] * 30 + [0.0] * 10
    alone = agreement(human, judge)
    assert (alone.low, alone.high) == pytest.approx((0.5979, 0.8581), abs=5e-4)
    together = agreement(human, judge, [place // 10 for place in range(40)])
    assert together.high - together.low > alone.high - alone.low


def test_kappa_worked_by_hand() -> None:
    """30 of 40 agree; counted both ways round the margins are even, so chance is 1/2 and kappa (0.75 - 0.5) / 0.5."""
    assert kappa([1.0] * 40, [1.0] * 30 + [0.0] * 10).value == pytest.approx(0.5)


@given(PAIRS)
def test_kappa_is_that_of_statsmodels_with_each_pair_both_ways_round(pairs) -> None:
    human, judge = zip(*pairs, strict=True)
    table = np.zeros((3, 3))
    for h, j in pairs:
        table[int(2 * h), int(2 * j)] += 1
        table[int(2 * (1 - h)), int(2 * (1 - j))] += 1
    chance = (table.sum(0) * table.sum(1)).sum() / table.sum() ** 2
    if chance < 1:
        expected = cohens_kappa(table, return_results=False)
        assert kappa(human, judge).value == pytest.approx(expected, abs=1e-12)
        assert weighted_kappa(human, judge).value == pytest.approx(cohens_kappa(table, wt="quadratic", return_results=False), abs=1e-12)
    else:
        assert kappa(human, judge).value == 0.0


def test_the_interval_of_kappa_holds_the_truth_as_often_as_it_says() -> None:
    rng, inside = np.random.default_rng(0), 0
    for _ in range(25):
        right = rng.random(100) < 0.7
        found = kappa([1.0] * 100, right.astype(float).tolist())
        inside += found.low <= 0.4 <= found.high
    assert inside >= 20


def test_a_win_rate_is_corrected_as_rogan_and_gladen_do() -> None:
    """(0.6 + 0.8 - 1) / (1.6 - 1) = 2/3; var = (0.24 / 400 + (1 - 4/3)^2 * 0.16 / 100) / 0.36."""
    found = corrected_rate(0.6, 400, 0.8, 100)
    assert found is not None and found.value == pytest.approx(2 / 3)
    reach = 1.959964 * math.sqrt((0.24 / 400 + (1 / 9) * 0.16 / 100) / 0.36)
    assert (found.low, found.high) == pytest.approx((2 / 3 - reach, 2 / 3 + reach), abs=1e-6)
    assert corrected_rate(0.6, 400, 0.5, 100) is None
    with pytest.raises(ValueError, match="between 0 and 1"):
        corrected_rate(1.2, 1, 0.8, 1)


def test_the_corrected_win_rate_covers_the_true_one() -> None:
    rng, inside = np.random.default_rng(1), 0
    for _ in range(400):
        rate = rng.binomial(500, 0.65 * 0.8 + 0.35 * 0.2) / 500
        found = corrected_rate(rate, 500, rng.binomial(300, 0.8) / 300, 300)
        assert found is not None
        inside += found.low <= 0.65 <= found.high
    assert 0.92 <= inside / 400 <= 0.98


def test_a_judge_that_is_always_right_reaches_one_once_noisy_raters_are_corrected_for() -> None:
    human = [0.9, 0.7, 0.8, 0.6] * 25
    found = corrected_agreement(human, [1.0] * 100)
    assert found is not None and found.value == pytest.approx(1.0)
    assert single_rater(human, [1.0] * 100).value == pytest.approx(0.75)
    half = corrected_agreement([0.8] * 100, [1.0] * 75 + [0.0] * 25)
    assert half is not None and half.value == pytest.approx(0.75)
    assert corrected_agreement([0.5, 0.5], [1.0, 0.0]) is None


def test_few_pairs_never_prove_anything() -> None:
    found = share([1.0, 1.0, 0.5])
    assert found.low < 0.6 and found.high == 1.0
