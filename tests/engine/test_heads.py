"""A task head says of a row in any company what it says of the row alone, and trains what it is meant to train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tunesmith.adapters import Adapter, Way, attach
from tunesmith.core.row import Row, Segment, segment
from tunesmith.engine.forward import Forward
from tunesmith.engine.heads import read_task_head, task_logits
from tunesmith.engine.losses import loss_of, weight_of
from tunesmith.engine.probe import probe
from tunesmith.objectives import OBJECTIVES

Build = Callable[..., Any]
LENGTHS = (9, 4, 23, 4, 13)
CASES = [
    ("bert-bare", "pooler"),
    ("albert-bare", "pooler"),
    *((name, pool) for name in ("bert", "roberta", "llama", "gemma3") for pool in ("first", "last", "mean")),
]


def asked(ids: list[int], label: float, parent: int = -1, at: int = -1) -> Segment:
    labels = np.full(len(ids), np.nan, np.float32)
    labels[at] = label
    return Segment(np.asarray(ids, np.int32), np.zeros(len(ids), np.bool_), parent, "", labels)


@pytest.fixture
def flat() -> list[Row]:
    drawn = torch.randint(5, 90, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3)).tolist()
    ends = np.cumsum(LENGTHS)
    return [Row((asked(drawn[end - n : end], number % 3),)) for number, (n, end) in enumerate(zip(LENGTHS, ends, strict=True))]


@pytest.fixture
def make(build: Build) -> Callable[..., tuple[Forward, Adapter]]:
    def make(name: str, pool: str, expression: str = "lora(rank=4, sites=[q, v]) + head") -> tuple[Forward, Adapter]:
        model = build(name)
        forward = probe(model, speaks=name in ("llama", "gemma3"))
        adapter = attach(model, expression, seed=1)
        adapter.give_head(32, ("a", "b", "c"), Way(pool), seed=1)  # type: ignore[arg-type]
        for path, parameter in adapter.named_parameters():
            if path.endswith(".b") or path.startswith("ts_head"):
                torch.nn.init.normal_(parameter, std=0.3)
        return forward, adapter

    return make


def alone(forward: Forward, adapter: Adapter, row: Row, pool: str) -> Tensor:
    """One row through the model's own forward and attention, and its head by hand, [1, 3]."""
    ids = torch.from_numpy(row.segments[0].ids.astype("int64"))[None]
    with forward.attention(forward.own_attention):
        out = forward.model.base_model(input_ids=ids)
    states = out.last_hidden_state[0]
    pooled = {"first": states[0], "last": states[-1], "mean": states.mean(0)}.get(pool)
    if pool == "pooler":
        pooled = out.pooler_output[0]
    assert adapter.head is not None and pooled is not None
    return (pooled @ adapter.head.out.weight.T + adapter.head.out.bias)[None]


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize(("name", "pool"), CASES)
def test_what_a_head_says_and_its_gradients_are_those_of_each_row_alone(
    name: str, pool: str, padded: bool, make: Any, flat: list[Row]
) -> None:
    forward, adapter = make(name, pool)
    assert forward.packed
    named = dict(adapter.named_parameters())
    truth = torch.cat([alone(forward, adapter, row, pool) for row in flat])
    forward.packed = not padded
    said = read_task_head(forward, forward.pack(flat), adapter.head)
    assert said.labels.tolist() == [0, 1, 2, 0, 1]
    assert torch.allclose(said.logits, truth, atol=2e-5)
    pull = torch.randn(truth.shape)
    wanted, found = (torch.autograd.grad((logits * pull).sum(), list(named.values())) for logits in (truth, said.logits))
    for path, a, b in zip(named, wanted, found, strict=True):
        assert torch.allclose(a, b, atol=2e-5 * max(1.0, float(a.abs().max()))), path


@pytest.mark.parametrize("pool", ["first", "last", "mean"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_rows_that_share_their_beginning_are_said_the_same_of_as_apart(name: str, pool: str, make: Any, flat: list[Row]) -> None:
    forward, adapter = make(name, pool)
    start, ends = flat[2].segments[0].ids.tolist(), [flat[0].segments[0].ids.tolist(), flat[4].segments[0].ids.tolist()]
    tree = Row((segment(start), *(asked(end, number, parent=0) for number, end in enumerate(ends))))
    apart = [Row((asked(start + end, number),)) for number, end in enumerate(ends)]
    together, separate = (read_task_head(forward, forward.pack(rows), adapter.head) for rows in ([tree], apart))
    assert together.labels.tolist() == separate.labels.tolist() == [0, 1]
    assert torch.allclose(together.logits, separate.logits, atol=2e-5)


def test_a_head_alone_runs_no_backward_into_the_base(make: Any, flat: list[Row]) -> None:
    forward, adapter = make("bert", "mean", "head")
    before = {path: value.clone() for path, value in forward.model.state_dict().items()}
    states: list[Tensor] = []
    forward.model.base_model.register_forward_hook(lambda module, args, out: states.append(out.last_hidden_state))
    loss = loss_of(forward, adapter, forward.pack(flat), OBJECTIVES["classify"], {})
    loss.total.backward()
    assert not states[0].requires_grad
    assert {path for path, _ in adapter.named_parameters()} == {"ts_head.out.weight", "ts_head.out.bias"}
    assert all(parameter.grad is not None for _, parameter in adapter.named_parameters())
    assert all(torch.equal(value, before[path]) for path, value in forward.model.state_dict().items())
    adapter.detach()
    assert not any("ts_" in path for path in forward.model.state_dict())


def test_every_token_may_have_a_label_of_its_own(make: Any, flat: list[Row]) -> None:
    forward, adapter = make("bert", "last")
    ids = flat[2].segments[0].ids.tolist()
    labels = np.full(len(ids), np.nan, np.float32)
    labels[[0, 5, 6]] = [2, 0, 1]
    row = Row((Segment(np.asarray(ids, np.int32), np.zeros(len(ids), np.bool_), labels=labels),))
    said = read_task_head(forward, forward.pack([flat[0], row]), adapter.head)
    truth = torch.cat([read_task_head(forward, forward.pack([Row((asked(ids, 0, at=at),))]), adapter.head).logits for at in (0, 5, 6)])
    assert said.labels.tolist() == [0, 2, 0, 1]
    assert torch.allclose(said.logits[1:], truth, atol=2e-5)
    assert weight_of([flat[0], row], OBJECTIVES["classify"]) == 4


@pytest.mark.parametrize("budget", [10, 40, 4096])
def test_many_rows_are_answered_in_their_own_order_whatever_the_size_of_packs(budget: int, make: Any, flat: list[Row]) -> None:
    forward, adapter = make("bert", "mean")
    found = torch.zeros(len(flat), 3)
    for places, logits in task_logits(forward, adapter.head, flat, budget):
        found[torch.tensor(places)] = logits
        assert not logits.requires_grad
    assert torch.allclose(found, torch.cat([alone(forward, adapter, row, "mean") for row in flat]), atol=2e-5)
