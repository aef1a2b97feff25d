"""Prompt Tuning and P-Tuning: trained vectors that stand among the words of a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from families import build_model
from tunesmith.adapters import attach, load_adapter, save_adapter, vocabulary_of
from tunesmith.core.errors import AdapterError
from tunesmith.engine.virtual import extra_of, prompt_with

N = 5
FAMILIES = ["llama", "gpt2", "qwen2"]


def ids_of(rows: int = 2, tokens: int = 9) -> Tensor:
    return torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(3))


def with_tokens(ids: Tensor, model: Any) -> Tensor:
    extra = extra_of(model)
    return torch.tensor([prompt_with(row.tolist(), extra) for row in ids])


def peft_tensor(model: Any, config: Any) -> tuple[Any, Any]:
    made = peft.get_peft_model(model, config).eval()
    return made, made.prompt_encoder["default"]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_tuning_computes_what_peft_computes_with_the_same_gradients(family: str) -> None:
    ids = ids_of()
    torch.manual_seed(0)
    theirs, encoder = peft_tensor(
        build_model(family), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, prompt_tuning_init="RANDOM")
    )
    model = build_model(family)
    adapter = attach(model, f"prompt(tokens={N}, init=normal)")
    adapter.load({"ts_virtual.prompt.table": encoder.embedding.weight.detach()})
    expected = theirs(input_ids=ids).logits
    got = model(input_ids=with_tokens(ids, model)).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    own = adapter.virtual["prompt"].table.grad
    assert own is not None
    torch.testing.assert_close(own, encoder.embedding.weight.grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("kind", "family"), [("MLP", "llama"), ("LSTM", "gpt2"), ("MLP", "bert-bare")])
def test_p_tuning_computes_what_peft_computes_with_the_same_gradients(kind: str, family: str) -> None:
    ids = ids_of()
    torch.manual_seed(0)
    task = "FEATURE_EXTRACTION" if family == "bert-bare" else "CAUSAL_LM"
    config = peft.PromptEncoderConfig(
        task_type=task,
        num_virtual_tokens=N,
        encoder_reparameterization_type=kind,
        encoder_hidden_size=16,
        encoder_num_layers=2,
        encoder_dropout=0.0,
    )
    theirs, encoder = peft_tensor(build_model(family), config)
    model = build_model(family)
    adapter = attach(model, f"ptuning(tokens={N}, encoder={kind.lower()}, hidden=16)")
    names = {"embedding.weight": "table"}
    state = {}
    for name, value in encoder.named_parameters():
        ours = names.get(name, name.replace("mlp_head", "mlp").replace("lstm_head", "lstm"))
        state[f"ts_virtual.ptuning.{ours}"] = value.detach()
    adapter.load(state)
    expected, got = theirs(input_ids=ids)[0], model(input_ids=with_tokens(ids, model))[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    expected.square().sum().backward()
    got.square().sum().backward()
    own = adapter.virtual["ptuning"].table.grad
    assert own is not None
    torch.testing.assert_close(own, encoder.embedding.weight.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "expression", ["prompt(tokens=5, init=normal)", "ptuning(tokens=5, hidden=8)", "ptuning(tokens=5, hidden=8, encoder=lstm)"]
)
def test_what_is_saved_can_be_loaded_by_peft_and_by_us(expression: str, tmp_path: Path, shake: Any) -> None:
    model, ids = build_model("llama"), ids_of()
    adapter = attach(model, expression)
    shake(adapter)
    expected = model(input_ids=with_tokens(ids, model)).logits[:, N:]
    state = adapter.state()
    save_adapter(adapter, tmp_path, base="x", fingerprint="y")
    adapter.detach()
    theirs = peft.PeftModel.from_pretrained(build_model("llama"), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(input_ids=ids).logits[:, N:], expected, atol=1e-5, rtol=1e-5)
    again = load_adapter(model, tmp_path, fingerprint="y")
    assert all(torch.equal(value, state[name]) for name, value in again.state().items()), "what resuming needs is there, network and all"
    assert torch.equal(model(input_ids=with_tokens(ids, model)).logits[:, N:], expected)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
def test_what_peft_saved_can_be_loaded(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)
        if kind == "PROMPT_TUNING"
        else peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=8)
    )
    theirs, _ = peft_tensor(build_model("qwen2"), config)
    theirs.save_pretrained(str(tmp_path))
    model, ids = build_model("qwen2"), ids_of()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(input_ids=with_tokens(ids, model)).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_a_network_whose_file_is_missing_is_not_made_up(tmp_path: Path) -> None:
    model = build_model("llama")
    adapter = attach(model, "ptuning(tokens=5, hidden=8)")
    save_adapter(adapter, tmp_path, base="x", fingerprint="y")
    adapter.detach()
    (tmp_path / "tunesmith.safetensors").unlink()
    with pytest.raises(AdapterError, match="network"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("name", ["gemma3", "electra", "llama"])
def test_a_prompt_begins_with_what_the_embedding_says_of_words(name: str) -> None:
    model = build_model(name)
    adapter = attach(model, "prompt(tokens=5, init=text, text='a b')", encode=lambda text: [len(part) + 6 for part in text.split()] + [11])
    expected = model.get_input_embeddings()(torch.tensor([7, 7, 11, 7, 7]))
    assert torch.equal(adapter.virtual["prompt"].table.detach(), expected)
    adapter.detach()
    drawn = attach(model, "prompt(tokens=5)").virtual["prompt"].table.detach()
    table = model.get_input_embeddings()(torch.arange(vocabulary_of(model)))
    assert (drawn[:, None] - table[None]).abs().amax(-1).amin(-1).max() == 0, "each vector is some word's"


@pytest.mark.parametrize("count", [0, -1, 2.5])
def test_a_count_of_tokens_that_is_none_is_refused(count: Any) -> None:
    with pytest.raises(AdapterError, match="whole number"):
        attach(build_model("llama"), f"prompt(tokens={count})")


def test_options_that_do_not_fit_are_refused_with_what_fits() -> None:
    model = build_model("llama")
    for expression, match in (
        ("prompt(init=words)", "vocabulary"),
        ("prompt(init=text)", "go together"),
        ("prompt(tokens=3, places=[0, end])", "evenly"),
        ("prompt(places=[0, 0])", "different"),
        ("ptuning(encoder=gru)", "lstm"),
        ("ptuning(dropout=0.1)", "lstm"),
        ("prompt + prompt", "twice"),
    ):
        with pytest.raises(AdapterError, match=match):
            attach(model, expression)
    assert extra_of(model).tokens == 0
    assert model(input_ids=ids_of()).logits.shape[1] == 9


def test_the_configuration_is_peft_s_own(tmp_path: Path) -> None:
    save_adapter(attach(build_model("llama"), "prompt(tokens=5)"), tmp_path, base="some/base", fingerprint="y")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    known = set(peft.PromptTuningConfig().to_dict())
    assert set(config) <= known
