"""Words with tags, one a line, and a blank line after each sentence: the form of CoNLL's shared tasks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tunesmith.core.errors import DataError
from tunesmith.data.files import RawRow, ReadOptions, text_lines

_DOCUMENT = "-DOCSTART-"


def conll_rows(path: Path, shown: str, options: ReadOptions) -> Iterator[RawRow]:
    """A row a sentence, with `tokens`, `tags`, and the `line` on which it begins.

    Cells are parted by tabs, or by spaces where the sentence's first line has no tab. The word is the first cell and the tag
    the last, or those that `columns` counts from 1. Lines of spaces alone end a sentence; -DOCSTART- and comments before a
    sentence ("# text = ...") are passed over. A line without a tag spoils its sentence.
    """
    places = {role: str(options.columns.get(role, role)) for role in ("tokens", "tags")}
    words: list[str] = []
    tags: list[str] = []
    first, spoiled, tabs = 0, False, False
    for number, line in text_lines(path, shown, options):
        text = line.rstrip("\r\n")
        if not text.strip():
            if words and not spoiled:
                yield _row(words, tags, first, places, shown)
            words, tags, first, spoiled = [], [], 0, False
            continue
        if text.startswith(_DOCUMENT) or (not first and _is_comment(text)):
            continue
        if not first:
            first, tabs = number, "\t" in text
        try:
            word, tag = _cells(text.split("\t") if tabs else text.split(), places, f"{shown}, line {number}")
        except DataError as cause:
            if not spoiled:
                options.refuse(cause)
            spoiled = True
            continue
        words.append(word)
        tags.append(tag)
    if words and not spoiled:
        yield _row(words, tags, first, places, shown)


def _is_comment(text: str) -> bool:
    return text.startswith("# ") and "\t" not in text and len(text.split()) > 2


def _row(words: list[str], tags: list[str], first: int, places: dict[str, str], shown: str) -> RawRow:
    return RawRow({places["tokens"]: words, places["tags"]: tags, "line": first}, f"{shown}, line {first}")


def _cells(cells: list[str], places: dict[str, str], where: str) -> tuple[str, str]:
    """The word and the tag among the cells of a line."""
    at = {role: int(place) - 1 for role, place in places.items() if place.isdigit()}
    word, tag = at.get("tokens", 0), at.get("tags", len(cells) - 1)
    if len(cells) < 2 or max(word, tag) >= len(cells) or min(word, tag) < 0 or not cells[word].strip() or not cells[tag].strip():
        hints = ["Form:  word<TAB>tag, and a blank line after each sentence"]
        raise DataError(f"the line has no word and tag: {' '.join(cells)[:60]!r}.", where=where, hints=hints)
    return cells[word].strip(), cells[tag].strip()
