"""The head that never holds all logits gives log_softmax's values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunesmith.engine import head
from tunesmith.engine.head import target_log_probs


def reference(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    return torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 21])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_values_and_gradients_are_those_of_log_softmax_on_both_sides_of_a_chunk_border(
    count: int, with_bias: bool, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK", 8)
    hidden = torch.randn(count, 12, requires_grad=True)
    weight = torch.randn(30, 12, requires_grad=trained)
    bias = torch.randn(30, requires_grad=trained) if with_bias else None
    target = torch.randint(0, 30, (count,))
    wanted = reference(hidden, weight, target, bias)
    got = target_log_probs(hidden, weight, target, bias)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), wanted, atol=1e-5)
    leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    scale = torch.randn(count)
    for ours, theirs in zip(
        torch.autograd.grad((got * scale).sum(), leaves), torch.autograd.grad((wanted * scale.double()).sum(), leaves), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=2e-5)


def test_a_tied_table_collects_gradient_from_both_ends() -> None:
    table = torch.randn(20, 6, requires_grad=True)
    ids, target = torch.tensor([1, 2, 3]), torch.tensor([4, 1, 2])
    (ours,) = torch.autograd.grad(target_log_probs(table[ids], table, target).sum(), table)
    (theirs,) = torch.autograd.grad(reference(table[ids], table, target, None).sum(), table)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_only_a_bias_or_only_a_weight_may_be_trained() -> None:
    hidden, target = torch.randn(5, 6), torch.randint(0, 9, (5,))
    for trained in ("weight", "bias"):
        weight = torch.randn(9, 6, requires_grad=trained == "weight")
        bias = torch.randn(9, requires_grad=trained == "bias")
        leaf = weight if trained == "weight" else bias
        (ours,) = torch.autograd.grad(target_log_probs(hidden, weight, target, bias).sum(), leaf)
        (theirs,) = torch.autograd.grad(reference(hidden, weight, target, bias).sum(), leaf)
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_huge_logits_neither_overflow_nor_lose_the_answer() -> None:
    hidden, weight = torch.full((1, 2), 1e4, requires_grad=True), torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    got = target_log_probs(hidden, weight, torch.tensor([0]))
    got.sum().backward()
    assert float(got.detach()) == 0 and hidden.grad is not None and torch.equal(hidden.grad, torch.zeros(1, 2))


def test_bf16_weights_give_fp32_log_probabilities_close_to_the_exact_ones() -> None:
    hidden, weight = torch.randn(40, 16).bfloat16().requires_grad_(), torch.randn(50, 16).bfloat16()
    target = torch.randint(0, 50, (40,))
    got = target_log_probs(hidden, weight, target)
    assert got.dtype == torch.float32
    assert (got.double() - reference(hidden, weight, target, None)).abs().max() < 0.1
    got.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_without_gradients_nothing_is_kept() -> None:
    with torch.no_grad():
        assert not target_log_probs(torch.randn(3, 4), torch.randn(5, 4, requires_grad=True), torch.tensor([0, 1, 2])).requires_grad
