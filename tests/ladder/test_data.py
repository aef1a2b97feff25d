"""From a data section to train, dev and test, with a line for everything that was left out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import DataError, LeakError, SpecError, TunesmithError
from tunesmith.core.record import Record
from tunesmith.data import BadRows
from tunesmith.ladder.data import Splits, as_messages, load_splits, read, take
from tunesmith.spec import DataSpec


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def labelled(count: int, start: int = 0, **more: Any) -> list[dict[str, Any]]:
    """Two positive ones for each negative one."""
    return [
        {"text": f"text {n}", "label": "neg" if n % 3 == 0 else "pos", "confidence": n % 10 / 10, **more}
        for n in range(start, start + count)
    ]


def load(**keys: Any) -> Splits:
    return load_splits(DataSpec(**keys))


def texts(records: list[Record]) -> set[str]:
    return {record.text for record in records}


@pytest.fixture
def train(tmp_path):
    return write(tmp_path / "train.jsonl", labelled(60))


# Sizes and sources


@pytest.mark.parametrize(
    ("dev", "test", "sizes"), [(6, 12, (42, 6, 12)), ("10%", "20%", (42, 6, 12)), (0.1, "12", (42, 6, 12)), (None, 10, (50, 0, 10))]
)
def test_dev_and_test_by_size_are_parts_of_train_with_nothing_in_common_and_labels_in_proportion(train, dev, test, sizes):
    parts = load(train=train, dev=dev, test=test)
    assert (len(parts.train), len(parts.dev), len(parts.test)) == sizes
    assert texts(parts.train) | texts(parts.dev) | texts(parts.test) == {f"text {n}" for n in range(60)}
    assert sum(sizes) == 60 and abs(Counter(r.label for r in parts.test)["neg"] - len(parts.test) / 3) <= 1
    assert load(train=train, dev=dev, test=test) == parts
    assert texts(load(train=train, dev=dev, test=test, seed=1).test) != texts(parts.test)


def test_dev_and_test_from_files_are_taken_as_they_are(tmp_path, train):
    dev, test = (write(tmp_path / f"{name}.jsonl", labelled(9, start)) for name, start in (("dev", 100), ("test", 200)))
    parts = load(train=train, dev=dev, test=test)
    assert (len(parts.train), texts(parts.dev), texts(parts.test)) == (
        60,
        {f"text {n}" for n in range(100, 109)},
        {f"text {n}" for n in range(200, 209)},
    )
    assert next(record.where for record in parts.test).endswith("test.jsonl, line 1")


def test_several_files_to_train_on_are_one(tmp_path, train):
    more = write(tmp_path / "more.jsonl", labelled(5, 300))
    assert len(load(train=[train, more]).train) == 65


@pytest.mark.parametrize(("keys", "error", "says"), [
    ({"test": 2}, SpecError, "data.train is missing"),
    ({"train": "nowhere.jsonl"}, DataError, "no such file"),
    ({"dev": 60}, DataError, "leave none to train on"),
    ({"dev": "150%"}, SpecError, "no size of a split"),
    ({"dev": 1.5}, SpecError, "no size of a split"),
    ({"dev": -3}, SpecError, "no size of a split"),
    ({"dev": "nowhere.jsonl"}, DataError, "no such file"),
    ({"columns": {"txt": "text"}}, TunesmithError, "text"),
    ({"columns": {"text": "txet", "label": "label"}}, DataError, "(?s)no column 'txet'.*Did you mean"),
])  # fmt: skip
def test_what_cannot_be_read_or_split_is_refused(train, keys, error, says):
    with pytest.raises(error, match=says):
        load(**({"train": train} if "test" not in keys else {}) | keys)


# Chosen


def test_the_limit_is_taken_after_dev_and_test_and_said(train):
    parts = load(train=train, test=10, limit=20)
    assert (len(parts.train), len(parts.test)) == (20, 10)
    assert "train: 30 over the limit of 20 left out" in parts.notes
    assert parts.test == load(train=train, test=10).test


def test_balance_gives_as_many_of_each_label_in_every_part_and_says_so(train):
    parts = load(train=train, test=12, balance=True)
    for records, each in ((parts.train, 14), (parts.test, 6)):
        assert Counter(record.label for record in records) == {"neg": each, "pos": each}
    assert "balanced: 20 neg, 20 pos, 20 left out" in parts.notes
    assert Counter(r.label for r in load(train=train, balance=True, limit=10).train) == {"neg": 5, "pos": 5}


def test_a_test_file_is_filtered_like_train_but_neither_balanced_nor_rid_of_repetitions(tmp_path, train):
    rows = labelled(20, 100)
    test = write(tmp_path / "test.jsonl", [*rows, rows[9]])
    parts = load(train=train, test=test, filter={"confidence": ">= 0.5"}, balance=True)
    assert all(record.fields["confidence"] >= 0.5 for record in [*parts.train, *parts.test])
    assert len(parts.test) == 11 and len(set(Counter(r.label for r in parts.test).values())) == 2
    assert len(set(Counter(r.label for r in parts.train).values())) == 1
    assert "test: 10 of 21 filtered out" in parts.notes and "test: 1 questions stand there more than once" in parts.notes


def test_a_test_file_without_the_filters_column_is_taken_unfiltered_and_that_is_said(tmp_path, train):
    test = write(tmp_path / "test.jsonl", [{"text": "new", "label": "pos"}])
    parts = load(train=train, test=test, filter={"confidence": ">= 0.5"})
    assert len(parts.test) == 1 and any("test: not filtered by 'confidence'" in note for note in parts.notes)
    with pytest.raises(DataError, match=r"(?s)unknown column 'confidense'.*Did you mean:  confidence"):
        load(train=train, test=test, filter={"confidense": ">= 0.5"})


def test_a_filter_that_empties_a_test_file_names_it(tmp_path, train):
    test = write(tmp_path / "test.jsonl", labelled(3, 100))
    with pytest.raises(DataError, match=r"test\.jsonl: no record is left"):
        load(train=train, test=test, filter={"confidence": ">= 0.8"})


def test_balance_still_holds_when_leaked_questions_were_dropped_from_train(tmp_path, train):
    test = write(tmp_path / "test.jsonl", [row for row in labelled(60) if row["label"] == "neg"][:5])
    parts = load(train=train, test=test, duplicates="drop", balance=True)
    assert Counter(record.label for record in parts.train) == {"neg": 15, "pos": 15}


# Conflicts and duplicates


def test_one_text_with_two_labels_is_dropped_and_one_question_with_two_good_answers_is_kept(tmp_path):
    labels = write(tmp_path / "l.jsonl", [*labelled(6), {"text": "text 1", "label": "neg", "confidence": 1}])
    answers = write(
        tmp_path / "p.jsonl",
        [{"prompt": "hi", "completion": "hello"}, {"prompt": "hi", "completion": "hey"}, {"prompt": "hi", "completion": "hey"}],
    )
    assert texts(load(train=labels).train) == {f"text {n}" for n in (0, 2, 3, 4, 5)}
    assert [record.answer() for record in load(train=answers).train] == ["hello", "hey"]
    assert "2 in conflict" in load(train=labels).notes[0] and "1 duplicates" in load(train=answers).notes[0]


def test_what_to_do_with_conflicts_can_be_said(tmp_path):
    labels = write(tmp_path / "l.jsonl", [*labelled(6), {"text": "text 1", "label": "neg", "confidence": 1}])
    answers = write(
        tmp_path / "p.jsonl",
        [{"prompt": "hi", "completion": "a"}, {"prompt": "hi", "completion": "b"}, {"prompt": "ho", "completion": "c"}],
    )
    assert len(load(train=labels, conflicts="keep").train) == 7
    assert [record.answer() for record in load(train=answers, conflicts="drop").train] == ["c"]


# Leaks


def test_test_questions_in_train_are_refused_with_both_places(tmp_path, train):
    test = write(tmp_path / "test.jsonl", [*labelled(2, 100), *labelled(2, 7)])
    with pytest.raises(LeakError, match=r"(?s)train\.jsonl, line 8.*2 of train also in test.*test\.jsonl, line 3.*data\.duplicates=drop"):
        load(train=train, test=test)


def test_leaks_are_dropped_from_train_before_anything_is_drawn_from_it(tmp_path, train):
    test = write(tmp_path / "test.jsonl", labelled(20))
    parts = load(train=train, dev=10, test=test, duplicates="drop")
    assert not (texts(parts.train) | texts(parts.dev)) & texts(parts.test)
    assert (len(parts.train), len(parts.dev), len(parts.test)) == (30, 10, 20)
    assert any("20 dropped from train" in note for note in parts.notes)


def test_allowed_leaks_are_only_reported(tmp_path, train):
    parts = load(train=train, test=write(tmp_path / "test.jsonl", labelled(20)), duplicates="allow")
    assert (len(parts.train), len(parts.test)) == (60, 20) and any("20 of train also in test" in note for note in parts.notes)


def test_questions_that_dev_and_test_share_are_refused_or_dropped_from_dev_and_counted(tmp_path, train):
    dev, test = write(tmp_path / "dev.jsonl", labelled(10, 100)), write(tmp_path / "test.jsonl", labelled(10, 106))
    with pytest.raises(LeakError, match="4 of test also in dev"):
        load(train=train, dev=dev, test=test)
    parts = load(train=train, dev=dev, test=test, duplicates="drop")
    assert texts(parts.dev) == {f"text {n}" for n in range(100, 106)} and len(parts.test) == 10
    assert "dev: 4 questions that are also in test left out" in parts.notes
    with pytest.raises(DataError, match="every question of dev is also in test"):
        load(train=train, dev=test, test=test, duplicates="drop")


def test_a_train_that_is_all_test_leaves_nothing(tmp_path, train):
    with pytest.raises(DataError, match=r"(?s)no training samples are left.*60 dropped from train"):
        load(train=train, test=write(tmp_path / "test.jsonl", labelled(60)), duplicates="drop")


def test_groups_that_files_share_are_told(tmp_path):
    train = write(tmp_path / "a.jsonl", [{**row, "doc": n // 2} for n, row in enumerate(labelled(6))])
    test = write(tmp_path / "b.jsonl", [{**row, "doc": n} for n, row in enumerate(labelled(2, 50))])
    parts = load(train=train, test=test, columns={"group": "doc"})
    assert any(note.startswith("test: 2 groups stand in train as well") for note in parts.notes)


# Bad rows


def test_bad_rows_are_errors_unless_they_may_be_skipped_and_then_counted_with_the_first_three_places(tmp_path):
    train = write(
        tmp_path / "train.jsonl", [*labelled(5), "{broken", {"text": "", "label": "pos"}, {"text": "x"}, {"text": "y", "label": ""}, "[1]"]
    )
    with pytest.raises(DataError, match=r"train\.jsonl, line 6: broken JSON"):
        load(train=train)
    parts = load(train=train, bad_rows="skip")
    assert len(parts.train) == 5
    note = parts.notes[0]
    assert note.startswith("train: 5 bad rows skipped (") and all(f"line {n}: " in note for n in (6, 7, 8)) and "line 9" not in note
    counted = BadRows()
    assert len(read(DataSpec(bad_rows="skip"), train, counted)) == 5 and counted.count == 5


def test_bad_rows_of_test_are_told_as_tests(tmp_path, train):
    test = write(tmp_path / "test.jsonl", [*labelled(3, 100), "{broken"])
    assert any(note.startswith("test: 1 bad row skipped") for note in load(train=train, test=test, bad_rows="skip").notes)


# Samples of samples


def test_a_sample_has_labels_in_proportion_and_never_fails_for_groups_or_repetitions():
    records = [Record("label", text=f"t{n % 40}", label="neg" if n % 4 else "pos", group=str(n % 3)) for n in range(80)]
    for count in (1, 7, 40, 79):
        drawn = take(records, count, seed=0)
        assert len(drawn) == count and abs(Counter(r.label for r in drawn)["pos"] - count / 4) <= 1
        assert [records.index(record) for record in drawn] == sorted(records.index(record) for record in drawn) or count > 40
    assert take(records, 7, seed=0) == take(records, 7, seed=0) != take(records, 7, seed=1)
    assert take(records, 500, seed=0) == records and take([], 3, seed=0) == []


def test_a_record_as_messages_keeps_where_it_came_from():
    made = as_messages(Record("label", text="x", label="y", where="f, line 1"), [{"role": "user", "content": "x"}])
    assert (made.shape, made.messages, made.where) == ("messages", ({"role": "user", "content": "x"},), "f, line 1")
