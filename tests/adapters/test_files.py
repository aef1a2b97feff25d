"""Adapter files are those of the `peft` library, both ways; what cannot be read is refused with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.adapters import attach, load_adapter, save_adapter
from tunesmith.core.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*is_gradient_checkpointing:FutureWarning")

Build = Callable[..., Any]
Shake = Callable[[Any], None]


@pytest.fixture
def by_peft(build: Build, ids: Tensor) -> Callable[..., Tensor]:
    """Save an adapter with random values by PEFT into a folder; the logits it gives there."""

    def make(folder: Path, family: str = "llama", *, changes: dict[str, Any] | None = None, **options: Any) -> Tensor:
        config = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **options})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            model = get_peft_model(build(family, **(changes or {})), config)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name or "trainable_tokens_delta" in name:
                        parameter.add_(torch.randn(parameter.shape) * 0.1)
        model.eval()
        model.save_pretrained(folder)
        logits: Tensor = model(ids).logits.detach()
        return logits

    return make


@pytest.mark.parametrize(
    ("family", "expression"),
    [
        ("llama", "lora(rank=4, alpha=6, sites=[q, v])"),
        ("llama", "lora(rank=4, sites=all, layers=[1])"),
        ("llama", "rslora(rank=4, alpha=3, sites=[down, o])"),
        ("llama", "lora(rank=2, alpha=4, sites=[q]) + lora(rank=5, alpha=3, sites=[up])"),
        ("gpt2", "lora(rank=4, sites=[qkv, o, down])"),
        ("gpt_neox", "lora(rank=4, sites=all)"),
        ("phi3", "lora(rank=4, sites=[qkv, gate_up])"),
    ],
)
def test_what_we_save_peft_loads_to_the_same_logits(
    family: str, expression: str, build: Build, ids: Tensor, shake: Shake, tmp_path: Path
) -> None:
    model = build(family)
    adapter = attach(model, expression)
    shake(adapter)
    save_adapter(adapter, tmp_path, base="tiny", fingerprint="f" * 64)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(build(family), tmp_path).eval()(ids).logits
        assert torch.allclose(model(ids).logits, theirs, atol=1e-5)
        assert not torch.allclose(theirs, build(family)(ids).logits, atol=1e-2)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(key.startswith("base_model.model.") and "default" not in key for key in file.keys())  # noqa: SIM118


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma3"])
def test_new_words_are_saved_so_that_peft_reads_them_at_both_ends(
    family: str, build: Build, ids: Tensor, shake: Shake, tmp_path: Path
) -> None:
    model = build(family)
    adapter = attach(model, "lora(rank=2)", new_words=[61, 63])
    shake(adapter)
    save_adapter(adapter, tmp_path, base="tiny", fingerprint="")
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, PeftModel.from_pretrained(build(family), tmp_path).eval()(ids).logits, atol=1e-5)
        again = build(family)
        load_adapter(again, tmp_path)
        assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "r": 9}),
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
        ("llama", {"target_modules": r".*\.1\.mlp\.(up|down)_proj"}),
        ("llama", {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\..*q_proj": 20}}),
        ("llama", {"init_lora_weights": "gaussian", "lora_dropout": 0.3}),
        ("llama", {"trainable_token_indices": [63, 5]}),
        ("llama", {"trainable_token_indices": {"embed_tokens": [62, 63], "lm_head": [62, 63]}}),
        ("llama-tied", {"trainable_token_indices": [62, 63]}),
        ("gemma3", {"trainable_token_indices": [63]}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": "all-linear"}),
        ("gpt_neox", {"target_modules": None}),
    ],
)
def test_what_peft_saves_we_load_to_the_same_logits(
    family: str, options: dict[str, Any], by_peft: Callable[..., Tensor], build: Build, ids: Tensor, tmp_path: Path
) -> None:
    theirs = by_peft(tmp_path, family, **options)
    model = build(family)
    adapter = load_adapter(model, tmp_path)
    assert torch.allclose(model(ids).logits, theirs, atol=1e-5)
    adapter.detach()
    assert torch.equal(model(ids).logits, build(family)(ids).logits)


def test_with_the_same_values_gradients_are_pefts(by_peft: Callable[..., Tensor], build: Build, ids: Tensor, tmp_path: Path) -> None:
    by_peft(tmp_path, target_modules="all-linear", trainable_token_indices=[62, 63])
    ours, theirs = build(), PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
    adapter = load_adapter(ours, tmp_path)
    loss = []
    for model in (ours, theirs):
        loss.append(-model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).mean())
        loss[-1].backward()
    assert float(loss[0].detach()) == pytest.approx(float(loss[1].detach()), abs=1e-6)
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    for path, form in adapter.forms.items():
        for ours_grad, part in ((form.a.grad, "lora_A"), (form.b.grad, "lora_B")):
            assert torch.allclose(ours_grad, wanted[f"base_model.model.{path}.{part}.default.weight"], atol=1e-5)
    rows = adapter.rows["model.embed_tokens"].rows.grad
    assert torch.allclose(rows, wanted["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"], atol=1e-5)


@pytest.mark.parametrize("expression", ["full", "layers(last=1)", "modules(names=['model.norm', lm_head])", "lora(rank=3, dropout=0.2)"])
def test_every_method_comes_back_from_its_files_bit_for_bit(
    expression: str, build: Build, ids: Tensor, shake: Shake, tmp_path: Path
) -> None:
    model, again = build(), build()
    adapter = attach(model, expression, new_words=[62, 63])
    shake(adapter)
    save_adapter(adapter, tmp_path, base="tiny", fingerprint="a" * 64)
    loaded = load_adapter(again, tmp_path, fingerprint="a" * 64, name="other")
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert loaded.expression == adapter.expression and loaded.trainable() == adapter.trainable()
    loaded.detach()
    assert torch.equal(again(ids).logits, build()(ids).logits)


def test_half_precision_weights_trained_in_place_are_saved_as_they_are(build: Build, shake: Shake, tmp_path: Path) -> None:
    model = build().to(torch.bfloat16)
    shake(attached := attach(model, "layers(last=1)"))
    save_adapter(attached, tmp_path, base="tiny", fingerprint="")
    assert {value.dtype for value in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}
    again = build().to(torch.bfloat16)
    load_adapter(again, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_an_adapter_made_for_another_base_is_refused(build: Build, tmp_path: Path) -> None:
    save_adapter(attach(build(), "lora"), tmp_path, base="tiny", fingerprint="a" * 64)
    with pytest.raises(AdapterError, match=r"made for another base \(tiny, fingerprint aaaaaaaaaaaa; this base has bbbbbbbbbbbb\)"):
        load_adapter(build(), tmp_path, fingerprint="b" * 64)
    load_adapter(build(), tmp_path)  # nobody asked


@pytest.mark.parametrize("changes", [{"hidden_size": 64}, {"num_hidden_layers": 1}])
def test_an_adapter_whose_shapes_or_layers_do_not_fit_is_refused_and_taken_off_again(
    changes: dict[str, Any], by_peft: Callable[..., Tensor], build: Build, ids: Tensor, tmp_path: Path
) -> None:
    by_peft(tmp_path)
    model = build(**changes)
    before = model(ids).logits
    with pytest.raises(AdapterError, match=r"shape|no linear map"):
        load_adapter(model, tmp_path)
    assert torch.equal(model(ids).logits, before)
    assert not any("ts_" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True, "use_rslora": True}, "dora with rslora cannot be read"),
        ({"bias": "all"}, "bias='all' cannot be read"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": {"embed_tokens": [63], "lm_head": [62]}}, "differ from table to table"),
    ],
)
def test_variants_of_lora_are_refused_by_name(
    options: dict[str, Any], reason: str, by_peft: Callable[..., Tensor], build: Build, tmp_path: Path
) -> None:
    by_peft(tmp_path, **options)
    model = build()
    with pytest.raises(AdapterError, match=reason):
        load_adapter(model, tmp_path)
    assert not any("ts_" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "VERA"}, "peft_type 'VERA' cannot be read"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"rank_pattern": {"(": 3}}, "rank and alpha cannot be read"),
        ({"r": None}, "adapter lora|rank"),
        ({"lora_alpha": 0}, "alpha"),
    ],
)
def test_configurations_that_mean_something_else_are_refused(
    change: dict[str, Any], reason: str, by_peft: Callable[..., Tensor], build: Build, tmp_path: Path
) -> None:
    by_peft(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterError, match=reason):
        load_adapter(build(), tmp_path)


def test_damaged_or_missing_files_are_named(build: Build, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors: there are no adapter weights"):
        load_adapter(build(), folder)
    save_adapter(attach(build(), "lora"), folder, base="tiny", fingerprint="")
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}

    def damaged(name: str, content: bytes | None) -> str:
        for file, data in whole.items():
            (folder / file).write_bytes(data)
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        model = build()
        with pytest.raises(AdapterError) as caught:
            load_adapter(model, folder)
        assert not any("ts_" in path for path, _ in model.named_parameters())
        return str(caught.value)

    weights = whole["adapter_model.safetensors"]
    assert "damaged or no safetensors file" in damaged("adapter_model.safetensors", weights[: len(weights) // 2])
    assert "damaged or no safetensors file" in damaged("adapter_model.safetensors", b"{}")
    assert "tunesmith.json" in damaged("tunesmith.json", b"{")
    assert "is damaged" in damaged("tunesmith.json", b'{"format": 1}')
    assert "newer version" in damaged("tunesmith.json", whole["tunesmith.json"].replace(b'"format": 1', b'"format": 2'))
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "tunesmith.json").unlink()
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        load_adapter(build(), folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="there is no adapter here"):
        load_adapter(build(), folder)
    (folder / "adapter_config.json").write_bytes(whole["adapter_config.json"])
    tensors["base_model.model.model.layers.0.mlp.ia3_l"] = torch.zeros(3)
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="ia3_l' belongs to no method"):
        load_adapter(build(), folder)


def test_lora_and_rslora_together_are_refused_before_training_since_they_have_no_place_in_the_format(build: Build) -> None:
    with pytest.raises(AdapterError, match="one scaling an adapter"):
        attach(build(), "lora(sites=[q]) + rslora(sites=[v])")
