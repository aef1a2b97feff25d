"""A step that does not fit is done again in smaller parts; activations can be computed again instead of kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.core.errors import RunError
from tunesmith.core.row import Row
from tunesmith.engine import memory
from tunesmith.engine.forward import Forward
from tunesmith.engine.memory import out_of_memory, recomputing
from tunesmith.engine.pack import Pack
from tunesmith.engine.rundir import read_metrics
from tunesmith.engine.train import Trainer

Make = Callable[..., Trainer]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.adapter.named_parameters()}


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in read_metrics(trainer.folder.path / "metrics.jsonl") if "loss" in line]


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], list[int]]:
    """Memory that holds packs of so many tokens; fails after the forward of a larger one, as real memory may."""

    def limit(tokens: int, error: BaseException) -> list[int]:
        original, tried = Forward.__call__, []

        def call(self: Forward, pack: Pack, *more: Any, **options: Any) -> Any:
            tried.append(pack.tokens)
            if torch.is_grad_enabled() and pack.tokens > tokens:
                raise error
            return original(self, pack, *more, **options)

        monkeypatch.setattr(Forward, "__call__", call)
        return tried

    return limit


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()]
)
def test_a_step_that_runs_out_of_memory_is_done_again_in_smaller_micro_batches_with_the_same_loss_and_weights(
    error: BaseException, make_trainer: Make, little_memory: Callable[[int, BaseException], list[int]]
) -> None:
    plenty = make_trainer("plenty", steps=3, batch=20)
    plenty.run()
    tried = little_memory(60, error)
    tight = make_trainer("tight", steps=3, batch=20)
    tight.run()
    assert max(tried) > 60, "it was tried"
    assert tight.state.pack_tokens is not None and tight.state.pack_tokens <= 60
    assert losses(tight) == pytest.approx(losses(plenty), abs=1e-5)
    for name, value in weights(plenty).items():
        assert torch.allclose(weights(tight)[name], value, atol=1e-5), name


def test_a_single_row_that_does_not_fit_ends_the_run_with_what_to_do(
    make_trainer: Make, little_memory: Callable[[int, BaseException], list[int]]
) -> None:
    little_memory(1, MemoryError())
    with pytest.raises(RunError, match=r"single row[\s\S]*train\.checkpointing=true"):
        make_trainer(steps=1).run()


def test_another_error_is_not_taken_for_lack_of_memory() -> None:
    assert not out_of_memory(RuntimeError("shapes differ"))
    assert not out_of_memory(ValueError("can't allocate memory"))


@pytest.mark.parametrize("adapter", ["lora(rank=4, sites=all)", "full"])
def test_computing_activations_again_changes_neither_losses_nor_weights(adapter: str, make_trainer: Make) -> None:
    kept, again = (make_trainer(f"run{on}", adapter=adapter, steps=4, checkpointing=on) for on in (False, True))
    kept.run()
    again.run()
    assert losses(again) == pytest.approx(losses(kept), abs=1e-6)
    for name, value in weights(kept).items():
        assert torch.allclose(weights(again)[name], value, atol=1e-6), name


def test_computing_activations_again_keeps_less_and_leaves_the_model_as_it_was(make_trainer: Make, samples: list[Row]) -> None:
    from tunesmith.engine.pack import build_pack

    trainer = make_trainer(adapter="lora(rank=4, sites=all)")
    model = trainer.model.base.model
    model.register_module("own_dropout", nn.Dropout(0.5))
    modes = [module.training for module in model.modules()]
    kept = {}
    for on in (False, True):
        sizes: list[int] = []
        with recomputing(model, on), torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # noqa: B023
            assert model.own_dropout.p == (0.0 if on else 0.5)
            trainer.model.forward(build_pack(samples))
        kept[on] = sum(sizes)
    assert kept[True] < kept[False] / 2
    assert [module.training for module in model.modules()] == modes
    assert model.own_dropout.p == 0.5


def test_the_dev_samples_are_judged_in_evaluation_mode_with_the_cache_at_hand(make_trainer: Make) -> None:
    seen: list[bool] = []

    def judge() -> dict[str, float]:
        seen.append(any(module.training for module in trainer.model.base.model.modules()))
        return {"accuracy": 0.5}

    trainer = make_trainer(steps=2, evaluate_every=1, checkpointing=True, dev=judge)
    trainer.run()
    assert seen == [False, False]


def test_room_is_made_before_a_micro_batch_that_is_longer_than_all_before(monkeypatch: pytest.MonkeyPatch, make_trainer: Make) -> None:
    made: list[str] = []
    monkeypatch.setattr(memory, "compact", lambda: made.append("room"))
    room = memory.Room()
    for tokens in (10, 8, 10, 11, 3):
        room.before(tokens)
    assert len(made) == 2
    make_trainer("run").run()
    assert len(made) > 2, "the trainer tells it"
