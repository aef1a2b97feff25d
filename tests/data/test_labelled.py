"""Rows for task heads: the text as its tokenizer writes it alone, asked at the last token, and labels that survive every store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith.core.errors import DataError
from tunesmith.core.row import Row, Segment
from tunesmith.data.labelled import Reading, labelled_rows
from tunesmith.data.lengths import fit
from tunesmith.data.rendering import renderer_for
from tunesmith.data.rowcache import RowCache
from tunesmith.data.rowstore import RowStore, write_store
from tunesmith.data.sharing import share_prefix
from tunesmith.data.textrow import TextRow

TEXTS = ["I love this phone.", "What a terrible film <|im_end|> 🙂", "It arrived."]


@pytest.fixture(scope="module")
def bert_like() -> Any:
    """A tokenizer that puts [CLS] and [SEP] around a text."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz.", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"), "love"]
    core = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def made(tokenizer: Any, texts: list[str], **options: Any) -> list[TextRow]:
    readings = [Reading(number, text=text, where=f"line {number + 1}") for number, text in enumerate(texts)]
    return list(labelled_rows(renderer_for(tokenizer), readings, **options))


def test_an_encoders_row_is_what_its_tokenizer_makes_of_the_text_alone(bert_like: Any) -> None:
    rows = made(bert_like, TEXTS[:1] + TEXTS[2:])
    assert [row.segments[0].ids.tolist() for row in rows] == [bert_like(text).input_ids for text in (TEXTS[0], TEXTS[2])]
    assert [(row.segments[0].asked.tolist(), row.segments[0].labels[-1]) for row in rows] == [
        ([row.tokens - 1], n) for n, row in enumerate(rows)
    ]  # type: ignore[index]
    assert not any(row.supervised_tokens for row in rows) and [row.where for row in rows] == ["line 1", "line 2"]


def test_a_decoders_row_ends_with_the_end_token_and_special_token_text_stays_text(tiny_tokenizer: Any) -> None:
    for row, text in zip(made(tiny_tokenizer, TEXTS), TEXTS, strict=True):
        ids = row.segments[0].ids.tolist()
        assert ids[-1] == tiny_tokenizer.eos_token_id and ids.count(tiny_tokenizer.eos_token_id) == 1
        assert text in tiny_tokenizer.decode(ids)


def test_messages_are_read_up_to_where_an_answer_would_begin(tiny_tokenizer: Any) -> None:
    (row,) = labelled_rows(renderer_for(tiny_tokenizer), [Reading(1, messages=({"role": "user", "content": "Good?"},), where="x")])
    assert tiny_tokenizer.decode(row.segments[0].ids).endswith("Good?<|im_end|>\n<|im_start|>assistant\n")
    assert row.segments[0].asked.tolist() == [row.tokens - 1]


def test_a_text_is_shortened_from_the_left_and_never_what_stands_around_it(bert_like: Any) -> None:
    (row,) = made(bert_like, ["a b c d e f g h"])
    (short,), report = fit([row], 5, "truncate-left-of-prompt", bert_like)
    assert bert_like.convert_ids_to_tokens(short.segments[0].ids.tolist()) == ["[CLS]", "f", "g", "h", "[SEP]"]
    assert short.segments[0].asked.tolist() == [4] and report.truncated == 1
    with pytest.raises(DataError, match="line 1"):
        fit([row], 5, "error", bert_like)


def test_an_empty_text_is_an_error_that_names_its_line(bert_like: Any) -> None:
    with pytest.raises(DataError, match="line 2"):
        made(bert_like, ["a", "  "])


def test_rows_from_the_cache_are_the_rows_made_anew(bert_like: Any, tmp_path: Path) -> None:
    cache = RowCache(tmp_path)
    first, again = (made(bert_like, TEXTS, cache=cache) for _ in range(2))
    assert cache.hits == 1 and repr(first) == repr(again)


def labelled() -> list[TextRow]:
    labels = np.array([np.nan, 2, np.nan, 0.5], np.float32)
    return [
        TextRow((Segment(np.arange(4, dtype=np.int32), np.zeros(4, np.bool_), labels=labels),), "a"),
        TextRow((Segment(np.arange(3, dtype=np.int32), np.array([False, True, True])),), "b"),
    ]


def test_labels_survive_the_cache_and_the_store_on_disk(tmp_path: Path) -> None:
    rows = labelled()
    cache = RowCache(tmp_path / "cache")
    cache.save("key", list(enumerate(rows)))
    loaded = cache.load("key")
    assert loaded is not None
    with write_store(tmp_path, "key") as writer:
        writer.extend(rows)
    store = RowStore.find(tmp_path, "key")
    assert store is not None
    for found in ([row for _, row in loaded], list(store)):
        assert np.array_equal(found[0].segments[0].labels, rows[0].segments[0].labels, equal_nan=True)  # type: ignore[arg-type]
        assert found[1].segments[0].labels is None and found[0].asked_tokens == 2


def test_a_token_with_a_label_is_never_shared_and_keeps_it() -> None:
    start = list(range(20))
    rows = []
    for number in (0, 1):
        labels = np.full(22, np.nan, np.float32)
        labels[[18, 21]] = number, 7
        rows.append(Row((Segment(np.asarray([*start, 90 + number, 95], np.int32), np.zeros(22, np.bool_), labels=labels),)))
    (shared,) = share_prefix(rows)
    assert len(shared.row.segments[0]) == 18 and shared.row.segments[0].labels is None
    for number in (0, 1):
        leaf = shared.row.segments[shared.members[number].leaves[0]]
        assert leaf.asked.tolist() == [0, 3] and leaf.labels is not None and leaf.labels[[0, 3]].tolist() == [number, 7]


def test_labels_are_one_a_token() -> None:
    with pytest.raises(ValueError, match="one label a token"):
        Segment(np.zeros(3, np.int32), np.zeros(3, np.bool_), labels=np.zeros(2, np.float32))
