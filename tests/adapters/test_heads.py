"""A task head belongs to its adapter: named in its expression, saved with it, read back with its labels, and by the peft library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from tunesmith.adapters import Adapter, Way, attach, load_adapter, plan, save_adapter
from tunesmith.core.errors import AdapterError, TunesmithError

LABELS = ("bad", "good", "so-so")
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert() -> BertModel:
    torch.manual_seed(3)
    return BertModel(BertConfig(**SIZES, max_position_embeddings=64)).eval().requires_grad_(False)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def with_head(model: Any, expression: str, **way: Any) -> Adapter:
    adapter = attach(model, expression, seed=1)
    adapter.give_head(32, LABELS, Way(**{"pool": "pooler", **way}), seed=1)
    for _, parameter in adapter.named_parameters():
        if parameter.ndim == 2 and not adapter.in_place:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapter


@pytest.mark.parametrize("expression", ["lora(rank=4) + head", "head", "head(hidden=8)", "layers(last=1) + head", "full + head(pool=mean)"])
def test_a_saved_head_comes_back_with_its_weights_its_labels_and_how_it_reads(expression: str, tmp_path: Path) -> None:
    hidden = 8 if "hidden" in expression else 0
    adapter = with_head(bert(), expression, hidden=hidden, limit=40)
    save_adapter(adapter, tmp_path, base="tiny", fingerprint="f")
    loaded = load_adapter(bert(), tmp_path, fingerprint="f")
    assert loaded.head is not None and adapter.head is not None
    assert (loaded.head.labels, loaded.head.way, loaded.expression) == (LABELS, adapter.head.way, expression)
    saved, found = adapter.state(), loaded.state()
    assert saved.keys() == found.keys() and any(name.startswith("ts_head.") for name in saved)
    assert all(torch.equal(saved[name], found[name]) for name in saved)
    assert loaded.trainable() == adapter.trainable() == sum(value.numel() for value in saved.values())


def by_hand(model: Any, adapter: Adapter, ids: Tensor, pool: str) -> Tensor:
    out = model.base_model(input_ids=ids)
    assert adapter.head is not None
    found: Tensor = adapter.head(out.pooler_output if pool == "pooler" else out.last_hidden_state[:, -1])
    return found


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_peft_library_reads_our_head_into_transformers_own_model(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model, theirs, pool = (
        (bert(), BertForSequenceClassification, "pooler") if kind == "encoder" else (llama(), LlamaForSequenceClassification, "last")
    )
    model.save_pretrained(tmp_path / "base")
    adapter = with_head(model, "lora(rank=4) + head", pool=pool, bias=kind == "encoder")
    (tmp_path / "adapter").mkdir()
    save_adapter(adapter, tmp_path / "adapter", base="tiny", fingerprint="f")
    read = PeftModel.from_pretrained(theirs.from_pretrained(tmp_path / "base", num_labels=3), tmp_path / "adapter").eval()
    ids = torch.randint(3, 64, (2, 11))
    with torch.no_grad():
        assert torch.allclose(read(input_ids=ids).logits, by_hand(model, adapter, ids, pool), atol=1e-5)


def test_a_detached_head_leaves_no_trace() -> None:
    model = bert()
    before = list(model.state_dict())
    adapter = with_head(model, "lora(rank=4) + head")
    assert any(path.startswith("ts_heads.") for path in model.state_dict())
    adapter.detach()
    assert list(model.state_dict()) == before and adapter.head is None


def test_an_expression_without_a_head_gets_one_and_says_so() -> None:
    adapter = attach(bert(), "lora(rank=4)")
    assert adapter.head_plan is None
    adapter.give_head(32, LABELS, Way("first"))
    assert adapter.expression == "lora(rank=4) + head" and adapter.head_plan is not None


@pytest.mark.parametrize(
    ("expression", "told"),
    [
        ("head(pool=max)", "unknown pool 'max'"),
        ("head(hidden=-1)", "hidden must be a whole number"),
        ("head(dropout=1)", "dropout must lie in"),
        ("head + head", "more than one head"),
        ("head(size=3)", "size"),
    ],
)
def test_a_head_that_cannot_be_is_refused(expression: str, told: str) -> None:
    with pytest.raises(TunesmithError, match=told):
        plan(expression)


def test_a_damaged_description_of_the_head_is_refused_and_the_model_left_as_it_was(tmp_path: Path) -> None:
    save_adapter(with_head(bert(), "lora(rank=4) + head"), tmp_path, base="tiny", fingerprint="f")
    values = json.loads((tmp_path / "tunesmith.json").read_text())
    for head in ({**values["head"], "pool": "max"}, {"labels": 3}, {**values["head"], "labels": ["a", "b"]}, {**values["head"], "odd": 1}):
        (tmp_path / "tunesmith.json").write_text(json.dumps({**values, "head": head}))
        model = bert()
        with pytest.raises(AdapterError):
            load_adapter(model, tmp_path)
        assert not any("ts_" in path and "ts_forms" not in path for path in model.state_dict())
