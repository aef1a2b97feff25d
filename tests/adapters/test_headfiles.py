"""Adapters with a head that the `peft` library wrote: read where the head is of a shape of ours, else refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import FAMILIES, build_model
from tunesmith.adapters import load_adapter, save_adapter
from tunesmith.core.errors import AdapterError
from tunesmith.core.row import Row, Segment
from tunesmith.engine.heads import read_task_head
from tunesmith.engine.probe import probe

IDS = list(range(5, 14))
SITES = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "distilbert": ["q_lin"], "mpnet": ["attn.q"], "modernbert": ["Wqkv"]}


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "ia3_", "prompt_encoder", "modules_to_save")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def theirs(family: str, task: str, *, labels: int = 3, kind: type = LoraConfig, **options: Any) -> tuple[Any, Any]:
    """A model of transformers' with a head, peft's adapter on it, and the body with the same weights as a base of ours."""
    config, _, values = FAMILIES[family]
    name = config.removesuffix("Config") + ("ForSequenceClassification" if task == "SEQ_CLS" else "ForTokenClassification")
    made = getattr(transformers, name)(getattr(transformers, config)(**values, num_labels=labels)).eval()
    sites = SITES.get(family, ["query", "value"])
    more: dict[str, Any] = {"num_virtual_tokens": 4} if kind is PrefixTuningConfig else {"target_modules": sites}
    more |= {LoraConfig: {"r": 3, "lora_alpha": 6}, IA3Config: {"feedforward_modules": []}}.get(kind, {})
    base = (
        build_model(family) if family in ("llama", "gpt2", "bert") else made.base_model.__class__(made.config).eval().requires_grad_(False)
    )
    base.base_model.load_state_dict(made.base_model.state_dict(), strict=False)
    return shaken(get_peft_model(made, kind(task_type=TaskType(task), **more, **options))), base


def ours(base: Any, folder: Path) -> tuple[Any, Any]:
    adapter = load_adapter(base, folder)
    return probe_of(base, adapter), adapter


def probe_of(base: Any, adapter: Any) -> Any:
    with adapter.disabled():
        return probe(base, speaks=False)


def said(forward: Any, adapter: Any, every: bool) -> Tensor:
    labels = np.full(len(IDS), np.nan, np.float32)
    labels[slice(None) if every else -1] = 0
    row = Row((Segment(np.array(IDS, np.int32), np.zeros(len(IDS), np.bool_), labels=labels),))
    with torch.no_grad():
        return read_task_head(forward, forward.pack([row]), adapter.head).logits


@pytest.mark.parametrize("kind", [LoraConfig, IA3Config, PrefixTuningConfig])
@pytest.mark.parametrize(
    ("family", "task", "pool"),
    [
        ("bert-bare", "SEQ_CLS", "pooler"),
        ("roberta", "SEQ_CLS", "first"),
        ("llama", "SEQ_CLS", "last"),
        ("gpt2", "SEQ_CLS", "last"),
        ("bert-bare", "TOKEN_CLS", "last"),
        ("bert", "TOKEN_CLS", "last"),
        ("distilbert", "TOKEN_CLS", "last"),
        ("llama", "TOKEN_CLS", "last"),
    ],
)
def test_it_says_what_peft_says(family: str, task: str, pool: str, kind: Any, tmp_path: Path) -> None:
    if kind is PrefixTuningConfig and family == "distilbert":
        pytest.skip("peft cannot tell the size of DistilBERT's keys")
    model, base = theirs(family, task, kind=kind)
    model.save_pretrained(tmp_path / "peft")
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([IDS])).logits[0]
    forward, adapter = ours(base, tmp_path / "peft")
    assert (adapter.head.way.pool, adapter.head.labels) == (pool, ("0", "1", "2"))
    assert adapter.head.way.says == ("tags" if task == "TOKEN_CLS" else "label")
    found = said(forward, adapter, task == "TOKEN_CLS")
    torch.testing.assert_close(found, wanted.reshape(found.shape), atol=1e-5, rtol=1e-5)
    (tmp_path / "ours").mkdir()
    save_adapter(adapter, tmp_path / "ours", base="tiny", fingerprint="")
    again = {key: value for key, value in load_file(tmp_path / "ours" / "adapter_model.safetensors").items()}
    before = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert again.keys() == before.keys() and all(torch.equal(again[key], value) for key, value in before.items()), "and back to peft"
    resumed = load_adapter(base, tmp_path / "ours", name="again").state()
    assert all(torch.equal(resumed[name.replace("default", "again")], value) for name, value in adapter.state().items())


def test_one_output_is_a_value_and_patterns_of_ranks_are_of_the_whole_model(tmp_path: Path) -> None:
    pattern = {"bert.encoder.layer.0.attention.self.query": 5}
    model, base = theirs("bert-bare", "SEQ_CLS", labels=1, rank_pattern=pattern)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([IDS])).logits
    forward, adapter = ours(base, tmp_path)
    assert (adapter.head.way.says, adapter.head.labels) == ("value", ("value",))
    torch.testing.assert_close(said(forward, adapter, False), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("bert", {}, "reads the base's pooler, without which this base was loaded"),
        ("electra", {}, "computes something else from the states"),
        ("albert", {}, "computes something else from the states"),
        ("distilbert", {}, "computes something else from the states"),
        ("distilbert", {"modules_to_save": ["pre_classifier", "classifier"]}, "beside the adapter it trains pre_classifier and classifier"),
        ("modernbert", {}, "computes something else from the states"),
    ],
)
def test_a_head_of_another_shape_is_refused_with_the_reason(family: str, options: Any, why: str, tmp_path: Path) -> None:
    model, base = theirs(family, "SEQ_CLS", **options)
    model.save_pretrained(tmp_path)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(AdapterError, match=why) as refusal:
        load_adapter(base, tmp_path)
    assert refusal.value.hints and str(tmp_path) in str(refusal.value)
    assert base.state_dict().keys() == before.keys() and not hasattr(base, "ts_heads")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda state: {k: v for k, v in state.items() if "classifier" not in k}, "there is no head among its tensors"),
        (lambda state: state | {"base_model.model.classifier.more": torch.ones(3)}, "which is no shape that heads have here"),
        (lambda state: state | {"base_model.model.classifier.weight": torch.ones(3, 8)}, "reads states of 8 values"),
        (lambda state: state | {"base_model.model.classifier.bias": torch.ones(4)}, "cannot be tried"),
    ],
)
def test_a_damaged_head_is_refused(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], why: str, tmp_path: Path) -> None:
    model, base = theirs("bert-bare", "SEQ_CLS")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=why):
        load_adapter(base, tmp_path)
