"""What follows from the judged answers."""

from __future__ import annotations

import pytest

from tunesmith.evaluation.results import Evaluation, Judged, compare_all
from tunesmith.evaluation.statistics import wilson
from tunesmith.evaluation.task import Task

TASK = Task("mood", "label", ("neg", "pos"))


def evaluation(scores, *, task=TASK, labels=None, golds=None, keys=None):
    golds = golds or ["pos"] * len(scores)
    labels = labels or [gold if score else "neg" for score, gold in zip(scores, golds, strict=True)]
    judged = [
        Judged(keys[n] if keys else f"k{n}", "", f"q{n}", gold, label or "?", label, float(score))
        for n, (score, gold, label) in enumerate(zip(scores, golds, labels, strict=True))
    ]
    return Evaluation("s", task, judged, 10, 2, 0.1, 100, "prompt")


def test_accuracy_interval_and_unparseable_by_hand():
    found = evaluation([1, 1, 0, 0], labels=["pos", "pos", "neg", None])
    assert (found.n, found.score, found.unparseable) == (4, 0.5, 1)
    assert found.interval() == wilson(2, 4)
    assert [one.correct for one in found.judged] == [True, True, False, False]


def test_macro_f1_classes_and_confusion_come_from_the_labels():
    found = evaluation([1, 0, 1, 0], golds=["pos", "pos", "neg", "neg"], labels=["pos", "neg", "neg", None])
    neg, pos = found.classes()
    assert (neg.label, neg.precision, neg.recall, neg.support) == ("neg", 0.5, 0.5, 2)
    assert (pos.precision, pos.recall) == (1.0, 0.5)
    assert found.macro_f1() == pytest.approx((0.5 + 2 / 3) / 2)
    matrix = found.confusion()
    assert matrix is not None and matrix.counts == [[1, 0, 1], [1, 1, 0]]


def test_graded_scores_get_a_bootstrap_interval_and_all_right_a_wilson_one():
    text = Task("t", "generate")
    graded = evaluation([0.25, 0.5, 1, 0.75] * 10, task=text).interval()
    assert 0.5 < graded.low < 0.625 < graded.high < 0.75
    assert evaluation([1, 1, 1], task=text).interval() == wilson(3, 3)
    assert evaluation([0.5], task=text).interval().low == 0.5


def test_verdicts_are_paired_and_corrected_for_one_another():
    weak, strong = evaluation([0] * 30 + [1] * 10), evaluation([1] * 40)
    better, same = compare_all([weak, strong], [(1, 0), (0, 0)])
    assert (better.wins, better.losses, better.verdict) == (30, 0, "better")
    assert (same.wins, same.losses) == (0, 0)
    assert compare_all([weak], []) == []


def test_only_the_same_questions_in_the_same_order_can_be_compared():
    with pytest.raises(ValueError, match="different questions"):
        compare_all([evaluation([1, 0]), evaluation([1, 0], keys=["k1", "k0"])], [(0, 1)])
