"""A step is what its formula says, however it is cut into packs; a run stops when it must and keeps what was best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

from tunesmith.bases import Base, load_base
from tunesmith.core.errors import AdapterError, RunError
from tunesmith.core.row import Row, single
from tunesmith.engine.feed import rows_of_step, total_steps
from tunesmith.engine.forward import Forward
from tunesmith.engine.model import Model, attach_to
from tunesmith.engine.optimizer import Optimizer, learning_rate
from tunesmith.engine.pack import build_pack
from tunesmith.engine.rundir import read_metrics
from tunesmith.engine.train import Trainer
from tunesmith.spec import TrainSpec, make_spec

Make = Callable[..., Trainer]


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Tensor], float]]:
    """Gradients by name and the factor of clipping, of each update that is made."""
    seen: list[tuple[dict[str, Tensor], float]] = []
    original = Optimizer.step

    def noted(self: Optimizer, lr: float, scale: float) -> None:
        seen.append(({name: master.grad.clone() for name, master in self.masters.items() if master.grad is not None}, scale))
        original(self, lr, scale)

    monkeypatch.setattr(Optimizer, "step", noted)
    return seen


# One step


@pytest.mark.parametrize("adapter", ["lora(rank=4)", "layers(last=1)", "full"])
def test_the_gradient_of_a_step_is_that_of_the_mean_over_its_supervised_tokens_for_any_size_of_packs(
    adapter: str, make_trainer: Make, samples: list[Row], steps_taken: list[tuple[dict[str, Tensor], float]]
) -> None:
    for tokens in (30, 64, 4096):
        make_trainer(f"run{tokens}", adapter=adapter, steps=1, batch=20, pack_tokens=tokens).run()
    trainer = make_trainer("formula", adapter=adapter)
    total = -sum(trainer.model.forward(build_pack([row])).log_probs.sum() for row in samples)
    named = dict(trainer.adapter.named_parameters())
    loss = total / sum(row.supervised_tokens for row in samples)  # type: ignore[operator]
    wanted = dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))
    for found, _ in steps_taken:
        for name, gradient in wanted.items():
            if gradient is not None and bool(gradient.any()):
                assert torch.allclose(found[name], gradient, rtol=0, atol=1e-6), name
    first = read_metrics(trainer.folder.path.parent / "run30" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert first["tokens"] == sum(row.tokens for row in samples)
    flat = torch.cat([gradient.flatten() for gradient in wanted.values() if gradient is not None])
    assert first["grad_norm"] == pytest.approx(float(flat.norm()), rel=1e-4)


def test_training_lowers_the_loss_and_moves_only_the_adapter(make_trainer: Make) -> None:
    trainer = make_trainer(steps=30, batch=10, schedule="constant", warmup=0)
    before = {name: value.clone() for name, value in trainer.model.base.model.named_parameters() if "ts_" not in name}
    trainer.run()
    losses = [line["loss"] for line in read_metrics(trainer.folder.path / "metrics.jsonl")]
    assert len(losses) == 30 and np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.08
    after = dict(trainer.model.base.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("clip", [0.01, 1e6, None])
def test_clipping_scales_the_whole_gradient_to_the_norm_given(
    clip: float | None, make_trainer: Make, steps_taken: list[tuple[dict[str, Tensor], float]]
) -> None:
    trainer = make_trainer(steps=1, clip=clip)
    trainer.run()
    ((gradient, scale),) = steps_taken
    norm = float(torch.cat([value.flatten() for value in gradient.values()]).norm())
    assert scale == (pytest.approx(0.01 / norm, rel=1e-3) if clip == 0.01 else 1.0)
    moments = trainer.optimizer.state()[1]
    for name, value in gradient.items():
        assert torch.allclose(moments[f"{name}.exp_avg"], 0.1 * scale * value, atol=1e-8)


def test_a_run_without_rows_or_with_patience_but_nothing_to_judge_by_is_refused(make_trainer: Make, samples: list[Row]) -> None:
    trainer = make_trainer()
    with pytest.raises(RunError, match="no rows"):
        Trainer(trainer.model, [], trainer.spec, trainer.folder)
    with pytest.raises(RunError, match=r"patience needs dev samples(.|\n)*data.dev"):
        make_trainer("other", patience=2)
    with pytest.raises(AdapterError, match="no adapter to train"):
        Trainer(Model(trainer.model.base), samples, trainer.spec, trainer.folder)


# Order and schedule


@given(rows=st.integers(1, 30), batch=st.integers(1, 40), seed=st.integers(0, 5), epochs=st.integers(1, 4))
def test_every_epoch_is_a_permutation_of_its_own_and_batches_run_across_the_seams(rows: int, batch: int, seed: int, epochs: int) -> None:
    size = min(batch, rows)
    steps = math.ceil(epochs * rows / size)
    laid = [index for step in range(steps) for index in rows_of_step(step, rows, batch, seed)]
    assert len(laid) == steps * size
    for epoch in range(epochs):
        assert sorted(laid[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert rows_of_step(3, rows, batch, seed) == rows_of_step(3, rows, batch, seed)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first, second, other = rows_of_step(0, 50, 50, 0), rows_of_step(1, 50, 50, 0), rows_of_step(0, 50, 50, 1)
    assert first != second and first != other and first != list(range(50))


@pytest.mark.parametrize(
    ("train", "rows", "steps"),
    [({"steps": 7}, 100, 7), ({"epochs": 2, "batch": 8}, 20, 5), ({"batch": 64}, 10, 3), ({"epochs": 0.01}, 3, 1)],
)
def test_the_length_of_a_run_is_given_in_steps_or_epochs_of_three(train: dict[str, Any], rows: int, steps: int) -> None:
    assert total_steps(make_spec({"base": "x", "train": train}), rows) == steps


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.1, 10])
def test_the_learning_rate_warms_up_peaks_and_falls_to_its_floor(schedule: Any, warmup: float) -> None:
    spec = TrainSpec(schedule=schedule, warmup=warmup, min_lr=0.1)
    rates = [learning_rate(step, 100, 2.0, spec) for step in range(100)]
    begins = 10 if warmup else 0
    assert all(a < b for a, b in pairwise(rates[:begins]))
    assert rates[begins] == pytest.approx(2.0) and max(rates) == pytest.approx(2.0) and min(rates) > 0
    falls = rates[begins:]
    if schedule == "constant":
        assert set(falls) == {2.0}
    else:
        assert all(a > b for a, b in pairwise(falls))
        assert falls[-1] == pytest.approx(0.2, abs=0.03)
        assert learning_rate(100, 100, 2.0, spec) == pytest.approx(0.2)
    middle = falls[len(falls) // 2]
    assert middle == pytest.approx({"constant": 2.0, "linear": 1.1, "cosine": 1.1}[schedule], abs=0.03)


def test_only_matrices_are_decayed() -> None:
    matrix, scale = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Optimizer([("matrix", matrix), ("scale", scale)], TrainSpec(weight_decay=0.5))
    matrix.grad, scale.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step(0.1, 1.0)
    assert torch.allclose(matrix, torch.full((2, 2), 0.95)) and torch.equal(scale.detach(), torch.ones(2))


def test_an_adapter_that_the_loss_does_not_reach_is_an_error_not_a_run_of_zeros() -> None:
    optimizer = Optimizer([("lost", torch.nn.Parameter(torch.ones(2)))], TrainSpec())
    with pytest.raises(RunError, match="no trained parameter received a gradient"):
        optimizer.gradient_norm()


# NEFTune


@pytest.fixture
def embedded(base: Base) -> Iterator[list[Tensor]]:
    """What enters the first layer at each forward of the base."""
    seen: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach())

    hook = base.model.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_neftune_adds_noise_of_its_papers_size_by_the_rows_own_length_and_only_while_training(
    packed: bool, kind: str, base: Base, embedded: list[Tensor]
) -> None:
    rows = [single(range(5, 5 + size), [False] * (size - 1) + [True]) for size in (100, 25, 7)]
    forward = Forward(base.model, packed=packed, direct_head=True)
    pack = build_pack(rows)
    forward(pack)
    plain = embedded[-1]
    with forward.neftune(15.0, kind):
        torch.manual_seed(1)
        forward(pack)
        noise = embedded[-1] - plain
        with torch.no_grad():
            forward(pack)
        assert torch.equal(embedded[-1], plain)
    forward(pack)
    assert torch.equal(embedded[-1], plain)
    with forward.neftune(None):
        forward(pack)
    assert torch.equal(embedded[-1], plain)

    width, start = plain.shape[-1], 0
    for number, row in enumerate(rows):
        own = noise[0, start : start + row.tokens] if packed else noise[number, : row.tokens]
        start += row.tokens
        unit = (own * math.sqrt(row.tokens * width) / 15.0).flatten().double().numpy()
        if kind == "uniform":
            assert np.abs(unit).max() <= 1 + 1e-4
            assert kstest(unit, "uniform", args=(-1, 2)).pvalue > 1e-3
        else:
            assert kstest(unit, "norm", args=(0, 1 / math.sqrt(3))).pvalue > 1e-3


def test_a_run_with_neftune_is_noisy_in_its_steps_and_silent_in_its_dev_judgements(make_trainer: Make, samples: list[Row]) -> None:
    judged: list[float] = []
    plain: list[float] = []

    def dev() -> dict[str, float]:
        with torch.no_grad():
            judged.extend(float(trainer.model.forward(build_pack(samples)).log_probs.sum()) for _ in range(2))
        return {"accuracy": 0.5}

    trainer = make_trainer(steps=2, neftune=10.0, evaluate_every=1, dev=dev)
    trainer.run()
    quiet = make_trainer("quiet", steps=2)
    quiet.run()
    assert judged[0] == judged[1] and judged[2] == judged[3]
    noisy, plain = ([line["loss"] for line in read_metrics(t.folder.path / "metrics.jsonl") if "loss" in line] for t in (trainer, quiet))
    assert noisy[0] != plain[0]
    assert not trainer.model.base.model.get_input_embeddings()._forward_hooks


# Judging, stopping, keeping the best


def scripted(values: list[float]) -> Callable[[], dict[str, float]]:
    given = iter(values)
    return lambda: {"accuracy": next(given), "other": 9.0}


def test_the_best_weights_by_the_first_dev_value_are_what_a_run_leaves(make_trainer: Make) -> None:
    seen: list[dict[str, Tensor]] = []
    values = iter([0.2, 0.7, 0.6, 0.7])

    def dev() -> dict[str, float]:
        seen.append(trainer.adapter.state())
        return {"accuracy": next(values)}

    trainer = make_trainer(steps=8, evaluate_every=2, save_every=3, keep=1, dev=dev)
    state = trainer.run()
    assert (state.best, state.best_step, state.step) == (0.7, 4, 8)
    assert all(torch.equal(value, seen[1][name]) for name, value in trainer.adapter.state().items())
    assert any(not torch.equal(value, seen[3][name]) for name, value in trainer.adapter.state().items())
    assert trainer.folder.checkpoints.steps() == [4, 8]  # the best and the last; the others are gone
    judged = [line for line in read_metrics(trainer.folder.path / "metrics.jsonl") if "dev_accuracy" in line]
    assert [line["step"] for line in judged] == [2, 4, 6, 8]


def test_patience_counts_judgements_without_a_better_one(make_trainer: Make) -> None:
    trainer = make_trainer(steps=100, evaluate_every=1, patience=3, dev=scripted([0.1, 0.3, 0.3, 0.2, 0.3, 0.9]))
    state = trainer.run()
    assert (state.step, state.best, state.best_step) == (5, 0.3, 2)


def test_a_dev_value_that_is_always_0_chooses_nothing_and_the_last_weights_are_kept(make_trainer: Make) -> None:
    trainer = make_trainer(steps=6, evaluate_every=2, dev=scripted([0.0, 0.0, 0.0]))
    state = trainer.run()
    assert (state.step, state.best, state.best_step) == (6, 0.0, 6)
    trainer = make_trainer("later", steps=6, evaluate_every=2, dev=scripted([0.0, 0.5, 0.5]))
    assert trainer.run().best_step == 4
    trainer = make_trainer("even", steps=6, evaluate_every=2, dev=scripted([0.5, 0.5, 0.5]))
    assert trainer.run().best_step == 2
    trainer = make_trainer("patient", steps=6, evaluate_every=1, patience=2, dev=scripted([0.0, 0.0, 0.0, 0.0]))
    assert trainer.run().step == 3


def test_a_run_that_goes_on_remembers_its_best_and_its_patience(make_trainer: Make) -> None:
    whole = make_trainer("whole", steps=8, evaluate_every=1, patience=4, dev=scripted([0.5, 0.1, 0.2, 0.3, 0.4, 0.9]))
    assert whole.run().step == 5
    cut = make_trainer("cut", steps=8, evaluate_every=1, patience=4, dev=scripted([0.5, 0.1, 0.2]))
    with pytest.raises(StopIteration):
        cut.run()
    again = make_trainer("cut", steps=8, evaluate_every=1, patience=4, dev=scripted([0.2, 0.3, 0.4, 0.9]))
    state = again.run(resume=True)
    assert (state.step, state.best, state.best_step) == (5, 0.5, 1)


# Trouble


def test_a_loss_that_is_no_number_stops_before_the_weights_and_names_the_rows_and_the_last_good_checkpoint(make_trainer: Make) -> None:
    whole = make_trainer("whole")
    whole.run()
    trainer = make_trainer("broken")
    formula = trainer.objective.function

    def breaking(log_probs: Tensor, *more: Any, **options: Any) -> Any:
        return formula(log_probs * (float("nan") if trainer.state.step == 5 else 1.0), *more, **options)

    trainer.objective = replace(trainer.objective, function=breaking)
    with pytest.raises(RunError) as caught:
        trainer.run()
    said = str(caught.value)
    assert "the loss is not a number at step 6" in said and "step-4" in said and "rows.jsonl, line" in said and "train.lr=" in said
    assert not any(torch.isnan(value).any() for value in trainer.adapter.state().values())
    assert all(master.grad is None for master in trainer.optimizer.masters.values())
    assert trainer.folder.checkpoints.steps() == [2, 4]
    again = make_trainer("broken")
    again.run(resume=True)
    assert all(torch.equal(value, whole.adapter.state()[name]) for name, value in again.adapter.state().items())


def test_a_loss_that_explodes_stops_the_run_and_one_that_merely_wobbles_does_not(make_trainer: Make) -> None:
    for factor, stops in ((30.0, True), (1.5, False)):
        trainer = make_trainer(f"times{factor}", steps=20, lr=1e-4)
        formula = trainer.objective.function

        def louder(log_probs: Tensor, *more: Any, t: Trainer = trainer, f: float = factor, o: Any = formula, **options: Any) -> Any:
            return o(log_probs * (f if t.state.step >= 14 else 1.0), *more, **options)

        trainer.objective = replace(trainer.objective, function=louder)
        if stops:
            with pytest.raises(RunError, match=r"the loss exploded at step 15: loss .* \(it was .*step-14"):
                trainer.run()
        else:
            assert trainer.run().step == 20


def test_weights_that_an_update_made_infinite_are_never_saved(make_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    original = Optimizer.step

    def overflowing(self: Optimizer, lr: float, scale: float) -> None:
        original(self, math.inf if trainer.state.step == 3 else lr, scale)

    monkeypatch.setattr(Optimizer, "step", overflowing)
    with pytest.raises(RunError, match=r"update of step 4 made the weights infinite.*step-2"):
        trainer.run()
    assert trainer.folder.checkpoints.steps() == [2]


# Precision


def test_bf16_weights_are_trained_through_fp32_masters(tiny_base_folder: Any, make_trainer: Make) -> None:
    base = load_base(tiny_base_folder, dtype="bf16", device="cpu")
    trainer = make_trainer(on=base, adapter="layers(last=1)", lr=2e-5, steps=4, warmup=0, schedule="constant")
    before = {name: master.detach().clone() for name, master in trainer.optimizer.masters.items()}
    trainer.run()
    moved = 0
    for name, parameter in trainer.adapter.named_parameters():
        master = trainer.optimizer.masters[name]
        assert parameter.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert torch.equal(parameter, master.bfloat16())
        moved += int((master != before[name]).sum())
        assert float((master.detach() - before[name]).abs().max()) < 1e-4  # steps that bf16 alone would round away
    assert moved > 1000
    assert trainer.optimizer.state()[0].keys() == before.keys()


# Several adapters on one base


def test_a_model_on_a_shared_base_trains_as_if_it_were_alone(base: Base, make_trainer: Make) -> None:
    """Judging on the dev samples switches the neighbour off and on again; it must stay off while training."""
    alone = make_trainer("alone", evaluate_every=1, dev=scripted([0.1] * 8))
    alone.run()
    neighbour = attach_to(base, "lora(rank=4)", name="neighbour")
    with torch.no_grad():
        for _, parameter in neighbour.adapter.named_parameters():
            parameter.normal_()

    def dev() -> dict[str, float]:
        with trainer.model.active(), torch.no_grad():
            trainer.model.forward(build_pack(trainer.feed.first()))
        return {"accuracy": 0.1}

    trainer = make_trainer("beside", on=base, evaluate_every=1, dev=dev)
    trainer.run()
    for ours, theirs in zip(trainer.adapter.state().values(), alone.adapter.state().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_in_place_adapters_upon_one_another_come_off_in_reverse(base: Base, samples: list[Row]) -> None:
    pack = build_pack(samples)

    def heard(model: Model) -> Tensor:
        with model.active(), torch.no_grad():
            return model.forward(pack).log_probs

    def shift(model: Model) -> None:
        with torch.no_grad():
            for _, parameter in model.adapter.named_parameters():
                parameter.add_(0.01)

    bare = Model(base)
    before = heard(bare)
    first = attach_to(base, "full")
    shift(first)
    one = heard(first)
    with pytest.raises(AdapterError, match=r"'full' of another model has changed this base's own weights"):
        attach_to(base, "lora")
    second = attach_to(first, "layers(last=1)")
    shift(second)
    both = heard(second)
    assert torch.equal(heard(bare), before) and torch.equal(heard(first), one) and torch.equal(heard(second), both)
    assert not torch.equal(one, both)
    second.detach()
    assert torch.equal(heard(bare), before)
    assert all(not parameter.requires_grad for parameter in base.model.parameters())
