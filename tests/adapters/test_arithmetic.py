"""Sums of adapters are sums of their changes; what is cut to a rank is the best of that rank, and its error is the one that is stated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.merge_utils import ties as pefts_ties
from torch import Tensor

from tunesmith.adapters import Change, as_lora, attach, average, change_of, dare, difference, fit, linear, plain, stack, subtract, ties
from tunesmith.core.errors import AdapterError

Build = Callable[..., Any]
Shake = Callable[[Any], None]


@pytest.fixture
def pair(build: Build, shake: Shake) -> tuple[Any, Any, Any]:
    """A model and two trained LoRAs on it; they share q."""
    model = build()
    first = attach(model, "lora(rank=3, sites=[q, v])", name="first")
    second = attach(model, "rslora(rank=2, sites=[q, down])", name="second", seed=5)
    shake(first)
    shake(second)
    with torch.no_grad():
        for form in second.forms.values():
            form.b.mul_(-0.7)
    return model, first, second


def matrices(change: Change) -> dict[str, Tensor]:
    return {path: change.matrix(path) for path in change.paths()}


# Exact ones


def test_a_weighted_sum_is_exact_and_its_ranks_add_up(pair: tuple[Any, Any, Any]) -> None:
    _, first, second = pair
    a, b = change_of(first), change_of(second)
    whole = linear([a, b], [0.3, -2.0])
    q, v, down = (f"model.layers.0.{name}_proj" for name in ("self_attn.q", "self_attn.v", "mlp.down"))
    assert torch.allclose(whole.matrix(q), 0.3 * first.forms[q].delta() - 2 * second.forms[q].delta(), atol=1e-6)
    assert torch.allclose(whole.matrix(v), 0.3 * first.forms[v].delta(), atol=1e-6)
    assert torch.allclose(whole.matrix(down), -2 * second.forms[down].delta(), atol=1e-6)
    fitted = plain(whole)
    assert fitted.error == 0.0 and (fitted.ranks[q], fitted.ranks[v], fitted.ranks[down]) == (5, 3, 2)


def test_stacked_adapters_answer_as_both_at_once_and_subtracting_one_leaves_the_other(pair: tuple[Any, Any, Any], ids: Tensor) -> None:
    model, first, second = pair
    a, b = change_of(first), change_of(second)
    both = model(ids).logits
    with second.disabled():
        alone = model(ids).logits
    first.detach()
    second.detach()
    made = as_lora(model, plain(stack([a, b])), name="both")
    assert torch.allclose(model(ids).logits, both, atol=1e-5)
    made.detach()
    as_lora(model, plain(subtract(stack([a, b]), b)), name="less")
    assert torch.allclose(model(ids).logits, alone, atol=1e-5)


def test_the_average_of_an_adapter_with_itself_is_that_adapter(pair: tuple[Any, Any, Any]) -> None:
    a = change_of(pair[1])
    for path, matrix in matrices(average([a, a, a])).items():
        assert torch.allclose(matrix, a.matrix(path), atol=1e-6)


def test_a_sum_with_more_ranks_than_a_matrix_has_is_brought_to_as_many_without_loss(pair: tuple[Any, Any, Any]) -> None:
    a = change_of(pair[1])
    fitted = plain(linear([a] * 8, [0.125] * 8))  # 24 ranks at v, which is 16 x 32
    assert max(fitted.ranks.values()) == 3 and fitted.error < 1e-6


# TIES and DARE


def test_ties_is_pefts_on_the_same_matrices(pair: tuple[Any, Any, Any]) -> None:
    _, first, second = pair
    a, b = change_of(first), change_of(second)
    found = ties([a, b], [0.8, 1.5], density=0.4)
    for path in found.paths():
        zero = torch.zeros_like(found.matrix(path))
        parts = [change.matrix(path) if path in change.paths() else zero for change in (a, b)]
        assert torch.allclose(found.matrix(path), pefts_ties(parts, torch.tensor([0.8, 1.5]), 0.4), atol=1e-6)


def test_ties_by_hand() -> None:
    one = Change(full={"w": torch.tensor([[3.0, -1.0], [0.1, 2.0]])})
    two = Change(full={"w": torch.tensor([[-2.0, -3.0], [0.2, 4.0]])})
    found = ties([one, two], [1.0, 1.0], density=0.5)
    assert torch.equal(found.matrix("w"), torch.tensor([[3.0, -3.0], [0.0, 3.0]]))  # 3 wins over nothing, -3 alone, the mean of 2 and 4


def test_dare_keeps_its_share_rescaled_the_same_for_the_same_seed_and_is_right_on_average() -> None:
    change = Change(full={"w": torch.ones(100, 100)})
    first, again, other = (dare([change], [1.0], density=0.25, seed=seed).matrix("w") for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert set(first.unique().tolist()) == {0.0, 4.0}
    assert float(first.mean()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(dare([change, change], [0.5, 0.5], density=1.0, elect=True).matrix("w"), torch.full((100, 100), 0.5))


# Cut to a rank


@given(rank=st.integers(1, 12), seed=st.integers(0, 10))
def test_the_stated_error_is_the_true_one_and_no_rank_could_do_better(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(20, 8, generator=generator), torch.randn(8, 12, generator=generator)
    low, full = fit(Change(low={"w": (b, a)}), rank=rank), fit(Change(full={"w": b @ a}), rank=rank)
    left, right = low.factors["w"]
    true = float(torch.linalg.norm(b @ a - left @ right) / torch.linalg.norm(b @ a))
    s = torch.linalg.svdvals(b @ a)
    best = math.sqrt(float(s[rank:].square().sum() / s.square().sum()))
    assert low.error == pytest.approx(true, abs=1e-5) and low.error == pytest.approx(best, abs=1e-5)
    assert full.error == pytest.approx(best, abs=1e-5)


def test_without_a_rank_it_takes_as_many_as_there_are() -> None:
    b, a = torch.randn(20, 3), torch.randn(3, 12)
    fitted = fit(Change(full={"w": b @ a}))
    assert fitted.ranks == {"w": 3} and fitted.error < 1e-5


@pytest.mark.parametrize(
    "expression", ["dora(rank=2, sites=[q, down])", "ia3", "pissa(rank=4)", "adalora(rank=2, initial=4)", "lora_plus(rank=4)"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_any_change_of_weights_becomes_a_lora_that_answers_the_same(
    expression: str, family: str, build: Build, ids: Tensor, shake: Shake
) -> None:
    if family == "gpt2":
        if expression == "ia3":
            pytest.skip("its qkv has a bias, which ia3 scales, too")
        expression = expression.replace("sites=[q, down]", "sites=[qkv, down]")
        if "sites" not in expression:
            expression = f"{expression.rstrip(')')}, sites=[qkv])"
    model = build(family)
    adapter = attach(model, expression)
    shake(adapter)
    tuned = model(ids).logits
    fitted = plain(change_of(adapter))
    adapter.detach()
    made = as_lora(model, fitted)
    assert torch.allclose(model(ids).logits, tuned, atol=1e-4)
    assert fitted.error < 1e-5 and made.expression.startswith("lora(")


def test_a_full_fine_tune_becomes_a_lora_and_what_none_can_hold_is_named_and_counted(build: Build, ids: Tensor, shake: Shake) -> None:
    model = build()
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    adapter = attach(model, "full")
    shake(adapter)
    change = change_of(adapter)
    by_hand = difference(model, base)
    assert change.paths() == by_hand.paths() and set(change.other) == set(by_hand.other)
    fitted = fit(change, rank=4)
    assert "model.norm.weight" in fitted.left_out and "model.embed_tokens.weight" in fitted.left_out
    true = whole = 0.0
    for name, parameter in model.named_parameters():
        delta = (parameter - base[name]).detach()
        held = fitted.factors.get(name.removesuffix(".weight"))
        left = delta - held[0] @ held[1] if held is not None else delta
        true, whole = true + float(left.square().sum()), whole + float(delta.square().sum())
    assert fitted.error == pytest.approx(math.sqrt(true / whole), abs=1e-4)


def test_only_linear_maps_changed_then_nothing_is_lost(build: Build, ids: Tensor, shake: Shake) -> None:
    model = build("gpt2")
    adapter = attach(model, "modules(names=['*.attn.c_attn.weight'])")
    shake(adapter)
    tuned = model(ids).logits
    fitted = fit(change_of(adapter))
    adapter.detach()
    as_lora(model, fitted)
    assert fitted.error < 1e-5 and not fitted.left_out
    assert torch.allclose(model(ids).logits, tuned, atol=1e-4)


def test_one_rank_for_all_is_filled_up_with_nothing(pair: tuple[Any, Any, Any], ids: Tensor) -> None:
    model, first, second = pair
    both = model(ids).logits
    fitted = plain(stack([change_of(first), change_of(second)]))
    first.detach()
    second.detach()
    made = as_lora(model, fitted, one_rank=True)
    assert {(form.rank, form.alpha) for form in made.forms.values()} == {(5, 5.0)}
    assert torch.allclose(model(ids).logits, both, atol=1e-5)


# What is refused


def test_what_is_no_change_of_weights_is_refused(build: Build) -> None:
    with pytest.raises(AdapterError, match="tokens of its own"):
        change_of(attach(build(), "prompt(tokens=2)"))
    with pytest.raises(AdapterError, match=r"vectors of new words(.|\n)*merged"):
        change_of(attach(build(), "lora(rank=2)", new_words=[63]))
    with pytest.raises(AdapterError, match="without keeping"):
        change_of(attach(build(), "full", keep_original=False))


def test_adapters_of_another_shape_and_numbers_that_do_not_fit_are_refused(build: Build) -> None:
    a = change_of(attach(build(), "lora(rank=2)"))
    wide = change_of(attach(build(hidden_size=64), "lora(rank=2)"))
    with pytest.raises(AdapterError, match="not of one base: their shapes at"):
        linear([a, wide], [1, 1])
    with pytest.raises(AdapterError, match="need as many weights"):
        linear([a, a], [1])
    with pytest.raises(AdapterError, match="density must lie"):
        ties([a], [1.0], density=0)
    with pytest.raises(AdapterError, match="nothing to combine"):
        average([])
    with pytest.raises(AdapterError, match="rank must be"):
        fit(a, rank=0)
    with pytest.raises(AdapterError, match="the base does not"):
        difference(build(), {})
