"""Objectives are formulas: sums with a stated denominator, no model in sight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import SpecError
from tunesmith.objectives import OBJECTIVES, objective, sft


@given(parts=st.lists(st.integers(0, 9), min_size=1, max_size=6))
def test_sft_over_any_parts_of_a_step_adds_up_to_the_mean_over_its_tokens(parts: list[int]) -> None:
    log_probs = -torch.rand(sum(parts), dtype=torch.float64)
    losses = [sft(piece) for piece in log_probs.split(parts)]
    assert sum(loss.weight for loss in losses) == len(log_probs)
    assert float(sum(loss.total for loss in losses)) == pytest.approx(float(-log_probs.sum()))  # type: ignore[arg-type]


def test_sft_pulls_every_supervised_token_with_the_same_force() -> None:
    log_probs = torch.randn(7, requires_grad=True)
    sft(log_probs).total.backward()
    assert log_probs.grad is not None and torch.equal(log_probs.grad, -torch.ones(7))


def test_every_objective_says_what_it_reads_and_by_what_it_is_divided() -> None:
    assert OBJECTIVES["sft"].function is sft and OBJECTIVES["sft"].reads == "tokens"
    assert all(entry.denominator and entry.function.__doc__ for _, entry in OBJECTIVES.items())


def test_an_unknown_objective_is_refused_with_the_nearest_and_a_name_is_taken_once() -> None:
    with pytest.raises(SpecError, match=r"unknown objective 'sfd'(.|\n)*Did you mean:  sft"):
        OBJECTIVES["sfd"]
    with pytest.raises(ValueError, match="registered twice"):
        objective("sft", reads="tokens", denominator="tokens")(sft)
