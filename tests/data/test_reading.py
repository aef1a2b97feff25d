"""Files to records: formats, encodings, line numbers, laziness, and what is said about files that are not right."""

from __future__ import annotations

import gzip
import itertools
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import DataError, SpecError, TunesmithError
from tunesmith.data import data_files, files, read_records

ROWS = [
    {"text": "fine, really", "label": "good"},
    {"text": "质量很差，不推荐", "label": "bad"},
    {"text": 'a "quoted"\nword 🙂', "label": "good"},
]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def refused(source: Path | str, kind: type[TunesmithError] = DataError, **options: Any) -> TunesmithError:
    with pytest.raises(kind) as caught:
        list(read_records(source, **options))
    return caught.value


def as_csv(path: Path) -> Path:
    return write(path, 'text,label\n"fine, really",good\n"质量很差，不推荐",bad\n"a ""quoted""\nword 🙂",good\n')


def as_parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


FORMATS: dict[str, Callable[[Path], Path]] = {
    "rows.jsonl": lambda path: write(path, jsonl(ROWS)),
    "rows.json": lambda path: write(path, json.dumps(ROWS, indent=1)),
    "held.json": lambda path: write(path, json.dumps({"version": "1", "data": ROWS})),
    "lines.json": lambda path: write(path, jsonl(ROWS)),
    "rows.csv": as_csv,
    "rows.tsv": lambda path: write(path, 'text\tlabel\nfine, really\tgood\n质量很差，不推荐\tbad\n"a ""quoted""\nword 🙂"\tgood\n'),
    "rows.parquet": as_parquet,
    "rows.jsonl.gz": lambda path: write(path, gzip.compress(jsonl(ROWS).encode())),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_records(tmp_path: Path, name: str) -> None:
    records = list(read_records(FORMATS[name](tmp_path / name)))
    assert [(record.text, record.label) for record in records] == [(row["text"], row["label"]) for row in ROWS]
    assert {record.shape for record in records} == {"label"}
    assert records[1].fields == ROWS[1]


def test_a_record_names_its_true_line_also_after_quoted_line_ends_and_blank_lines(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", 'text,label\r\n"one\r\ntwo\r\nthree",a\r\n\r\nfour,b\r\n')
    assert [(r.text, r.where) for r in read_records(table)] == [("one\r\ntwo\r\nthree", f"{table}, line 2"), ("four", f"{table}, line 6")]
    tabs = write(tmp_path / "t.tsv", 'text\tlabel\n"one\ntwo"\ta\n\nthree\tb\n')
    assert [r.where for r in read_records(tabs)] == [f"{tabs}, line 2", f"{tabs}, line 5"]
    lines = write(tmp_path / "t.jsonl", '\n{"text": "a"}\n\n{"text": "b"}\n')
    assert [r.where for r in read_records(lines)] == [f"{lines}, line 2", f"{lines}, line 4"]
    assert [r.where for r in read_records(as_parquet(tmp_path / "t.parquet"))][-1].endswith("t.parquet, row 3")


def test_only_a_line_feed_ends_a_line_of_json_lines(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\x0bfour"
    path = write(tmp_path / "t.jsonl", jsonl([{"text": text}, {"text": "next"}]))
    assert [r.text for r in read_records(path)] == [text, "next"]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.txt", "t.json"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
def test_byte_order_marks_and_windows_line_ends_leave_no_trace(tmp_path: Path, name: str, end: str, mark: bytes) -> None:
    rows = {
        "t.csv": "text,label\n好,a\nx,b\n",
        "t.jsonl": '{"text": "好", "label": "a"}\n{"text": "x", "label": "b"}',
        "t.txt": "好\ta\nx\tb",
        "t.json": '[\n{"text": "好", "label": "a"},\n{"text": "x", "label": "b"}]',
    }
    path = write(tmp_path / name, mark + rows[name].replace("\n", end).encode())
    assert [(r.text, r.label) for r in read_records(path)] == [("好", "a"), ("x", "b")]


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_other_encodings_are_read_when_named(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path / "t.csv", "text,label\n质量很差\u0a0a,bad\n很好,good\n".encode(encoding))
    assert [r.text for r in read_records(path, encoding=encoding)] == ["质量很差\u0a0a", "很好"]


def test_bytes_of_another_encoding_are_located_and_can_be_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", b"text,label\nfine,a\ncaf\xe9,b\n")
    error = refused(path)
    assert error.where == f"{path}, line 3" and "0xe9 at position 4" in error.what
    assert any("data.decode_errors=replace" in hint for hint in error.hints) and any("data.encoding=" in hint for hint in error.hints)
    assert [r.text for r in read_records(path, decode_errors="replace")] == ["fine", "caf\ufffd"]
    assert [r.text for r in read_records(path, encoding="latin-1")] == ["fine", "café"]


def test_utf16_without_being_told_is_recognised_in_the_error(tmp_path: Path) -> None:
    error = refused(write(tmp_path / "t.csv", "text,label\na,b\n".encode("utf-16")))
    assert "data.encoding=utf-16" in str(error)


def test_broken_utf16_is_located(tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt", "first\nsecond".encode("utf-16") + b"\x00")
    assert "after line" in refused(path, encoding="utf-16").where


def test_unknown_encodings_and_ways_to_decode_are_refused(tmp_path: Path) -> None:
    path = as_csv(tmp_path / "t.csv")
    assert "klingon" in str(refused(path, SpecError, encoding="klingon"))
    assert "replace" in str(refused(path, SpecError, decode_errors="replce"))
    refused(path, SpecError, limit=-1)


def test_half_of_a_surrogate_pair_is_refused_or_replaced_and_a_whole_one_is_read(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.jsonl", '{"text": "\\ud83d\\ude42"}')
    assert next(read_records(whole)).text == "🙂"
    half = write(tmp_path / "half.jsonl", '{"text": "fine"}\n{"text": "cut \\ud83d"}')
    assert refused(half).where == f"{half}, line 2"
    record = list(read_records(half, decode_errors="replace"))[1]
    assert record.text == "cut \ufffd" and record.key()


# --- what is wrong with the file -------------------------------------------------------------------------------------


def test_a_missing_file_names_the_nearest_ones(tmp_path: Path) -> None:
    as_csv(tmp_path / "reviews.csv")
    write(tmp_path / "notes.md", "x")
    with pytest.raises(DataError) as caught:
        read_records(tmp_path / "revews.csv")  # at the call, before any row is asked for
    assert str(tmp_path / "reviews.csv") in str(caught.value) and "notes.md" not in str(caught.value)
    assert "reviews.csv" in str(refused(tmp_path / "zzz.parquet"))
    assert "hub:" in str(refused("imdb")) and "no folder" in str(refused(tmp_path / "nowhere" / "x.csv"))


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.tsv", "t.txt", "t.jsonl.gz"])
@pytest.mark.parametrize("content", ["", "\n \n"], ids=["no byte", "blank lines"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path / name, gzip.compress(content.encode()) if name.endswith("gz") else content)
    error = refused(path)
    assert "empty" in error.what and error.where == str(path)


@pytest.mark.parametrize(("name", "content"), [("t.json", "[]"), ("t.csv", "text,label\n"), ("t.tsv", "text\tlabel\n")])
def test_a_file_with_a_header_or_a_list_and_no_rows_is_empty_too(tmp_path: Path, name: str, content: str) -> None:
    assert "no rows" in refused(write(tmp_path / name, content)).what


def test_an_empty_parquet_file_is_an_error(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "t.parquet")
    assert "no rows" in refused(tmp_path / "t.parquet").what


def test_broken_json_names_line_and_column(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": "c",}\n')
    error = refused(path)
    assert error.where == f"{path}, line 3" and "broken JSON" in error.what and "column" in error.what
    whole = write(tmp_path / "t.json", '[\n{"text": "a"},\n{"text" "b"}\n]')
    assert "line 3" in refused(whole).what


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('["a"]', "not an object"),
        ("3", "not an object"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_lines_that_are_no_objects_are_refused(tmp_path: Path, content: str, said: str) -> None:
    assert said in refused(write(tmp_path / "t.jsonl", content)).what


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "2 lists of rows (train, test)"),
        ('{"text": {"0": "a"}}', "no list of rows"),
        ('"text"', "not a list of rows"),
        ("[1, 2]", "not an object"),
    ],
)
def test_json_that_holds_no_rows_says_what_it_holds(tmp_path: Path, content: str, said: str) -> None:
    assert said in refused(write(tmp_path / "t.json", content)).what


def test_one_json_object_may_be_one_row(tmp_path: Path) -> None:
    dialogue = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert next(read_records(write(tmp_path / "a.json", json.dumps(dialogue)))).answer() == "b"
    assert next(read_records(write(tmp_path / "b.json", '{"text": "alone"}'))).text == "alone"


def test_a_json_file_beyond_the_limit_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "JSON_LIMIT", 1000)
    path = write(tmp_path / "t.json", json.dumps([{"text": "x" * 50}] * 100, indent=1))
    assert "jq" in str(refused(path))
    assert len(list(read_records(write(tmp_path / "lines.json", jsonl([{"text": "x" * 50}] * 100))))) == 100


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LINE_LIMIT", 100)
    assert "longer" in refused(write(tmp_path / "t.txt", "short\n" + "x" * 300)).what


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.parquet"])
@pytest.mark.parametrize("harm", ["cut short", "not of the format"])
def test_a_damaged_binary_file_is_an_error_and_no_traceback(tmp_path: Path, name: str, harm: str) -> None:
    whole = FORMATS[f"rows.{name.partition('.')[2]}"](tmp_path / name).read_bytes()
    path = write(tmp_path / name, whole[: len(whole) // 2] if harm == "cut short" else b"PK\x03\x04 nothing")
    assert str(path) in refused(path).where


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        ('text,label\na,b\n"never closed,c\nd,e\n', 3, "never closed"),
        ('text,label\n"a" b,c\n', 2, "closing quote"),
        ("text,label\na,b,c\n", 2, "3 cells"),
        ("text,label\na,b\nc\n", 3, "1 cells"),
        ("text,label,text\na,b,c\n", 1, "twice"),
        ("text,label\na\rb,c\n", 2, "carriage return"),
    ],
)
def test_broken_tables_name_the_line_and_the_reason(tmp_path: Path, content: str, line: int, said: str) -> None:
    path = write(tmp_path / "t.csv", content)
    error = refused(path)
    assert error.where == f"{path}, line {line}" and said in error.what


def test_quotes_in_tsv_are_plain_characters_unless_they_quote_a_whole_cell(tmp_path: Path) -> None:
    rows = ['"A" is a letter\ta', 'an inch is 1"\tb', '"open\tc', '"with\ttab"\td', '"say ""hi"""\te']
    path = write(tmp_path / "t.tsv", "text\tlabel\n" + "\n".join(rows) + "\n")
    assert [r.text for r in read_records(path)] == ['"A" is a letter', 'an inch is 1"', '"open', "with\ttab", 'say "hi"']


def test_quotes_that_open_and_close_in_different_cells_of_tsv_join_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", 'text\tlabel\n"open\tclose"\n')
    assert [(r.text, r.label) for r in read_records(path)] == [('"open', 'close"')]


def test_a_quote_that_is_never_closed_in_tsv_does_not_swallow_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", 'text\tlabel\n"open and no tab\n' + "x\n" * 10)
    assert refused(path).where == f"{path}, line 2"


def test_semicolons_part_a_table_whose_header_has_no_comma(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "text;label\nfine, really;good\n")
    assert next(read_records(path)).text == "fine, really"


def test_cells_larger_than_the_usual_limit_of_csv_are_read(tmp_path: Path) -> None:
    long = "x" * 300_000
    assert next(read_records(write(tmp_path / "t.csv", f"text,label\n{long},a\n"))).text == long


# --- headers ---------------------------------------------------------------------------------------------------------


def test_a_table_without_header_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "What a day!,1\nAwful.,0\n")
    error = refused(path)
    assert error.where == f"{path}, line 1" and "data.columns.text=1 data.columns.label=2" in error.hints[0]
    assert "data.columns.text=NAME" in error.hints[1]
    named = refused(write(tmp_path / "n.csv", "tweet,mood\nWhat a day!,1\n"))
    assert "data.columns.text=NAME" in named.hints[0] and "tweet" in named.what


@pytest.mark.parametrize("places", [{"text": 2, "label": 1}, {"text": "2", "label": "1"}])
def test_columns_by_place_read_a_table_without_header_from_its_first_line(tmp_path: Path, places: dict[str, Any]) -> None:
    path = write(tmp_path / "t.csv", "1,What a day!\n0,Awful.\n")
    assert [(r.label, r.text) for r in read_records(path, columns=places)] == [("1", "What a day!"), ("0", "Awful.")]
    tabs = write(tmp_path / "t.txt", "1\tWhat a day!\n0\tAwful.\n")
    assert [(r.label, r.text) for r in read_records(tabs, columns=places)] == [("1", "What a day!"), ("0", "Awful.")]


def test_columns_by_place_are_refused_where_there_is_a_header_or_no_such_place(tmp_path: Path) -> None:
    assert "header (text, label)" in refused(as_csv(tmp_path / "t.csv"), columns={"text": 1, "label": 2}).what
    assert "no column 3" in refused(write(tmp_path / "n.csv", "a!,1\n"), columns={"text": 1, "label": 3}).what


def test_a_header_of_unknown_names_is_read_when_they_are_given(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "推文,情感?\n很好,好\n")
    assert next(read_records(path, columns={"text": "推文", "label": "情感?"})).label == "好"


# --- lines of text ---------------------------------------------------------------------------------------------------


def test_a_line_of_text_is_a_sample_and_a_tab_in_the_first_line_means_labels(tmp_path: Path) -> None:
    plain = list(read_records(write(tmp_path / "a.txt", "one, two\n\n三\n")))
    assert [(r.shape, r.text, r.where.rpartition(" ")[2]) for r in plain] == [("text", "one, two", "1"), ("text", "三", "3")]
    labelled = write(tmp_path / "b.txt", "one\ta\ntwo\tthree\tb\n")
    assert [(r.text, r.label) for r in read_records(labelled)] == [("one", "a"), ("two\tthree", "b")]
    assert [r.text for r in read_records(labelled, shape="text")] == ["one\ta", "two\tthree\tb"]


def test_a_comma_parts_text_and_label_only_when_labels_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt", "well, fine,good\nbad,bad\n")
    assert [(r.text, r.label) for r in read_records(path, shape="label")] == [("well, fine", "good"), ("bad", "bad")]
    assert next(read_records(path)).label is None


def test_a_line_without_the_label_that_the_first_has_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.txt", "one\ta\ntwo\n")
    error = refused(path)
    assert error.where == f"{path}, line 2" and "data.shape=text" in str(error)
    assert "no label" in refused(write(tmp_path / "u.txt", "alone\n"), shape="label").what


# --- folders and packages --------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_order_of_names_and_its_files_may_differ_in_shape(tmp_path: Path) -> None:
    write(tmp_path / "b" / "late.jsonl", jsonl([{"question": "q", "answer": "a"}]))
    as_csv(tmp_path / "a.csv")
    for aside in ("README.md", ".hidden.bin", "LICENSE", "dataset_infos.json", ".cache/x.bin"):
        write(tmp_path / aside, "not data")
    records = list(read_records(tmp_path))
    assert [r.shape for r in records] == ["label"] * 3 + ["prompt"]
    assert records[-1].where == f"{tmp_path}/b/late.jsonl, line 1"
    assert [path.name for path in data_files(tmp_path)] == ["a.csv", "late.jsonl"]
    assert len(list(read_records(tmp_path, limit=2))) == 2


def test_a_folder_with_files_that_cannot_be_read_is_refused_rather_than_shrunk(tmp_path: Path) -> None:
    as_csv(tmp_path / "a.csv")
    write(tmp_path / "b.xlsx", "x")
    assert "b.xlsx" in refused(tmp_path).what
    (tmp_path / "empty").mkdir()
    assert "no data files" in refused(tmp_path / "empty").what
    assert ".xlsx" in refused(tmp_path / "b.xlsx").what


def test_a_file_within_a_package_is_fetched_and_named_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = as_csv(tmp_path / "cache" / "rows.csv") if (tmp_path / "cache").mkdir() is None else tmp_path
    monkeypatch.setattr("tunesmith.core.packages.fetch", lambda spec: fetched)
    source = "pypi:some-package==1.0/data/rows.csv"
    assert next(read_records(f"{source}#sha256={'0' * 64}")).where == f"{source}, line 2"


# --- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.tsv", "t.txt"])
def test_only_the_lines_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    read = 0

    def counted(path: Path, shown: str, options: Any) -> Iterator[tuple[int, str]]:
        nonlocal read
        header = {"t.csv": "text,label\n", "t.tsv": "text\tlabel\n"}.get(name)
        row = {"t.jsonl": '{"text": "a", "label": "b"}\n', "t.csv": "a,b\n", "t.tsv": "a\tb\n", "t.txt": "a\tb\n"}[name]
        for read in itertools.count(1):  # a file that never ends
            yield read, header if header and read == 1 else row

    monkeypatch.setattr("tunesmith.data.files.text_lines", counted)
    monkeypatch.setattr("tunesmith.data.tables.text_lines", counted)
    assert len(list(read_records(write(tmp_path / name, "x"), limit=10))) == 10
    assert read <= 12


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    row = json.dumps({"text": "word " * 200, "label": "a"}) + "\n"
    with path.open("w") as stream:
        stream.writelines(itertools.repeat(row, 10_000))
    tracemalloc.start()
    assert sum(1 for _ in read_records(path)) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 10_000_000 and peak < 1_000_000


def test_parquet_is_read_in_batches(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"row {i}" for i in range(1000)]}), path, row_group_size=100)
    records = list(read_records(path))
    assert [r.text for r in records] == [f"row {i}" for i in range(1000)] and records[-1].where == f"{path}, row 1000"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1, max_size=5))
def test_any_text_survives_json_lines_and_csv(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    import csv

    folder = tmp_path_factory.mktemp("any")
    path = write(folder / "t.jsonl", "".join(json.dumps({"text": text}, ensure_ascii=bool(i % 2)) + "\n" for i, text in enumerate(texts)))
    assert [r.text for r in read_records(path)] == texts
    with (folder / "t.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([["text", "label"], *([text, "a"] for text in texts)])
    assert [r.text for r in read_records(folder / "t.csv")] == texts


def test_a_json_object_with_a_name_for_each_row_is_read_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "leads.json"
    path.write_text(json.dumps({"Cat": {"title": "Cat", "extract": "A cat is small."}, "Dog": {"title": "Dog", "extract": "A dog barks."}}))
    found = list(read_records(path, columns={"text": "extract"}, shape="text"))
    assert [record.text for record in found] == ["A cat is small.", "A dog barks."]
    assert found[1].where.endswith("leads.json, row 2")


def test_a_json_object_that_holds_no_rows_shows_only_its_first_keys(tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps({**{f"key{i}": i for i in range(50)}, "last": {"a": 1}}))
    with pytest.raises(DataError, match=r"key7, \.\.\.\)") as caught:
        list(read_records(path))
    assert "key9" not in str(caught.value)
