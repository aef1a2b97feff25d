"""Prefix Tuning and P-Tuning v2: learned keys and values before those of the text, at every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from families import build_model
from tunesmith.adapters import attach, load_adapter, save_adapter
from tunesmith.core.errors import AdapterError
from tunesmith.engine.virtual import extra_of, prompt_with

N = 5
FAMILIES = ["llama", "gpt2", "qwen2", "qwen3", "gemma3", "phi3", "phi", "gpt_neox", "cohere", "olmo2"]


def ids_of(rows: int = 2, tokens: int = 9) -> Tensor:
    return torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(3))


def with_tokens(ids: Tensor, model: Any) -> Tensor:
    extra = extra_of(model)
    return torch.tensor([prompt_with(row.tolist(), extra) for row in ids])


def run(model: Any, ids: Tensor) -> Tensor:
    out: Tensor = model(input_ids=with_tokens(ids, model))[0]
    return out[:, N:]


def reference(model: Any, ids: Tensor, table: Tensor, heads: int, layers: int) -> Tensor:
    """The model behind a cache that holds the keys and values of `table`, as PEFT puts them there."""
    both = table.view(1, N, 2 * layers, heads, -1).expand(len(ids), -1, -1, -1, -1).permute(2, 0, 3, 1, 4).split(2)
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(both):
        cache.update(keys, values, layer)
    out: Tensor = model(input_ids=ids, past_key_values=cache).logits
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_is_what_the_attention_finds_in_its_cache_with_the_same_gradients(family: str) -> None:
    """Learned keys are neither normed nor rotated, on families that norm and rotate theirs."""
    model, ids = build_model(family), ids_of()
    prefix = attach(model, f"prefix(tokens={N}, hidden=none)").virtual["prefix"]
    sites = prefix.sites
    table = prefix.table.detach().clone().requires_grad_()
    got = run(model, ids)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    (got * weight).sum().backward()
    expected = reference(build_model(family), ids, table, sites.heads, sites.layers)
    (expected * weight).sum().backward()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert prefix.table.grad is not None and table.grad is not None
    torch.testing.assert_close(prefix.table.grad, table.grad, atol=1e-5 * float(table.grad.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("projection", [False, True])
def test_prefix_tuning_computes_what_peft_computes_with_the_same_gradients(family: str, projection: bool) -> None:
    torch.manual_seed(0)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=projection, encoder_hidden_size=12)
    theirs = peft.get_peft_model(build_model(family), config).eval()
    encoder = theirs.prompt_encoder["default"]
    model, ids = build_model(family), ids_of()
    adapter = attach(model, f"prefix(tokens={N}, hidden={12 if projection else 'none'})")
    names = {
        f"ts_virtual.prefix.{name.replace('embedding.weight', 'table').replace('transform', 'mlp')}": p
        for name, p in encoder.named_parameters()
    }
    adapter.load({name: p.detach() for name, p in names.items()})
    expected, got = theirs(input_ids=ids).logits, run(model, ids)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    expected.square().mean().backward()
    got.square().mean().backward()
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, names[name].grad, atol=1e-5, rtol=1e-4)


def test_on_an_encoder_a_prefix_is_keys_and_values_that_every_token_finds_beside_the_text_s() -> None:
    """BERT by hand: softmax(q [P_k; K] / sqrt d) [P_v; V], positions of the text behind the prefix."""
    model, ids = build_model("bert-bare"), ids_of()
    prefix = attach(model, f"ptuning_v2(tokens={N})").virtual["ptuning_v2"]
    got = run(model, ids)
    both = prefix.table.detach().view(N, 2, 2, 4, 8)
    bert = build_model("bert-bare")
    x = bert.embeddings(input_ids=ids, position_ids=torch.arange(N, N + 9)[None])
    for number, layer in enumerate(bert.encoder.layer):
        own = layer.attention.self
        q, k, v = (f(x).view(2, 9, 4, 8).transpose(1, 2) for f in (own.query, own.key, own.value))
        k, v = (torch.cat([both[:, number, part].transpose(0, 1).expand(2, -1, -1, -1), own_], 2) for part, own_ in enumerate((k, v)))
        met = ((q @ k.transpose(-1, -2)) / 8**0.5).softmax(-1) @ v
        inner = layer.attention.output(met.transpose(1, 2).reshape(2, 9, 32), x)
        x = layer.output(layer.intermediate(inner), inner)
    torch.testing.assert_close(got, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("expression", [f"prefix(tokens={N}, hidden=8)", f"ptuning_v2(tokens={N})"])
def test_what_is_saved_can_be_loaded_by_peft_and_by_us(family: str, expression: str, tmp_path: Path, shake: Any) -> None:
    model, ids = build_model(family), ids_of()
    adapter = attach(model, expression)
    shake(adapter)
    expected, state = run(model, ids), adapter.state()
    save_adapter(adapter, tmp_path, base="x", fingerprint="y")
    adapter.detach()
    theirs = peft.PeftModel.from_pretrained(build_model(family), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    again = load_adapter(model, tmp_path, fingerprint="y")
    assert all(torch.equal(value, state[name]) for name, value in again.state().items()), "what resuming needs is there, network and all"
    assert torch.equal(run(model, ids), expected)


def test_what_peft_saved_can_be_loaded_by_us(tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=8)
    theirs = peft.get_peft_model(build_model("qwen2"), config).eval()
    theirs.save_pretrained(str(tmp_path))
    model, ids = build_model("qwen2"), ids_of()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(run(model, ids), theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "family",
    ["roberta", "electra", "distilbert", "modernbert", "mpnet", "roformer", "mixtral", "gpt_oss", "stablelm", "falcon", "gptj", "opt"],
)
def test_nothing_but_the_prefix_is_seen_of_its_tokens_on_families_of_every_kind(family: str) -> None:
    changes = {"sliding_window": None} if family == "mixtral" else {}  # its window of 5 would not reach back to the first token
    model, ids = build_model(family, **changes), ids_of()
    adapter = attach(model, f"prefix(tokens={N}, hidden=none)")
    prefix = adapter.virtual["prefix"]
    before = run(model, ids)
    other = torch.randn(N, prefix.width)
    prefix.vectors = lambda: other  # type: ignore[method-assign]
    torch.testing.assert_close(run(model, ids), before, atol=1e-5, rtol=1e-5)
    before.square().sum().backward()
    grad = prefix.table.grad
    assert grad is not None
    assert bool((grad.view(N, -1).abs().sum(1) > 0).all()), "each token's keys and values are learned"
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        name for name, p in model.named_parameters() if p is prefix.table
    ]


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("albert", "share"),
        ("deberta-v2", "called 2 times"),
        ("mamba", "no place"),
        ("fnet", "no map"),
        ("convbert", "more than their keys"),
        ("qwen3_5", "layer 0"),
        ("nystromformer", "short text"),
    ],
)
def test_a_model_without_a_place_for_it_is_refused_with_the_reason_and_left_as_it_was(family: str, why: str) -> None:
    model = build_model(family)
    before = {path: len(module._forward_hooks) for path, module in model.named_modules()}
    with pytest.raises(AdapterError, match=why) as caught:
        attach(model, "prefix(tokens=4)")
    assert any("prompt" in hint for hint in caught.value.hints)
    assert {path: len(module._forward_hooks) for path, module in model.named_modules()} == before


def test_a_prefix_that_leaves_no_room_for_text_is_refused() -> None:
    for expression in ("prefix(tokens=256)", "prompt(tokens=300)"):
        with pytest.raises(AdapterError, match="256"):
            attach(build_model("gpt2"), expression)


def test_detached_the_base_computes_exactly_what_it_did_and_switched_off_too() -> None:
    model, ids = build_model("llama"), ids_of()
    before = model(input_ids=ids).logits
    adapter = attach(model, "prefix(tokens=5) + lora(rank=2)")
    with adapter.disabled():
        assert torch.equal(model(input_ids=ids).logits, before)
    adapter.detach()
    assert torch.equal(model(input_ids=ids).logits, before)
    attach(model, "prefix(tokens=5)")


def test_other_forms_at_the_key_and_value_sites_leave_the_prefix_as_it_is(shake: Any) -> None:
    """Whatever the order in which they are named."""
    ids, outs = ids_of(), []
    for expression in (
        "prefix(tokens=5, hidden=none) + lora(rank=2, sites=[k, v])",
        "lora(rank=2, sites=[k, v]) + prefix(tokens=5, hidden=none)",
    ):
        model = build_model("llama")
        adapter = attach(model, expression)
        values = {name: torch.linspace(-1, 1, p.numel()).view(p.shape) for name, p in adapter.named_parameters()}
        adapter.load(values)
        outs.append(run(model, ids))
    assert torch.equal(outs[0], outs[1])


def test_two_adapters_with_tokens_stand_beside_one_another_and_one_can_be_switched_off() -> None:
    model, ids = build_model("llama"), ids_of()
    attach(model, f"prefix(tokens={N}, hidden=none)", name="a")
    alone = run(model, ids)
    second = attach(model, "prompt(tokens=3)", name="b")
    assert extra_of(model).tokens == N + 3
    assert not torch.allclose(model(input_ids=with_tokens(ids, model)).logits[:, N + 3 :], alone)
    with second.disabled():
        assert torch.equal(run(model, ids), alone)


def test_in_half_precision_the_parameters_stay_fp32_and_keys_come_close() -> None:
    model = build_model("llama").bfloat16()
    prefix = attach(model, f"prefix(tokens={N}, hidden=none)").virtual["prefix"]
    assert prefix.table.dtype == torch.float32
    assert prefix.sites.turns, "the rotation is seen in half precision too"
    whole = build_model("llama")
    other = attach(whole, f"prefix(tokens={N}, hidden=none)")
    other.load({"ts_virtual.prefix.table": prefix.table.detach()})
    apart = (run(model, ids_of()).float() - run(whole, ids_of())).abs().max()
    assert apart < 0.05 * run(whole, ids_of()).abs().max()
