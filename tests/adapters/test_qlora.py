"""QLoRA: LoRA on 4-bit bases is PEFT's on the same weights, and what the rest of the catalogue does there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import VOCABULARY, build_model
from tunesmith.adapters import attach, find_sites, load_adapter, merge, save_adapter, unmerge
from tunesmith.adapters.counting import counts
from tunesmith.adapters.forms import LowRank
from tunesmith.adapters.sitetable import site_table
from tunesmith.bases.quantise import FourBit, dequantise, quantise
from tunesmith.core.errors import AdapterError, BaseError
from tunesmith.engine import compiling
from tunesmith.engine.compiling import compiled
from tunesmith.engine.memory import recomputing

pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")

SIZES = {"hidden_size": 64, "intermediate_size": 128}
"""Whole blocks a row: bitsandbytes' own map, which PEFT uses, takes wrong scales otherwise."""


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model() -> Any:
    made = build_model("llama", **SIZES)
    quantise(made)
    return made


def shake(adapter: Any) -> None:
    generator = torch.Generator().manual_seed(11)
    adapter.load({name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in adapter.state().items()})


def gradients(model: Any, ids: Tensor, adapter: Any) -> dict[str, Tensor]:
    named = dict(adapter.named_parameters())
    out = model(input_ids=ids).logits
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return dict(zip(named, torch.autograd.grad((out * weights).sum(), list(named.values())), strict=True))


def by_peft(folder: Path, ids: Tensor, adapter: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of the peft library on transformers' own 4-bit model, with an adapter from a file."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits, dtype=torch.float32, device_map={"": "cpu"})
    theirs = PeftModel.from_pretrained(theirs, adapter, is_trainable=True).train()  # its maps compute in bf16 in evaluation
    out = theirs(input_ids=ids).logits
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    return out.detach(), {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}


def test_outputs_and_gradients_are_pefts_on_the_same_weights_and_it_reads_our_files(model: Any, ids: Tensor, tmp_path: Path) -> None:
    build_model("llama", **SIZES).save_pretrained(tmp_path / "base")
    adapter = attach(model, "qlora(rank=4, dropout=0)")
    shake(adapter)
    (tmp_path / "adapter").mkdir()
    save_adapter(adapter, tmp_path / "adapter", base="tiny", fingerprint="")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == ("LORA", 4, 16, False)
    logits, theirs = by_peft(tmp_path / "base", ids, tmp_path / "adapter")
    assert torch.allclose(model(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-5)
    ours = gradients(model, ids, adapter)
    assert len(ours) == len(theirs) == 28
    for name, value in ours.items():
        path, _, part = name.rpartition(".")
        other = theirs[f"base_model.model.{path}.lora_{part.upper()}.default.weight"]
        assert torch.allclose(value, other, rtol=1e-5, atol=1e-5 * max(1.0, float(other.abs().max()))), name


def test_it_begins_as_the_quantised_base_with_the_papers_settings_at_every_linear_map(ids: Tensor) -> None:
    model = build_model("llama", **SIZES, num_key_value_heads=4)  # wide enough for 64 ranks
    quantise(model)
    with torch.no_grad():
        base = model(input_ids=ids).logits
        adapter = attach(model, "qlora")
        assert torch.equal(model(input_ids=ids).logits, base)
    forms = list(adapter.forms.values())
    assert len(forms) == 14 and all(isinstance(form, LowRank) and (form.rank, form.alpha, form.dropout) == (64, 16, 0.1) for form in forms)
    adapter.detach()


def test_saved_and_loaded_it_says_the_same(model: Any, ids: Tensor, tmp_path: Path) -> None:
    adapter = attach(model, "qlora(rank=4)")
    shake(adapter)
    save_adapter(adapter, tmp_path, base="tiny", fingerprint="f")
    with torch.no_grad():
        said = model(input_ids=ids).logits
        adapter.detach()
        load_adapter(model, tmp_path, fingerprint="f")
        assert torch.equal(model(input_ids=ids).logits, said)


def test_a_base_that_is_not_quantised_is_refused_with_the_way_on() -> None:
    with pytest.raises(AdapterError, match="kept in 4 bits") as refusal:
        attach(build_model("llama"), "qlora(rank=4)")
    assert "base.quantise=nf4" in refusal.value.hints[0]


@pytest.mark.parametrize(
    "expression", ["full", "layers(last=1)", "modules(names=[q_proj])", "sparse(sites=[q])", "dora(rank=2)", "pissa(rank=2)"]
)
def test_what_needs_the_weights_themselves_is_refused_and_leaves_the_model_as_it_was(model: Any, ids: Tensor, expression: str) -> None:
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with pytest.raises(AdapterError, match=r"quantised(.|\n)*lora"):
            attach(model, expression)
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("expression", ["lora(rank=2)", "ia3(sites=[k, v, down])", "pfeiffer(reduction=4)", "norms", "prompt(tokens=2)"])
def test_whatever_leaves_the_weights_alone_is_trained_on_a_4_bit_base(model: Any, ids: Tensor, expression: str) -> None:
    adapter = attach(model, expression)
    if not adapter.virtual:
        assert any(bool(value.any()) for value in gradients(model, ids, adapter).values())
    adapter.detach()


def test_sites_show_widths_and_counts_those_of_the_values_and_not_of_the_codes(model: Any) -> None:
    assert site_table(model) == site_table(build_model("llama", **SIZES))
    assert [(site.inputs, site.outputs) for site in find_sites(model)[:2]] == [(64, 64), (64, 32)]
    adapter = attach(model, "qlora(rank=4)")
    found = counts(adapter)
    assert found.of == sum(p.numel() for p in build_model("llama", **SIZES).parameters())
    assert "quantised" in found.merges and set(found.ranks.values()) == {0}


def test_merging_is_refused_until_the_base_is_floating_point_again_and_then_changes_no_answer(model: Any, ids: Tensor) -> None:
    adapter = attach(model, "qlora(rank=4)")
    shake(adapter)
    with torch.no_grad():
        said = model(input_ids=ids).logits
        with pytest.raises(AdapterError, match="is quantised") as refusal:
            merge(adapter)
        assert "--dequantise" in refusal.value.hints[0]
        assert dequantise(model) == 14
        assert torch.equal(model(input_ids=ids).logits, said)
        assert merge(adapter) < 1e-6
        assert torch.allclose(model(input_ids=ids).logits, said, atol=1e-4)
        unmerge(adapter)
        assert torch.equal(model(input_ids=ids).logits, said)


def test_a_model_with_adapters_on_is_not_quantised() -> None:
    model = build_model("llama")
    attach(model, "lora(rank=2)")
    with pytest.raises(BaseError, match="an adapter is attached"):
        quantise(model)


def test_activations_computed_again_and_compiled_layers_give_the_same_gradients(
    model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = attach(model, "qlora(rank=4)")
    shake(adapter)
    kept = gradients(model, ids, adapter)
    said: list[str] = []
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    with recomputing(model, True):
        again = gradients(model, ids, adapter)
    with compiled(model, True, said.append):
        fast = gradients(model, ids, adapter)
    assert said == []
    for other in (again, fast):
        assert all(torch.allclose(other[name], value, rtol=1e-4, atol=1e-4) for name, value in kept.items())


def test_a_family_that_keeps_its_weights_the_other_way_round_is_adapted_and_saved(ids: Tensor, tmp_path: Path) -> None:
    model = build_model("gpt2")
    quantise(model)
    adapter = attach(model, "qlora(rank=2, sites=[qkv, down])")
    shake(adapter)
    assert all(isinstance(model.get_submodule(path), FourBit) for path in adapter.forms)
    save_adapter(adapter, tmp_path, base="tiny", fingerprint="")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is False
    assert all(bool(value.any()) for value in gradients(model, ids, adapter).values())
