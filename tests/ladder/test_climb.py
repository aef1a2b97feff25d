"""The whole ladder on a tiny base: every rung answers the same questions, and what is done is not done again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import DataError, SpecError
from tunesmith.engine.sampler import Completion
from tunesmith.ladder import climb as climbing
from tunesmith.ladder import rationales
from tunesmith.ladder.climb import climb
from tunesmith.report import read_report
from tunesmith.spec import Spec, make_spec

RUNGS = ["zero_shot", "few_shot(shots=2)", "few_shot(shots=2, choose=random)", "nearest(shots=2)", "chain_of_thought(shots=2)", "sft"]
ASKED_OF_A_RUNG = {
    "name", "accuracy", "ci_low", "ci_high", "macro_f1", "prompt_tokens_per_answer", "completion_tokens_per_answer",
    "seconds_per_answer", "train_seconds", "peak_memory_mb", "trainable_parameters", "versus_previous",
}  # fmt: skip


@pytest.fixture
def spec(tmp_path: Path, tiny_base_folder: Path) -> Spec:
    """Forty texts whose last word is their label's, ten of them questions, two worked examples."""
    rows = [{"text": f"thing {i} is {'good' if i % 2 else 'bad'}", "label": "yes" if i % 2 else "no"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    worked = [
        {"text": "a cup is bad", "reasoning": "It is bad.", "label": "no"},
        {"text": "a hat is good", "reasoning": "Good.", "label": "yes"},
    ]
    (tmp_path / "worked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in worked))
    values = {
        "name": "ladder",
        "base": {"model": str(tiny_base_folder), "dtype": "fp32"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "test": 10, "dev": 6},
        "task": {"instruction": "Good?", "max_new_tokens": 8},
        "train": {"steps": 4, "batch": 8},
        "climb": {"rungs": RUNGS, "demonstrations": str(tmp_path / "worked.jsonl")},
    }
    return make_spec(values)


def test_every_rung_answers_every_question_and_the_report_has_what_was_promised(spec: Spec, tmp_path: Path) -> None:
    report, paths = climb(spec, root=tmp_path / "runs")
    assert [rung.name for rung in report.rungs] == [
        "zero-shot",
        "few-shot",
        "few-shot-random",
        "nearest-few-shot",
        "chain-of-thought",
        "lora",
    ]
    values = json.loads(paths.json.read_text())
    assert {"task", "base", "n_questions", "rungs", "recommendation", "schema_version"} <= values.keys()
    assert values["n_questions"] == 10
    for rung in values["rungs"]:
        assert rung.keys() >= ASKED_OF_A_RUNG
        assert sum(map(sum, rung["confusion"]["counts"])) == 10
        assert rung["prompt"]
    trained = report.rungs[-1]
    assert trained.trainable_parameters > 0
    assert [point.step for point in trained.curve] == [1, 2, 3, 4]
    assert trained.curve[-1].dev_metric is not None
    assert read_report(paths.json) == report
    assert paths.html.read_text().startswith("<!doctype html>")


def test_resuming_takes_finished_rungs_as_they_are(spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "runs"
    real, asked = climbing.evaluate, []

    def counted(system: Any, *rest: Any, **options: Any) -> Any:
        asked.append(system.name)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return real(system, *rest, **options)

    monkeypatch.setattr(climbing, "evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        climb(spec, root=root)
    asked.clear()
    asked += ["four", "more", "are", "not", "counted"]
    resumed, _ = climb(spec, root=root, resume=True)
    assert asked[5:] == ["nearest-few-shot", "chain-of-thought", "lora"]
    monkeypatch.undo()
    whole, _ = climb(spec, root=tmp_path / "elsewhere")
    assert [rung.accuracy for rung in resumed.rungs] == [rung.accuracy for rung in whole.rungs]
    assert [rung.versus_previous for rung in resumed.rungs] == [rung.versus_previous for rung in whole.rungs]


def test_a_finished_ladder_can_be_climbed_again_only_when_asked_to(spec: Spec, tmp_path: Path) -> None:
    short = spec.model_copy(update={"climb": spec.climb.model_copy(update={"rungs": ["zero_shot"]})})
    climb(short, root=tmp_path / "runs")
    with pytest.raises(Exception, match="--overwrite"):
        climb(short, root=tmp_path / "runs")
    climb(short, root=tmp_path / "runs", overwrite=True)
    with pytest.raises(SpecError, match="another spec"):
        climb(spec, root=tmp_path / "runs", resume=True)


def test_without_worked_examples_the_base_explains_the_answers_of_training_samples(
    spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[str] = []

    def explain(forward: Any, tokenizer: Any, asked: list[list[int]], *rest: Any, **options: Any) -> list[Completion]:
        prompts.extend(tokenizer.decode(ids) for ids in asked)
        return [Completion([1], "Because it says so. And more. Answer: maybe", "end") for _ in asked]

    monkeypatch.setattr(rationales, "generate", explain)
    rungs = {"rungs": ["chain_of_thought(shots=2)"], "demonstrations": None}
    report, _ = climb(spec.model_copy(update={"climb": spec.climb.model_copy(update=rungs)}), root=tmp_path / "runs")
    assert report.rungs[0].settings["reasoning"].startswith("written by the base")
    assert all("The right answer is: " in prompt for prompt in prompts)
    assert report.rungs[0].prompt.count("Because it says so. Answer:") == 2


def test_a_base_that_explains_nothing_is_an_error_that_says_what_to_do(spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rationales, "generate", lambda forward, tokenizer, asked, *rest, **options: [Completion([], "", "end") for _ in asked]
    )
    rungs = {"rungs": ["chain_of_thought(shots=2)"], "demonstrations": None}
    with pytest.raises(DataError, match=r"climb\.demonstrations=FILE"):
        climb(spec.model_copy(update={"climb": spec.climb.model_copy(update=rungs)}), root=tmp_path / "runs")


@pytest.mark.parametrize(
    ("rungs", "said"),
    [(["zeroshot"], "zero_shot"), (["few_shot(shot=3)"], "shots"), (["few_shot(choose=best)"], "'fixed' or 'random'"), ([], "no rungs")],
)
def test_an_unknown_rung_or_option_is_refused_with_what_is_known(spec: Spec, tmp_path: Path, rungs: list[str], said: str) -> None:
    bad = spec.model_copy(update={"climb": spec.climb.model_copy(update={"rungs": rungs})})
    with pytest.raises(SpecError, match=said):
        climb(bad, root=tmp_path / "runs")


def test_a_ladder_without_questions_is_refused(spec: Spec, tmp_path: Path) -> None:
    bad = spec.model_copy(update={"data": spec.data.model_copy(update={"test": None})})
    with pytest.raises(SpecError, match=r"data\.test is missing"):
        climb(bad, root=tmp_path / "runs")


def _aligned(spec: Spec, folder: Path, rows: list[dict[str, object]], **changed: object) -> Spec:
    (folder / "aligned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = spec.model_dump(exclude_defaults=True)
    data = {"train": str(folder / "aligned.jsonl"), "test": 6, "dev": 4}
    return make_spec(
        {**values, "task": {"max_new_tokens": 4}, "train": {"steps": 2}, **changed, "data": {**data, **changed.pop("data", {})}}
    )  # type: ignore[dict-item]


def test_a_ladder_of_sampling_judges_answers_by_the_task_and_not_by_the_reward(spec: Spec, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(20)]
    asked = _aligned(
        spec, tmp_path, rows, data={"shape": "question"}, objective="grpo", rewards=["numeric"],
        rollout={"prompts": 2, "samples": 2, "max_new_tokens": 4}, climb={"rungs": ["zero_shot", "sft"]},
    )  # fmt: skip
    report, _ = climb(asked, root=tmp_path / "runs")
    assert report.metric == "exact_match"


def test_a_reward_model_is_a_rung_that_says_which_answer_is_better(spec: Spec, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": f"Of thing {n}?", "chosen": "good", "rejected": "bad"} for n in range(30)]
    report, _ = climb(_aligned(spec, tmp_path, rows, objective="reward", climb={"rungs": ["reward"]}), root=tmp_path / "runs")
    assert report.rungs[0].name == "lora" and report.metric == "accuracy"


def test_questions_without_a_right_answer_are_refused_before_a_rung_is_climbed(spec: Spec, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": f"Of thing {n}?", "completion": f"good {n}", "good": n % 2 == 0} for n in range(30)]
    asked = _aligned(spec, tmp_path, rows, data={"shape": "rated"}, objective="kto", climb={"rungs": ["sft"]})
    with pytest.raises(DataError, match="no gold answer"):
        climb(asked, root=tmp_path / "runs")
    assert not (tmp_path / "runs" / "ladder" / "train").exists()
