"""Rows that cannot be used, counted in every kind of file; what is wrong with a whole file stays an error."""

from __future__ import annotations

import gzip
import json

import pytest

from tunesmith.core.errors import DataError, SpecError
from tunesmith.data import BadRows, read_records

GOOD = [{"prompt": "a", "completion": "1"}, {"prompt": "b", "completion": "2"}]
FILES = {
    "rows.jsonl": "\n".join([json.dumps(GOOD[0]), "{broken", "5", '{"prompt": "c", "completion": ""}', "", json.dumps(GOOD[1])]),
    "rows.json": json.dumps([GOOD[0], 5, {"prompt": "c"}, {"prompt": ["d"], "completion": "4"}, GOOD[1]]),
    "rows.csv": 'prompt,completion\na,1\nc\nd,4,5\ne,""\nb,2\n',
    "rows.tsv": "prompt\tcompletion\na\t1\nc\nd\t4\t5\ne\t\nb\t2\n",
    "rows.txt": "a\t1\nno label\nalso none\n\t\nb\t2\n",
}


@pytest.mark.parametrize("name", FILES)
def test_bad_rows_are_skipped_and_counted_and_the_good_ones_come_all(tmp_path, name):
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8")
    counted = BadRows()
    records = list(read_records(path, bad_rows=counted))
    assert [(r.text or r.messages[0]["content"], r.answer()) for r in records] == [("a", "1"), ("b", "2")]
    bad = 2 if name == "rows.txt" else 3
    assert counted.count == bad and len(counted.first) == bad
    assert all(str(path) in error.where for error in counted.first)
    with pytest.raises(DataError) as first:
        list(read_records(path))
    assert str(first.value) == str(counted.first[0])


def test_a_first_row_that_is_bad_does_not_decide_the_shape_of_the_rest(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"prompt": "lost"}, *GOOD])), encoding="utf-8")
    counted = BadRows()
    assert len(list(read_records(path, bad_rows=counted))) == 2 and counted.count == 1


def test_a_file_of_which_no_row_can_be_used_is_an_error_not_an_empty_set(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD[0]), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"x": 1}\n{"x": 2}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: none of the 2 rows can be used; the last one: no column is known"):
        list(read_records(tmp_path, bad_rows=BadRows()))


def test_a_column_that_no_row_has_is_an_error_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, GOOD)), encoding="utf-8")
    with pytest.raises(DataError, match=r"(?s)there is no column 'promt'.*Did you mean"):
        list(read_records(path, columns={"prompt": "promt", "completion": "completion"}, bad_rows=BadRows()))


def test_what_is_wrong_with_a_whole_file_is_never_skipped(tmp_path):
    broken = {
        "a.csv": b'text,label\n"never closed,x\n',
        "b.jsonl": b'{"text": "a", "label": "\xff"}\n',
        "c.json": b"[{",
        "d.jsonl": b"",
        "e.jsonl.gz": gzip.compress(b'{"text": "a", "label": "b"}\n' * 99)[:-9],
    }
    for name, content in broken.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=name):
            list(read_records(path, bad_rows=BadRows()))
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "x.jsonl", bad_rows=BadRows())
    with pytest.raises(SpecError, match="no text encoding"):
        read_records(tmp_path / "b.jsonl", encoding="utf-88", bad_rows=BadRows())


def test_the_summary_shows_three_places_and_says_when_there_are_more():
    counted = BadRows()
    assert counted.summary() == ""
    counted.add(DataError("the text is empty.", where="f, line 1"))
    assert counted.summary() == "1 bad row skipped (f, line 1: the text is empty)"
    for number in range(2, 6):
        counted.add(DataError("bad.", where=f"f, line {number}"))
    assert counted.summary() == "5 bad rows skipped (f, line 1: the text is empty; f, line 2: bad; f, line 3: bad; ...)"
