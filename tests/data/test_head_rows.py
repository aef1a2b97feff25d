"""Rows for task heads are read from JSON Lines and from CoNLL's form, and made so that every word, pair and candidate is asked once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tunesmith.core.errors import DataError
from tunesmith.core.record import Record
from tunesmith.core.row import SECOND
from tunesmith.data import BadRows, read_records
from tunesmith.data.labelled import Reading, answered_rows, labelled_rows
from tunesmith.data.lengths import fit
from tunesmith.data.rendering import renderer_for
from tunesmith.data.tagged import WORDLESS, Sentence, tagged_rows

CONLL = "-DOCSTART- -X- O O\n\n# text = Ada left\nAda\tB-PER\nleft\tO\n \t\nBo\tB-PER\n\n\nhome\tO"


def read(tmp_path: Path, rows: Any, name: str = "a.jsonl", **options: Any) -> list[Record]:
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text)
    return list(read_records(tmp_path / name, **options))


@pytest.fixture(scope="module")
def bert_like() -> Any:
    """A tokenizer that puts [CLS] and [SEP] around a text, and [SEP] between two; a word it has not is cut into letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *"abcdefghijklmnopqrstuvwxyz.中国",
        *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
        "ada",
    ]
    core = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def test_sentences_are_read_with_a_word_and_its_tag_a_line(tmp_path: Path) -> None:
    for name, options in (("a.txt", {"shape": "tokens"}), ("a.tsv", {"shape": "tokens"}), ("a.conll", {})):
        records = read(tmp_path, CONLL, name, **options)
        assert [record.tokens for record in records] == [("Ada", "left"), ("Bo",), ("home",)]
        assert [record.tags for record in records] == [("B-PER", "O"), ("B-PER",), ("O",)]
        assert [record.where.rpartition("line ")[2] for record in records] == ["4", "7", "10"]
        assert records[0].shape == "tokens" and records[0].question() == "Ada left" and records[0].answer() == "B-PER O"


def test_columns_parted_by_spaces_may_be_counted(tmp_path: Path) -> None:
    text = "EU NNP B-NP I-ORG\nrejects VBZ B-VP O\n"
    assert read(tmp_path, text, "a.conll")[0].tags == ("I-ORG", "O")
    (record,) = read(tmp_path, text, "a.conll", columns={"tokens": 1, "tags": 3})
    assert (record.tokens, record.tags) == (("EU", "rejects"), ("B-NP", "B-VP"))


def test_a_line_without_a_tag_is_refused_by_its_number_or_spoils_its_sentence_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 2: the line has no word and tag: 'left'"):
        read(tmp_path, "Ada\tO\nleft\n\nBo\tO\n", "a.conll")
    skipped = BadRows()
    assert [r.tokens for r in read(tmp_path, "Ada\tO\nleft\n\nBo\tO\n", "a.conll", bad_rows=skipped)] == [("Bo",)]
    assert skipped.count == 1


def test_words_and_tags_are_read_from_json_with_text_or_numbers_as_tags(tmp_path: Path) -> None:
    rows = [{"tokens": ["Ada", "left"], "ner_tags": [1, 0], "id": "7"}]
    assert read(tmp_path, rows)[0].tags == ("1", "0")
    assert read(tmp_path, [{"words": ["a"], "tags": ["O"], "text": "a"}])[0].shape == "tokens"
    with pytest.raises(DataError, match="2 ways"):
        read(tmp_path, [{"tokens": ["a"], "ner_tags": ["O"], "pos_tags": ["X"]}])
    assert read(tmp_path, [{"tokens": ["a"], "ner_tags": ["O"], "pos_tags": ["X"]}], columns={"tags": "pos_tags"})[0].tags == ("X",)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 words and 1 tags"),
        ({"tokens": [], "tags": []}, "no words"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "word 2 is ' '"),
        ({"tokens": ["a"], "tags": ["B PER"]}, "the tag of word 1, 'a', is 'B PER'"),
        ({"tokens": ["a"], "tags": [0.5]}, "is 0.5, not a tag"),
        ({"tokens": ["a"]}, "no list of tags beside its list of words"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "has 1 candidates"),
        ({"question": "q", "choices": ["a", "a"], "answer": 0}, "stands there twice"),
        ({"question": "q", "choices": ["a", "b"], "answer": "c"}, "the answer 'c' is none of the 2 candidates"),
        ({"question": "q", "choices": ["a", "b"], "answer": -1}, "the answer -1 is none"),
    ],
)
def test_rows_that_cannot_be_are_refused_with_their_line(row: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"line 1: .*{told}"):
        read(tmp_path, [row])


def test_a_number_is_learned_only_where_it_is_asked_for(tmp_path: Path) -> None:
    rows = [{"text": "good", "score": "3.5", "text_pair": "better"}]
    assert read(tmp_path, rows)[0].shape == "text"
    for options in ({"columns": {"value": "score"}}, {"shape": "value"}):
        (record,) = read(tmp_path, rows, **options)
        assert (record.shape, record.value, record.pair, record.answer()) == ("value", 3.5, "better", "3.5")
        assert record.question() == "good\nbetter"
    with pytest.raises(DataError, match="'nan', not a number"):
        read(tmp_path, [{"text": "a", "score": "nan"}], shape="value")
    with pytest.raises(DataError, match=r"(?s)a score and not a class.*data\.columns\.value=label"):
        read(tmp_path, [{"text": "a", "label": 0.5}])


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        (["red", "green"], 1, "green"),
        (["red", "green"], "1", "green"),
        (["red", "green"], "red", "red"),
        (["red", "green"], "B", "green"),
        (["2", "1"], "1", "1"),  # a candidate's text before its place
        ({"text": ["red", "green"], "label": ["1", "2"]}, "1", "red"),
    ],
)
def test_the_right_candidate_is_named_by_its_text_its_letter_or_its_place(choices: Any, answer: Any, right: str, tmp_path: Path) -> None:
    (record,) = read(tmp_path, [{"question": "Which?", "choices": choices, "answer": answer}])
    assert record.shape == "choices" and record.answer() == right and record.asked()[0]["content"] == "Which?"
    other = read(tmp_path, [{"question": "Which?", "choices": ["blue", "pink"], "answer": 0}])[0]
    assert record.key() != other.key()


def test_a_question_without_candidates_stays_a_prompt(tmp_path: Path) -> None:
    assert read(tmp_path, [{"question": "Which?", "answer": "red"}])[0].shape == "prompt"


def tagged(tokenizer: Any, words: tuple[str, ...], subwords: str = "first") -> Any:
    numbers = tuple(map(float, range(len(words))))
    (row,) = tagged_rows(renderer_for(tokenizer), [Sentence(words, numbers, tuple(n + 0.5 for n in numbers), "x")], subwords)  # type: ignore[arg-type]
    return row


def test_each_word_is_asked_at_its_first_piece_its_last_or_all(bert_like: Any) -> None:
    words = ("Ada", "left", "U.S")
    row = tagged(bert_like, words)
    part = row.segments[0]
    assert part.ids.tolist() == bert_like(list(words), is_split_into_words=True).input_ids
    assert (part.asked.tolist(), part.labels[part.asked].tolist()) == ([1, 2, 6], [0, 1, 2])
    last = tagged(bert_like, words, "last").segments[0]
    assert (last.asked.tolist(), last.labels[last.asked].tolist()) == ([1, 5, 8], [0, 1, 2])
    every = tagged(bert_like, words, "all").segments[0]
    assert every.labels[every.asked].tolist() == [0, 1, 1.5, 1.5, 1.5, 2, 2.5, 2.5]


def test_the_first_piece_holds_the_words_first_letter_in_any_vocabulary(tiny_tokenizer: Any) -> None:
    words = ("The", "quick", "naïve", "🙂", "<|im_end|>", "foxes")
    part = tagged(tiny_tokenizer, words).segments[0]
    assert tiny_tokenizer.decode(part.ids).removesuffix("<|im_end|>") == " ".join(words)
    assert len(part.asked) == len(words)
    for word, at in zip(words, part.asked, strict=True):
        found = tiny_tokenizer.decode(part.ids[: at + 1]).split(" ")[-1]
        assert found == "\ufffd" or (found and word.startswith(found))
    assert part.ids[-1] == tiny_tokenizer.eos_token_id and int((part.ids == tiny_tokenizer.eos_token_id).sum()) == 1


def test_cjk_characters_are_joined_without_spaces_and_a_word_of_nothing_is_not_asked(bert_like: Any, tiny_tokenizer: Any) -> None:
    assert tiny_tokenizer.decode(tagged(tiny_tokenizer, ("中", "国", "a")).segments[0].ids).startswith("中国 a")
    row = tagged(bert_like, ("ada", "\u200b", "b"))
    assert row.segments[0].labels[row.segments[0].asked].tolist() == [0, 2] and row.notes == (WORDLESS,)


def test_a_long_sentence_loses_its_first_words_and_no_others(bert_like: Any) -> None:
    row = tagged(bert_like, ("a", "bc", "d", "e"))
    (short,), _ = fit([row], 6, "truncate-left-of-prompt", bert_like)
    part = short.segments[0]
    assert bert_like.convert_ids_to_tokens(part.ids.tolist()) == ["[CLS]", "b", "##c", "d", "e", "[SEP]"]
    assert part.labels[part.asked].tolist() == [1, 2, 3]
    with pytest.raises(DataError, match="x: "):
        fit([row], 5, "error", bert_like)


def test_a_pair_is_what_the_tokenizer_makes_of_two_texts_and_only_the_first_is_shortened(bert_like: Any) -> None:
    (row,) = labelled_rows(renderer_for(bert_like), [Reading(2, text="a b c", others=("d e",), where="x")])
    root, leaf = row.segments
    both = bert_like("a b c", "d e", return_token_type_ids=True)
    assert [*root.ids, *leaf.ids] == both.input_ids and len(root) == both.token_type_ids.index(1)
    assert leaf.name == SECOND and leaf.asked.tolist() == [len(leaf) - 1] and not len(root.asked)
    (short,), _ = fit([row], 6, "truncate-left-of-prompt", bert_like)
    assert bert_like.decode(np.concatenate([part.ids for part in short.segments])) == "[CLS] c [SEP] d e [SEP]"


def test_candidates_follow_their_question_each_on_its_own_path(bert_like: Any, tiny_tokenizer: Any) -> None:
    reading = Reading(0, text="a", others=("b", "c d", "e"), labels=(1, 0, -1), where="x")
    (row,) = labelled_rows(renderer_for(bert_like), [reading])
    assert [[*row.segments[0].ids, *row.segments[n].ids] for n in row.leaves()] == [bert_like("a", x).input_ids for x in ("b", "c d", "e")]
    assert [part.labels[-1] for part in row.segments[1:]] == [1, 0, -1]  # type: ignore[index]
    asked = Reading(0, messages=({"role": "user", "content": "a"},), others=("b", "c d"), labels=(0, -1), where="x")
    (answered,) = answered_rows(renderer_for(tiny_tokenizer), [asked])
    assert tiny_tokenizer.decode(answered.segments[0].ids).endswith("<|im_start|>assistant\n") and not answered.supervised_tokens
    assert [tiny_tokenizer.decode(part.ids) for part in answered.segments[1:]] == ["b<|im_end|>", "c d<|im_end|>"]
    assert answered.asked_tokens == 2
