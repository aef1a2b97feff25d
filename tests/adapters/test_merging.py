"""A merged adapter answers as it did beside the base, on every make of linear map, and unmerging gives the base back to the bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.adapters import attach, merge, unmerge, untie
from tunesmith.core.errors import AdapterError

Build = Callable[..., Any]
Shake = Callable[[Any], None]


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if ".ts_" not in name}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "phi3", "gpt_neox"])
@pytest.mark.parametrize(
    "expression",
    [
        "lora(rank=4, {})",
        "rslora(rank=4, {})",
        "pissa(rank=4, {})",
        "dora(rank=4, {})",
        "adalora(rank=2, initial=4, {})",
        "ia3({}, inputs=[])",
    ],
)
def test_merged_answers_as_unmerged_and_unmerging_restores_every_bit(
    family: str, expression: str, build: Build, ids: Tensor, shake: Shake
) -> None:
    model = build(family)
    before, kept = model(ids).logits, weights(model)
    adapter = attach(model, expression.format("sites=all"))
    shake(adapter)
    tuned = model(ids).logits
    merge(adapter)
    assert torch.allclose(model(ids).logits, tuned, atol=2e-5)
    assert not any(module.ts_active or module.ts_before for module in model.modules() if hasattr(module, "ts_forms"))
    with adapter.disabled():
        assert torch.equal(model(ids).logits, before)
    assert torch.allclose(model(ids).logits, tuned, atol=2e-5)
    unmerge(adapter)
    assert same(weights(model), kept)
    assert torch.equal(model(ids).logits, tuned)
    merge(adapter)
    adapter.detach()
    assert same(weights(model), kept) and torch.equal(model(ids).logits, before)


def test_what_scales_inputs_and_outputs_and_lora_at_one_site_merge_in_the_order_in_which_they_listen(
    build: Build, ids: Tensor, shake: Shake
) -> None:
    model = build("phi")
    adapter = attach(model, "lora(rank=4, sites=[v, down]) + ia3(sites=[k, v, down])")
    shake(adapter)
    tuned = model(ids).logits
    merge(adapter)
    assert torch.allclose(model(ids).logits, tuned, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_vectors_of_new_words_are_merged_into_their_tables(family: str, build: Build, ids: Tensor, shake: Shake) -> None:
    model = build(family)
    before = model(ids).logits
    adapter = attach(model, "lora(rank=2)", new_words=[62, 63])
    shake(adapter)
    tuned = model(ids).logits
    merge(adapter)
    assert torch.allclose(model(ids).logits, tuned, atol=1e-5)
    adapter.detach()
    assert torch.equal(model(ids).logits, before)


def test_a_bf16_base_is_merged_in_fp32_and_the_rounding_is_stated(build: Build, ids: Tensor, shake: Shake) -> None:
    model = build().to(torch.bfloat16)
    adapter = attach(model, "lora(rank=4)")
    shake(adapter)
    site = model.model.layers[0].self_attn.q_proj
    expected = (site.weight.float() + adapter.forms["model.layers.0.self_attn.q_proj"].delta()).to(torch.bfloat16)
    lost = merge(adapter)
    assert torch.equal(site.weight, expected) and site.weight.dtype == torch.bfloat16
    assert 1e-4 < lost < 0.2
    assert merge(attach(build(), "lora(rank=4)")) == 0.0  # nothing learned, nothing lost


def test_without_the_original_weights_there_is_no_way_back_and_it_is_said(build: Build, ids: Tensor, shake: Shake) -> None:
    model = build()
    adapter = attach(model, "lora(rank=4)")
    shake(adapter)
    tuned = model(ids).logits
    merge(adapter, keep_original=False)
    assert torch.allclose(model(ids).logits, tuned, atol=1e-5)
    for way_back in (lambda: unmerge(adapter), adapter.detach):
        with pytest.raises(AdapterError, match="without keeping the weights"):
            way_back()


def test_a_tied_head_is_refused_until_it_has_a_table_of_its_own(build: Build, ids: Tensor, shake: Shake) -> None:
    model = build("llama-tied")
    adapter = attach(model, "lora(rank=4, sites=[head])")
    shake(adapter)
    tuned, kept = model(ids).logits, weights(model)
    with pytest.raises(AdapterError, match=r"also model.embed_tokens.weight(.|\n)*untie"):
        merge(adapter)
    assert same(weights(model), kept)
    untie(model)
    merge(adapter)
    assert torch.allclose(model(ids).logits, tuned, atol=1e-5)
    assert torch.equal(model.get_input_embeddings().weight, kept["model.embed_tokens.weight"])


@pytest.mark.parametrize("expression", ["prompt(tokens=3)", "prefix(tokens=3)"])
def test_tokens_of_its_own_cannot_be_merged(expression: str, build: Build) -> None:
    with pytest.raises(AdapterError, match="cannot be merged: it is tokens of its own"):
        merge(attach(build(), expression))


def test_a_form_that_is_no_change_of_weights_is_refused_and_nothing_is_touched(build: Build, ids: Tensor, shake: Shake) -> None:
    model = build()
    adapter = attach(model, "lora(rank=2, sites=[q])")
    form = adapter.forms["model.layers.1.self_attn.q_proj"]
    form.__dict__["merged"] = lambda weight, bias: None
    shake(adapter)
    kept = weights(model)
    with pytest.raises(AdapterError, match=r"depends on the input(.|\n)*leave the adapter on"):
        merge(adapter)
    assert same(weights(model), kept) and not adapter.merged


def test_quantised_weights_are_not_merged_into(build: Build) -> None:
    model = build()
    adapter = attach(model, "lora(rank=2, sites=[q])")
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight = torch.nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match="is quantised, and rounding would change the answers"):
        merge(adapter)


def test_of_two_adapters_at_one_site_those_that_add_up_are_merged_and_others_refused(build: Build, ids: Tensor, shake: Shake) -> None:
    model = build()
    first, second = attach(model, "lora(rank=4)", name="first"), attach(model, "lora(rank=2)", name="second", seed=3)
    shake(first)
    shake(second)
    both = model(ids).logits
    merge(first)
    assert torch.allclose(model(ids).logits, both, atol=1e-5)
    merge(second)
    assert torch.allclose(model(ids).logits, both, atol=1e-5)
    unmerge(second)
    unmerge(first)
    assert torch.equal(model(ids).logits, both)
    attach(model, "dora(rank=2, sites=[q])", name="third")
    with pytest.raises(AdapterError, match="Directed form does not add up"):
        merge(first)


def test_merging_twice_and_unmerging_what_is_not_merged_are_refused(build: Build) -> None:
    adapter = attach(build(), "lora(rank=2)")
    with pytest.raises(AdapterError, match="is not merged"):
        unmerge(adapter)
    merge(adapter)
    with pytest.raises(AdapterError, match="is merged already"):
        merge(adapter)


@pytest.mark.parametrize("expression", ["houlsby(reduction=4)", "gate(of='lora(rank=3)')"])
def test_bottlenecks_and_gates_cannot_be_merged_and_the_reason_is_said(expression: str, build: Build) -> None:
    model = build()
    kept = weights(model)
    with pytest.raises(AdapterError, match=r"depends on the input, which no weight holds(.|\n)*leave the adapter on"):
        merge(attach(model, expression))
    assert same(weights(model), kept)


def test_what_writes_into_the_base_by_nature_is_merged_already(build: Build, ids: Tensor) -> None:
    model = build()
    adapter = attach(model, "bias(sites=[q])")
    with pytest.raises(AdapterError, match=r"adds a bias at .*, where this model has none"):
        merge(adapter)
    assert merge(attach(build(), "full")) == 0.0
