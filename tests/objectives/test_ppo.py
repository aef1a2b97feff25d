"""PPO: numbers worked by hand, loops over tokens, gradients by finite differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slopes import slope
from tunesmith.core.errors import SpecError
from tunesmith.objectives import OBJECTIVES, Wanted, ppo
from tunesmith.spec import objective_call

OPTIONS: list[dict[str, Any]] = [
    {},
    {"value_weight": 0.5, "clip": 0.1, "clip_high": 0.3},
    {"value_clip": None},
    {"value_clip": 0.05, "dual_clip": 1.2},
    {"entropy_weight": 0.01},
]


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def written_out(read: np.ndarray, options: dict[str, Any]) -> float:
    """By loops over tokens. read: [tokens, 7], lp, old, A, V, V_old, R, H."""
    clip, value_clip = options.get("clip", 0.2), options.get("value_clip", 0.2)
    total = 0.0
    for lp, old, a, v, v_old, r, h in read.tolist():
        w = math.exp(lp - old)
        policy = max(-a * w, -a * min(max(w, 1 - clip), 1 + options.get("clip_high", clip)))
        if "dual_clip" in options and a < 0:
            policy = min(policy, -options["dual_clip"] * a)
        errors = [(v - r) ** 2]
        if value_clip is not None:
            errors.append((v_old + min(max(v - v_old, -value_clip), value_clip) - r) ** 2)
        total += policy + options.get("value_weight", 0.1) * 0.5 * max(errors) - options.get("entropy_weight", 0.0) * h
    return total


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@settings(max_examples=20)
@given(tokens=st.integers(1, 6), seed=st.integers(0, 9999))
def test_the_loss_is_its_equation_and_its_gradients_the_equations_slopes(options: dict[str, Any], tokens: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    read = random.normal(size=(tokens, 7))
    read[:, 0] = read[:, 1] + 0.3 * read[:, 0]
    read[:, 3] = read[:, 4] + 0.3 * read[:, 3]
    lp, old, a, v, v_old, r, h = (torch.tensor(column, requires_grad=at in (0, 3, 6)) for at, column in enumerate(read.T))
    loss = ppo(lp, old, a, v, v_old, r, h, **options)
    assert float(loss.total.detach()) == pytest.approx(written_out(read, options)) and loss.weight == tokens
    loss.total.backward()
    truth = slope(lambda at: written_out(at, options), read, 1e-7)
    for at, leaf in ((0, lp), (3, v), (6, h)):
        mine = np.zeros(tokens) if leaf.grad is None else leaf.grad.numpy()
        assert np.allclose(mine, truth[:, at], atol=1e-6)


def test_one_token_worked_by_hand() -> None:
    # w = 0.6 / 0.4 = 1.5, held at 1.2, A = 2: -2.4. V = 1.5 held at 1.2 (V_old 1), R = 2: max(0.25, 0.64) / 2 = 0.32, a tenth of it.
    v = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    lp = tensor(math.log(0.6)).requires_grad_()
    loss = ppo(lp, tensor(math.log(0.4)), tensor(2.0), v, tensor(1.0), tensor(2.0), tensor(0.7), entropy_weight=0.5)
    assert float(loss.total.detach()) == pytest.approx(-2.4 + 0.032 - 0.35)
    loss.total.backward()
    assert float(lp.grad) == 0 and float(v.grad) == 0  # type: ignore[arg-type]  # both are held
    seen = {name: float(value) for name, value in loss.metrics.items()}
    assert seen["policy_loss"] == pytest.approx(-2.4) and seen["value_loss"] == pytest.approx(0.32) and seen["entropy"] == 0.7
    assert seen["clip_high"] == 1 and seen["clip_low"] == 0 and seen["value_clipped"] == 1 and seen["ratio"] == pytest.approx(1.5)
    assert seen["old_kl"] == pytest.approx(0.5 - math.log(1.5))


def test_as_it_was_sampled_the_gradient_is_that_of_reinforce() -> None:
    lp = tensor(-1.0, -2.0).requires_grad_()
    loss = ppo(lp, None, tensor(0.5, -3.0), tensor(0, 0), tensor(0, 0), tensor(0, 0))
    loss.total.backward()
    assert lp.grad is not None and lp.grad.tolist() == [-0.5, 3.0] and "entropy" not in loss.metrics


def test_entropy_has_its_gradient_only_where_it_is_rewarded() -> None:
    wanted = OBJECTIVES["ppo"].wanted
    assert wanted({}) == Wanted() and wanted({}, logging=True) == Wanted(entropy=True, detached=frozenset({"entropy"}))
    assert wanted({"entropy_weight": 0.01}) == wanted({"entropy_weight": 0.01}, logging=True) == Wanted(entropy=True)
    with pytest.raises(ValueError, match="entropy"):
        ppo(tensor(-1), None, tensor(1), tensor(0), tensor(0), tensor(0), entropy_weight=0.1)


@pytest.mark.parametrize("written", ["ppo(clip=0)", "ppo(value_clip=-1)", "ppo(value_weight=-0.1)", "ppo(entropy_weight=none)"])
def test_options_out_of_range_are_refused_as_the_spec_is_read(written: str) -> None:
    with pytest.raises(SpecError, match=r"objective ppo: .* must be a number"):
        objective_call(written)
    assert objective_call("ppo(value_clip=none, clip_high=0.3)").options == {"value_clip": None, "clip_high": 0.3}
