"""Judges with known faults, held against labels that are known too."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tunesmith.core.errors import DataError
from tunesmith.curation.checking import check_judge, held_against, save
from tunesmith.curation.pairs import Pair
from tunesmith.engine.server import Server
from tunesmith.rollout.judges import Duel, Judge, Judgement

WORDS = ("good", "fine", "plain", "odd", "poor")


class Made(Judge):
    """A judge that is a function of the two texts as they stand: the probability that the one ahead is better, or None."""

    def __init__(self, ahead: Callable[[str, str], float | None], rating: Callable[[str], float] = len) -> None:
        super().__init__(Server("http://127.0.0.1:9/v1", "made"), "R", way="generation")
        self.ahead, self.rating = ahead, rating

    def compare(self, duels: Sequence[Duel]) -> list[Judgement]:
        out = []
        for duel in duels:
            ahead, said = self.ahead(duel.first, duel.second), self.ahead(duel.second, duel.first)
            behind = None if said is None else 1 - said
            out.append(Judgement(None if ahead is None or behind is None else (ahead + behind) / 2, ahead, behind))
        return out

    def rate(self, answers: Sequence[tuple[str, str]], where: Sequence[str] = ()) -> list[float | None]:
        return [self.rating(text) for _, text in answers]


@pytest.fixture(autouse=True)
def plain_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made judge is not a dataclass of its own to copy."""
    monkeypatch.setattr("tunesmith.curation.checking.replace", lambda judge, **_: judge)


def labelled(count: int = 60, soft: bool = False) -> list[Pair]:
    """Chosen texts say "good"; one half of them is the longer text, the other the shorter."""
    return [
        Pair(
            f"good {place}{' more words' if place % 2 else ''}",
            f"poor {place}{'' if place % 2 else ' more words'}",
            probability=0.8 if soft else 1.0,
        )
        for place in range(count)
    ]


def test_a_judge_that_is_right_agrees_wholly_without_any_bias() -> None:
    found = check_judge(Made(lambda a, b: float("good" in a)), labelled())
    assert (found.agreement.value, found.kappa.value, found.flips.value, found.first.value) == (1.0, 1.0, 0.0, 0.5)
    assert found.length_bias.value == 0.0 and found.better_than_chance and "better than chance" in found.verdict
    assert found.translated and found.translated[0][1] > 0.55 - 1e-9


def test_a_judge_of_the_first_place_always_flips_and_is_no_better_than_chance() -> None:
    found = check_judge(Made(lambda a, b: 0.9), labelled())
    assert (found.flips.value, found.first.value, found.agreement.value) == (1.0, 1.0, 0.5)
    assert "no better than chance" in found.verdict and not found.better_than_chance and found.translated == ()


def test_a_judge_of_length_shows_it_beside_what_people_prefer() -> None:
    found = check_judge(Made(lambda a, b: float(len(a) > len(b))), labelled())
    assert (found.judge_longer.value, found.people_longer.value, found.length_bias.value) == (1.0, 0.5, 0.5)
    assert found.length_bias.low > 0


def test_a_judge_that_errs_on_purpose_is_said_to_be_worse_than_chance() -> None:
    assert "worse than chance" in check_judge(Made(lambda a, b: float("poor" in a)), labelled()).verdict


def test_soft_labels_bring_the_raters_ceiling_and_the_corrected_agreement() -> None:
    found = check_judge(Made(lambda a, b: float("good" in a)), labelled(soft=True))
    assert (found.soft, found.ceiling, found.single_rater.value, found.corrected.value) == (
        True,
        pytest.approx(0.8),
        pytest.approx(0.8),
        1.0,
    )
    assert found.weighted_kappa is not None and found.weighted_kappa.value < 1


def test_no_verdict_is_counted_and_left_out() -> None:
    found = check_judge(Made(lambda a, b: None if " 7" in a or " 7" in b else float("good" in a)), labelled())
    assert (found.pairs, found.none, found.agreement.value) == (59, 1, 1.0)
    with pytest.raises(DataError, match="no verdict on any"):
        check_judge(Made(lambda a, b: None), labelled())


def test_a_rating_judge_has_no_bias_of_place_to_measure() -> None:
    found = check_judge(Made(lambda a, b: 0.5, rating=lambda text: 9.0 if "good" in text else 2.0), labelled(), rate=True)
    assert (found.agreement.value, found.flips, found.first) == (1.0, None, None)


def test_pairs_of_one_prompt_belong_together_unless_it_is_the_prompt_of_all() -> None:
    def asked(prompts: Sequence[str]) -> float:
        pairs = [replace(pair, prompt=prompt) for pair, prompt in zip(labelled(60), prompts, strict=True)]
        right = Made(lambda a, b: float("good" in a) if int(a.split()[1]) < 40 else float("poor" in a))
        found = check_judge(right, pairs).agreement
        return found.high - found.low

    alone = asked([f"q{at}" for at in range(60)])
    assert asked(["q"] * 60) == alone < asked([f"q{at // 10}" for at in range(60)])


def test_pairs_without_any_preference_are_refused_and_a_limit_draws_the_same_pairs_again() -> None:
    with pytest.raises(DataError, match="all are ties"):
        check_judge(Made(lambda a, b: 1.0), [Pair("a", "b", probability=0.5)])
    seen: list[list[str]] = []

    def noting(a: str, b: str) -> float:
        seen[-1].append(a)
        return float("good" in a)

    for _ in range(2):
        seen.append([])
        assert check_judge(Made(noting), labelled(), limit=10).pairs == 10
    assert seen[0] == seen[1]


def test_the_report_is_plain_json(tmp_path) -> None:
    found = check_judge(Made(lambda a, b: float("good" in a)), labelled(), source="pairs.jsonl")
    file = save(found, tmp_path / "runs", "judge x/y")
    values: dict[str, Any] = json.loads(file.read_text("utf-8"))
    assert file.parent.name == "judge-x-y" and values["agreement"] == {
        "value": 1.0,
        "low": values["agreement"]["low"],
        "high": 1.0,
        "pairs": 60,
    }
    assert values["better_than_chance"] is True and values["judge"].startswith("made at") and values["source"] == "pairs.jsonl"


def test_each_rubric_keeps_its_own_check_and_the_last_one_is_found_again(tmp_path) -> None:
    judge = Made(lambda a, b: float("good" in a), rating=lambda text: 9.0 if "good" in text else 2.0)
    assert held_against(tmp_path, judge, rates=False) == "not held against human labels"
    files = {save(check_judge(judge, labelled(40)), tmp_path, "judge")}
    other = Made(lambda a, b: float("poor" in a))
    other.rubric = "another"
    files.add(save(check_judge(other, labelled()), tmp_path, "judge"))
    assert len(files) == 2 and all(file.exists() for file in files)
    assert "agrees with people in 100.0 % (95 %: 91.2 to 100.0) of 40 pairs" in held_against(tmp_path, judge, rates=False)
    assert "0.0 %" in held_against(tmp_path, other, rates=False)
    assert save(check_judge(judge, labelled(60), source="p.jsonl"), tmp_path, "judge") in files
    assert held_against(tmp_path, judge, rates=False).endswith("of 60 pairs of p.jsonl")
    assert held_against(tmp_path, judge, rates=True).endswith("asked to compare")
    save(check_judge(judge, labelled(50), rate=True), tmp_path, "elsewhere")
    assert held_against(tmp_path, judge, rates=True).endswith("of 50 pairs") and "60 pairs" in held_against(tmp_path, judge, rates=False)
    (tmp_path / "judge" / "judge-0.json").write_text("{")
    assert "60 pairs" in held_against(tmp_path, judge, rates=False)
