"""Two processes take the same steps as one: the same losses, gradients and weights, from the same checkpoints."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.core.row import Row, single
from tunesmith.engine.checkpoint import Checkpoints
from tunesmith.engine.dealing import deal

LORA = "lora(rank=4, sites=all)"
PLAIN = {"steps": 4, "batch": 8, "lr": 1e-2, "save_every": 2, "pack_tokens": 64}


def plan(name: str, adapter: str = LORA, dtype: str = "fp32", more: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    return {"name": name, "adapter": adapter, "dtype": dtype, "train": {**PLAIN, **train}, **(more or {})}


SAME = {
    "lora": plan("lora"),
    "full": plan("full", "full"),
    "one-pack": plan("one-pack", pack_tokens=4096),
    "fewer-rows-than-processes": plan("fewer-rows-than-processes", batch=1),
    "dropout": plan("dropout", "lora(rank=4, dropout=0.3)", pack_tokens=40, batch=20),
    "neftune": plan("neftune", neftune=5.0, pack_tokens=40, batch=20),
    "judged": plan("judged", more={"dev": True}, evaluate_every=2),
    "adalora": plan("adalora", "adalora(rank=2, initial=4, warmup=1, final=1)"),
    "fsdp-dora": plan("fsdp-dora", "dora(rank=4)", sharding="fsdp"),
    "fsdp-lora": plan("fsdp-lora", sharding="fsdp"),
    "fsdp-full": plan("fsdp-full", "full", sharding="fsdp"),
    "fsdp-uneven": plan("fsdp-uneven", sharding="fsdp", batch=1),
    "fsdp-checkpointing": plan("fsdp-checkpointing", "full", sharding="fsdp", checkpointing=True),
    "fsdp-bf16-base": plan("fsdp-bf16-base", "lora(rank=4)", "bf16", sharding="fsdp"),
    "fsdp-judged": plan("fsdp-judged", more={"dev": True}, sharding="fsdp", evaluate_every=2),
}
ADAPTERS = {"lora": LORA, "full": "full"}


def alone(run: dict[str, Any], name: str) -> dict[str, Any]:
    """The same run for one process."""
    return {**run, "name": name, "train": {**run["train"], "sharding": "none"}}


@pytest.fixture(scope="module")
def trained(together: Any) -> Any:
    """Every run of this module, of two processes in one launch, and of one."""
    for run in SAME.values():
        together.one(alone(run, f"{run['name']}-alone"))
    stopped: list[dict[str, Any]] = []
    for kind, adapter in ADAPTERS.items():
        together.one(plan(f"{kind}-one", adapter))
        for sharding in ("none", "fsdp"):
            begun = plan(f"{kind}-{sharding}-stopped", adapter, more={"stop": 3}, sharding=sharding)
            stopped += [begun, {key: value for key, value in begun.items() if key != "stop"}]
            stopped.append(plan(f"{kind}-{sharding}-whole", adapter, sharding=sharding))
            stopped.append(halfway(together, f"{kind}-one", plan(f"{kind}-{sharding}-then-two", adapter, sharding=sharding)))
    tight = plan("tight", more={"memory": 40}, pack_tokens=64, batch=20)
    together.two(*SAME.values(), *stopped, tight, plan("seldom", log_every=3))
    together.one(alone(tight, "tight-alone") | {"memory": 10**9})
    return together


def halfway(together: Any, of: str, run: dict[str, Any]) -> dict[str, Any]:
    """A run that goes on from where another one was halfway."""
    shutil.copytree(together.folder / of, together.folder / run["name"])
    shutil.rmtree(together.folder / run["name"] / "checkpoints" / "step-4")
    return run


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], within: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.allclose(ours[name].float(), value.float(), rtol=0, atol=within), name


@pytest.mark.parametrize("name", SAME)
def test_two_processes_have_the_gradients_losses_and_weights_of_one(name: str, trained: Any) -> None:
    within = 1e-6 if "bf16" not in name else 2e-2
    ours, theirs = trained.gradients(name), trained.gradients(f"{name}-alone")
    assert any(bool(value.abs().max() > 1e-4) for value in theirs.values())
    close(ours, theirs, within)
    assert trained.metrics(name) == pytest.approx(trained.metrics(f"{name}-alone"), abs=10 * within)
    assert trained.metrics(name, "grad_norm") == pytest.approx(
        trained.metrics(f"{name}-alone", "grad_norm"), rel=1e-4 if within < 1e-3 else 0.05
    )
    close(trained.weights(name), trained.weights(f"{name}-alone"), 1e-4 if within < 1e-3 else 5e-2)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_stop_that_one_process_is_asked_for_stops_both_and_they_resume_bit_for_bit(kind: str, sharding: str, trained: Any) -> None:
    ours, theirs = (trained.weights(f"{kind}-{sharding}-{how}") for how in ("stopped", "whole"))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert trained.metrics(f"{kind}-{sharding}-stopped") == trained.metrics(f"{kind}-{sharding}-whole")
    assert 3 in Checkpoints(trained.folder / f"{kind}-{sharding}-stopped" / "checkpoints").steps(), "it was stopped there"


def test_lines_of_metrics_are_written_by_one_process_and_for_logged_steps_only(trained: Any) -> None:
    assert trained.metrics("lora", "step") == [1, 2, 3, 4]
    assert trained.metrics("seldom", "step") == [3, 4]
    assert trained.metrics("seldom") == [trained.metrics("lora")[2], trained.metrics("lora")[3]]
    assert trained.metrics("lora", "token_accuracy") == pytest.approx(trained.metrics("lora-alone", "token_accuracy"))


def test_a_step_that_one_process_has_no_memory_for_is_done_again_by_both(trained: Any) -> None:
    assert trained.metrics("tight") == pytest.approx(trained.metrics("tight-alone"), abs=1e-5)
    last = Checkpoints(trained.folder / "tight" / "checkpoints").load(4)[1]
    assert 0 < last["pack_tokens"] <= 40


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_checkpoint_of_two_processes_holds_what_one_would_and_one_goes_on_from_it(kind: str, sharding: str, trained: Any) -> None:
    two, one = f"{kind}-{sharding}-whole", f"{kind}-{sharding}-then-one"
    checkpoints = Checkpoints(trained.folder / two / "checkpoints")
    names = {file.name for file in checkpoints.path(2).iterdir()}
    parts = ("00001-of-00002", "00002-of-00002")
    assert names == {"state.json", *(f"{what}-{part}.safetensors" for what in ("weights", "moments") for part in parts)}
    trained.one(halfway(trained, two, plan(one, ADAPTERS[kind])))
    assert trained.metrics(one) == pytest.approx(trained.metrics(two), abs=1e-5)
    close(trained.weights(one), trained.weights(two), 1e-4)
    ours, theirs = Checkpoints(trained.folder / one / "checkpoints").load(4)[0], checkpoints.load(4)[0]
    for what in ("weights", "moments"):
        close(dict(ours[what]), dict(theirs[what]), 1e-4)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_go_on_from_a_checkpoint_of_one(kind: str, sharding: str, trained: Any) -> None:
    two, one = f"{kind}-{sharding}-then-two", f"{kind}-one"
    assert trained.metrics(two) == pytest.approx(trained.metrics(one), abs=1e-5)
    assert trained.metrics(two)[:2] == trained.metrics(one)[:2], "it went on, and did not begin anew"
    close(trained.weights(two), trained.weights(one), 1e-4)


def test_a_checkpoint_with_a_missing_or_damaged_part_is_told_apart(trained: Any) -> None:
    folder = trained.folder / "damaged"
    shutil.copytree(trained.folder / "lora" / "checkpoints", folder)
    state = json.loads((folder / "step-4" / "state.json").read_text())
    assert len(state["files"]) == 4
    (folder / "step-4" / "weights-00002-of-00002.safetensors").unlink()
    with pytest.raises(Exception, match="damaged"):
        Checkpoints(folder).load(4)


@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=30), count=st.integers(1, 5), budget=st.integers(60, 300))
def test_rows_are_dealt_out_whole_each_once_and_evenly(lengths: list[int], count: int, budget: int) -> None:
    rows = [single([1] * length, [False] + [True] * (length - 1), f"{number}") for number, length in enumerate(lengths)]
    dealt = deal(lambda tokens: rows, lambda row: row.tokens, budget, max(lengths), count)
    given_out = [row for rank in range(count) for _, batch in dealt.of(rank) for row in batch]
    assert sorted(row.where for row in given_out) == sorted(row.where for row in rows)
    assert max(dealt.tokens) <= budget and dealt.tokens == [sum(row.tokens for row in batch) for batch in dealt.batches]
    load = [sum(row.tokens for _, batch in dealt.of(rank) for row in batch) for rank in range(count)]
    assert max(load) <= sum(load) / count + max(dealt.tokens)
    alone = deal(lambda tokens: rows, lambda row: row.tokens, budget, max(lengths), 1)
    if count * 4 <= len(alone.batches) and alone.tokens == [alone.tokens[0]] * len(alone.tokens):
        assert [id(row) for batch in dealt.batches for row in batch] == [id(row) for batch in alone.batches for row in batch]


def test_a_step_of_one_pack_is_cut_so_that_every_process_has_work() -> None:
    rows: list[Row] = [single([1] * 50, [False] + [True] * 49) for _ in range(8)]
    assert len(deal(lambda tokens: rows, lambda row: row.tokens, 2048, 50, 1).batches) == 1
    dealt = deal(lambda tokens: rows, lambda row: row.tokens, 2048, 50, 4)
    assert dealt.tokens == [100] * 4 and sorted(dealt.owner) == [0, 1, 2, 3]
