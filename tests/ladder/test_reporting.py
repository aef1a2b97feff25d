"""What the ladder concludes from evaluations: which pairs are compared, what is recommended and why."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.evaluation.results import Evaluation, Judged
from tunesmith.evaluation.task import Task
from tunesmith.ladder.reporting import Climbed, notable_questions, paired_verdicts, recommend, report_of
from tunesmith.ladder.rungs import Rung

TASK = Task("mood", "label", labels=("no", "yes"))


def evaluation(name: str, right: list[bool], tokens: float = 50.0) -> Evaluation:
    judged = [
        Judged(f"q{i}", f"line {i}", f"question {i}", "yes", said := "yes" if good else "no", said, float(good))
        for i, good in enumerate(right)
    ]
    return Evaluation(name, TASK, judged, tokens, 1.0, 0.01, 100.0, "the prompt")


def climbed(*found: Evaluation) -> list[Climbed]:
    system: Any = None
    return [Climbed(Rung(one.system, one.system.title(), "what it does", system), one, []) for one in found]


def with_right(share: int, n: int = 200, start: int = 0) -> list[bool]:
    """`share` of n right, beginning at `start`."""
    return [(i - start) % n < share for i in range(n)]


def conclude(*found: Evaluation, target: float | None = None) -> tuple[str, str]:
    done = climbed(*found)
    made = recommend(done, paired_verdicts(list(found), 0.02), target)
    return made.rung, made.reason


def test_the_best_rung_is_recommended_when_it_is_shown_to_be_better_than_every_cheaper_one() -> None:
    rung, reason = conclude(
        evaluation("zero", with_right(80)), evaluation("few", with_right(110), 300.0), evaluation("lora", with_right(160), 50.0)
    )
    assert rung == "lora"
    assert "80.0 % right, 25.0 points more than few" in reason
    assert "50 questions won, 0 lost (p < 0.001)" in reason
    assert "250 tokens less" in reason


def test_a_cheaper_rung_is_recommended_when_the_best_is_not_shown_to_beat_it() -> None:
    rung, reason = conclude(evaluation("zero", with_right(100)), evaluation("few", with_right(104, start=60)))
    assert rung == "zero"
    assert "few reaches 52.0 % but is not shown to be better (undecided" in reason
    assert "more questions would settle it" in reason


def test_the_first_rung_is_recommended_when_nothing_after_it_does_better() -> None:
    assert conclude(evaluation("zero", with_right(150)), evaluation("few", with_right(100)))[0] == "zero"


def test_with_a_target_the_cheapest_rung_that_reaches_it_is_recommended() -> None:
    found = (evaluation("zero", with_right(80)), evaluation("few", with_right(130)), evaluation("lora", with_right(180)))
    assert conclude(*found, target=0.6)[0] == "few"
    rung, reason = conclude(*found, target=0.99)
    assert (rung, "no rung reaches the target of 99.0 %" in reason) == ("lora", True)


def test_every_rung_is_held_against_the_one_before_it_the_best_before_it_and_the_best_of_all() -> None:
    found = [
        evaluation("a", with_right(100)),
        evaluation("b", with_right(60)),
        evaluation("c", with_right(70)),
        evaluation("d", with_right(150)),
    ]
    verdicts = paired_verdicts(found, 0.02)
    assert set(verdicts) == {(1, 0), (2, 1), (2, 0), (3, 2), (3, 0), (3, 1)}
    assert all(v.p_adjusted >= v.p_value for v in verdicts.values())


def test_questions_won_and_lost_by_the_best_rung_are_shown_first() -> None:
    best, rival = with_right(150), with_right(100, start=60)
    shown = notable_questions(climbed(evaluation("few", rival), evaluation("lora", best)), 20)
    assert len(shown) == len({question.id for question in shown}) == 20
    won = [q for q in shown if q.answers["lora"].correct and not q.answers["few"].correct]
    lost = [q for q in shown if not q.answers["lora"].correct and q.answers["few"].correct]
    assert len(won) == 10
    assert len(lost) == 10


def test_the_report_holds_every_figure_of_every_rung() -> None:
    found = [evaluation("zero", with_right(80)), evaluation("lora", with_right(160))]
    report = report_of(climbed(*found), title="t", task=TASK, base="tiny", metric="accuracy", margin=0.02)
    first, second = report.rungs
    assert (first.accuracy, second.accuracy, report.n_questions) == (0.4, 0.8, 200)
    assert first.versus_previous is None
    assert second.versus_previous is not None
    assert (second.versus_previous.wins, second.versus_previous.losses, second.versus_previous.verdict) == (80, 0, "better")
    assert second.ci_low < 0.8 < second.ci_high
    assert second.confusion is not None
    assert sum(map(sum, second.confusion.counts)) == 200


def test_evaluations_of_different_questions_are_never_compared() -> None:
    a, b = evaluation("a", [True, False]), evaluation("b", [True, False])
    b.judged[1] = Judged("other", "", "", "yes", "yes", "yes", 1.0)
    with pytest.raises(ValueError, match="different questions"):
        paired_verdicts([a, b], 0.02)
