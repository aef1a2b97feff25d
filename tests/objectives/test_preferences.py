"""Losses of pairs against the papers' equations, written out with plain numbers, and their gradients by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slopes import slope
from tunesmith.core.errors import SpecError
from tunesmith.objectives import OBJECTIVES
from tunesmith.spec import objective_call

NAMES = ("chosen", "rejected", "chosen_reference", "rejected_reference", "chosen_length", "rejected_length", "soft")


def s(z: float) -> float:
    """log sigmoid"""
    return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))


def sig(z: float) -> float:
    return math.exp(s(z))


class Pair:
    """Two answers: their log-ratios, and mean log-probabilities of a token."""

    def __init__(self, c: float, r: float, ref_c: float, ref_r: float, len_c: float, len_r: float) -> None:
        self.c, self.r = c - ref_c, r - ref_r
        self.d = self.c - self.r
        self.mean_c, self.mean_r = c / len_c, r / len_r
        self.d_a_token = self.c / len_c - self.r / len_r


def orpo(p: Pair, weight: float) -> float:
    odds = [m - math.log(-math.expm1(m)) for m in (p.mean_c, p.mean_r)]
    return -p.mean_c - weight * s(odds[0] - odds[1])


def discopop(z: float) -> float:
    m = sig(z / 0.05)
    return (1 - m) * math.log1p(math.exp(-z)) + m * math.exp(-z)


Equation = Callable[[Pair], float]
CASES: list[tuple[str, Equation]] = [
    ("dpo(beta=0.3)", lambda p: -s(0.3 * p.d)),
    ("dpo(beta=0.3, label_smoothing=0.2)", lambda p: -0.8 * s(0.3 * p.d) - 0.2 * s(-0.3 * p.d)),
    ("robust_dpo(label_smoothing=0.2)", lambda p: (-0.8 * s(0.1 * p.d) + 0.2 * s(-0.1 * p.d)) / 0.6),
    ("hinge(beta=0.3)", lambda p: max(0.0, 1 - 0.3 * p.d)),
    ("ipo(beta=0.3)", lambda p: (p.d_a_token - 1 / 0.6) ** 2),
    ("ipo(beta=0.3, normalise=none)", lambda p: (p.d - 1 / 0.6) ** 2),
    ("nca", lambda p: -s(0.1 * p.c) - 0.5 * s(-0.1 * p.c) - 0.5 * s(-0.1 * p.r)),
    ("bco(beta=0.2)", lambda p: -s(0.2 * p.c) - s(-0.2 * p.r)),
    ("apo_zero", lambda p: 1 - sig(0.1 * p.c) + sig(0.1 * p.r)),
    ("apo_down", lambda p: sig(0.1 * p.c) + 1 - sig(0.1 * p.d)),
    ("discopop", lambda p: discopop(0.1 * p.d)),
    ("simpo(gamma=0.7)", lambda p: -s(2 * (p.mean_c - p.mean_r) - 0.7)),
    ("orpo(weight=0.4)", lambda p: orpo(p, 0.4)),
]


def expected(equation: Equation, values: np.ndarray) -> float:
    """The sum over pairs of an equation's mean over both orders."""
    total = 0.0
    for c, r, ref_c, ref_r, len_c, len_r, soft in values.tolist():
        total += soft * equation(Pair(c, r, ref_c, ref_r, len_c, len_r)) + (1 - soft) * equation(Pair(r, c, ref_r, ref_c, len_r, len_c))
    return total


def exo(values: np.ndarray) -> float:
    total = 0.0
    for c, r, ref_c, ref_r, _, _, soft in values.tolist():
        q, p = sig(0.1 * ((c - ref_c) - (r - ref_r))), soft * 0.9 + (1 - soft) * 0.1
        total += q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    return total


def sppo(values: np.ndarray) -> float:
    return sum((c - a - (p - 0.5) / 0.1) ** 2 + (r - b + (p - 0.5) / 0.1) ** 2 for c, r, a, b, _, _, p in values.tolist())


WHOLE: list[tuple[str, Callable[[np.ndarray], float]]] = [
    *((written, lambda values, equation=equation: expected(equation, values)) for written, equation in CASES),  # type: ignore[misc]
    ("exo(label_smoothing=0.1)", exo),
    ("sppo", sppo),
]


def readings(values: np.ndarray) -> SimpleNamespace:
    """What an objective reads, by name."""
    tensors = {name: torch.tensor(column, dtype=torch.float64) for name, column in zip(NAMES, values.T, strict=True)}
    for name in NAMES[:2]:
        tensors[name].requires_grad_()
    return SimpleNamespace(**tensors)


def pairs(count: int) -> st.SearchStrategy[np.ndarray]:
    """[pairs, 7]: log-probabilities below zero, lengths of at least one, soft in [0, 1]."""

    def made(raw: np.ndarray) -> np.ndarray:
        out = raw.copy()
        out[:, :4] = -0.05 - 20 * raw[:, :4]
        out[:, 4:6] = 1 + np.floor(30 * raw[:, 4:6])
        return out

    return arrays(np.float64, (count, 7), elements=st.floats(0, 1, width=32)).map(made)


@pytest.mark.parametrize(("written", "equation"), WHOLE, ids=[written for written, _ in WHOLE])
@settings(max_examples=20)
@given(values=pairs(3))
def test_a_loss_is_the_papers_equation_and_its_gradient_the_equations_slope(
    written: str, equation: Callable[[np.ndarray], float], values: np.ndarray
) -> None:
    call, read = objective_call(written), readings(values)
    loss = OBJECTIVES[call.name].loss(read, call.options)
    assert float(loss.total.detach()) == pytest.approx(equation(values), rel=1e-9, abs=1e-9) and loss.weight == 3
    loss.total.backward()
    if call.name != "hinge":  # its slope has a step
        mine = torch.stack([read.chosen.grad, read.rejected.grad], 1).numpy()
        assert np.allclose(mine, slope(equation, values)[:, :2], rtol=1e-6, atol=1e-6)


def test_a_hinge_pulls_at_pairs_within_the_margin_alone() -> None:
    values = np.array([[-3.0, -9.0, -4.0, -6.5, 4, 7, 1.0], [-2.0, -30.0, -8.0, -3.0, 9, 2, 1.0]])
    read = readings(values)
    OBJECTIVES["hinge"].loss(read, {"beta": 0.1}).total.backward()
    assert read.chosen.grad.tolist() == pytest.approx([-0.1, 0]) and read.rejected.grad.tolist() == pytest.approx([0.1, 0])


def test_what_is_logged_compares_the_implicit_rewards_and_a_tie_is_half_right() -> None:
    values = np.array([[-3.0, -9.0, -4.0, -6.5, 4, 7, 1.0], [-11.0, -2.0, -8.0, -3.0, 9, 2, 1.0], [-1.0, -1.0, -1.0, -1.0, 1, 1, 1.0]])
    logged = OBJECTIVES["dpo"].loss(readings(values), {"beta": 0.1}).metrics
    assert float(logged["accuracy"]) == 1.5 and float(logged["margin"]) == pytest.approx(0.1 * (3.5 - 4))
    assert float(logged["chosen"]) == pytest.approx(0.1 * (1 - 3))


@pytest.mark.parametrize("written", [written for written, _ in WHOLE])
def test_a_label_that_is_as_likely_wrong_asks_for_no_difference(written: str) -> None:
    call, values = objective_call(written), np.array([[-3.0, -9.0, -4.0, -6.5, 4, 7, 0.5]])
    swapped = values[:, [1, 0, 3, 2, 5, 4, 6]]
    ours, other = (OBJECTIVES[call.name].loss(readings(each), call.options).total for each in (values, swapped))
    assert float(ours.detach()) == pytest.approx(float(other.detach()))


@pytest.mark.parametrize("name", ["orpo", "discopop", "exo", "dpo"])
def test_certain_answers_and_far_references_give_finite_losses_and_gradients(name: str) -> None:
    for numbers in ([0.0, -5.0, 0, 0, 3, 3, 1], [-9000.0, -1.0, -1.0, -9000.0, 3, 3, 1], [-1.0, -9000.0, -9000.0, -1.0, 3, 3, 1]):
        read = SimpleNamespace(**{key: value.detach().float() for key, value in vars(readings(np.array([numbers]))).items()})
        read.chosen.requires_grad_()
        loss = OBJECTIVES[name].loss(read, {})
        loss.total.backward()
        assert torch.isfinite(loss.total) and torch.isfinite(read.chosen.grad).all()


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("dpo(beta=0)", "beta must be a number above 0, not 0"),
        ("dpo(label_smoothing=0.5)", r"label_smoothing must be a number in \[0, 0.5\)"),
        ("dpo(beta=none)", "beta must be a number above 0, not None"),
        ("ipo(normalise=words)", "normalise must be length or none, not 'words'"),
        ("exo(label_smoothing=0)", r"in \(0, 0.5\), not 0"),
        ("simpo(gamma=-1)", "gamma must be a number of at least 0"),
        ("orpo(weight=much)", "weight must be a number above 0, not 'much'"),
        ("hinge(beta=true)", "beta must be a number above 0, not True"),
    ],
)
def test_options_out_of_range_are_refused_as_the_spec_is_read(written: str, said: str) -> None:
    with pytest.raises(SpecError, match=said) as refused:
        objective_call(written)
    assert f"tunesmith objectives {written.split('(')[0]}" in str(refused.value)
