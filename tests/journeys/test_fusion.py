"""A user's way through both stages of AdapterFusion: adapters of one task and of several, then attention over them for a new one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

User = Any

KINDS = {"phone": "thing", "chair": "thing", "shoe": "thing", "lamp": "thing", "film": "work", "book": "work", "song": "work"}
FUSED = "fusion(of=[runs/tone, runs/kind, runs/both])"


@pytest.fixture(scope="module")
def user(
    tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path, user_in: Callable[[Path], User], reviews: list[dict[str, str]]
) -> User:
    """Has two tasks put in words, reviews with labels, and a spec of the second stage."""
    folder = tmp_path_factory.mktemp("fusion")
    shutil.copytree(tiny_base_folder, folder / "base")
    tone = [{"prompt": f"Tone? {row['text']}", "response": row["label"]} for row in reviews]
    kind = [{"prompt": f"Kind? {row['text']}", "response": KINDS[thing]} for row in reviews for thing in KINDS if thing in row["text"]]
    for name, rows in (("tone", tone), ("kind", kind), ("reviews", reviews[:-18]), ("test", reviews[-18:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "fused.yaml").write_text(
        "base: {model: base, dtype: fp32}\n"
        "data: {train: reviews.jsonl, dev: 6, test: test.jsonl}\n"
        "task: {kind: label}\n"
        f"adapter: {FUSED} + head\n"
        "objective: classify\n"
        "train: {steps: 80, batch: 16, lr: 1e-2, evaluate_every: 20}\n"
    )
    return user_in(folder)


def first_stage(name: str, rows: Any, **changes: Any) -> Any:
    """Train an adapter with a bottleneck on one task, or on several together."""
    import tunesmith as ts
    from tunesmith.spec import make_spec

    spec = {
        "name": name,
        "base": {"model": "base", "dtype": "fp32"},
        "data": {"train": rows},
        "adapter": "houlsby(reduction=4)",
        "train": {"steps": 30, "batch": 8, "lr": 2e-2},
    }
    return ts.train(make_spec({**spec, **changes}))


@pytest.fixture(scope="module")
def trained(user: User) -> User:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(user.folder)
        for name, rows in (("tone", "tone.jsonl"), ("kind", "kind.jsonl"), ("both", ["tone.jsonl", "kind.jsonl"])):
            first_stage(name, rows)
    told = user.types("train", "fused.yaml")
    assert told.returncode == 0, told.stdout + told.stderr
    return user


def test_attention_over_adapters_of_one_task_and_of_several_is_trained_for_a_new_task(trained: User) -> None:
    found = json.loads((trained.folder / "runs" / "fused" / "result.json").read_text())
    assert found["trainable_parameters"] == 4 * 3 * 32 * 32 + 2 * 32  # four sites, and a head without biases
    ours = json.loads((trained.folder / "runs" / "fused" / "adapter" / "tunesmith.json").read_text())
    assert ours["finished"] == {f"runs/{name}": "houlsby(reduction=4)" for name in ("tone", "kind", "both")}


def test_the_fused_run_answers_questions_it_has_not_seen_without_the_runs_that_it_joined(trained: User) -> None:
    import tunesmith as ts

    fused = trained.folder / "runs" / "fused"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained.folder)
        before = ts.classify(fused, "I love this lamp.")
        for name in ("tone", "kind", "both"):
            (trained.folder / "runs" / name).rename(trained.folder / f"gone-{name}")
        try:
            assert ts.classify(fused, "I love this lamp.") == before
            found = json.loads(trained.gets("evaluate", "runs/fused", "--json"))
        finally:
            for name in ("tone", "kind", "both"):
                (trained.folder / f"gone-{name}").rename(trained.folder / "runs" / name)
    assert (found["n_questions"], found["metric"]) == (18, "accuracy")
    assert found["score"] > 0.7


def test_a_fused_run_is_trained_further_and_its_adapters_stay_as_they_were(trained: User, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import load_file

    import tunesmith as ts
    from tunesmith.spec import load_spec

    monkeypatch.chdir(trained.folder)
    changes = ["name=further", "base=runs/fused", "adapter=continue", "train.steps=3"]
    ts.train(load_spec("fused.yaml", changes))
    runs = {name: load_file(f"runs/{name}/adapter/adapter_model.safetensors") for name in ("fused", "further", "kind")}
    moved = {key.rsplit(".", 1)[1] for key, value in runs["fused"].items() if not torch.equal(value, runs["further"][key])}
    assert moved == {"query", "key", "value", "weight"}
    for key, value in runs["kind"].items():  # the second of three
        path, name = key.rsplit(".", 1)
        assert torch.equal(runs["further"][f"{path}.parts.1.{name}"], value)


def test_adapters_that_do_not_belong_here_are_refused_before_anything_is_trained(trained: User, monkeypatch: pytest.MonkeyPatch) -> None:
    import tunesmith as ts
    from tunesmith.core.errors import AdapterError
    from tunesmith.spec import load_spec

    monkeypatch.chdir(trained.folder)
    monkeypatch.setenv("TUNESMITH_DTYPE", "fp32")
    first_stage("low", "tone.jsonl", adapter="lora(rank=2)", train={"steps": 1})
    first_stage("above", "tone.jsonl", base="runs/low", train={"steps": 1})
    first_stage("alike", "kind.jsonl", base="runs/low", train={"steps": 1})
    other = ts.load_base("base", dtype="fp32")
    other.model.lm_head.weight.data.mul_(2)
    other.model.save_pretrained("other")
    other.tokenizer.save_pretrained("other")
    first_stage("elsewhere", "tone.jsonl", base="other", train={"steps": 1})
    for second, said in (
        ("low", "not one method with a bottleneck"),
        ("above", "trained above other adapters"),
        ("elsewhere", "made for another base"),
        ("nowhere", "no finished adapter"),
    ):
        with pytest.raises(AdapterError, match=said):
            ts.train(load_spec("fused.yaml", [f"name=x-{second}", f"adapter=fusion(of=[runs/tone, runs/{second}])"]))
        assert not (trained.folder / "runs" / f"x-{second}" / "result.json").exists()
    upon = ts.attach(ts.open("runs/low"), "fusion(of=[runs/above, runs/alike])")  # where they stood themselves
    assert [adapter.expression for adapter in upon.adapters] == ["lora(rank=2)", "fusion(of=[runs/above, runs/alike])"]
