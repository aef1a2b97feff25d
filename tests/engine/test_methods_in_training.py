"""Methods that have a say in a step: what they add to the loss, their learning rates, what they remember between steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tunesmith.adapters import Triplets
from tunesmith.core.errors import Interrupted
from tunesmith.engine.rundir import read_metrics
from tunesmith.engine.train import Trainer

ADALORA = "adalora(rank=2, initial=4, warmup=2, final=2, every=2)"
Make = Callable[..., Trainer]


def triplets(trainer: Trainer) -> list[Triplets]:
    return [form for form in trainer.adapter.forms.values() if isinstance(form, Triplets)]


def test_adalora_ends_with_its_budget_and_its_penalty_is_in_the_metrics_and_not_in_the_loss(make_trainer: Make) -> None:
    trainer = make_trainer(adapter=ADALORA, schedule="constant")
    before = trainer.adapter.penalty()
    assert before is not None
    trainer.run()
    forms = triplets(trainer)
    assert sum(int((form.e != 0).sum()) for form in forms) == 2 * len(forms)
    lines = read_metrics(trainer.folder.path / "metrics.jsonl")
    assert lines[0]["penalty"] == pytest.approx(float(before.detach()), rel=1e-5)
    assert lines[-1]["penalty"] < lines[0]["penalty"]
    plain = make_trainer("plain", adapter=ADALORA.replace("every=2", "every=2, orthogonality=0"), schedule="constant")
    plain.run()
    others = read_metrics(plain.folder.path / "metrics.jsonl")
    assert "penalty" not in others[0]
    assert others[0]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("stop", [1, 3, 5, 7])
def test_adalora_goes_on_from_any_checkpoint_to_the_same_bits(stop: int, make_trainer: Make) -> None:
    whole = make_trainer("whole", adapter=ADALORA)
    whole.run()
    begun = make_trainer("cut", adapter=ADALORA)
    one_step = begun._one_step

    def stopped() -> dict[str, float]:
        values = one_step()
        begun._stop = begun.state.step == stop
        return values

    begun._one_step = stopped  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        begun.run()
    again = make_trainer("cut", adapter=ADALORA)
    again.run(resume=True)
    assert again.state.step == whole.state.step
    first, second = whole.adapter.state(), again.adapter.state()
    assert all(torch.equal(first[name], second[name]) for name in first)
    kept, found = whole.adapter.memory(), again.adapter.memory()
    assert kept and all(torch.equal(kept[name], found[name]) for name in kept)


def test_the_factor_on_a_learning_rate_is_taken_step_by_step(make_trainer: Make) -> None:
    moved: dict[str, Any] = {}
    for name, adapter in (("lora", "lora(rank=4)"), ("plus", "lora_plus(rank=4, ratio=8)")):
        trainer = make_trainer(name, adapter=adapter, steps=1, warmup=0, schedule="constant", weight_decay=0.0, clip=None)
        trainer.run()
        moved[name] = trainer.adapter.state()
    for key, value in moved["lora"].items():
        times = 8 if key.endswith(".b") else 1
        assert torch.allclose(moved["plus"][key], value * times, atol=1e-6), key


def test_a_penalty_that_does_not_fit_into_memory_with_its_step_is_counted_once(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    short = "adalora(rank=2, initial=4, warmup=0, final=0)"
    calm, tight = make_trainer("calm", adapter=short, steps=1), make_trainer("tight", adapter=short, steps=1)
    calm.run()
    real, tries = tight.adapter.penalty, []

    def penalty() -> Any:
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return real()

    monkeypatch.setattr(tight.adapter, "penalty", penalty)
    tight.run()
    assert len(tries) == 2
    first, second = calm.adapter.state(), tight.adapter.state()
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)
