"""Adapters on models of an encoder and a decoder: T5, and BART, whose attention has other names. Their own forward runs them, not ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conformance import EXAMPLES, NOT_THE_BASE_AT_FIRST
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from tunesmith.adapters import attach, find_sites, load_adapter, merge, save_adapter, unmerge
from tunesmith.adapters.sitetable import site_table
from tunesmith.core.errors import AdapterError
from tunesmith.core.row import single
from tunesmith.engine.preparing import prepare

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*is_gradient_checkpointing:FutureWarning")

FAMILIES = ["t5", "bart"]
TOKENS = ["prefix", "ptuning_v2", "prompt", "ptuning", "mam", "unipelt"]
SMALL = {"vocab_size": 64, "d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": None}


def build(family: str) -> Any:
    """A frozen random model, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        if family == "t5":
            config: Any = transformers.T5Config(**SMALL, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4, dropout_rate=0.0)
            model: Any = transformers.T5ForConditionalGeneration(config)
        else:
            sizes = {"encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "dropout": 0.0}
            heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
            model = transformers.BartForConditionalGeneration(transformers.BartConfig(**SMALL, **sizes, **heads))
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.15)
    return model.eval().requires_grad_(False)


def read() -> Tensor:
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def said() -> Tensor:
    return torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(2))


def logits(model: Any, **more: Any) -> Tensor:
    out: Tensor = model(input_ids=read(), labels=said(), **more).logits
    return out


def shaken(method: str, folder: Path, family: str) -> tuple[Any, Any]:
    """(model, adapter) with other values than at the start, as training would leave them."""
    model = build(family)
    adapter = attach(model, expression(method, folder, family))
    prepare(adapter, [single([5, 6], [False, True])] * 3, lambda row: model(input_ids=read(), labels=said()).loss)
    shake(adapter)
    return model, adapter


def shake(adapter: Any) -> None:
    generator = torch.Generator().manual_seed(11)
    adapter.load({name: value + torch.randn(value.shape, generator=generator) * 0.1 for name, value in adapter.state().items()})


def expression(method: str, folder: Path, family: str) -> str:
    """The example of a method as the conformance suite has it."""
    finished = []
    for number in range(2) if "{finished}" in EXAMPLES[method] else ():
        model = build(family)
        adapter = attach(model, "pfeiffer(reduction=4)", seed=number)
        (folder / f"part{number}").mkdir(parents=True)
        save_adapter(adapter, folder / f"part{number}", base="", fingerprint="")
        finished.append(f"'{folder / f'part{number}'}'")
    first = {"t5": "encoder.block.0.layer.0.SelfAttention.q", "bart": "model.encoder.layers.0.self_attn.q_proj"}[family]
    return EXAMPLES[method].format(qv="q, v", kv="k, v", first=first, finished=", ".join(finished))


def methods(*, family: str) -> list[str]:
    """Those that an encoder-decoder carries."""
    none = {"lst", "qlora", "head", *TOKENS, *(["bitfit"] if family == "t5" else [])}
    return [name for name in EXAMPLES if name not in none]


CELLS = [(family, method) for family in FAMILIES for method in methods(family=family)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sites_of_both_stacks_are_found_and_layers_are_counted_through(family: str) -> None:
    sites, blocks = find_sites(build(family)), {"t5": 2, "bart": 3}[family]
    assert sorted({site.layer for site in sites}) == list(range(2 + blocks))
    assert all(_in_decoder(site.path) == (site.layer >= 2) for site in sites)
    assert sum(site.name == "q" for site in sites) == 2 + blocks * 2  # a decoder's block attends to itself and to the encoder
    paths = {shape.path for shape in site_table(build(family)) if shape.name == "q"}
    assert len(paths) == 3

    model = build(family)
    only = attach(model, "lora(rank=2, sites=[q], layers=[0, -1])")
    assert [_in_decoder(path) for path in only.forms] == [False, True, True]
    with pytest.raises(AdapterError, match=f"layers 0 to {1 + blocks}"):
        attach(build(family), "lora(layers=[9])")
    trained = attach(build(family), f"layers(last={blocks})").trained
    assert trained and all(_in_decoder(path) for path in trained)


def _in_decoder(path: str) -> bool:
    return path.removeprefix("model.").startswith("decoder.")


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_it_begins_as_the_base_gradient_reaches_it_alone_and_taken_off_leaves_the_base(family: str, method: str, tmp_path: Path) -> None:
    model = build(family)
    base = logits(model)
    adapter = attach(model, expression(method, tmp_path, family))
    if method not in NOT_THE_BASE_AT_FIRST:
        assert torch.allclose(logits(model), base, atol=1e-5)
    adapter.detach()
    assert torch.equal(logits(model), base)

    model, adapter = shaken(method, tmp_path / "again", family)
    model.train()
    model(input_ids=read(), labels=said()).loss.backward()
    model.eval()
    own = {id(parameter) for _, parameter in adapter.named_parameters()}
    touched = {id(parameter) for parameter in model.parameters() if parameter.grad is not None and parameter.grad.abs().sum() > 0}
    assert touched and touched <= own
    silent = [name for name, parameter in adapter.named_parameters() if parameter.grad is None]
    assert not silent, silent
    changed = logits(model)
    assert not torch.equal(changed, base)
    adapter.detach()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_saved_and_read_it_says_the_same_and_merged_as_well(family: str, method: str, tmp_path: Path) -> None:
    model, adapter = shaken(method, tmp_path, family)
    said_then = logits(model)
    (tmp_path / "saved").mkdir()
    save_adapter(adapter, tmp_path / "saved", base="tiny", fingerprint="f")
    again = build(family)
    load_adapter(again, tmp_path / "saved", fingerprint="f")
    assert torch.allclose(logits(again), said_then, atol=1e-6)
    try:
        merge(adapter)
    except AdapterError:
        return
    assert torch.allclose(logits(model), said_then, atol=1e-4)
    if adapter.merged:
        unmerge(adapter)
        assert torch.allclose(logits(model), said_then, atol=1e-6)


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_caches_padding_and_checkpointing_change_nothing(family: str, method: str, tmp_path: Path) -> None:
    model, adapter = shaken(method, tmp_path, family)
    with torch.no_grad():
        length = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        fast, slow = (model.generate(input_ids=read(), use_cache=cache, **length) for cache in (True, False))
        assert torch.equal(fast, slow)
        mask = torch.tensor([[1] * 9 + [0] * 4] * 2)
        padded = torch.cat([read(), torch.full((2, 4), 5)], 1)
        there = model(input_ids=padded, attention_mask=mask, labels=said()).logits
        assert torch.allclose(there, logits(model, attention_mask=torch.ones(2, 9)), atol=1e-5)

    def gradients(on: bool) -> list[Tensor]:
        for _, parameter in adapter.named_parameters():
            parameter.grad = None
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model.train()
            model(input_ids=read(), labels=said(), use_cache=False).loss.backward()
        model.eval()
        return [parameter.grad.clone() for _, parameter in adapter.named_parameters() if parameter.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("config", ["lora", "ia3"])
def test_files_are_exchanged_with_peft(config: str, tmp_path: Path) -> None:
    ours = {"lora": "lora(rank=3, alpha=5, sites=[q, v, up])", "ia3": "ia3(sites=[k, v, down])"}[config]
    model = build("t5")
    adapter = attach(model, ours)
    shake(adapter)
    (tmp_path / "ours").mkdir()
    save_adapter(adapter, tmp_path / "ours", base="tiny", fingerprint="")
    with torch.no_grad():
        assert torch.allclose(logits(PeftModel.from_pretrained(build("t5"), tmp_path / "ours").eval()), logits(model), atol=1e-5)

    asked: Any = (
        LoraConfig(task_type="SEQ_2_SEQ_LM", r=3, target_modules=["q", "v"])
        if config == "lora"
        else IA3Config(task_type="SEQ_2_SEQ_LM", target_modules=["k", "v", "wo"], feedforward_modules=["wo"])
    )
    theirs = get_peft_model(build("t5"), asked).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "ia3" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
        theirs.save_pretrained(tmp_path / "theirs")
        read_by_us = build("t5")
        load_adapter(read_by_us, tmp_path / "theirs")
        assert torch.allclose(logits(read_by_us), logits(theirs), atol=1e-5)


@pytest.mark.parametrize("method", ["lst", *TOKENS])
def test_what_it_cannot_carry_is_refused_with_the_reason(method: str) -> None:
    model = build("t5")
    with pytest.raises(AdapterError, match=r"encoder-decoder(.|\n)*Nearest that works here"):
        attach(model, EXAMPLES[method].format(qv="q, v", kv="k, v"))
    assert not any(hasattr(module, "ts_active") and module.ts_active for module in model.modules())


def test_new_words_are_refused() -> None:
    with pytest.raises(AdapterError, match="looks words up in the encoder and in the decoder"):
        attach(build("t5"), "lora", new_words=[5])
