"""Files to raw rows, one at a time: JSON Lines, JSON, Parquet; text is decoded line by line, so errors know their line.

Memory stays at one line (one batch for Parquet) however large the file is. Only .json has to be held whole.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tunesmith.core.errors import DataError, SpecError, unknown
from tunesmith.data.badrows import BadRows
from tunesmith.data.names import NAMES

LINE_LIMIT = 64 << 20
"""Bytes of one line; a longer one is most likely not a line of text at all."""

JSON_LIMIT = 1 << 30
"""Bytes of one .json file, which cannot be streamed."""

PARQUET_BATCH = 256
"""Rows decoded at once."""

DECODE_ERRORS = ("strict", "replace", "ignore", "backslashreplace")


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as the file has it. where: file and line (or row), for errors."""

    fields: dict[str, Any]
    where: str

    @property
    def source(self) -> str:
        """The file's name as it is shown."""
        return self.where.rpartition(", ")[0]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How to read: see `read_records`. skipped: where bad rows are counted; None refuses them."""

    columns: Mapping[str, str | int] = field(default_factory=dict)
    shape: str | None = None
    encoding: str = "utf-8"
    decode_errors: str = "strict"
    skipped: BadRows | None = None

    def refuse(self, error: DataError) -> None:
        """Raise the error of one row, or count it where bad rows are skipped."""
        if self.skipped is None:
            raise error
        self.skipped.add(error)

    def __post_init__(self) -> None:
        if self.decode_errors not in DECODE_ERRORS:
            raise unknown("value of data.decode_errors", self.decode_errors, DECODE_ERRORS)
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            raise SpecError(
                f"there is no text encoding '{self.encoding}'.",
                where="data.encoding",
                hints=["Usual ones: utf-8, utf-16, cp1252, gb18030, big5, shift_jis"],
            ) from None


def text_lines(path: Path, shown: str, options: ReadOptions) -> Iterator[tuple[int, str]]:
    """Line numbers (from 1) and lines with their ends; only \\n ends a line, a byte-order mark is taken off.

    Raises DataError where the bytes are not in the encoding, for a line beyond LINE_LIMIT and a damaged .gz.
    """
    try:
        with _opened(path) as stream:
            wide = codecs.lookup(options.encoding).name.startswith(("utf-16", "utf-32"))
            yield from (_wide_lines if wide else _lines)(stream, shown, options)
    except (EOFError, gzip.BadGzipFile, zlib.error) as cause:
        raise DataError(f"the compressed file is damaged: {cause}.", where=shown) from None
    except OSError as cause:
        raise DataError(f"the file cannot be read: {cause.strerror or cause}.", where=shown) from None


def _opened(path: Path) -> IO[bytes]:
    return io.BufferedReader(gzip.GzipFile(path)) if path.suffix == ".gz" else path.open("rb")


def _lines(stream: IO[bytes], shown: str, options: ReadOptions) -> Iterator[tuple[int, str]]:
    number = 0
    while line := stream.readline(LINE_LIMIT):
        number += 1
        if len(line) == LINE_LIMIT and not line.endswith(b"\n"):
            raise DataError(
                f"the line is longer than {LINE_LIMIT >> 20} MB; this does not look like lines of text.", where=f"{shown}, line {number}"
            )
        if number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and options.decode_errors == "strict":
                raise DataError(f"the file is UTF-16, not {options.encoding}.", where=shown, hints=["Say so:  data.encoding=utf-16"])
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, line.decode(options.encoding, options.decode_errors)
        except UnicodeDecodeError as cause:
            raise _undecodable(line, cause, f"{shown}, line {number}", options.encoding) from None


def _undecodable(line: bytes, cause: UnicodeDecodeError, where: str, encoding: str) -> DataError:
    before = line[max(0, cause.start - 30) : cause.start].decode(encoding, "replace").lstrip("�")
    return DataError(
        f"byte 0x{line[cause.start]:02x} at position {cause.start + 1} is not {encoding} (after '{before}').",
        where=where,
        hints=[
            "If the file has another encoding:   data.encoding=cp1252  (or gb18030, utf-16, ...)",
            "To read such bytes as a mark (�):   data.decode_errors=replace",
        ],
    )


def _wide_lines(stream: IO[bytes], shown: str, options: ReadOptions) -> Iterator[tuple[int, str]]:
    # In UTF-16 and UTF-32 the byte \n may be half of another character, so the stream is decoded before it is cut.
    number = 0
    text = io.TextIOWrapper(stream, options.encoding, options.decode_errors, newline="\n")
    try:
        while line := text.readline(LINE_LIMIT):
            number += 1
            yield number, line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeError as cause:
        reason = getattr(cause, "reason", str(cause))
        hints = ["Name the encoding:  data.encoding=utf-8", "Or read such bytes as a mark (�):  data.decode_errors=replace"]
        raise DataError(f"the text is not {options.encoding} ({reason}).", where=f"{shown}, after line {number}", hints=hints) from None


def jsonl_rows(path: Path, shown: str, options: ReadOptions) -> Iterator[RawRow]:
    """One JSON object a line; blank lines are skipped."""
    for number, line in text_lines(path, shown, options):
        if line.strip():
            where = f"{shown}, line {number}"
            try:
                fields = _object(_parsed(line, where, options), where)
            except DataError as cause:
                options.refuse(cause)
                continue
            yield RawRow(fields, where)


def _parsed(text: str, where: str, options: ReadOptions) -> Any:
    try:
        value = json.loads(text)
        return _whole_characters(value, options.decode_errors) if "\\ud" in text or "\\uD" in text else value
    except json.JSONDecodeError as cause:
        place = f"line {cause.lineno}, column {cause.colno}" if "\n" in text.rstrip() else f"column {cause.colno}"
        near = text[max(0, cause.pos - 20) : cause.pos + 20].strip()
        raise DataError(f"broken JSON: {cause.msg.removesuffix(' at')} at {place}, near '{near}'.", where=where) from None
    except UnicodeDecodeError:
        raise DataError(
            "a text holds half of a character (a lone surrogate).", where=where, hints=["Replace such halves:  data.decode_errors=replace"]
        ) from None
    except RecursionError:
        raise DataError("the JSON is nested too deeply to be a row of data.", where=where) from None


def _whole_characters(value: Any, errors: str) -> Any:
    """JSON may spell half of a surrogate pair, which no tokenizer or hash can encode."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", errors)
    if isinstance(value, list):
        return [_whole_characters(item, errors) for item in value]
    if isinstance(value, dict):
        return {key: _whole_characters(item, errors) for key, item in value.items()}
    return value


def _object(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    hints = ["A file that is one JSON list is read as .json: rename it."] if isinstance(value, list) else []
    raise DataError(f"the row is a JSON {_kind(value)}, not an object with named values.", where=where, hints=hints)


def _kind(value: Any) -> str:
    return {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}.get(type(value), "object")


def json_rows(path: Path, shown: str, options: ReadOptions) -> Iterator[RawRow]:
    """A list of rows, an object holding one list of rows, or JSON Lines under a .json name (those are streamed)."""
    if _is_json_lines(path, shown, options):
        yield from jsonl_rows(path, shown, options)
        return
    pieces, size = [], 0
    for _, line in text_lines(path, shown, options):
        size += len(line)
        if size > JSON_LIMIT:
            raise DataError(
                f"a .json file has to be held in memory whole, and this one is over {JSON_LIMIT >> 20} MB.",
                where=shown,
                hints=["One object a line (.jsonl) is streamed; to convert:  jq -c '.[]' big.json > big.jsonl"],
            )
        pieces.append(line)
    text = "".join(pieces)
    if not text.strip():
        return
    for number, row in enumerate(_row_list(_parsed(text, shown, options), shown), 1):
        where = f"{shown}, row {number}"
        try:
            fields = _object(row, where)
        except DataError as cause:
            options.refuse(cause)
            continue
        yield RawRow(fields, where)


def _is_json_lines(path: Path, shown: str, options: ReadOptions) -> bool:
    lines = (line for _, line in text_lines(path, shown, options) if line.strip())
    try:
        first = json.loads(next(lines, "[]"))
    except (json.JSONDecodeError, RecursionError):
        return False
    return isinstance(first, dict) and next(lines, None) is not None


def _row_list(value: Any, shown: str) -> list[Any]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise DataError(f"the file holds a JSON {_kind(value)}, not a list of rows.", where=shown)
    if any(key in NAMES["messages"] for key in value):
        return [value]
    lists = {key: item for key, item in value.items() if isinstance(item, list) and item and all(isinstance(entry, dict) for entry in item)}
    if len(lists) == 1:
        return next(iter(lists.values()))
    if not any(isinstance(item, list | dict) for item in value.values()):
        return [value]
    if len(value) > 1 and all(isinstance(item, dict) and item for item in value.values()):  # a name for each row
        return list(value.values())
    keys = ", ".join([*map(str, list(value)[:8]), *(["..."] if len(value) > 8 else [])])
    found = f"{len(lists)} lists of rows ({', '.join(lists)})" if lists else f"no list of rows (its keys: {keys})"
    hints = ["A file holds one list of objects, or an object with one such list. Put each list into a file of its own."]
    raise DataError(f"the JSON object holds {found}.", where=shown, hints=hints)


def parquet_rows(path: Path, shown: str, options: ReadOptions) -> Iterator[RawRow]:
    """Rows of a Parquet file, decoded in small batches."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH):
                for fields in batch.to_pylist():
                    number += 1
                    yield RawRow({key: without_nulls(value) for key, value in fields.items()}, f"{shown}, row {number}")
    except (pyarrow.ArrowException, OSError) as cause:
        raise DataError(f"the Parquet file cannot be read: {str(cause).splitlines()[0]}", where=shown) from None


def without_nulls(value: Any) -> Any:
    """Arrow gives every struct of a column all keys of all rows; those it made up are null, and are taken off again."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
