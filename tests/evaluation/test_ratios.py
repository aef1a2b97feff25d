"""F1 over all sentences is a ratio of sums: its interval resamples sentences, its comparison swaps them between systems."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from tunesmith.evaluation.rating import closeness, figures_of
from tunesmith.evaluation.ratios import Ratio, compared
from tunesmith.evaluation.results import Evaluation, Judged, compare_all
from tunesmith.evaluation.tagging import Tagged, sentence_score
from tunesmith.evaluation.task import Task

LABELS = ("O", "B-X", "I-X", "B-Y", "I-Y")


def evaluation(pairs: list[tuple[str, str]], name: str = "a") -> Evaluation:
    task = Task("t", "tags", LABELS)
    judged = [Judged(str(n), "", "", gold, said, None, sentence_score(gold, said, LABELS, "IOB2")) for n, (gold, said) in enumerate(pairs)]
    return Evaluation(name, task, judged, 1.0, 0.0, 0.0, 0.0, "")


HAND = [("B-X I-X O B-Y", "B-X I-X O B-X"), ("B-Y O", "B-Y O"), ("O O", "O O"), ("O B-X", "O O"), ("O O", "I-X O")]


def test_micro_f1_precision_recall_and_types_are_those_worked_by_hand() -> None:
    """Gold: X, Y, Y, X. Found: X (right), X, Y (right), X. Hits 2 of 4 found and 4 gold."""
    found = evaluation(HAND)
    assert found.score == pytest.approx(0.5)
    figures = {one.name: one.value for one in found.figures()}
    assert figures["precision"] == pytest.approx(0.5) and figures["recall"] == pytest.approx(0.5)
    assert figures["strict_f1"] == pytest.approx(2 * 2 / (3 + 4))  # an I-X that continues nothing is no span
    scores = {one.label: (one.precision, one.recall, one.support) for one in found.classes()}
    assert scores == {"X": (pytest.approx(1 / 3), 0.5, 2), "Y": (1.0, 0.5, 2)}
    assert found.scores == [0.5, 1.0, 1.0, 0.0, 0.0]
    assert found.macro_f1() == pytest.approx((2 / 5 + 2 / 3) / 2)
    assert found.sums() == (4.0, 8.0)


def test_plain_tags_are_judged_by_the_share_of_words_that_are_right() -> None:
    ratio = Tagged.read([("N V N", "N V V"), ("N", "N")], ("N", "V"), "plain").ratio()
    assert ratio.value == pytest.approx(3 / 4)


def test_nothing_to_find_and_nothing_found_scores_zero_as_in_seqeval() -> None:
    assert evaluation([("O O", "O O")]).score == 0.0 and evaluation([("O O", "O O")]).scores == [1.0]


def test_the_interval_holds_the_score_and_has_the_width_of_an_independent_bootstrap() -> None:
    rng = np.random.default_rng(0)
    bottom = rng.integers(1, 5, 300) * 2.0
    ratio = Ratio(2.0 * rng.binomial((bottom / 2).astype(int), 0.7), bottom)
    interval = ratio.interval()
    drawn = [ratio.top[i].sum() / ratio.bottom[i].sum() for i in rng.integers(0, 300, (2000, 300))]
    assert interval.low < ratio.value < interval.high
    assert interval.high - interval.low == pytest.approx(np.subtract(*np.quantile(drawn, [0.975, 0.025])), rel=0.1)


def test_the_permutation_swaps_whole_sentences_between_the_systems() -> None:
    a, b = Ratio(np.array([2.0, 4, 0, 2]), np.array([3.0, 4, 2, 2])), Ratio(np.array([0.0, 4, 2, 0]), np.array([2.0, 5, 2, 3]))
    observed, extreme = abs(a.value - b.value), 0
    for flips in itertools.product([False, True], repeat=4):
        swap = np.array(flips)
        tops, bottoms = np.where(swap, b.top, a.top), np.where(swap, b.bottom, a.bottom)
        gap = tops.sum() / bottoms.sum() - np.where(swap, a.top, b.top).sum() / np.where(swap, a.bottom, b.bottom).sum()
        extreme += abs(gap) >= observed - 1e-9
    assert compared(a, b, 2, 1).p_value == pytest.approx(extreme / 16)


def test_equal_systems_do_not_differ_and_a_much_better_one_is_better() -> None:
    gold = ["B-X I-X O B-Y"] * 60
    right, wrong = evaluation([(g, g) for g in gold]), evaluation([(g, "O O O B-Y") for g in gold], "b")
    (same,) = compare_all([right, evaluation([(g, g) for g in gold], "c")], [(1, 0)])
    assert (same.difference, same.p_value, same.wins, same.losses) == (0.0, 1.0, 0, 0) and same.verdict not in ("better", "worse")
    (better,) = compare_all([wrong, right], [(1, 0)])
    assert (better.verdict, better.wins, better.losses) == ("better", 60, 0)
    assert better.difference == pytest.approx(1 - 2 / 3) and better.low <= better.difference <= better.high


def test_numbers_are_judged_by_their_distance_in_ranges_with_errors_and_correlations_beside() -> None:
    gold, found = [0.0, 1.0, 2.0, 4.0], [0.5, 1.0, 9.0, 3.0]
    assert closeness(gold, found) == [0.875, 1.0, 0.0, 0.75]
    figures = {one.name: one for one in figures_of(gold, found)}
    assert figures["mse"].value == pytest.approx((0.25 + 49 + 1) / 4) and figures["mae"].value == pytest.approx(8.5 / 4)
    assert figures["pearson"].value == pytest.approx(pearsonr(gold, found).statistic)
    assert figures["spearman"].value == pytest.approx(spearmanr(gold, found).statistic)
    assert all(one.low <= one.value <= one.high for one in figures.values())
    assert [one.name for one in figures_of(gold, [1.0] * 4)] == ["mse", "mae"]
