"""What rows hold that is there for task heads: words with tags, a number, candidates with the right one among them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.data.files import RawRow

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def words_and_tags(raw: RawRow, words: str, tags: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A row's words and the tag of each, numbers written out. Raises DataError where they are not one to one, or not words."""
    given, named = raw.fields[words], raw.fields[tags]
    for column, value in ((words, given), (tags, named)):
        if not isinstance(value, list | tuple):
            raise DataError(f"'{column}' holds a {type(value).__name__}, not a list.", where=raw.where)
    if len(given) != len(named):
        raise DataError(f"the row has {len(given)} words and {len(named)} tags.", where=raw.where)
    if not given:
        raise DataError("the row has no words.", where=raw.where)
    for place, (word, tag) in enumerate(zip(given, named, strict=True), 1):
        if not isinstance(word, str) or not word.strip():
            raise DataError(f"word {place} is {word!r}, not a word.", where=raw.where)
        if type(tag) is not int and not (isinstance(tag, str) and len(tag.split()) == 1):
            raise DataError(f"the tag of word {place}, '{word}', is {tag!r}, not a tag.", where=raw.where)
    return tuple(given), tuple(str(tag).strip() for tag in named)


def number(raw: RawRow, column: str) -> float:
    """A finite number, or a text that is one. Raises DataError for anything else."""
    value = raw.fields[column]
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        hints = ["Nearest that works here, for classes:  data.columns.label=" + column]
        raise DataError(f"'{column}' holds {value!r}, not a number.", where=raw.where, hints=hints)
    return found


def candidates(value: Any) -> tuple[list[Any], list[str]] | None:
    """(candidates, what they are called), from a list, or from {"text": [...], "label": [...]}; None for anything else."""
    if isinstance(value, list | tuple):
        return list(value), []
    if isinstance(value, Mapping) and isinstance(value.get("text"), list | tuple) and isinstance(value.get("label"), list | tuple):
        return list(value["text"]), [str(name) for name in value["label"]]
    return None


def question(raw: RawRow, column: str, answer: str) -> tuple[tuple[str, ...], int]:
    """The candidates of a row, and the place of the right one.

    The answer is a candidate's text, what it is called, its letter, or its place counted from 0, tried in this order. Raises
    DataError for less than two candidates, equal ones, and an answer that is none of them.
    """
    found = candidates(raw.fields[column])
    if found is None:
        raise DataError(f"'{column}' holds no list of candidates.", where=raw.where, hints=['Form:  ["red", "green", "blue"]'])
    among, names = found
    for choice in among:
        if not isinstance(choice, str) or not choice.strip():
            raise DataError(f"a candidate in '{column}' is {choice!r}, not a text.", where=raw.where)
    if len(among) < 2:
        raise DataError(f"the question has {len(among)} candidates; a choice needs two.", where=raw.where)
    if twice := [choice for choice in among if among.count(choice) > 1]:
        raise DataError(f"the candidate '{twice[0][:60]}' stands there twice.", where=raw.where)
    right = _right(among, names, raw.fields[answer])
    if right is None:
        hints = ["It may be a candidate's text, its letter, or its place counted from 0."]
        raise DataError(f"the answer {raw.fields[answer]!r} is none of the {len(among)} candidates.", where=raw.where, hints=hints)
    return tuple(among), right


def _right(among: Sequence[str], names: Sequence[str], answer: Any) -> int | None:
    if isinstance(answer, str):
        text = answer.strip()
        for known in (among, names, _LETTERS[: len(among)]):
            if text in list(known):
                return list(known).index(text)
        answer = int(text) if text.isascii() and text.isdigit() else None
    if isinstance(answer, bool) or not isinstance(answer, int):
        return None
    return answer if 0 <= answer < len(among) else None
