"""The headline follows the evidence, and numbers are written as people say them."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.report import Report, figures, numbers, sections, verdict
from tunesmith.report.schema import Rung


def _pair(sample: Report, recommended: int, word: str, ours: float, theirs: float, other: int) -> list[dict[str, object]]:
    """Two rungs of the sample, the second compared with the first."""
    first, second = sample.rungs[min(recommended, other)], sample.rungs[max(recommended, other)]
    score = {recommended: ours, other: theirs}
    made = sample.rungs[4].versus_best_before.model_copy(  # type: ignore[union-attr]
        update={"rung": first.name, "verdict": word, "wins": 20, "losses": 12, "questions_needed": 800 if word == "undecided" else None}
    )
    return [
        first.model_copy(
            update={"accuracy": score[sample.rungs.index(first)], "versus_previous": None, "versus_best_before": None}
        ).model_dump(),
        second.model_copy(
            update={"accuracy": score[sample.rungs.index(second)], "versus_previous": made, "versus_best_before": None}
        ).model_dump(),
    ]


@pytest.mark.parametrize(
    ("recommended", "other", "word", "ours", "theirs", "headline"),
    [
        (4, 0, "better", 0.83, 0.45, "LoRA reaches 83 % where the best prompt reaches 45 %"),
        (4, 0, "better", 0.464, 0.451, "LoRA reaches 46.4 % where the best prompt reaches 45.1 %"),
        (4, 0, "undecided", 0.50, 0.45, "LoRA reaches 50 % and the best prompt 45 %: too close to call on 450 questions"),
        (0, 4, "undecided", 0.61, 0.63, "Zero-shot reaches 61 % and LoRA 63 %: too close to call on 450 questions"),
        (0, 4, "equivalent", 0.61, 0.61, "Zero-shot reaches 61.0 % and LoRA 61.0 %: no difference that matters"),
        (0, 4, "better", 0.61, 0.66, "Zero-shot is recommended at 61 %; LoRA reaches 66 %"),
        (1, 0, "better", 0.61, 0.45, "Few-shot reaches 61 % where Zero-shot reaches 45 %"),
    ],
)
def test_the_headline_claims_no_more_than_the_paired_verdict(
    variant: Callable[..., Report], sample: Report, recommended: int, other: int, word: str, ours: float, theirs: float, headline: str
) -> None:
    rungs = _pair(sample, recommended, word, ours, theirs, other)
    report = variant(rungs=rungs, recommendation={"rung": sample.rungs[recommended].name, "reason": ""})
    assert verdict.conclude(report).headline == headline


def test_a_comparison_made_from_the_other_side_is_turned_round(variant: Callable[..., Report], sample: Report) -> None:
    report = variant(rungs=_pair(sample, 0, "worse", 0.6, 0.5, 4), recommendation={"rung": "zero-shot", "reason": ""})
    versus = verdict.conclude(report).versus
    assert versus is not None
    assert (versus.wins, versus.losses, versus.verdict) == (12, 20, "better")
    assert versus.difference_low <= versus.difference <= versus.difference_high


def test_an_undecided_verdict_says_how_many_more_questions_would_decide(variant: Callable[..., Report], sample: Report) -> None:
    report = variant(rungs=_pair(sample, 4, "undecided", 0.5, 0.45, 0), recommendation={"rung": "lora", "reason": ""})
    assert "About 800 more questions would decide it." in verdict.conclude(report).evidence


def test_the_share_of_the_largest_class_is_the_floor_of_the_picture(sample: Report) -> None:
    assert figures.largest_class(sample) == pytest.approx(1 / 3)


def test_close_scores_are_drawn_on_a_scale_of_their_own_and_distant_ones_from_zero(variant: Callable[..., Report], sample: Report) -> None:
    near = [
        rung.model_copy(update={"accuracy": 0.9, "ci_low": 0.87, "ci_high": 0.92, "confusion": None}).model_dump() for rung in sample.rungs
    ]
    close, far = figures.accuracy(variant(rungs=near)), figures.accuracy(sample)
    assert close.zoomed and close.axis.low >= 0.8
    assert not far.zoomed and far.axis.low == 0


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_an_axis_holds_its_values_and_places_them_in_order(low: float, span: float) -> None:
    line = figures.axis(low, low + span)
    assert line.low <= low + 1e-6 * span + 1e-9 * abs(low) and line.high >= low + span * (1 - 1e-6) - 1e-9 * abs(low)
    assert 2 <= len(line.ticks) <= 12
    assert 0 <= line.at(low) <= line.at(low + span) <= 100
    assert [tick.at for tick in line.ticks] == sorted(tick.at for tick in line.ticks)


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (0, "–"),
        (0.0421, "42.1 ms"),
        (0.9996, "1 s"),
        (3.24, "3.24 s"),
        (59.6, "1 min"),
        (252, "4 min 12 s"),
        (3599.7, "1 h"),
        (5400, "1 h 30 min"),
    ],
)
def test_durations_are_written_as_people_say_them(seconds: float, written: str) -> None:
    assert numbers.duration(seconds) == written


@pytest.mark.parametrize(("value", "written"), [(0.25, "+0.2"), (-0.26, "−0.3"), (0.0, "0.0"), (-0.0001, "0.0")])
def test_a_difference_has_a_sign_unless_it_rounds_to_nothing(value: float, written: str) -> None:
    assert numbers.signed(value, 1) == written


@pytest.mark.parametrize(
    ("value", "other", "written"), [(94, 620, "85 % fewer"), (620, 94, "6.6 times more"), (100, 101, "about the same"), (0, 5, "")]
)
def test_costs_are_put_in_proportion(value: float, other: float, written: str) -> None:
    assert numbers.ratio(value, other, "fewer", "more") == written


def test_a_long_curve_is_thinned_and_its_best_step_marked(sample: Report) -> None:
    rung = sample.rungs[4]
    points = [point.model_copy(update={"step": i + 1}) for i, point in enumerate(rung.curve * 50)]
    loss, dev = figures.curves(sample, Rung.model_validate({**rung.model_dump(), "curve": [p.model_dump() for p in points]}))
    assert len(loss.line.split()) <= figures.LINE_POINTS and len(loss.marks) <= figures.HOVER_POINTS
    assert sum(mark.best for mark in dev.marks) == 1


def test_a_loss_that_became_no_number_is_left_out_of_the_curve(sample: Report) -> None:
    points = [point.model_copy(update={"loss": float("nan")}) if point.step > 300 else point for point in sample.rungs[4].curve]
    loss, _ = figures.curves(sample, sample.rungs[4].model_copy(update={"curve": points}))
    assert "nan" not in loss.line and "step 300" in loss.summary


@given(st.text(max_size=60))
def test_a_prompt_made_visible_still_holds_exactly_its_text(prompt: str) -> None:
    assert html.unescape(re.sub(r"</?span[^>]*>", "", str(sections.visible(prompt)))) == prompt


def test_nested_settings_become_dotted_keys() -> None:
    assert sections.flat({"train": {"lr": 2e-4, "on": True}, "seed": None, "sites": ["q", "v"], "empty": {}}) == [
        ("train.lr", "0.0002"),
        ("train.on", "true"),
        ("seed", "null"),
        ("sites", '["q", "v"]'),
        ("empty", "{}"),
    ]
