"""Small models as users have them: folders to break, a BERT, a GGUF file, and a cache of each test's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TUNESMITH_DTYPE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def folder(tiny_base_folder: Path, tmp_path: Path) -> Path:
    """A tiny Llama's folder that the test may break."""
    return Path(shutil.copytree(tiny_base_folder, tmp_path / "tiny-llama"))


@pytest.fixture
def bert_folder(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A tiny BERT without a masked-language-model head, as sentence encoders are published."""
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    target = tmp_path / "tiny-bert"
    BertModel(BertConfig(vocab_size=len(tiny_tokenizer), **sizes)).save_pretrained(target)
    tiny_tokenizer.save_pretrained(target)
    (target / "tokenizer_config.json").write_text((target / "tokenizer_config.json").read_text().replace("512", "48"))
    return target


@pytest.fixture
def write_gguf(tiny_llama: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny Llama as llama.cpp would: fp32 tensors, interleaved rotary halves, the tokenizer inside."""

    def write(name: str = "tiny-llama.F32.gguf", *, architecture: str = "llama", pre: str = "gpt-2", leave_out: str = "") -> Path:
        import gguf

        config = tiny_llama.config
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_vocab_size(config.vocab_size)
        _write_tokenizer(writer, tiny_tokenizer, pre)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        for key, tensor in tiny_llama.state_dict().items():
            stem = key.removesuffix(".weight")
            target = names.get_name(stem)
            if target is None or key == "lm_head.weight" or (leave_out and leave_out in target):
                continue
            values = tensor.numpy()
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads if "k_proj" in key else 0
            writer.add_tensor(f"{target}.weight", _interleave(values, heads) if heads else values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return write


def _interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """From transformers' order of rotary halves to llama.cpp's pairs, for each head."""
    rows, columns = values.shape
    return np.ascontiguousarray(values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns))


def _write_tokenizer(writer: object, tokenizer: PreTrainedTokenizerFast, pre: str) -> None:
    import json

    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocab = sorted(core["vocab"], key=core["vocab"].__getitem__)
    control = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")  # type: ignore[attr-defined]
    writer.add_tokenizer_pre(pre)  # type: ignore[attr-defined]
    writer.add_token_list(vocab)  # type: ignore[attr-defined]
    writer.add_token_types([3 if token in control else 1 for token in vocab])  # type: ignore[attr-defined]
    writer.add_token_merges([" ".join(pair) for pair in core["merges"]])  # type: ignore[attr-defined]
    writer.add_bos_token_id(tokenizer.bos_token_id)  # type: ignore[attr-defined]
    writer.add_eos_token_id(tokenizer.eos_token_id)  # type: ignore[attr-defined]
    writer.add_pad_token_id(tokenizer.pad_token_id)  # type: ignore[attr-defined]
    writer.add_chat_template(tokenizer.chat_template)  # type: ignore[attr-defined]
