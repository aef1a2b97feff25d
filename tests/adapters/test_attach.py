"""Adapters change what they are meant to change, nothing else, and come off without a trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.adapters import METHODS, attach, find_sites, head_weight, plan, select
from tunesmith.adapters.heads import Way
from tunesmith.core.errors import AdapterError, SpecError

Build = Callable[..., Any]
Shake = Callable[[Any], None]

IN_PLACE = ["full", "layers(last=1)", "layers(only=[0])", "modules(names=[mlp])", "modules(names=['model.norm'])"]


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if ".ts_" not in name}


def with_gradient(model: Any, ids: Tensor) -> set[str]:
    model.zero_grad()
    model(ids).logits.float().log_softmax(-1)[..., 5].sum().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None and bool(parameter.grad.any())}


# Sites


def test_sites_of_a_llama_are_found_with_their_layer_width_and_path(build: Build) -> None:
    sites = find_sites(build())
    assert [site.name for site in sites if site.layer == 1] == ["q", "k", "v", "o", "gate", "up", "down"]
    down = next(site for site in sites if site.name == "down")
    assert (down.path, down.inputs, down.outputs) == ("model.layers.0.mlp.down_proj", 48, 32)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("gpt2", "qkv o up down"),
        ("phi3", "qkv o gate_up down"),
        ("gpt_neox", "qkv o up down"),
        ("phi", "q k v up down"),
        ("mixtral", "q k v o"),
    ],
)
def test_every_familys_linear_maps_have_the_same_few_names(family: str, names: str, build: Build) -> None:
    found = list(dict.fromkeys(site.name for site in find_sites(build(family))))
    assert set(names.split()) <= set(found)
    assert "gate" not in found or family not in ("gpt2", "mixtral")


def test_a_site_the_model_lacks_is_refused_with_the_one_it_is_fused_into(build: Build) -> None:
    with pytest.raises(AdapterError, match=r"no site 'q'(.|\n)*sites=\[qkv\]"):
        attach(build("gpt2"), "lora(sites=[q, v])")
    with pytest.raises(AdapterError, match=r"no site 'gate_up'(.|\n)*sites here: q, k"):
        attach(build(), "lora(sites=[gate_up])")


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("lorra", r"unknown adapter method 'lorra'(.|\n)*lora"),
        ("lora(rnk=4)", r"unknown option of adapter lora 'rnk'(.|\n)*rank"),
        ("lora(sites=[qq])", r"unknown site 'qq'(.|\n)*q"),
        ("lora(rank=0)", "rank must be a whole number"),
        ("lora(rank=2.5)", "rank must be a whole number"),
        ("lora(rank=true)", "rank must be a whole number"),
        ("lora(rank=33)", r"rank 33 is larger than site q allows(.|\n)*rank=32"),
        ("lora(rank=17)", r"rank 17 is larger than site v allows \(16 x 32\)(.|\n)*rank=16"),
        ("lora(alpha=0)", "alpha must be"),
        ("lora(alpha=high)", "adapter lora"),
        ("lora(dropout=1)", "dropout must lie"),
        ("lora(sites=[])", "a list of names"),
        ("lora(sites=[1])", "a list of names"),
        ("lora(layers=[2])", "layer 2 does not exist: the model has layers 0 to 1"),
        ("lora(layers=2)", "adapter lora"),
        ("lora(layers=[])", "selects no site"),
        ("lora(sites=['model.layers.0.self_attn.q_proj'], layers=[1])", "layers= cannot be given"),
        ("lora(sites=['model.layers.0.self_attn'])", "no linear map at"),
        ("lora(sites=[q]) + lora(sites=[q, v])", "listen at the same site"),
        ("layers", "exactly one of"),
        ("layers(last=1, only=[0])", "exactly one of"),
        ("layers(last=3)", r"more than the model's 2 layers(.|\n)*last=2"),
        ("layers(last=0)", "at least 1"),
        ("layers(only=[])", "selects no parameter"),
        ("layers(only=[7])", "layer 7 does not exist"),
        ("modules(names=[nothing])", r"matches 'nothing'(.|\n)*Paths look like"),
        ("modules(names=[])", "a list of names"),
        ("full + lora", "in place and adds forms"),
        ("lora(", "cannot be read"),
    ],
)
def test_an_expression_that_cannot_work_is_refused_with_the_reason_and_leaves_no_trace(expression: str, message: str, build: Build) -> None:
    model = build()
    with pytest.raises((AdapterError, SpecError), match=message):
        attach(model, expression)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(getattr(module, "ts_active", ()) for module in model.modules())
    attach(model, "lora(rank=2)")  # the name is free again


def test_quantised_parameters_cannot_be_trained_in_place_and_experts_are_no_sites(build: Build) -> None:
    model = build()
    model.model.norm.weight = torch.nn.Parameter(torch.zeros(32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"quantised(.|\n)*lora"):
        attach(model, "full")
    assert not any("experts" in site.path for site in find_sites(build("mixtral")))


def test_every_method_says_where_it_comes_from_and_takes_its_defaults() -> None:
    assert {"lora", "rslora", "full", "layers", "modules"} <= set(METHODS)
    assert all(function.__doc__ for _, function in METHODS.items())
    assert plan("lora")[0].form == {"rank": 16, "alpha": 32.0, "dropout": 0.0, "stabilised": False}


# Low rank


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gpt_neox"])
def test_lora_starts_as_the_base_and_detaching_gives_it_back_bit_for_bit(family: str, build: Build, ids: Tensor, shake: Shake) -> None:
    model = build(family)
    before, kept = model(ids).logits, weights(model)
    names = [name for name, _ in model.named_parameters()]
    adapter = attach(model, "lora(rank=4, sites=all)")
    assert torch.equal(model(ids).logits, before)
    shake(adapter)
    assert not torch.allclose(model(ids).logits, before, atol=1e-2)
    adapter.detach()
    assert torch.equal(model(ids).logits, before)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(torch.equal(value, kept[name]) for name, value in weights(model).items())


def test_lora_adds_scaled_b_a_x_to_its_site(build: Build) -> None:
    for expression, scale in (("lora(rank=4, alpha=10, sites=[q])", 2.5), ("rslora(rank=4, alpha=10, sites=[q])", 5.0)):
        model = build()
        site = select(model, "q", [0])[0]
        x = torch.randn(3, 32)
        plain = site.module(x)
        adapter = attach(model, expression)
        form = adapter.forms[site.path]
        with torch.no_grad():
            form.b.normal_()
        assert torch.allclose(site.module(x) - plain, scale * x @ form.a.T @ form.b.T, atol=1e-5)
        assert form.a.abs().max() <= math.sqrt(1 / 32) + 1e-6  # kaiming uniform with a = sqrt 5


def test_gradient_reaches_the_adapter_and_nothing_else(build: Build, ids: Tensor, shake: Shake) -> None:
    model = build()
    adapter = attach(model, "lora(rank=4, sites=[q, down], layers=[1])")
    shake(adapter)
    assert sorted(adapter.forms) == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    reached = with_gradient(model, ids)
    assert reached == {f"{path}.ts_forms.default.{part}" for path in adapter.forms for part in "ab"}
    assert adapter.trainable() == 4 * (32 + 32) + 4 * (48 + 32)


def test_negative_layers_count_from_the_end(build: Build) -> None:
    assert sorted(attach(build(), "lora(rank=2, sites=[q], layers=[-1])").forms) == ["model.layers.1.self_attn.q_proj"]


def test_two_terms_may_have_ranks_of_their_own_and_paths_mix_with_names(build: Build) -> None:
    adapter = attach(build(), "lora(rank=2, sites=[q]) + lora(rank=5, sites=[v])")
    assert {form.rank for form in adapter.forms.values()} == {2, 5}
    mixed = attach(build(), "lora(rank=2, sites=['model.layers.0.self_attn.k_proj', q])")
    assert len(mixed.forms) == 3


def test_initial_values_depend_on_the_seed_only(build: Build) -> None:
    first, again, other = (attach(build(), "lora", seed=seed).state() for seed in (1, 1, 2))
    torch.manual_seed(99)
    moved = attach(build(), "lora", seed=1).state()
    path = "model.layers.0.self_attn.q_proj.a"
    assert torch.equal(first[path], again[path]) and torch.equal(first[path], moved[path])
    assert not torch.equal(first[path], other[path])
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    attach(build(), "lora")
    assert torch.equal(torch.rand(1), drawn)  # attaching takes nothing from the caller's numbers


def test_dropout_is_on_only_while_training(build: Build, ids: Tensor, shake: Shake) -> None:
    model = build()
    adapter = attach(model, "lora(rank=4, dropout=0.5)")
    shake(adapter)
    calm = model(ids).logits
    assert torch.equal(model(ids).logits, calm)
    adapter.train()
    assert not torch.equal(model(ids).logits, calm)
    adapter.train(False)
    assert torch.equal(model(ids).logits, calm)


def test_adapter_parameters_are_fp32_on_a_bf16_base_and_its_answers_stay_bf16(build: Build, ids: Tensor) -> None:
    model = build().to(torch.bfloat16)
    adapter = attach(model, "lora(rank=4)", new_words=[63])
    assert {parameter.dtype for _, parameter in adapter.named_parameters()} == {torch.float32}
    assert model(ids).logits.dtype == torch.bfloat16
    with_gradient(model, ids)
    assert all(parameter.grad is not None for name, parameter in adapter.named_parameters())


# On and off


@pytest.mark.parametrize("expression", ["lora(rank=4)", "full", "layers(last=1)"])
def test_disabled_shows_the_base_and_then_the_adapter_again_also_nested_and_after_an_error(
    expression: str, build: Build, ids: Tensor, shake: Shake
) -> None:
    model = build("llama-tied")
    base = model(ids).logits
    adapter = attach(model, expression, new_words=[62, 63])
    shake(adapter)
    tuned = model(ids).logits
    with adapter.disabled():
        assert torch.equal(model(ids).logits, base)
        with adapter.disabled():
            assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, base)
    assert torch.equal(model(ids).logits, tuned)
    with pytest.raises(ZeroDivisionError), adapter.disabled():
        _ = 1 / 0
    assert torch.equal(model(ids).logits, tuned)
    with adapter.disabled():
        adapter.detach()
    assert torch.equal(model(ids).logits, base)


def test_of_two_adapters_each_can_be_heard_alone_and_both_in_any_order_of_switching(build: Build, ids: Tensor, shake: Shake) -> None:
    model = build()
    first = attach(model, "lora(rank=4)", name="first")
    shake(first)
    alone = model(ids).logits
    second = attach(model, "lora(rank=2, sites=[q, o])", name="second", seed=3)
    shake(second)
    both = model(ids).logits
    with second.disabled():
        assert torch.equal(model(ids).logits, alone)
    with first.disabled():
        assert not torch.equal(model(ids).logits, both)
    assert torch.equal(model(ids).logits, both)  # bit for bit: sums keep their order
    first.detach()
    with second.disabled():
        assert torch.equal(model(ids).logits, build()(ids).logits)


def test_a_name_is_given_once_and_has_no_dot(build: Build) -> None:
    model = build()
    attach(model, "lora", name="one")
    with pytest.raises(AdapterError, match="named 'one' is attached already"):
        attach(model, "lora", name="one")
    assert len(model.model.layers[0].self_attn.q_proj.ts_active) == 1
    for name in ("", "a.b"):
        with pytest.raises(AdapterError, match="cannot be the name"):
            attach(model, "lora", name=name)


@pytest.mark.parametrize("name", ["train", "keys", "training"])
def test_an_adapter_may_be_called_like_a_method_of_a_module(build: Build, ids: Tensor, shake: Shake, name: str) -> None:
    """Names come from folders: `demo/train` is one of them."""
    model = build()
    base = model(ids).logits
    adapter = attach(model, "lora(rank=2) + prompt(tokens=2) + head", name=name, new_words=[62, 63])
    adapter.give_head(32, ["bad", "good"], Way("last"))
    shake(adapter)
    assert not torch.equal(model(ids).logits, base)
    model.eval(), model.train(), model.eval()
    adapter.detach()
    assert torch.equal(model(ids).logits, base)


def test_state_and_load_are_inverse_and_refuse_another_adapters_values(build: Build, ids: Tensor, shake: Shake) -> None:
    model, other = build(), build()
    adapter, empty = attach(model, "lora(rank=4)"), attach(other, "lora(rank=4)", seed=8)
    shake(adapter)
    empty.load(adapter.state())
    assert torch.equal(model(ids).logits, other(ids).logits)
    with pytest.raises(AdapterError, match="differ in"):
        empty.load({})
    with pytest.raises(AdapterError, match="has shape"):
        empty.load({name: value[:1] for name, value in adapter.state().items()})


def test_a_frozen_adapter_still_speaks_but_asks_for_no_gradient(build: Build, ids: Tensor, shake: Shake) -> None:
    model = build()
    adapter = attach(model, "lora(rank=4)")
    shake(adapter)
    tuned = model(ids).logits
    adapter.freeze()
    assert torch.equal(model(ids).logits, tuned) and not model(ids).logits.requires_grad


# In place


@pytest.mark.parametrize("expression", IN_PLACE)
def test_in_place_methods_train_their_own_parameters_and_detach_to_the_bit(
    expression: str, build: Build, ids: Tensor, shake: Shake
) -> None:
    model = build()
    before, kept = model(ids).logits, weights(model)
    adapter = attach(model, expression)
    assert with_gradient(model, ids) == set(adapter.trained) == {n for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([parameter for _, parameter in adapter.named_parameters()], lr=0.1)
    optimizer.step()
    changed = {name for name, value in weights(model).items() if not torch.equal(value, kept[name])}
    assert changed == set(adapter.trained)
    adapter.detach()
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(value, kept[name]) for name, value in weights(model).items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_in_place_methods_reach_what_their_names_say(build: Build) -> None:
    model = build()
    assert set(attach(model, "layers(only=[-1])").trained) == {n for n, _ in model.named_parameters() if ".layers.1." in n}
    assert set(attach(build(), "modules(names=['*.norm'])").trained) == {"model.norm.weight"}
    assert set(attach(build(), "modules(names=['layers.0.mlp', lm_head])").trained) == {
        "lm_head.weight",
        *(f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }


def test_without_the_original_weights_the_base_is_not_pretended_to_be_back(build: Build, shake: Shake) -> None:
    adapter = attach(build(), "full", keep_original=False)
    shake(adapter)
    for way_back in (adapter.detach, lambda: adapter.disabled().__enter__()):
        with pytest.raises(AdapterError, match="without keeping the weights"):
            way_back()


def test_in_place_training_leaves_other_adapters_parameters_alone(build: Build) -> None:
    model = build()
    attach(model, "lora(rank=2)", name="first", new_words=[63]).freeze()
    second = attach(model, "full", name="second")
    assert not any("ts_" in path for path in second.trained)


# New words


@pytest.mark.parametrize("family", ["llama", "llama-tied", "phi", "gemma3", "gpt2"])
def test_new_words_are_trained_at_both_ends_as_if_their_rows_were_in_the_tables(
    family: str, build: Build, ids: Tensor, shake: Shake
) -> None:
    model, oracle = build(family), build(family)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before, kept = model(ids).logits, weights(model)
    adapter = attach(model, "lora(rank=2, sites=all)", new_words=[63, 61])
    assert torch.allclose(model(ids).logits, before, atol=1e-6)  # the same product, over fewer rows at once
    assert len(adapter.rows) == (1 if tied else 2)
    with torch.no_grad():
        for number, rows in enumerate(adapter.rows.values()):
            rows.rows.add_(torch.linspace(-0.3, 0.4, rows.rows.numel()).view_as(rows.rows) * (number + 1))
        tables = [oracle.get_input_embeddings().weight] + ([] if tied else [oracle.get_output_embeddings().weight])
        for table, rows in zip(tables, adapter.rows.values(), strict=True):
            table[[63, 61]] = rows.rows
    assert torch.allclose(model(ids).logits, oracle(ids).logits, atol=1e-5)
    assert all(torch.equal(value, kept[name]) for name, value in weights(model).items())
    with torch.no_grad():
        assert torch.equal(head_weight(model.get_output_embeddings()), oracle.get_output_embeddings().weight)

    reached = with_gradient(model, ids)
    oracle.requires_grad_(True)
    with_gradient(oracle, ids)
    assert {name for name in reached if "ts_forms" not in name} == {f"{path}.ts_rows.default.rows" for path in adapter.rows}
    for table, rows in zip(tables, adapter.rows.values(), strict=True):
        assert torch.allclose(rows.rows.grad, table.grad[[63, 61]], atol=1e-4)
    adapter.detach()
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(head_weight(model.get_output_embeddings()), model.get_output_embeddings().weight)
    assert weights(model).keys() == kept.keys()


def test_words_of_two_adapters_on_one_base_do_not_mix(build: Build, ids: Tensor, shake: Shake) -> None:
    model = build("llama-tied")
    base = model(ids).logits
    first = attach(model, "lora(rank=2)", name="first", new_words=[63])
    shake(first)
    heard = model(ids).logits
    with first.disabled():
        second = attach(model, "lora(rank=2)", name="second", new_words=[63])
        assert torch.allclose(model(ids).logits, base, atol=1e-6)
        shake(second)
    with second.disabled():
        assert torch.equal(model(ids).logits, heard)
    second.detach()
    assert torch.equal(model(ids).logits, heard)


def test_a_table_trained_in_place_needs_no_rows_and_the_other_one_gets_them(build: Build, ids: Tensor) -> None:
    assert attach(build(), "full", new_words=[63]).rows == {}
    assert attach(build("llama-tied"), "modules(names=[embed_tokens])", new_words=[63]).rows == {}
    model = build()
    adapter = attach(model, "modules(names=[lm_head])", new_words=[63])
    assert list(adapter.rows) == ["model.embed_tokens"]
    assert with_gradient(model, ids) == {"lm_head.weight", "model.embed_tokens.ts_rows.default.rows"}
    assert head_weight(model.lm_head) is model.lm_head.weight


def test_words_beyond_the_table_are_refused(build: Build) -> None:
    model = build()
    with pytest.raises(AdapterError, match="vectors for 0 to 63"):
        attach(model, "lora", new_words=[63, 64])
    assert not any("ts_" in name for name, _ in model.named_parameters())
