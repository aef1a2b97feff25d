"""GGUF files: the conversion is exact, done once, and refuses what it cannot read before it begins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tunesmith.bases import gguf, load_base
from tunesmith.core.errors import BaseError

Write = Callable[..., Path]


def test_a_gguf_file_becomes_exactly_the_model_it_was_written_from(
    write_gguf: Write, tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    base = load_base(write_gguf(), dtype="fp32")
    for key, tensor in tiny_llama.state_dict().items():
        assert torch.equal(base.model.state_dict()[key], tensor), key
    ids = tiny_tokenizer("I love this phone. 12 é 中", return_tensors="pt").input_ids
    assert torch.equal(base.tokenizer("I love this phone. 12 é 中", return_tensors="pt").input_ids, ids)
    torch.testing.assert_close(base.model(ids).logits, tiny_llama(ids).logits, atol=1e-6, rtol=0)
    assert base.tokenizer.chat_template == tiny_tokenizer.chat_template
    assert (base.tokenizer.eos_token, base.tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert base.name == "tiny-llama" and base.kind == "decoder" and base.context_length == 512


def test_the_result_is_a_plain_folder_that_can_be_saved_and_is_not_marked_quantised(write_gguf: Write, tmp_path: Path) -> None:
    base = load_base(write_gguf(), dtype="fp32")
    assert getattr(base.model.config, "quantization_config", None) is None
    base.model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert load_base(base.folder, dtype="fp32").fingerprint == base.fingerprint


def test_a_file_is_converted_once_whatever_it_is_called(write_gguf: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    first = gguf.convert(write_gguf("one.gguf"))
    monkeypatch.setattr(gguf, "_convert_into", lambda *_: pytest.fail("converted again"))
    assert gguf.convert(write_gguf("two.gguf")) == first


def test_a_failed_conversion_leaves_nothing_that_looks_converted(
    write_gguf: Write, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf()

    def full(model: object, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "_save_plain", full)
    with pytest.raises(BaseError, match="No space left on device"):
        gguf.convert(file)
    assert [item for item in (own_cache / "bases").iterdir() if not item.name.endswith(".lock")] == []


def test_what_a_killed_conversion_left_behind_is_swept(write_gguf: Write) -> None:
    file = write_gguf()
    target = gguf.converted(file)
    left = target.parent / f".{target.name}~dead"
    left.mkdir(parents=True)
    gguf.convert(file)
    assert target.is_dir() and not left.exists()


@pytest.mark.parametrize("kept", [0.98, 0.6, 0.1])
def test_a_gguf_file_cut_short_anywhere_is_refused(write_gguf: Write, kept: float) -> None:
    file = write_gguf()
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(BaseError, match="cut short") as caught:
        load_base(file)
    assert str(file) in str(caught.value) and "again" in str(caught.value)


def test_a_gguf_file_of_a_few_bytes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "stub.gguf"
    file.write_bytes(b"GGUF\x03\x00")
    with pytest.raises(BaseError, match="cut short"):
        load_base(file)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_a_file_that_only_ends_in_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(BaseError, match="no GGUF file"):
        load_base(file)


def test_an_architecture_that_cannot_be_read_is_named_with_those_that_can(write_gguf: Write) -> None:
    with pytest.raises(BaseError, match=r"'rwkv6'(.|\n)*llama") as caught:
        load_base(write_gguf(architecture="rwkv6"))
    assert "safetensors" in str(caught.value)


def test_a_file_that_lacks_a_tensor_is_refused_rather_than_filled_with_noise(write_gguf: Write) -> None:
    with pytest.raises(BaseError, match="lacks 1 tensors"):
        load_base(write_gguf(leave_out="blk.1.ffn_down"))


def test_digits_are_split_off_one_by_one_where_the_file_says_so(write_gguf: Write) -> None:
    plain, digits = load_base(write_gguf("a.gguf")), load_base(write_gguf("b.gguf", pre="smollm"))
    assert plain.tokenizer.tokenize("x 12") != digits.tokenizer.tokenize("x 12")
    assert digits.tokenizer.tokenize("x 12") == ["x", "Ġ", "1", "2"]
    assert digits.decisions == [f"dtype: {digits.dtype_reason}"]


def test_an_unknown_splitting_of_text_is_said(write_gguf: Write) -> None:
    base = load_base(write_gguf(pre="no-such-splitting"))
    assert any("no-such-splitting" in line for line in base.decisions)


def test_a_missing_gguf_package_is_named(write_gguf: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BaseError, match="pip install gguf"):
        load_base(file)


@pytest.mark.parametrize(
    ("name", "short"),
    [("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"), ("a-Q4_K_M.gguf", "a"), ("b.f16.gguf", "b"), ("plain.gguf", "plain")],
)
def test_the_short_name_drops_the_quantisation(name: str, short: str) -> None:
    assert gguf.short_name(Path(name)) == short
