"""Tokenizers of bases: added tokens and their rows, chat templates of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tunesmith.bases import load_base
from tunesmith.core.errors import BaseError


def save(folder: Path, tokenizer: PreTrainedTokenizerFast, *, rows: int, tied: bool) -> Path:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 1, 64])
def test_new_tokens_get_rows_that_start_at_the_mean_and_leave_the_others_alone(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, tied: bool, spare: int
) -> None:
    used = len(tiny_tokenizer)
    folder = save(tmp_path / "m", tiny_tokenizer, rows=used + spare, tied=tied)
    before, base = load_base(folder, dtype="fp32"), load_base(folder, dtype="fp32", new_tokens=["<think>", "</think>"])
    assert base.new_token_ids == [used, used + 1]
    assert base.model.config.vocab_size == max(used + spare, used + 2)
    for table in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before.model, table)().weight, getattr(base.model, table)().weight
        assert torch.equal(new[:used], old[:used])
        torch.testing.assert_close(new[used : used + 2], old[:used].mean(0).expand(2, -1))
    assert base.model(torch.tensor([base.new_token_ids])).logits.shape[-1] == max(used + spare, used + 2)
    assert (base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight) == tied
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_a_new_token_is_one_id_in_text_and_special_when_decoding(folder: Path) -> None:
    base = load_base(folder, new_tokens=["<think>"])
    ids = base.tokenizer("so <think>yes", add_special_tokens=False).input_ids
    assert ids.count(base.new_token_ids[0]) == 1
    assert "<think>" not in base.tokenizer.decode(ids, skip_special_tokens=True)
    assert "<|im_end|>" in base.tokenizer.all_special_tokens


def test_two_loads_start_new_rows_from_the_same_numbers(folder: Path) -> None:
    first, second = (load_base(folder, new_tokens=["<a>", "<b>"]).model.get_input_embeddings().weight for _ in range(2))
    assert torch.equal(first, second)


def test_a_token_that_is_known_already_is_not_added_twice(folder: Path) -> None:
    base = load_base(folder, new_tokens=["<|im_end|>", "<x>", "<x>"])
    assert len(base.new_token_ids) == 1
    assert any("1 added" in line and "1 were known" in line for line in base.decisions)


def test_new_tokens_on_an_encoder(bert_folder: Path) -> None:
    base = load_base(bert_folder, new_tokens=["<x>"])
    states = base.model(torch.tensor([base.new_token_ids])).last_hidden_state
    assert len(base.new_token_ids) == 1 and states.shape[1] == 1 and bool(states.isfinite().all())


@pytest.mark.parametrize("tokens", [[""], [" "], [3]])
def test_an_empty_token_is_refused(folder: Path, tokens: Sequence[str]) -> None:
    with pytest.raises(BaseError, match="new_tokens"):
        load_base(folder, new_tokens=tokens)


def test_tokens_without_a_row_are_told(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = save(tmp_path / "m", tiny_tokenizer, rows=len(tiny_tokenizer) - 2, tied=True)
    assert any("2 tokens have no embedding row" in line for line in load_base(folder).decisions)


def test_a_tokenizer_without_padding_pads_with_its_end_token(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"pad_token": "<|endoftext|>",', ""))
    assert load_base(folder).tokenizer.pad_token == "<|im_end|>"


def test_a_template_replaces_the_tokenizers_own_as_text_or_from_a_file(folder: Path, tmp_path: Path) -> None:
    text = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    file = tmp_path / "template.jinja"
    file.write_text(text)
    for template in (text, str(file), file):
        base = load_base(folder, template=template)
        assert base.template == text
        assert base.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[user] hi\n"


def test_a_template_that_wants_more_than_one_message_is_not_refused_for_it(folder: Path) -> None:
    text = "{% if messages|length < 2 %}{{ raise_exception('two, please') }}{% endif %}x"
    assert load_base(folder, template=text).template == text


def test_a_template_that_is_no_jinja_names_the_line(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("first\n{% for m in messages %}\n{% endif %}")
    with pytest.raises(BaseError, match=r"template\.jinja, line 3: the chat template is not valid Jinja"):
        load_base(folder, template=file)


def test_a_missing_template_is_answered_with_the_nearest(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("x")
    with pytest.raises(BaseError, match=r"Nearest:  .*chat\.jinja"):
        load_base(folder, template=tmp_path / "chatt.jinja")
