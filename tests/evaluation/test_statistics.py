"""The statistics: against statsmodels and scipy, by hand, as properties, and by simulating systems of known quality."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar as peer_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from tunesmith.evaluation.statistics import (
    Interval,
    graded_verdict,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_difference,
    paired_permutation,
    questions_needed,
    verdict,
    verdicts,
    wilson,
)

TABLES = st.integers(1, 300).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda wins: st.integers(0, n - wins).map(lambda losses: (wins, losses, n)))
)


def answers(wins: int, losses: int, n: int) -> tuple[list[bool], list[bool]]:
    """Two systems' rights and wrongs with the given wins and losses; what they agree on is right."""
    rest = n - wins - losses
    return [True] * wins + [False] * losses + [True] * rest, [False] * wins + [True] * losses + [True] * rest


# Wilson, McNemar, Holm


@given(TABLES, st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_is_statsmodels_wilson(table, level):
    successes, _, n = table
    mine, peer = wilson(successes, n, level), proportion_confint(successes, n, alpha=1 - level, method="wilson")
    assert (mine.low, mine.high) == pytest.approx(peer, abs=1e-12)


def test_wilson_by_hand_eight_of_ten():
    assert wilson(8, 10).low == pytest.approx(0.4902, abs=1e-4)
    assert wilson(8, 10).high == pytest.approx(0.9433, abs=1e-4)


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemar_is_statsmodels_exact_mcnemar_and_does_not_care_who_is_who(wins, losses):
    if wins + losses:
        assert mcnemar(wins, losses) == pytest.approx(peer_mcnemar([[7, wins], [losses, 3]], exact=True).pvalue)
    assert mcnemar(wins, losses) == mcnemar(losses, wins)
    assert 0 < mcnemar(wins, losses) <= 1


def test_mcnemar_by_hand_five_wins_and_no_losses_are_not_enough_and_six_are():
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(6, 0) == pytest.approx(2 / 64)
    assert mcnemar(0, 0) == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_is_statsmodels_holm_in_the_order_given(p_values):
    assert holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]))
    assert all(after >= before for before, after in zip(p_values, holm(p_values), strict=True))


def test_holm_by_hand_and_of_nothing():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


# The interval of a difference of accuracies


def score_statistic(wins: int, losses: int, n: int, difference: float) -> float:
    """McNemar's score statistic for a difference, the nuisance share found by maximising the likelihood numerically."""

    def unlikelihood(share: float) -> float:
        cells = [(wins, share + difference), (losses, share), (n - wins - losses, 1 - 2 * share - difference)]
        return -sum(count * math.log(p) for count, p in cells if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    share = optimize.minimize_scalar(unlikelihood, bounds=(low + 1e-13, high - 1e-13), method="bounded", options={"xatol": 1e-13}).x
    return (wins - losses - n * difference) / math.sqrt(n * (2 * share + difference * (1 - difference)))


@pytest.mark.parametrize("table", [(12, 2, 50), (3, 17, 60), (1, 0, 44), (40, 35, 400), (5, 0, 5), (0, 9, 9), (0, 0, 20)])
def test_the_ends_of_the_difference_interval_are_where_the_score_test_just_fails_to_reject(table):
    interval = paired_difference(*table)
    if interval.low > -1:
        assert score_statistic(*table, interval.low) == pytest.approx(1.959964, abs=2e-3)
    if interval.high < 1:
        assert score_statistic(*table, interval.high) == pytest.approx(-1.959964, abs=2e-3)


@given(TABLES)
def test_the_difference_interval_holds_the_estimate_mirrors_and_excludes_zero_just_when_the_score_test_rejects(table):
    wins, losses, n = table
    interval, mirrored = paired_difference(wins, losses, n), paired_difference(losses, wins, n)
    assert -1 <= interval.low <= (wins - losses) / n <= interval.high <= 1
    assert (interval.low, interval.high) == pytest.approx((-mirrored.high, -mirrored.low), abs=1e-9)
    statistic = (wins - losses) ** 2 / max(wins + losses, 1)
    if abs(statistic - 3.841459) > 1e-3:
        assert (interval.low > 0 or interval.high < 0) == (statistic > 3.841459)


@given(TABLES)
def test_more_confidence_means_a_wider_difference_interval_and_more_questions_a_narrower_one(table):
    wins, losses, n = table
    at_90, at_95 = paired_difference(wins, losses, n, 0.9), paired_difference(wins, losses, n, 0.95)
    tenfold = paired_difference(10 * wins, 10 * losses, 10 * n, 0.95)
    assert at_95.low <= at_90.low + 1e-9 and at_90.high <= at_95.high + 1e-9
    assert tenfold.high - tenfold.low < at_95.high - at_95.low


def exact_coverage(n: int, win_rate: float, loss_rate: float) -> float:
    """Chance that the interval holds the truth, summed over every table that can plausibly occur."""
    covered = 0.0
    for wins in range(*stats.binom.ppf([1e-6, 1 - 1e-6], n, win_rate).astype(int)):
        rest, rate = n - wins, loss_rate / (1 - win_rate)
        for losses in range(*stats.binom.ppf([1e-6, 1 - 1e-6], rest, rate).astype(int)):
            interval = paired_difference(wins, losses, n)
            if interval.low <= win_rate - loss_rate <= interval.high:
                covered += stats.binom.pmf(wins, n, win_rate) * stats.binom.pmf(losses, rest, rate)
    return covered


@pytest.mark.parametrize(("n", "win_rate", "loss_rate"), [(400, 0.1, 0.1), (400, 0.13, 0.07), (100, 0.1, 0.1), (100, 0.12, 0.06)])
def test_the_difference_interval_covers_the_truth_93_to_97_percent_of_the_time(n, win_rate, loss_rate):
    assert 0.93 <= exact_coverage(n, win_rate, loss_rate) <= 0.97


def test_with_few_questions_the_difference_interval_errs_on_the_cautious_side():
    assert exact_coverage(20, 0.15, 0.1) >= 0.95


# Graded scores


@pytest.mark.parametrize("n", [8, 60])
def test_the_bootstrap_is_scipys_bca_on_the_differences(n):
    rng = np.random.default_rng(n)
    a, b = rng.gamma(1, 1, n), rng.gamma(1, 0.7, n)
    peer = stats.bootstrap((a - b,), np.mean, method="BCa", n_resamples=20_000, rng=1).confidence_interval
    mine = paired_bootstrap(a, b, resamples=20_000, seed=2)
    assert (mine.low, mine.high) == pytest.approx((peer.low, peer.high), abs=0.02 * (peer.high - peer.low))


@pytest.mark.parametrize("n", [3, 9, 13])
def test_the_permutation_test_of_few_questions_is_exact_and_agrees_with_scipy(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.5, 1, n), rng.normal(0, 1, n)
    peer = stats.permutation_test((a - b,), lambda d, axis: d.sum(axis), permutation_type="samples", vectorized=True, rng=0)
    assert paired_permutation(a, b) == pytest.approx(peer.pvalue)


def test_the_permutation_test_by_hand_three_equal_gains_and_ties_that_say_nothing():
    assert paired_permutation([0.3, 0.3, 0.3, 0.5, 0.1], [0.1, 0.1, 0.1, 0.5, 0.1]) == 2 / 8
    assert paired_permutation([0.3, 0.4], [0.3, 0.4]) == 1.0


@given(st.integers(0, 6), st.integers(0, 7))
def test_on_rights_and_wrongs_the_permutation_test_is_mcnemars(wins, losses):
    assert paired_permutation(*answers(wins, losses, wins + losses + 3)) == pytest.approx(mcnemar(wins, losses))


def test_the_permutation_test_of_many_questions_is_close_to_the_exact_one_and_repeats_with_its_seed():
    a, b = answers(30, 16, 200)
    assert paired_permutation(a, b, resamples=20_000) == pytest.approx(mcnemar(30, 16), abs=0.006)
    assert paired_permutation(a, b, seed=5) == paired_permutation(a, b, seed=5) != paired_permutation(a, b, seed=6)
    graded = np.random.default_rng(0).random(50)
    assert paired_bootstrap(graded, a[:50], seed=5) == paired_bootstrap(graded, a[:50], seed=5) != paired_bootstrap(graded, a[:50], seed=6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=30))
def test_the_bootstrap_stays_between_the_smallest_and_the_largest_difference(pairs):
    a, b = zip(*pairs, strict=True)
    interval, differences = paired_bootstrap(a, b, resamples=200), np.subtract(a, b)
    assert differences.min() - 1e-9 <= interval.low <= interval.high <= differences.max() + 1e-9


def test_questions_of_one_cluster_that_say_the_same_count_as_one_not_as_ten():
    rng = np.random.default_rng(0)
    per_document = rng.normal(0.05, 0.2, 40)
    a, b, documents = np.repeat(per_document, 10), np.zeros(400), np.repeat(np.arange(40), 10).tolist()
    whole, once = paired_bootstrap(a, b, clusters=documents, seed=3), paired_bootstrap(per_document, np.zeros(40), seed=3)
    naive = paired_bootstrap(a, b, seed=3)
    assert (whole.low, whole.high) == pytest.approx((once.low, once.high))
    assert whole.high - whole.low > 2.5 * (naive.high - naive.low)
    assert paired_permutation(a, b, clusters=documents) == pytest.approx(paired_permutation(per_document, np.zeros(40)), abs=0.02)


def test_the_bootstrap_covers_the_truth_93_to_97_percent_of_the_time_also_with_unequal_clusters():
    rng, hits, rounds = np.random.default_rng(11), 0, 600
    for _ in range(rounds):
        sizes = rng.integers(1, 6, 120)
        documents = np.repeat(np.arange(120), sizes)
        differences = rng.normal(0.03, 0.15, 120)[documents] + rng.gamma(1, 0.1, len(documents)) - 0.1
        interval = paired_bootstrap(differences, np.zeros(len(documents)), clusters=documents.tolist(), resamples=999)
        hits += interval.low <= 0.03 <= interval.high
    assert 0.93 - 0.018 <= hits / rounds <= 0.97 + 0.014  # two standard errors of the simulation


@pytest.mark.parametrize(("a", "b", "clusters"), [([], [], None), ([1.0], [1.0, 0.0], None), ([math.nan], [1.0], None), ([1.0], [0.5], [])])
def test_scores_that_do_not_pair_or_are_not_numbers_are_refused(a, b, clusters):
    for function in (paired_bootstrap, paired_permutation):
        with pytest.raises(ValueError):
            function(a, b, clusters=clusters)


def test_impossible_counts_are_refused():
    for call in (lambda: wilson(3, 2), lambda: wilson(0, 0), lambda: mcnemar(-1, 3), lambda: paired_difference(3, 3, 5)):
        with pytest.raises(ValueError):
            call()


# Planning


@pytest.mark.parametrize(("wins", "losses", "n"), [(12, 6, 100), (30, 20, 200), (89, 60, 1500), (9, 4, 60)])
def test_with_the_questions_needed_the_exact_test_finds_the_effect_four_times_in_five(wins, losses, n):
    further = questions_needed(wins, losses, n)
    rates = [wins / n, losses / n, 1 - (wins + losses) / n]
    draws = np.random.default_rng(wins).multinomial(n + further, rates, size=4000)
    found = np.mean([mcnemar(int(w), int(x)) < 0.05 for w, x, _ in draws])
    assert 0.77 <= found <= 0.84


def test_a_tiny_effect_needs_about_eight_times_the_discordant_share_over_its_square():
    assert questions_needed(100_100, 100_000, 1_000_000) == pytest.approx(7.849 * 0.2001 / 1e-4**2, rel=0.01)


def test_no_effect_needs_no_number_and_a_large_effect_no_further_questions():
    assert questions_needed(7, 7, 100) is None
    assert questions_needed(0, 0, 100) is None
    assert questions_needed(60, 5, 200) == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 15), st.integers(0, 15), st.integers(50, 200))
def test_more_power_a_stricter_alpha_or_a_smaller_effect_need_more_questions(wins, losses, n):
    further = questions_needed(wins + losses, losses, n)
    assert questions_needed(losses, wins + losses, n) == further
    assert questions_needed(wins + losses, losses, n, power=0.9) >= further
    assert questions_needed(wins + losses, losses, n, alpha=0.01) >= further
    assert questions_needed(wins + losses - 1, losses, n) >= further * 0.97  # the exact test's power has small teeth


# Verdicts


def test_a_verdict_says_better_worse_equivalent_or_undecided():
    better, worse = verdict(*answers(30, 8, 200)), verdict(*answers(8, 30, 200))
    assert (better.verdict, worse.verdict) == ("better", "worse")
    assert (better.wins, better.losses, better.difference) == (30, 8, pytest.approx(0.11))
    assert better.low > 0 > worse.high and better.p_value == better.p_adjusted == mcnemar(30, 8)
    assert better.questions_needed is None
    undecided = verdict(*answers(12, 6, 100))
    assert undecided.verdict == "undecided" and undecided.questions_needed == questions_needed(12, 6, 100)
    assert verdict(*answers(10, 10, 4000)).verdict == "equivalent"


def test_three_questions_answered_alike_prove_nothing():
    assert verdict(*answers(0, 0, 3)).verdict == "undecided"
    assert graded_verdict([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]).verdict == "undecided"
    assert graded_verdict([0.501, 0.502, 0.503], [0.5, 0.5, 0.5]).verdict == "undecided"


def test_a_difference_too_small_to_matter_is_equivalent_however_sure_and_a_zero_margin_never_is():
    tiny = answers(40, 10, 10_000)
    assert verdict(*tiny).p_value < 0.001 and verdict(*tiny).verdict == "equivalent"
    assert verdict(*tiny, margin=0).verdict == "better"


def test_an_adjusted_p_decides_in_place_of_the_plain_one():
    pair = answers(14, 4, 100)
    assert verdict(*pair).verdict == "better"
    assert verdict(*pair, p_adjusted=0.09).verdict == "undecided"


def test_verdicts_are_holm_corrected_over_all_pairs_and_plan_for_all_of_them():
    pairs = [answers(14, 4, 100), answers(12, 5, 100), answers(40, 5, 100)]
    judged = verdicts(pairs)
    assert [v.p_adjusted for v in judged] == pytest.approx(holm([mcnemar(14, 4), mcnemar(12, 5), mcnemar(40, 5)]))
    assert [v.verdict for v in judged] == ["undecided", "undecided", "better"]
    assert judged[1].questions_needed == questions_needed(12, 5, 100, alpha=0.05 / 3)
    assert verdicts([]) == []


def test_graded_scores_get_a_bootstrap_and_rights_and_wrongs_the_exact_methods():
    assert graded_verdict(*answers(12, 6, 100)) == verdict(*answers(12, 6, 100))
    rng = np.random.default_rng(4)
    b = rng.uniform(0.1, 0.8, 300)
    a = np.clip(b + rng.normal(0.06, 0.2, 300), 0, 1)
    graded = graded_verdict(a, b)
    assert graded.verdict == "better" and graded.low > 0
    assert graded.wins == np.sum(a > b) and graded.losses == np.sum(a < b)
    assert Interval(graded.low, graded.high) == paired_bootstrap(a, b)
    assert graded_verdict(np.clip(b + rng.normal(0, 0.02, 300), 0, 1), b).verdict == "equivalent"
    with pytest.raises(ValueError, match="between 0 and 1"):
        graded_verdict([55.0, 3.0], [40.0, 2.0])


def test_with_the_questions_needed_graded_scores_are_told_apart_four_times_in_five():
    rng = np.random.default_rng(8)
    b = rng.uniform(0.2, 0.8, 100)
    a = np.clip(b + rng.normal(0.02, 0.15, 100), 0, 1)
    first = graded_verdict(a, b)
    assert first.verdict == "undecided"
    n, found = 100 + first.questions_needed, 0
    for seed in range(300):
        chosen = rng.integers(0, 100, n)
        found += paired_permutation(a[chosen], b[chosen], resamples=399, seed=seed) < 0.05
    assert 0.8 - 0.06 <= found / 300 <= 0.8 + 0.06


@settings(max_examples=40, deadline=None)
@given(TABLES)
def test_swapping_the_systems_swaps_the_verdict(table):
    a, b = answers(*table)
    one, other = verdict(a, b), verdict(b, a)
    assert (one.wins, one.losses, one.p_value, one.questions_needed) == (other.losses, other.wins, other.p_value, other.questions_needed)
    assert {"better": "worse", "worse": "better"}.get(one.verdict, one.verdict) == other.verdict


def false_climbs(judge, rounds: int, n: int, rungs: int) -> float:
    """How often any of several systems of equal quality is called better or worse than the first."""
    rng, climbs = np.random.default_rng(21), 0
    for _ in range(rounds):
        ease = rng.beta(3, 2, n)  # mean 0.6; questions that are easy for one system are easy for the others
        scores = [judge[1](rng, ease) for _ in range(rungs + 1)]
        climbs += any(v.verdict in ("better", "worse") for v in judge[0]([(s, scores[0]) for s in scores[1:]]))
    return climbs / rounds


@pytest.mark.parametrize("rungs", [1, 4])
def test_systems_of_equal_quality_are_told_apart_at_most_five_percent_of_the_time(rungs):
    binary = (verdicts, lambda rng, ease: (rng.random(len(ease)) < ease).tolist())
    assert false_climbs(binary, 500, 400, rungs) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 500)


def test_graded_systems_of_equal_quality_are_told_apart_at_most_five_percent_of_the_time():
    graded = (verdicts, lambda rng, ease: np.clip(ease + rng.normal(0, 0.25, len(ease)), 0, 1).tolist())
    assert false_climbs(graded, 120, 150, 2) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 120)
