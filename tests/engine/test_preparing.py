"""Masks that are found on the data as training begins: written as they are learned, kept in checkpoints, the same on resuming."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tunesmith.adapters import Entries
from tunesmith.core.errors import Interrupted
from tunesmith.engine.train import Trainer

SPARSE = "sparse(share=0.02, samples=5, sites=[q, down])"


def test_a_mask_is_found_before_the_first_step_and_its_entries_alone_are_trained(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(adapter=SPARSE, compile="off")
    model = trainer.model.base.model
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".ts_" not in name}
    assert trainer.adapter.waits and trainer.lr == 1e-2
    first = trainer.run().losses[0]
    assert not trainer.adapter.waits and trainer.state.losses[-1] < first
    for name, value in before.items():
        form = trainer.adapter.forms.get(name.removesuffix(".weight"))
        changed = (model.get_parameter(name) != value).flatten().nonzero()[:, 0]
        assert set(changed.tolist()) <= (set(form.index.tolist()) if isinstance(form, Entries) else set())
        if form is not None:
            assert len(changed) > 0.9 * len(form.index)  # type: ignore[arg-type]
    trainer.model.detach()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())


@pytest.mark.parametrize("adapter", [SPARSE, "diff_pruning(sites=[q])", "norms", "bias"])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(adapter: str, make_trainer: Callable[..., Trainer]) -> None:
    whole = make_trainer("whole", adapter=adapter)
    whole.run()
    stopped = make_trainer("parts", adapter=adapter)
    step = stopped.optimizer.step

    def stop_after_three(lr: float, scale: float) -> None:
        step(lr, scale)
        if stopped.state.step == 2:
            stopped._ask_to_stop()

    stopped.optimizer.step = stop_after_three  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        stopped.run()
    again = make_trainer("parts", adapter=adapter)
    again.run(resume=True)
    assert again.state.step == 8
    wanted, got = whole.adapter.stored(), again.adapter.stored()
    assert wanted.keys() == got.keys() and all(torch.equal(got[name], value) for name, value in wanted.items())


def test_diff_pruning_shuts_gates_when_it_is_asked_to(make_trainer: Callable[..., Trainer]) -> None:
    def still_open(penalty: float) -> int:
        trainer = make_trainer(f"p{penalty:g}", adapter=f"diff_pruning(sites=[q], penalty={penalty})", steps=30)
        trainer.run()
        return sum(int(form.delta().count_nonzero()) for form in trainer.adapter.forms.values())

    assert still_open(1.0) < 0.5 * still_open(0.0)
