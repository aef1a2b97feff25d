"""A ladder, a comparison and a run with judges: who scored, who rewarded, and what is known of them stands in every report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tunesmith import api
from tunesmith.core.errors import SpecError
from tunesmith.core.progress import Quiet
from tunesmith.curation.checking import check_judge, save
from tunesmith.curation.labels import JudgeLabels
from tunesmith.curation.pairs import Answers, Pair, Rules
from tunesmith.ladder.climb import climb
from tunesmith.ladder.training import train
from tunesmith.report import read_report
from tunesmith.rollout.judges import open_judge
from tunesmith.spec import Spec, make_spec

RUBRIC = "Judge how kind it is.\nKind words count."


class Noting(Quiet):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def line(self, name: str, text: str) -> None:
        self.told.append(f"{name} {text}")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TUNESMITH_DTYPE", "fp32")


def spec_of(folder: Path, /, **changed: Any) -> Spec:
    """Free answers to eight questions, three of them held out, judged by the base itself."""
    rows = [{"prompt": f"Say {at}.", "completion": f"It is {at}."} for at in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "name": "poet",
        "base": {"model": str(folder), "dtype": "fp32"},
        "data": {"train": "rows.jsonl", "test": 5},
        "task": {"kind": "generate", "max_new_tokens": 4},
        "adapter": "lora(rank=2)",
        "train": {"steps": 2, "batch": 4},
        "climb": {"rungs": ["zero_shot", "sft"]},
        "evaluate": {"judge": {"model": str(folder), "rubric": RUBRIC}},
    }
    return make_spec({**values, **changed})


def test_a_ladder_is_scored_by_its_judge_and_its_report_names_it(tiny_base_folder: Path) -> None:
    spec, root = spec_of(tiny_base_folder), Path("runs")
    report, paths = climb(spec, root=root)
    assert report.metric == "judge_rating" and all(0 < rung.accuracy < 1 for rung in report.rungs)
    assert report.interval_method == "BCa bootstrap" and report.rungs[1].versus_previous is not None
    assert report.recommendation.reason.startswith("judge rating 0.")
    (judge,) = report.judges
    assert (judge.role, judge.rubric) == ("scored the answers", "Judge how kind it is.")
    assert judge.checked == "not held against human labels" and "(likelihood)" in judge.name
    assert any("stands on the base" in note for note in report.notes)
    for text in (paths.html.read_text(), paths.markdown.read_text()):
        assert "Judge how kind it is." in text and "not held against human labels" in text
    assert read_report(paths.json) == report

    people = [Pair(f"kind {at}", f"rude {at}", provenance={"where": f"line {at}"}) for at in range(6)]
    save(check_judge(open_judge(str(tiny_base_folder), rubric=RUBRIC), people, rate=True, source="people.jsonl"), root, "held")
    again, _ = climb(spec, root=root, resume=True)
    assert "agrees with people in" in again.judges[0].checked and again.judges[0].checked.endswith("of 6 pairs of people.jsonl")
    assert [rung.accuracy for rung in again.rungs] == [rung.accuracy for rung in report.rungs]


def test_a_judge_on_the_base_reads_it_as_it_was_after_all_its_weights_were_trained(tiny_base_folder: Path) -> None:
    full = {"adapter": "full", "train": {"steps": 3, "batch": 4, "lr": 0.05}}
    shared, _ = climb(spec_of(tiny_base_folder, **full), root=Path("runs"))
    Path("judge").symlink_to(tiny_base_folder)  # another name, so that it is loaded beside the base
    apart, _ = climb(spec_of(tiny_base_folder, **full, evaluate={"judge": {"model": "judge", "rubric": RUBRIC}}), root=Path("elsewhere"))
    assert [rung.accuracy for rung in shared.rungs] == pytest.approx([rung.accuracy for rung in apart.rungs], abs=1e-4)


def test_a_ladder_of_labels_has_no_judge(tiny_base_folder: Path) -> None:
    Path("labels.jsonl").write_text("".join(json.dumps({"text": f"t{at}", "label": "ab"[at % 2]}) + "\n" for at in range(12)))
    with pytest.raises(SpecError, match="kind label"):
        climb(spec_of(tiny_base_folder, data={"train": "labels.jsonl", "test": 4}, task={}), root=Path("runs"))


def test_a_run_names_the_judge_of_its_reward_and_no_one_lets_it_judge_the_result(tiny_base_folder: Path) -> None:
    reporter = Noting()
    spec = spec_of(
        tiny_base_folder,
        objective="grpo",
        rewards=[f"judge_rating(model={tiny_base_folder}, rubric=kind.txt)", {"reward": "length(target=3)", "weight": 0.1}],
        rollout={"prompts": 2, "samples": 2, "max_new_tokens": 4, "show": 0},
        train={"steps": 1},
        evaluate={},
    )
    Path("kind.txt").write_text("Is it kind?\nMore words.")
    run = train(spec, root=Path("runs"), reporter=reporter)
    (noted,) = run.result["judges"]
    assert noted["role"] == "gave the reward judge_rating" and noted["rubric"] == "Is it kind?"
    assert noted["checked"] == "not held against human labels"
    assert any(line.startswith("judge ") and "gives the reward judge_rating" in line for line in reporter.told)

    ask = {"questions": "rows.jsonl", "task": {"kind": "generate", "max_new_tokens": 2}}
    with pytest.raises(SpecError, match="cannot judge the result"):
        api.compare(str(tiny_base_folder), run, judge={"model": str(tiny_base_folder), "rubric": "other"}, **ask)
    with pytest.raises(SpecError, match="cannot judge the result"):
        api.evaluate("runs/poet", "rows.jsonl", task=ask["task"], judge=str(tiny_base_folder))
    report = api.compare(str(tiny_base_folder), run, **ask).report()
    assert [judge.role for judge in report.judges] == ["gave the reward judge_rating of runs/poet"]
    with pytest.raises(SpecError, match="gives the reward judge_rating"):  # nor in a run that goes on from it
        train(spec_of(tiny_base_folder, base="runs/poet", name="later"), root=Path("runs"))


def labelled(judge: str) -> None:
    """Pairs as `tunesmith pairs --judge` writes them."""
    answers = [Answers((f"It is {at}.", f"No, {at}!"), f"Say {at}.", where=f"line {at}") for at in range(6)]
    labels = JudgeLabels(open_judge(judge, rubric=RUBRIC), rate=True, checked="not held against human labels")
    pairs = [pair for own in labels(answers, Rules(ties=True)) for pair in own]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair.row()) + "\n" for pair in pairs))


@pytest.mark.parametrize("changed", [{"objective": "dpo"}, {"objective": "sft"}])
def test_who_labelled_the_preferences_cannot_judge_what_was_learned_from_them(tiny_base_folder: Path, changed: dict[str, Any]) -> None:
    labelled(str(tiny_base_folder))
    values = {"data": {"train": "pairs.jsonl"}, "task": {}, "train": {"steps": 1, "batch": 2}, **changed}
    moved = shutil.copytree(tiny_base_folder, "elsewhere")  # the same weights under another name
    if changed["objective"] == "sft":
        with pytest.raises(SpecError, match="labelled the preferences"):
            train(spec_of(tiny_base_folder, **values | {"task": {"kind": "generate"}, "evaluate": {"judge": str(moved)}}))
    run = train(spec_of(tiny_base_folder, **values, evaluate={}), root=Path("runs"))
    (noted,) = run.result["judges"]
    assert (noted["role"], noted["rubric"]) == ("labelled the preferences", "Judge how kind it is.")
    assert "(likelihood)" in noted["name"] and noted["checked"] == "not held against human labels"

    ask: dict[str, Any] = {"questions": "rows.jsonl", "task": {"kind": "generate", "max_new_tokens": 2}}
    for judge in (str(tiny_base_folder), str(moved)):
        with pytest.raises(SpecError, match="labelled the preferences"):
            api.evaluate(run, judge=judge, **ask)
        with pytest.raises(SpecError, match="labelled the preferences"):
            train(spec_of(tiny_base_folder, base="runs/poet", name="later", evaluate={"judge": judge}), root=Path("runs"))
    report = api.compare(str(tiny_base_folder), run, **ask).report()
    assert [judge.role for judge in report.judges] == ["labelled the preferences of runs/poet"]


def test_a_run_is_judged_as_its_spec_says(tiny_base_folder: Path) -> None:
    run = train(spec_of(tiny_base_folder), root=Path("runs"))
    found = api.evaluate(run, "rows.jsonl")
    assert found.task.measure == "judge_rating" and found.n == 12
    assert api.evaluate(run, "rows.jsonl", judge={"model": str(tiny_base_folder), "asks": "comparison"}).task.measure == "win_rate"
