"""Bases in 4 bits: the numbers are those of the paper, the gradient arrives, and what cannot be is refused."""

from __future__ import annotations

import builtins
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import VOCABULARY, build_model
from tunesmith.bases import load_base
from tunesmith.bases.quantise import FourBit, dequantise, quantise
from tunesmith.core.errors import BaseError, SpecError

pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")

NF4 = [
    *[-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334],
    *[-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224],
    *[0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
]
"""The sixteen values of NF4 (Dettmers et al. 2023, appendix E)."""


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))


def maps(model: nn.Module) -> dict[str, FourBit]:
    return {path: module for path, module in model.named_modules() if isinstance(module, FourBit)}


def nearest_nf4(weight: Tensor) -> Tensor:
    """The paper's equation: each block of 64 over its largest absolute value, every number the nearest of the sixteen."""
    levels = torch.tensor(NF4)
    blocks = weight.flatten().view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    return (levels[(blocks[..., None] / largest[..., None] - levels).abs().argmin(-1)] * largest).view_as(weight)


@pytest.mark.parametrize("shape", [(16, 128), (6, 32)], ids=["whole blocks a row", "blocks across rows"])
def test_weights_are_the_nearest_of_the_papers_sixteen_values_of_their_block(shape: tuple[int, int]) -> None:
    model = nn.Sequential(nn.ModuleList([nn.Linear(shape[1], shape[0])]))
    weight = model[0][0].weight.detach().clone()
    assert quantise(model, "nf4", double=False) == 1
    assert torch.allclose(model[0][0].dequantised(), nearest_nf4(weight), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_weights_are_bitsandbytes_own(kind: str, double: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = build_model("llama", hidden_size=64, intermediate_size=128)
    path = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(path).weight.detach().clone()
    quantise(model, kind, double=double)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type=kind)
    assert torch.equal(model.get_submodule(path).dequantised(), dequantize_4bit(packed, state))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "albert"])
def test_only_the_linear_maps_of_blocks_are_quantised_and_the_model_computes_with_them(family: str, ids: Tensor) -> None:
    model, plain = build_model(family), build_model(family)
    assert quantise(model) == len(maps(model)) > 0
    for path, module in maps(model).items():
        own: Any = plain.get_submodule(path)
        value = module.dequantised()
        own.weight.data = value.t().contiguous() if module.transposed else value
    with torch.no_grad():
        assert torch.allclose(model(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-5)
    others = [type(m) for path, m in model.named_modules() if hasattr(m, "in_features") and path not in maps(model)]
    assert model.get_output_embeddings().weight.is_floating_point() and len(others) >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_arrive_whole_even_after_answers_were_asked_for(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.ModuleList([nn.Linear(64, 48)])).to(dtype).eval()
    quantise(model)
    module = model[0][0]
    module.bias.requires_grad_(True)
    x = torch.randn(3, 5, 64, dtype=dtype)
    with torch.no_grad():
        module(x)
    x.requires_grad_(True)
    out = module(x)
    weight = module.dequantised(dtype)
    assert torch.equal(out, nn.functional.linear(x, weight, module.bias))
    wanted = torch.randn_like(out)
    dx, db = torch.autograd.grad(out, [x, module.bias], wanted)
    assert torch.allclose(dx, wanted @ weight)
    assert torch.allclose(db, wanted.sum((0, 1)), atol=1e-5 if dtype == torch.float32 else 0.1)


def test_nothing_of_the_size_of_a_weight_is_kept_for_the_backward() -> None:
    model = nn.Sequential(nn.ModuleList([nn.Linear(256, 256, bias=False)]))
    quantise(model)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t):
        model[0][0](torch.randn(2, 256, requires_grad=True))
    assert max(kept) == 256 * 256 // 2


def test_a_value_takes_four_bits_and_an_eighth(tiny_base_folder: Path) -> None:
    model = nn.Sequential(nn.ModuleList([nn.Linear(1024, 1024, bias=False)]))
    quantise(model)
    module = model[0][0]
    stored = [module.weight, *(buffer for name, buffer in module.named_buffers() if name != "levels")]  # one table of 256 values
    bits = 8 * sum(each.numel() * each.element_size() for each in stored) / 1024**2
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


def test_scales_stay_as_they_are_when_a_model_changes_its_dtype() -> None:
    model = build_model("llama")
    quantise(model)
    before = {path: module.dequantised() for path, module in maps(model).items()}
    model.to(torch.bfloat16)
    assert all(torch.equal(module.dequantised(), before[path]) for path, module in maps(model).items())
    assert next(iter(maps(model).values()))(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_copy_computes_the_same() -> None:
    model = build_model("llama")
    quantise(model)
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, model(input_ids=ids).logits)


def test_dequantised_again_the_model_computes_what_it_did(ids: Tensor) -> None:
    model = build_model("gpt2")
    count = quantise(model)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        assert dequantise(model) == count
        assert torch.equal(model(input_ids=ids).logits, before)
    assert all(module.weight.shape == (module.out_features, module.in_features) for module in maps(model).values())
    assert dequantise(model) == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_base_is_quantised_as_it_is_loaded(tiny_base_folder: Path, dtype: str) -> None:
    base = load_base(tiny_base_folder, quantise="nf4", dtype=dtype, device="cpu")
    plain = load_base(tiny_base_folder, dtype=dtype, device="cpu")
    assert base.parameters == plain.parameters
    quantise(plain.model)
    assert maps(base.model).keys() == maps(plain.model).keys()
    ids = torch.arange(5, 14)[None]
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, plain.model(input_ids=ids).logits)
    assert not any(p.requires_grad for p in base.model.parameters()) and not base.model.training
    assert "4 bits (nf4)" in base.describe() and any("14 linear maps" in line for line in base.decisions)
    assert base.fingerprint == plain.fingerprint


def test_an_encoder_keeps_what_lies_outside_of_its_blocks(bert_folder: Path) -> None:
    base = load_base(bert_folder, quantise="nf4", dtype="fp32", device="cpu")
    assert len(maps(base.model)) == 12 and not any("pooler" in path for path in maps(base.model))


def test_a_checkpoint_that_is_quantised_already_and_an_unknown_kind_are_refused(folder: Path) -> None:
    import json

    with pytest.raises(SpecError, match="int3") as refusal:
        load_base(folder, quantise="int3", device="cpu")  # type: ignore[arg-type]
    assert "nf4" in str(refusal.value.hints)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseError, match="quantised already"):
        load_base(folder, device="cpu")


def test_without_bitsandbytes_the_extra_is_named_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(f"No module named '{name}'", name="bitsandbytes")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(BaseError, match="needs bitsandbytes, which is not installed") as refusal:
        load_base(tmp_path / "nothing", quantise="nf4", device="cpu")
    assert refusal.value.hints == ("pip install 'tunesmith[quant]'",)
