"""Methods that train the base's own parameters: they choose what they say, refuse what they cannot, and come off without a trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.adapters import Entries, attach, load_adapter, save_adapter
from tunesmith.core.errors import AdapterError

Build = Callable[..., Any]


def trained(model: Any, expression: str) -> set[str]:
    adapter = attach(model, expression)
    names = set(adapter.trained)
    adapter.detach()
    return names


def test_bitfit_trains_every_bias_or_those_of_some_sites_or_layers(build: Build) -> None:
    model = build("gpt2")
    every = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert trained(model, "bitfit") == every
    assert trained(model, "bitfit(sites=[down])") == {f"transformer.h.{n}.mlp.c_proj.bias" for n in range(2)}
    assert trained(model, "bitfit(sites=[qkv, norm], layers=[1])") == {
        f"transformer.h.1.{name}.bias" for name in ("attn.c_attn", "ln_1", "ln_2")
    }
    assert trained(model, "bitfit(layers=[0])") == {name for name in every if ".h.0." in name}


def test_bitfit_on_a_model_without_biases_is_refused_with_what_can_be_trained_instead(build: Build) -> None:
    with pytest.raises(AdapterError) as refusal:
        attach(build(), "bitfit")
    assert refusal.value.what == "adapter 'bitfit' trains biases, and LlamaForCausalLM has none."
    # q and v have 32 and 16 outputs in each of 2 layers; there are 5 norms of 32
    assert refusal.value.hints == ("Nearest that works here:  bias(sites=[q, v])  trains 96 added biases  ·  norms  trains 160 scales",)
    assert attach(build(), "bias(sites=[q, v])").trainable() == 96
    assert attach(build(), "norms").trainable() == 160
    with pytest.raises(AdapterError, match=r"sites asked for have no biases(.|\n)*down"):
        attach(build("phi"), "bitfit(sites=[norm], layers=[])")


def test_norms_are_found_by_their_class_with_shifts_or_without(build: Build) -> None:
    model = build("gpt2")
    norms = {"transformer.ln_f", *(f"transformer.h.{n}.ln_{k}" for n in range(2) for k in (1, 2))}
    assert trained(model, "norms") == {f"{path}.{kind}" for path in norms for kind in ("weight", "bias")}
    assert trained(model, "norms(biases=false)") == {f"{path}.weight" for path in norms}
    assert trained(model, "norms(layers=[1])") == {f"transformer.h.1.ln_{k}.{kind}" for k in (1, 2) for kind in ("weight", "bias")}


def test_added_biases_are_added_and_merge_where_a_bias_is(build: Build, ids: Tensor) -> None:
    model = build("gpt2")
    adapter = attach(model, "bias(sites=[down], layers=[0])")
    form = adapter.forms["transformer.h.0.mlp.c_proj"]
    x = torch.randn(3, 128)
    plain = model.transformer.h[0].mlp.c_proj(x)
    with torch.no_grad():
        form.added.normal_()
    assert torch.allclose(model.transformer.h[0].mlp.c_proj(x), plain + form.added)
    weight, bias = form.merged(torch.zeros(2, 2), None)
    assert torch.equal(bias, form.added) and not weight.any()


# Sparse masks


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_largest_weights_are_trained_and_nothing_else_is_touched(family: str, build: Build, ids: Tensor) -> None:
    model = build(family)
    before = {name: value.clone() for name, value in model.named_parameters()}
    adapter = attach(model, "sparse(share=0.1, mask=magnitude, sites=[down])")
    for path, form in adapter.forms.items():
        assert isinstance(form, Entries)
        weight = before[f"{path}.weight"].flatten().abs()
        assert adapter.trainable() == 2 * round(0.1 * len(weight)) and not form.waits
        assert set(form.index.tolist()) == set(weight.topk(len(form.values)).indices.tolist())
    base = model(ids).logits
    adapter.load({name: torch.full_like(value, 0.5) for name, value in adapter.state().items()})
    assert not torch.allclose(model(ids).logits, base, atol=1e-2)
    for name, value in model.named_parameters():
        path = name.removesuffix(".weight")
        if path in adapter.forms:
            changed = (value != before[name]).flatten().nonzero()[:, 0]
            assert changed.tolist() == adapter.forms[path].index.tolist()
            delta = adapter.forms[path].delta()
            turned = delta.t() if family == "gpt2" else delta
            assert torch.allclose(value - before[name], turned, atol=1e-6)
        elif name in before:
            assert torch.equal(value, before[name])
    adapter.detach()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert torch.equal(model(ids).logits, base)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_entries_get_the_gradient_that_the_whole_weight_has_there(family: str, build: Build, ids: Tensor) -> None:
    model = build(family)
    whole = attach(model, "modules(names=['*.mlp.*'])")
    model(ids).logits.square().sum().backward()
    wanted = {name: p.grad.flatten().clone() for name, p in whole.named_parameters()}
    model.zero_grad()
    whole.detach()
    adapter = attach(model, "sparse(share=0.2, mask=random, sites=[down])")
    model(ids).logits.square().sum().backward()
    for path, form in adapter.forms.items():
        assert isinstance(form, Entries)
        theirs = wanted[f"{path}.weight"][form.index]
        assert torch.allclose(form.values.grad, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert not any(p.grad is not None for name, p in model.named_parameters() if ".ts_" not in name)


@pytest.mark.parametrize("mask", ["fisher", "gradient"])
def test_masks_from_gradients_take_the_entries_that_single_samples_say(mask: str, build: Build, ids: Tensor) -> None:
    model = build()
    whole = attach(model, "modules(names=['model.layers.0.mlp.down_proj'])")
    seen = torch.zeros(32 * 48)
    for row in ids:
        model.zero_grad()
        model(row[None]).logits.square().sum().backward()
        (gradient,) = (p.grad.flatten() for _, p in whole.named_parameters())
        seen += gradient.square() if mask == "fisher" else gradient
    model.zero_grad()
    whole.detach()
    adapter = attach(model, f"sparse(share=0.1, mask={mask}, sites=[down], layers=[0])")
    (form,) = adapter.forms.values()
    assert isinstance(form, Entries) and adapter.waits
    for row in ids:
        form.watch(True)
        model(row[None]).logits.square().sum().backward()
    form.watch(False)
    assert not adapter.waits
    assert len(set(form.index.tolist()) ^ set(seen.abs().topk(len(form.index)).indices.tolist())) <= 2  # ties within rounding


def test_only_changed_entries_are_stored_and_a_file_of_others_is_refused(build: Build, tmp_path: Path) -> None:
    model = build()
    adapter = attach(model, "sparse(share=0.01, mask=random, sites=[q, down])")
    save_adapter(adapter, tmp_path, base="tiny", fingerprint="")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in stored} == {"index", "values"}
    assert sum(value.numel() for name, value in stored.items() if name.endswith("values")) == adapter.trainable() == 2 * (10 + 15)
    adapter.detach()
    from safetensors.torch import save_file

    for broken in ({"index": torch.tensor([10**6])}, {"index": torch.tensor([-1])}, {"index": torch.tensor([1, 1])}):
        index, values = broken["index"].to(torch.int32), torch.zeros(len(broken["index"]))
        damaged = {name: index.clone() if name.endswith("index") else values.clone() for name in stored}
        save_file(damaged, tmp_path / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match="do not fit a weight of"):
            load_adapter(model, tmp_path)
    assert attach(model, "lora(rank=2)").forms  # the model is free again


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("sparse(mask=largest)", r"unknown mask 'largest'"),
        ("sparse(share=0)", "share must lie above 0"),
        ("sparse(samples=0)", "samples must be a whole number"),
        ("sparse(sites=[head])", "cannot listen at the vocabulary head"),
        ("diff_pruning(penalty=-1)", "penalty must be"),
        ("diff_pruning(gate_rate=0)", "gate_rate must be"),
        ("sparse + lora", "in place and adds forms"),
    ],
)
def test_options_that_do_not_fit_are_refused(expression: str, message: str, build: Build) -> None:
    with pytest.raises(AdapterError, match=message):
        attach(build(), expression)


# Diff Pruning


def test_diff_pruning_adds_gated_differences_and_its_penalty_counts_open_gates(build: Build) -> None:
    model = build()
    adapter = attach(model, "diff_pruning(sites=[q], layers=[0], penalty=0.01)")
    (form,) = adapter.forms.values()
    x, site = torch.randn(4, 32), model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        form.w.normal_()
        form.gate.copy_(torch.linspace(-6, 6, 32 * 32))
        z = (3 * torch.sigmoid(form.gate) - 1.5).clamp(0, 1).view(32, 32)
        assert torch.allclose(site(x), x @ (site.weight + z * form.w).T, atol=1e-5)
        assert torch.allclose(form.delta(), z * form.w)
        assert torch.allclose(adapter.penalty(), 0.01 * torch.sigmoid(form.gate).sum())
        form.gate.fill_(-6.0)  # what was computed before an update is not used after it
        assert torch.allclose(site(x), x @ site.weight.T, atol=1e-6)
    assert adapter.rates() == {"model.layers.0.self_attn.q_proj.gate": 500.0}


def test_gates_are_drawn_in_training_and_have_the_hard_concrete_distribution(build: Build) -> None:
    adapter = attach(build(), "diff_pruning(sites=[q], layers=[0])")
    (form,) = adapter.forms.values()
    form.train()
    with torch.no_grad():
        form.gate.fill_(0.5)
        z = torch.cat([form._z(form.gate) for _ in range(40)])
    # P(z > 0) = sigmoid(a), and P(z = 1) = P(s > 5 / 6) = sigmoid(a - log 5), by the formulas of the paper
    assert abs(float((z > 0).float().mean()) - float(torch.sigmoid(torch.tensor(0.5)))) < 0.01
    assert abs(float((z == 1).float().mean()) - float(torch.sigmoid(torch.tensor(0.5) - torch.log(torch.tensor(5.0))))) < 0.01


@pytest.mark.parametrize("structured", ["false", "true"])
def test_a_pruned_difference_is_stored_by_its_entries_and_comes_back_the_same(
    structured: str, build: Build, ids: Tensor, tmp_path: Path
) -> None:
    model = build()
    adapter = attach(model, f"diff_pruning(sites=[q, v], structured={structured})")
    with torch.no_grad():
        for form in adapter.forms.values():
            form.w.normal_(std=0.3)
            form.gate.copy_(torch.randn_like(form.gate) * 3 - 4)
        said = model(ids).logits
    open_gates = sum(int(form.delta().count_nonzero()) for form in adapter.forms.values())
    assert 0 < open_gates < adapter.trainable() / 10
    save_adapter(adapter, tmp_path, base="tiny", fingerprint="")
    adapter.detach()
    assert sum(v.numel() for n, v in load_file(tmp_path / "adapter_model.safetensors").items() if n.endswith("values")) == open_gates
    load_adapter(model, tmp_path)
    assert torch.allclose(model(ids).logits, said, atol=1e-5)
