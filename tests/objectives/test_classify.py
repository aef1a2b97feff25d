"""Classification is torch's cross-entropy, summed over what is labelled, with a denominator that nothing but the step changes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import SpecError
from tunesmith.objectives import OBJECTIVES, classify
from tunesmith.spec import objective_call


@given(
    reads=st.integers(1, 9),
    classes=st.integers(2, 6),
    smoothing=st.floats(0, 0.9),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_loss_and_its_gradient_are_torchs_summed_cross_entropy(
    reads: int, classes: int, smoothing: float, weighted: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(reads, classes, dtype=torch.float64, requires_grad=True)
    labels, weights = torch.randint(0, classes, (reads,)), torch.rand(classes, dtype=torch.float64) if weighted else None
    ours = classify(logits, labels.float(), label_smoothing=smoothing, weights=None if weights is None else weights.tolist())
    theirs = torch.nn.functional.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing, reduction="sum")
    assert float(ours.total) == pytest.approx(float(theirs), abs=1e-9)
    assert torch.allclose(*(torch.autograd.grad(loss, logits)[0] for loss in (ours.total, theirs)), atol=1e-10)


def test_the_loss_is_what_one_computes_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), math.log(1.0)], [math.log(1.0), math.log(4.0)]])
    assert float(classify(logits, torch.tensor([0.0, 0.0])).total) == pytest.approx(-math.log(3 / 4) - math.log(1 / 5))
    smoothed = 0.8 * -math.log(3 / 4) + 0.2 * np.mean([-math.log(3 / 4), -math.log(1 / 4)])
    assert float(classify(logits[:1], torch.zeros(1), label_smoothing=0.2).total) == pytest.approx(smoothed)


@given(parts=st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_over_any_parts_of_a_step_the_loss_adds_up_and_so_does_its_accuracy(parts: list[int]) -> None:
    logits, labels = torch.randn(sum(parts), 3, dtype=torch.float64), torch.randint(0, 3, (sum(parts),)).float()
    whole = classify(logits, labels)
    pieces = [classify(*piece) for piece in zip(logits.split(parts), labels.split(parts), strict=True)]
    assert sum(piece.weight for piece in pieces) == whole.weight == len(labels)
    assert float(sum(piece.total for piece in pieces)) == pytest.approx(float(whole.total))  # type: ignore[arg-type]
    assert sum(int(piece.metrics["accuracy"]) for piece in pieces) == int((logits.argmax(-1) == labels).sum())


@pytest.mark.parametrize(
    "expression", ["classify(label_smoothing=1)", "classify(weights=[])", "classify(weights=[1, -1])", "classify(weights=[a, b])"]
)
def test_options_out_of_range_are_refused_as_the_spec_is_read(expression: str) -> None:
    with pytest.raises(SpecError, match="objective classify: "):
        objective_call(expression)


def test_as_many_weights_as_labels_are_needed() -> None:
    with pytest.raises(SpecError, match="2 weights are given for 3 labels"):
        classify(torch.randn(4, 3), torch.zeros(4), weights=[1, 2])


def test_it_reads_labels_and_the_others_read_words() -> None:
    assert {name: objective.reads_labels for name, objective in OBJECTIVES.items() if name in ("classify", "sft")} == {
        "classify": True,
        "sft": False,
    }
