"""Learning from answers that are held against one another, from the command to the model that prefers as people did."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import tunesmith as ts

Types = Callable[..., Result]

GOOD, BAD = ("I love it", "what a great one", "it lasts for days"), ("I hate it", "what a terrible one", "it broke at once")
THINGS = ("phone", "film", "book", "soup", "chair", "song", "train", "lamp")


def pairs(count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Prompts with a kind and an unkind answer; the first one is the better one."""
    out = []
    for _ in range(count):
        prompt = f"Say something about the {rng.choice(THINGS)} number {rng.randrange(99)}."
        out.append({"prompt": prompt, "chosen": rng.choice(GOOD), "rejected": rng.choice(BAD)})
    return out


def rankings(count: int, rng: random.Random) -> list[dict[str, Any]]:
    return [
        {"prompt": one["prompt"], "answers": [one["rejected"], "It is a thing.", one["chosen"]], "scores": [0.1, 0.5, 0.9]}
        for one in pairs(count, rng)
    ]


def rated(count: int, rng: random.Random) -> list[dict[str, Any]]:
    return [
        {"prompt": one["prompt"], "completion": one["chosen" if number % 2 else "rejected"], "good": bool(number % 2)}
        for number, one in enumerate(pairs(count, rng))
    ]


MAKERS = {"pairs": pairs, "rankings": rankings, "rated": rated}
OBJECTIVES = {
    "dpo": "pairs", "ipo": "pairs", "simpo": "pairs", "orpo": "pairs", "dpo + 0.2 * sft": "pairs", "plackett_luce": "rankings",
    "kto": "rated", "reward": "pairs",
}  # fmt: skip


@pytest.fixture(scope="module")
def types(typed_in: Any, tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path) -> Iterator[Types]:
    """The command, in process, in a folder with samples."""
    folder, rng = tmp_path_factory.mktemp("preferences"), random.Random(1)
    for kind, make in MAKERS.items():
        for name, count in (("train", 48), ("test", 24)):
            (folder / f"{kind}-{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make(count, rng)))
    for objective, kind in OBJECTIVES.items():
        (folder / f"{name_of(objective)}.yaml").write_text(
            f"base: {tiny_base_folder}\n"
            f"data: {{train: {kind}-train.jsonl, dev: 12, test: {kind}-test.jsonl, duplicates: drop"
            f"{', shape: rated' if kind == 'rated' else ''}}}\n"
            "adapter: lora(rank=8, sites=all)\n"
            f"objective: {objective}\n"
            "train: {steps: 24, batch: 16, lr: 1e-2, evaluate_every: 12}\n"
        )
    with typed_in(folder) as run:
        yield run


def name_of(objective: str) -> str:
    return objective.split(" ")[0] + ("-mix" if "+" in objective else "")


@pytest.fixture(scope="module")
def trained(types: Types) -> Types:
    for objective in OBJECTIVES:
        told = types("train", f"{name_of(objective)}.yaml")
        assert told.exit_code == 0, told.output
    return types


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_learns_to_prefer_as_its_samples_do(trained: Types, objective: str) -> None:
    lines = [json.loads(line) for line in Path(f"runs/{name_of(objective)}/metrics.jsonl").read_text().splitlines()]
    judged = [line["dev_accuracy"] for line in lines if "dev_accuracy" in line]
    steps = [line for line in lines if "loss" in line]
    assert len(judged) == 2 and judged[-1] >= 0.8
    assert steps[-1]["loss"] < steps[0]["loss"] and {"accuracy", "margin"} <= steps[-1].keys()
    if objective == "dpo":
        assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # the policy begins at its reference
    if "+" in objective:
        assert "sft_token_accuracy" in steps[-1]


def test_pairs_are_marked_answers_too_and_the_run_prefers_as_they_do(types: Types) -> None:
    told = types("train", "dpo.yaml", "name=kto-of-pairs", "objective=kto")
    assert told.exit_code == 0, told.output
    found = json.loads(types("evaluate", "runs/kto-of-pairs", "pairs-test.jsonl", "--json").stdout)
    assert found["score"] > 0.8


@pytest.mark.parametrize("objective", ["dpo", "reward"])
def test_held_out_pairs_are_judged_by_the_run(trained: Types, objective: str) -> None:
    """A reward model says which answer it scores higher; a policy which one it finds likelier than its reference does."""
    found = json.loads(trained("evaluate", f"runs/{objective}", "--json").stdout)
    assert found["metric"] == "accuracy" and found["score"] > 0.8 and found["ci_low"] < found["score"]


def test_a_reward_model_scores_answers_from_python(trained: Types) -> None:
    said = ts.choose("runs/reward", "Say something about the lamp number 3.", [BAD[0], GOOD[0]])
    assert next(iter(said)) == GOOD[0] and sum(said.values()) == pytest.approx(1)


def test_a_reward_model_and_a_policy_are_compared_on_the_same_pairs(trained: Types, tiny_base_folder: Path) -> None:
    told = trained("compare", str(tiny_base_folder), "runs/dpo", "runs/reward", "--questions", "pairs-test.jsonl")
    assert told.exit_code == 0, told.output
    assert "better" in told.stdout and "runs/reward" in told.stdout


def test_a_run_goes_on_from_a_run_whose_adapter_is_then_the_reference(trained: Types, tiny_base_folder: Path) -> None:
    told = trained("train", "dpo.yaml", "name=further", "base.model=runs/simpo", "adapter=lora(rank=4)", "train.steps=2", "train.lr=1e-6")
    assert told.exit_code == 0, told.output
    lines = [json.loads(line) for line in Path("runs/further/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    told = trained("train", "dpo.yaml", "name=same", "base.model=runs/simpo", "adapter=continue", "train.steps=2", "train.lr=1e-6")
    assert told.exit_code == 0, told.output
    assert json.loads(Path("runs/same/metrics.jsonl").read_text().splitlines()[0])["loss"] == pytest.approx(0.6931, abs=1e-3)


def test_a_student_learns_from_a_run_on_its_own_base(trained: Types, tiny_base_folder: Path) -> None:
    """Forward divergence to a tuned teacher falls; the teacher is another adapter on the student's base."""
    lines = "".join(json.dumps({"prompt": row["prompt"], "completion": row["chosen"]}) + "\n" for row in pairs(40, random.Random(5)))
    Path("texts.jsonl").write_text(lines)
    Path("distil.yaml").write_text(
        f"base: {tiny_base_folder}\ndata: {{train: texts.jsonl, duplicates: drop, conflicts: keep}}\nteacher: runs/orpo\n"
        "adapter: lora(rank=8, sites=all)\nobjective: distil(beta=0.5)\ntrain: {steps: 24, batch: 16, lr: 1e-2}\n"
    )
    told = trained("train", "distil.yaml")
    assert told.exit_code == 0 and "on the student's own base" in told.output, told.output
    steps = [json.loads(line) for line in Path("runs/distil/metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["divergence"] < 0.4 * steps[0]["divergence"]


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_stopped_run_resumes_to_the_same_weights(trained: Types, objective: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from tunesmith.engine.train import Trainer

    with pytest.MonkeyPatch.context() as patch:
        judge = Trainer._judge_and_save

        def stop(self: Any) -> dict[str, float]:
            if self.state.step == 13:
                self._ask_to_stop()
            return judge(self)

        patch.setattr(Trainer, "_judge_and_save", stop)
        told = trained("train", f"{objective}.yaml", f"name=again-{objective}")
        assert told.exit_code != 0 and "stopped at step 13" in told.output
    told = trained("train", f"{objective}.yaml", f"name=again-{objective}", "--resume")
    assert told.exit_code == 0, told.output
    ours, theirs = (load_file(f"runs/{name}/adapter/adapter_model.safetensors") for name in (f"again-{objective}", objective))
    assert all(bool((ours[key] == theirs[key]).all()) for key in theirs)


@pytest.mark.parametrize(
    ("spec", "overrides", "told"),
    [
        ("plackett_luce", ["objective=kto"], "learns from answers marked good or bad"),
        ("kto", ["objective=dpo"], "learns from pairs of answers"),
        ("dpo", ["objective=distil"], "none is named"),
        ("dpo", ["teacher=runs/orpo"], "listens to no teacher"),
        ("dpo", ["base.model=nowhere", "objective=grpo", "train={steps: 2}", "rewards=[other]"], "unknown reward 'other'"),
        ("dpo", ["adapter=lora(rank=4) + head"], "task head"),
        ("dpo", ["data.train=equal.jsonl", "data.dev=null", "data.test=null"], "equal.jsonl, line 2"),
        ("dpo", ["objective=dpo + classify"], "do not learn from the same rows"),
        ("dpo", ["objective=dpo(beta=0)"], "beta must be a number above 0"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_does(types: Types, spec: str, overrides: list[str], told: str) -> None:
    rows = pairs(3, random.Random(3))
    rows[1]["rejected"] = rows[1]["chosen"]
    Path("equal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = types("train", f"{spec}.yaml", "name=refused", *overrides)
    assert said.exit_code != 0 and told in said.output and "Traceback" not in said.output, said.output


def test_a_run_that_answers_by_a_task_head_is_neither_teacher_nor_judge(trained: Types) -> None:
    Path("few.jsonl").write_text("".join(json.dumps({"prompt": f"What is {n}?", "completion": "I love it"}) + "\n" for n in range(8)))
    words = ("objective=distil", "data.train=few.jsonl", "data.dev=null", "data.test=null", "data.conflicts=keep")
    told = trained("train", "dpo.yaml", "name=taught", *words, "teacher=runs/reward")
    assert told.exit_code == 2 and "says nothing in words" in told.output, told.output
    told = trained("judge", "check", "runs/reward", "pairs-test.jsonl")
    assert told.exit_code == 2 and "model(source=runs/reward)" in told.output, told.output


def test_supervised_learning_takes_the_better_answer_of_a_pair(trained: Types) -> None:
    told = trained("train", "dpo.yaml", "name=better", "objective=sft")
    assert told.exit_code == 0, told.output
    lines = [json.loads(line) for line in Path("runs/better/metrics.jsonl").read_text().splitlines()]
    assert [line["dev_accuracy"] for line in lines if "dev_accuracy" in line][-1] >= 0.7
    said = ts.generate("runs/better", "Say something about the lamp number 3.", max_new_tokens=12)
    assert (
        isinstance(said, str) and set(said.split()) & set(" ".join(GOOD).split()) and not {"hate", "terrible", "broke"} & set(said.split())
    )


def test_a_student_may_learn_on_its_own_words(trained: Types) -> None:
    told = trained("train", "distil.yaml", "name=own", "rollout.own=1", "rollout.max_new_tokens=8", "train.steps=4")
    assert told.exit_code == 0, told.output
    lines = [json.loads(line) for line in Path("runs/own/metrics.jsonl").read_text().splitlines()]
    assert all(line["own"] == 1.0 for line in lines if "loss" in line)
