"""Plans of whole runs: held against the run, and what is proposed where nothing fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tunesmith.ladder.plan as module
from tunesmith.core.errors import DataError, RunError, SpecError
from tunesmith.engine import planning
from tunesmith.engine.planning import Option, Training, plan_training
from tunesmith.ladder.plan import plan
from tunesmith.spec import Spec, make_spec


@pytest.fixture
def spec(tiny_base_folder: Path, tmp_path: Path) -> Any:
    """Training the tiny base on sixty texts with labels; keys may be set."""
    rows = [{"text": f"The {thing} is {word}.", "label": label} for thing in range(30) for word, label in (("bad", "no"), ("good", "yes"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(*overrides: str) -> Spec:
        data = {"train": str(tmp_path / "rows.jsonl"), "dev": 10}
        values = {"base": {"model": str(tiny_base_folder), "dtype": "fp32"}, "data": data, "train": {"steps": 6, "batch": 8}}
        return make_spec(values, overrides)

    return make


def test_a_plan_counts_what_the_run_will_do_and_says_that_it_fits(spec: Any) -> None:
    found = plan(spec())
    assert (found.training.steps, found.evaluations) == (6, 6)
    assert found.fits and found.advice == []
    assert found.trainable == found.training.memory.optimizer // 8
    assert found.total_seconds > 6 * found.training.step_seconds
    assert json.loads(json.dumps(found.as_dict()))["peak"] == found.peak >= found.training.memory.total


def test_where_nothing_fits_the_plan_says_what_would(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan(spec("adapter=full"))
    monkeypatch.setattr(planning, "room", lambda device: whole.training.memory.process + 1000)
    found = plan(spec("adapter=full"))
    assert not found.fits
    told = "\n".join(found.advice)
    assert "adapter=lora(rank=16)" in told and "a smaller base" in told and "data.max_tokens" in told


def test_a_smaller_micro_batch_is_proposed_first_where_that_is_enough(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def tight(*given: Any) -> Training:
        found = plan_training(*given)
        memory = replace(found.memory, activations=10 * 2**30)
        return replace(found, memory=memory, update=2**30, available=5 * 2**30, fitting_pack=96, checkpointing=Option(2 * 2**30, 9.0))

    monkeypatch.setattr(module, "plan_training", tight)
    found = plan(spec("data.dev=null"))
    assert not found.fits
    assert found.advice[0].endswith("train.pack_tokens=96")
    assert "peak 2.0 GB instead of" in found.advice[1] and found.advice[1].endswith("train.checkpointing=true")
    assert "not enough alone" not in found.advice[1]


def test_a_base_whose_weights_alone_are_too_large_is_refused_before_it_is_loaded(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "room", lambda device: 1000)
    monkeypatch.setattr(module, "prepare", lambda *args, **options: pytest.fail("it was loaded"))
    with pytest.raises(RunError, match="the weights alone take") as told:
        plan(spec())
    assert any("In 4 bits" in hint for hint in told.value.hints)


def test_mistakes_are_told_as_training_tells_them(spec: Any) -> None:
    with pytest.raises(DataError):
        plan(spec("data.train=none.jsonl"))


_PAIRS = [{"prompt": f"Say of thing {n}.", "chosen": "It is good.", "rejected": "It is bad."} for n in range(30)]
_ANSWERED = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in _PAIRS]
_RATED = [
    {"prompt": row["prompt"], "completion": row["chosen" if n % 2 else "rejected"], "good": bool(n % 2)} for n, row in enumerate(_PAIRS)
]


@pytest.mark.parametrize(
    ("objective", "rows", "more"),
    [
        ("dpo", _PAIRS, {}),
        ("dpo + 0.2 * sft", _PAIRS, {}),
        ("reward", _PAIRS, {}),
        ("kto", _RATED, {"shape": "rated"}),
        ("distil(beta=0.5)", _ANSWERED, {"conflicts": "keep"}),
    ],
)
def test_runs_that_learn_from_preferences_or_a_teacher_are_foreseen(
    tiny_base_folder: Path, tmp_path: Path, objective: str, rows: list[dict[str, Any]], more: dict[str, str]
) -> None:
    found = plan(_aligned(tiny_base_folder, tmp_path, objective, rows, **more))
    assert found.fits and found.training.steps == 4 and found.evaluations > 0
    assert found.training.step_seconds > 0 and found.training.memory.activations > 0


def test_mismatched_answers_of_kto_are_no_part_of_its_micro_batches(tiny_base_folder: Path, tmp_path: Path) -> None:
    rated = plan(_aligned(tiny_base_folder, tmp_path, "kto", _RATED, shape="rated")).training
    texts = plan(_aligned(tiny_base_folder, tmp_path, "sft", _ANSWERED, conflicts="keep")).training
    assert rated.largest_pack <= texts.largest_pack + 8 * 2


@pytest.mark.parametrize(("objective", "more"), [("grpo", {"rewards": ["numeric"]}), ("distil", {"rollout": {"own": 0.5}})])
def test_a_run_that_samples_is_not_foreseen_and_it_is_said_what_to_do(
    tiny_base_folder: Path, tmp_path: Path, objective: str, more: dict[str, Any]
) -> None:
    spec = _aligned(tiny_base_folder, tmp_path, objective, _ANSWERED, conflicts="keep")
    with pytest.raises(SpecError, match="cannot be foreseen") as told:
        plan(make_spec({**spec.model_dump(exclude_defaults=True), **more, "train": {"steps": 4}}))
    assert any("train.steps=2" in hint for hint in told.value.hints)


def _aligned(base: Path, folder: Path, objective: str, rows: list[dict[str, Any]], **data: str) -> Spec:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "base": {"model": str(base), "dtype": "fp32"},
        "data": {"train": str(folder / "rows.jsonl"), "dev": 6, **data},
        "objective": objective,
        "train": {"steps": 4, "batch": 8} if objective != "grpo" else {"steps": 4},
    }
    if objective.startswith("distil"):
        values["teacher"] = str(base)
    if objective == "grpo":
        values["rewards"] = ["numeric"]
    return make_spec(values)
