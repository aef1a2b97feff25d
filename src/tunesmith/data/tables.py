"""CSV, TSV and lines of text to raw rows, with the line on which each row begins."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tunesmith.core.errors import DataError
from tunesmith.data.conll import conll_rows
from tunesmith.data.files import LINE_LIMIT, RawRow, ReadOptions, text_lines
from tunesmith.data.names import KNOWN_NAMES

Numbered = tuple[int, list[str]]

QUOTED_LIMIT = 1 << 20
"""Characters that one row of a TSV file may take; beyond, a quote was never closed."""

_NAME = re.compile(r"[^\W\d][\w .\-/()#%:]{0,39}|")


def csv_rows(path: Path, shown: str, options: ReadOptions) -> Iterator[RawRow]:
    """Rows of a CSV file (comma; or semicolon or tab where the first line has no comma)."""
    return _named(_csv_cells(path, shown, options), shown, options)


def tsv_rows(path: Path, shown: str, options: ReadOptions) -> Iterator[RawRow]:
    """Rows of a TSV file; quotes that do not quote a whole cell are plain characters. With shape="tokens" a word and its tag a line."""
    if options.shape == "tokens":
        return conll_rows(path, shown, options)
    return _named(_tsv_cells(path, shown, options), shown, options)


def txt_rows(path: Path, shown: str, options: ReadOptions) -> Iterator[RawRow]:
    """One sample a line: text alone, or text and label parted by a tab (by the last comma only if shape="label").

    The first line decides; blank lines are skipped. Positional columns ({"label": 1, "text": 2}) part lines by tabs. With
    shape="tokens" each line is a word and its tag (`conll_rows`).
    """
    if options.shape == "tokens":
        yield from conll_rows(path, shown, options)
        return
    lines = ((number, line.rstrip("\r\n")) for number, line in text_lines(path, shown, options) if line.strip())
    if _positions(options):
        yield from _named(((number, line.split("\t")) for number, line in lines), shown, options)
        return
    separator: str | None = None
    for index, (number, line) in enumerate(lines):
        where = f"{shown}, line {number}"
        if index == 0:
            separator = _text_separator(line, options.shape, where)
        try:
            fields = _text_and_label(line, separator, where)
        except DataError as cause:
            options.refuse(cause)
            continue
        yield RawRow(fields, where)


def _text_separator(line: str, shape: str | None, where: str) -> str | None:
    if shape == "label":
        for separator in ("\t", ","):
            if separator in line:
                return separator
        raise DataError("the line has no label: neither a tab nor a comma parts it.", where=where, hints=["Form:  text<TAB>label"])
    return "\t" if shape is None and line.count("\t") == 1 else None


def _text_and_label(line: str, separator: str | None, where: str) -> dict[str, str]:
    if separator is None:
        return {"text": line}
    text, found, label = line.rpartition(separator)
    if not found:
        raise DataError(
            "the line has no label, and the first line of the file has one.",
            where=where,
            hints=["Form:  text<TAB>label", "If tabs do not part labels here:  data.shape=text"],
        )
    return {"text": text, "label": label.strip()}


def _csv_cells(path: Path, shown: str, options: ReadOptions) -> Iterator[Numbered]:
    """Cells of each row and the line it begins on; a quoted cell may run over line ends."""
    last = 0

    def counted() -> Iterator[str]:
        nonlocal last
        for number, line in text_lines(path, shown, options):
            last = number
            yield line

    lines = counted()
    first = next(lines, "")
    delimiter = next((sign for sign in (",", ";", "\t") if sign in first), ",")
    csv.field_size_limit(max(csv.field_size_limit(), LINE_LIMIT))
    reader = csv.reader(_chain(first, lines), delimiter=delimiter, strict=True)
    begins = 1
    try:
        for cells in reader:
            if cells and not (len(cells) == 1 and not cells[0].strip()):
                yield begins, cells
            begins = last + 1
    except csv.Error as cause:
        raise DataError(f"broken CSV: {_csv_reason(str(cause))}.", where=f"{shown}, line {begins}") from None


def _chain(first: str, rest: Iterable[str]) -> Iterator[str]:
    if first:
        yield first
        yield from rest


def _csv_reason(cause: str) -> str:
    if "unexpected end of data" in cause or "field larger than" in cause:
        return "a quote that opens in this row is never closed"
    if "expected after" in cause:
        return "text follows a closing quote (a quote within a quoted cell is written twice)"
    if "new-line character" in cause:
        return "a carriage return stands within a cell that is not quoted"
    return cause


def _tsv_cells(path: Path, shown: str, options: ReadOptions) -> Iterator[Numbered]:
    """Cells of each row. Some TSV files quote as CSV does and some mean every quote literally: each row shows which."""
    width, held, begins = 0, "", 0
    for number, line in text_lines(path, shown, options):
        if not held and not line.strip():
            continue
        begins = begins if held else number
        held += line
        cells = _tsv_row(held, width)
        if cells is None:
            if len(held) > QUOTED_LIMIT:
                break
            continue  # a quoted cell that goes on in the next line
        yield begins, cells
        width, held = width or len(cells), ""
    if held:
        raise DataError("broken TSV: a quote that opens in this row is never closed.", where=f"{shown}, line {begins}")


def _tsv_row(text: str, width: int) -> list[str] | None:
    """The cells; None if the text ends within a quoted cell and has too few cells to be a row of this width."""
    plain = text.rstrip("\r\n").split("\t")
    try:
        quoted = next(csv.reader([text], delimiter="\t", strict=True))
    except csv.Error as cause:
        return None if "unexpected end of data" in str(cause) and len(plain) < width else plain
    return plain if width == len(plain) != len(quoted) else quoted


def _positions(options: ReadOptions) -> bool:
    return bool(options.columns) and all(str(column).isdigit() for column in options.columns.values())


def _named(rows: Iterator[Numbered], shown: str, options: ReadOptions) -> Iterator[RawRow]:
    """Name the cells by the header, or by position ("1", "2", ...) where the user counts columns."""
    names: list[str] | None = None
    for number, cells in rows:
        where = f"{shown}, line {number}"
        if names is None:
            if _has_header(cells, where, options):
                names = _header(cells, where)
                continue
            names = [str(position) for position in range(1, len(cells) + 1)]
        if len(cells) != len(names):
            hints = ["A separator inside a text needs quotes around the text.", f"To see the rows:  tunesmith data show {shown}"]
            what = f"the row has {len(cells)} cells, the first one has {len(names)} ({', '.join(names)})."
            options.refuse(DataError(what, where=where, hints=hints))
            continue
        yield RawRow(dict(zip(names, cells, strict=True)), where)


def _header(cells: Sequence[str], where: str) -> list[str]:
    names = [cell.strip() or f"column {position}" for position, cell in enumerate(cells, 1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"the header names '{twice[0]}' twice.", where=where, hints=["Give each column a name of its own."])
    return names


def _has_header(cells: Sequence[str], where: str, options: ReadOptions) -> bool:
    """Whether the first line names the columns. Refused where neither the line nor the user says what they are."""
    names = [cell.strip() for cell in cells]
    like_names = all(_NAME.fullmatch(name) for name in names)
    known = like_names and any(name.casefold() in KNOWN_NAMES for name in names)
    named = [str(column) in names for column in options.columns.values()]
    if named and (all(named) if _positions(options) else any(named)):
        return True
    if _positions(options):
        if known:
            mapping = "  ".join(f"data.columns.{role}=NAME" for role in options.columns)
            raise DataError(
                f"the first line is a header ({', '.join(names)}), so columns go by name.", where=where, hints=[f"Write:  {mapping}"]
            )
        beyond = [column for column in options.columns.values() if not 1 <= int(column) <= len(cells)]
        if beyond:
            raise DataError(f"there is no column {beyond[0]}: the first line has {len(cells)} (counted from 1).", where=where)
        return False
    if known or (options.columns and like_names):
        return True
    raise _no_header(names, like_names, where)


def _no_header(names: Sequence[str], like_names: bool, where: str) -> DataError:
    shown = ", ".join(f"'{name if len(name) <= 30 else name[:29] + '…'}'" for name in names[:6])
    by_name = "If this line is a header, name the columns:      data.columns.text=NAME data.columns.label=NAME"
    by_place = "If it is a row already, count them from 1:       data.columns.text=1 data.columns.label=2"
    return DataError(
        f"the first line names no column that is known ({shown}).",
        where=where,
        hints=[by_name, by_place] if like_names else [by_place, by_name],
    )
