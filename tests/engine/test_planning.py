"""What `plan` foresees of a run's memory, held against counts made by hand and against the run itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tunesmith.bases import Base
from tunesmith.core.row import Row
from tunesmith.engine import planning
from tunesmith.engine.feed import rows_of_step
from tunesmith.engine.measuring import bytes_of, count_saved
from tunesmith.engine.model import attach_to
from tunesmith.engine.planning import Training, plan_training
from tunesmith.engine.train import Trainer
from tunesmith.spec import make_spec


@pytest.fixture
def foresee(base: Base, samples: list[Row]) -> Callable[..., Training]:
    """A plan of training the tiny base on the samples."""

    def plan(adapter: str = "lora(rank=4)", **train: Any) -> Training:
        spec = make_spec({"base": "tiny", "adapter": adapter, "train": {"steps": 4, "batch": 6, **train}})
        return plan_training(attach_to(base, adapter), samples, spec)

    return plan


def test_what_a_forward_keeps_is_counted_once_a_storage_and_without_parameters(base: Base) -> None:
    weight = nn.Parameter(torch.ones(64, 64))
    x = torch.ones(10, 64)

    def forward() -> None:
        y = x @ weight  # keeps x; the weight belongs to the model below
        (y * y).sum()  # keeps y, twice the same

    base.model.register_parameter("ts_test", weight)
    saved = count_saved(base.model, forward)
    del base.model._parameters["ts_test"]
    assert saved.total == 2 * 10 * 64 * 4


def test_what_is_counted_is_given_back_at_once(base: Base) -> None:
    kept: list[StorageWeakRef] = []

    class Keeping(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            copy = x.clone()
            kept.append(StorageWeakRef(copy.untyped_storage()))
            ctx.save_for_backward(copy)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0]

    def forward() -> None:
        function: Any = Keeping
        x = torch.ones(256, 256, requires_grad=True)
        for _ in range(8):
            x = function.apply(x)
            assert kept[-1].expired()

    assert count_saved(base.model, forward).total == 8 * 256 * 256 * 4


def test_activations_grow_with_the_micro_batch_and_shrink_when_they_are_computed_again(foresee: Callable[..., Training]) -> None:
    small, large = foresee(pack_tokens=60), foresee(pack_tokens=500)
    again = foresee(pack_tokens=500, checkpointing=True)
    assert small.largest_pack <= 60 < large.largest_pack
    assert small.packs_a_step > large.packs_a_step == 1
    assert small.memory.activations < large.memory.activations
    assert again.memory.activations < large.memory.activations
    assert again.checkpointing is None and large.checkpointing is not None
    assert large.checkpointing.step_seconds > large.step_seconds


def test_bytes_of_the_optimiser_are_those_that_the_optimiser_holds(
    make_trainer: Callable[..., Trainer], foresee: Callable[..., Training]
) -> None:
    for adapter in ("lora(rank=4)", "full"):
        trainer = make_trainer(adapter.partition("(")[0], adapter=adapter, steps=1)
        trainer.run()
        moments = [value for state in trainer.optimizer.adamw.state.values() for key, value in state.items() if key != "step"]
        assert foresee(adapter).memory.optimizer == bytes_of(moments)
        trainer.model.detach()


def test_micro_batches_are_those_that_the_run_deals(make_trainer: Callable[..., Trainer], foresee: Callable[..., Training]) -> None:
    trainer = make_trainer("dealt", steps=4, pack_tokens=60)
    seen: list[int] = []
    backward = trainer._backward

    def noted(rows: list[Row], *rest: Any) -> Any:
        seen.append(sum(row.tokens for row in rows))
        return backward(rows, *rest)

    trainer._backward = noted  # type: ignore[method-assign]
    trainer.run()
    found = foresee(pack_tokens=60)
    assert (found.largest_pack, found.packs_a_step * 4) == (max(seen), len(seen))
    assert rows_of_step(0, 20, 6, 0)


def test_a_step_takes_the_time_that_kernels_of_another_length_take_once_a_pack(
    foresee: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning._Planner, "_kernels", lambda *given: (0.0, 100.0))
    found = foresee(pack_tokens=60)
    assert found.packs_a_step * 100 < found.step_seconds < found.packs_a_step * 100 + 10


def test_planning_changes_neither_weights_nor_random_numbers(base: Base, samples: list[Row]) -> None:
    model = attach_to(base, "full", keep_original=False)
    before = {name: parameter.detach().clone() for name, parameter in model.adapter.named_parameters()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    plan_training(model, samples, make_spec({"base": "tiny", "adapter": "full", "train": {"steps": 2}}))
    assert torch.equal(torch.rand(3), expected)
    for name, parameter in model.adapter.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_the_largest_micro_batch_is_what_memory_leaves_room_for(foresee: Callable[..., Training], monkeypatch: pytest.MonkeyPatch) -> None:
    enough = foresee(batch=20, pack_tokens=100)
    assert enough.fitting_pack is not None and enough.fitting_pack > 100
    fixed = enough.peak - enough.memory.activations - enough.memory.head - enough.memory.workspace
    monkeypatch.setattr(planning, "room", lambda device: int(fixed * 0.5))
    nothing = foresee(batch=20, pack_tokens=100)
    assert nothing.fitting_pack is None
    assert nothing.measured_tokens == 0, "what does not fit is counted and not run"
    assert nothing.memory.activations > 0
