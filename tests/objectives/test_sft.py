"""Objectives are formulas: sums with a stated denominator, no model in sight."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import SpecError
from tunesmith.engine.head import Projection, read_head
from tunesmith.objectives import OBJECTIVES, Divergence, Wanted, dft, objective, sft
from tunesmith.spec import objective_call


@given(parts=st.lists(st.integers(0, 9), min_size=1, max_size=6), smoothing=st.sampled_from([0.0, 0.1]))
def test_sft_over_any_parts_of_a_step_adds_up_to_the_mean_over_its_tokens(parts: list[int], smoothing: float) -> None:
    log_probs, mean = -torch.rand(2, sum(parts), dtype=torch.float64)
    losses = [
        sft(piece, middle, label_smoothing=smoothing) for piece, middle in zip(log_probs.split(parts), mean.split(parts), strict=True)
    ]
    assert sum(loss.weight for loss in losses) == len(log_probs)
    whole = -((1 - smoothing) * log_probs + smoothing * mean).sum()
    assert float(sum(loss.total for loss in losses)) == pytest.approx(float(whole))  # type: ignore[arg-type]


def test_sft_pulls_every_supervised_token_with_the_same_force() -> None:
    log_probs = torch.randn(7, requires_grad=True)
    sft(log_probs).total.backward()
    assert log_probs.grad is not None and torch.equal(log_probs.grad, -torch.ones(7))


@pytest.mark.parametrize("trained", [False, True])
@given(smoothing=st.floats(0, 0.9), count=st.integers(1, 9), seed=st.integers(0, 99))
def test_smoothed_sft_and_its_gradients_are_torchs_cross_entropy(trained: bool, smoothing: float, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    hidden = torch.randn(count, 5, dtype=torch.float64, requires_grad=True)
    weight, target = torch.randn(13, 5, dtype=torch.float64, requires_grad=trained), torch.randint(0, 13, (count,))
    entry, options = OBJECTIVES["sft"], {"label_smoothing": smoothing}
    ours = entry.loss(read_head(Projection((hidden,), (weight,)), target, entry.wanted(options)), options).total / count
    theirs = torch.nn.functional.cross_entropy(hidden @ weight.T, target, label_smoothing=smoothing)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-9)
    leaves = [hidden, weight] if trained else [hidden]
    for mine, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        assert torch.allclose(mine, other, atol=1e-9)


def test_dft_weighs_each_token_by_its_probability_which_takes_no_part_in_the_gradient() -> None:
    log_probs = torch.tensor([-0.1, -2.0, -5.0], requires_grad=True)
    loss = dft(log_probs)
    loss.total.backward()
    p = log_probs.detach().exp()
    assert loss.weight == 3 and torch.allclose(loss.total.detach(), -(p * log_probs.detach()).sum())
    assert log_probs.grad is not None and torch.allclose(log_probs.grad, -p)


@pytest.mark.parametrize("name", ["sft", "dft"])
def test_metrics_are_asked_for_and_computed_on_logging_steps_only(name: str) -> None:
    entry = OBJECTIVES[name]
    assert entry.wanted({}) == Wanted() and entry.wanted({}, logging=True) == Wanted(best=True)
    read = SimpleNamespace(log_probs=torch.tensor([-0.5, -1.0, -3.0]), mean=None, best=None)
    assert entry.loss(read, {}).metrics == {}
    read.best = torch.tensor([-0.5, -0.7, -3.0])
    assert float(entry.loss(read, {}).metrics["token_accuracy"]) == 2


def test_every_objective_says_what_it_reads_and_by_what_it_is_divided() -> None:
    assert OBJECTIVES["sft"].function is sft and OBJECTIVES["sft"].reads == ("log_probs", "mean", "best")
    assert all(entry.reads and entry.denominator and entry.function.__doc__ for _, entry in OBJECTIVES.items())
    assert OBJECTIVES["sft"].wanted({"label_smoothing": 0.1}) == Wanted(mean=True)


def test_an_unknown_objective_is_refused_with_the_nearest_and_a_name_is_taken_once() -> None:
    with pytest.raises(SpecError, match=r"unknown objective 'sfd'(.|\n)*Did you mean:  sft"):
        OBJECTIVES["sfd"]
    with pytest.raises(ValueError, match="registered twice"):
        objective("sft", reads="log_probs", denominator="tokens")(sft)


@pytest.mark.parametrize("value", ["1", "-0.1", "2.5", "high", "true", "nan"])
def test_a_smoothing_out_of_range_is_refused_before_the_run_with_the_options_name(value: str) -> None:
    with pytest.raises(SpecError, match=r"objective sft: label_smoothing must be a number in \[0, 1\)"):
        objective_call(f"sft(label_smoothing={value})")
    assert objective_call("sft(label_smoothing=0.1)").options == {"label_smoothing": 0.1}


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Wanted(temperature=0), "temperature"),
        (lambda: Wanted(temperature=float("inf")), "temperature"),
        (lambda: Wanted(top_k=-1), "top_k"),
        (lambda: Divergence(beta=1.5), "beta"),
        (lambda: Divergence(temperature=-1), "temperature"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(make: object, name: str) -> None:
    with pytest.raises(SpecError, match=name):
        make()  # type: ignore[operator]
