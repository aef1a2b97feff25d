"""Rows of preference data as people have it: scored answers, rankings, raters' ratings, rated texts, pairs, prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tunesmith.core.errors import DataError, SpecError, nearest, unknown
from tunesmith.curation.pairs import Answers, Pair, folded
from tunesmith.data.files import RawRow
from tunesmith.data.sources import read_rows

Kind = Literal["pairs", "answers", "rated", "items", "prompts"]

ROLES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "query", "instruction"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "margin": ("margin",),
    "probability": ("probability", "soft"),
    "answers": ("answers", "responses", "completions", "candidates"),
    "scores": ("scores", "rewards"),
    "answer": ("answer", "response", "completion", "output"),
    "text": ("text", "content", "sentence"),
    "score": ("score", "rating", "mean", "reward", "value"),
    "ratings": ("ratings", "votes"),
    "id": ("id",),
    "group": (),
}
"""By role: the usual names of its column, compared without case. A group is never guessed."""


@dataclass(slots=True)
class Source:
    """What a file holds. answers: answers to prompts, or single texts where `items`. pairs: those that were pairs already."""

    name: str
    kind: Kind
    answers: list[Answers] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def items(self) -> bool:
        """Is each row a text by itself, which has no prompt?"""
        return self.kind == "items"


def read_source(
    name: str,
    columns: Mapping[str, str] | None = None,
    *,
    ratings: str | None = None,
    ratings_columns: Mapping[str, str] | None = None,
    up_to: str = "",
    encoding: str = "utf-8",
) -> Source:
    """Read a file of preferences; its columns say what it is, and a row that deviates is an error.

    columns: role to column name, or to its place from 1 in a table without header. ratings: a second table (id, ratings) of the raters,
    joined by id. up_to: a text's group is its id up to the last of these signs ("12_3" with "_" is of document "12").
    Raises DataError with file, line and key, SpecError for an unknown role.
    """
    _check_roles(columns or {})
    _check_roles(ratings_columns or {})
    rows = list(read_rows(name, columns=dict(columns or {}), encoding=encoding))
    found = _columns(rows[0], columns or {})
    kind = _kind(rows[0], found, ratings is not None)
    if kind == "pairs":
        return Source(name, kind, pairs=[_pair(row, found) for row in rows])
    rated = _ratings_table(ratings, ratings_columns or {}, encoding) if ratings is not None else None
    own = [_answers(row, found, kind, rated, up_to) for row in rows]
    source = Source(name, kind, own)
    if kind == "rated":
        source.answers = _by_prompt(own)
    elif kind == "items":
        source.answers, same = _distinct(own)
        source.notes += [f"{same:,} of {len(own):,} rows repeat a text; its ratings were joined"] if same else []
    return source


def _check_roles(columns: Mapping[str, str]) -> None:
    for role in columns:
        if role not in ROLES:
            raise unknown("role of a column", role, ROLES, where="--columns")


def _columns(row: RawRow, given: Mapping[str, str]) -> dict[str, str]:
    """Role to column. Raises DataError for one that is not there."""
    for role, column in given.items():
        if column not in row.fields:
            close = nearest(column, row.fields)
            hints = [f"Did you mean:  --columns {role}={close[0]}"] if close else []
            keys = ", ".join(map(str, row.fields))
            raise DataError(f"there is no column '{column}' for {role}.", where=row.where, hints=[*hints, f"Known: {keys}"])
    taken = set(given.values())
    found = dict(given)
    for role, names in ROLES.items():
        if role not in found:
            usual = next((name for name in row.fields if str(name).strip().casefold() in names and name not in taken), None)
            if usual is not None:
                found[role] = usual
                taken.add(usual)
    return found


def _kind(row: RawRow, found: Mapping[str, str], rated: bool) -> Kind:
    worth = "score" in found or "ratings" in found or rated
    if "chosen" in found and "rejected" in found:
        return "pairs"
    if "answers" in found and isinstance(row.fields[found["answers"]], list):
        return "answers"
    if "prompt" in found and "answer" in found and worth:
        return "rated"
    if "text" in found and "prompt" not in found:
        return "items"
    if "prompt" in found:
        return "prompts"
    keys = ", ".join(map(str, row.fields)) or "none"
    raise DataError(
        f"the row holds no preferences that are known (its keys: {keys}).",
        where=row.where,
        hints=[
            "Scored answers:   prompt, answers (a list), scores (a list)   ·   prompt, answer, score (an answer a row)",
            "A ranking:        prompt, answers (best first)",
            "Raters:           prompt, answers, ratings (a list of numbers an answer)   ·   text, ratings",
            "Name columns:     --columns answers=NAME --columns scores=NAME",
        ],
    )


def _answers(row: RawRow, found: Mapping[str, str], kind: Kind, rated: Mapping[str, Any] | None, up_to: str) -> Answers:
    identity = _plain(row, found, "id")
    group = _plain(row, found, "group")
    if up_to:
        if identity is None or up_to not in identity:
            what = f"the row's id has no '{up_to}'." if identity is not None else "the row has no id."
            raise DataError(what, where=row.where, hints=["Name the column:  --columns id=NAME", "Or leave --group-up-to out."])
        group = identity.rpartition(up_to)[0]
    about: dict[str, Any] = {"id": identity} if identity is not None else {}
    common: dict[str, Any] = {"where": row.where, "group": group, "fields": row.fields}
    if kind == "prompts":
        return Answers((), _prompt(row, found), **common)
    if kind == "answers":
        return _several(row, found, common)
    ratings = _ratings_of(row, found, rated, identity)
    scores = (_number(row, found["score"]),) if "score" in found else (sum(ratings) / len(ratings),) if ratings else ()
    text = _text(row, found["text" if kind == "items" else "answer"])
    prompt = "" if kind == "items" else _prompt(row, found)
    return Answers((text,), prompt, scores, (ratings,) if ratings else (), about=(about,), **common)


def _several(row: RawRow, found: Mapping[str, str], common: Mapping[str, Any]) -> Answers:
    """A row with a list of answers, and what says which is better."""
    texts = row.fields[found["answers"]]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"'{found['answers']}' is to be a list of texts, none of them empty.", where=row.where)
    if len(texts) < 2:
        raise DataError(f"'{found['answers']}' has {len(texts)} answer(s), and a pair takes two.", where=row.where)
    scores = tuple(_list(row, found["scores"], len(texts))) if "scores" in found else ()
    ratings: tuple[tuple[float, ...], ...] = ()
    if "ratings" in found:
        column = found["ratings"]
        lists = row.fields[column]
        if not isinstance(lists, list) or len(lists) != len(texts):
            raise DataError(f"'{column}' is to be a list with the ratings of each of the {len(texts)} answers.", where=row.where)
        ratings = tuple(tuple(_numbers(own, column, row.where)) for own in lists)
    return Answers(tuple(texts), _prompt(row, found), scores, ratings, ranked=not (scores or ratings), **common)


def _pair(row: RawRow, found: Mapping[str, str]) -> Pair:
    chosen, rejected = _text(row, found["chosen"]), _text(row, found["rejected"])
    if folded(chosen) == folded(rejected):
        raise DataError("the two answers are equal, so neither is better.", where=row.where, hints=["Take the row out."])
    probability = _number(row, found["probability"]) if "probability" in found else 1.0
    if not 0 <= probability <= 1:
        raise DataError(f"'{found['probability']}' is {probability:g}, and a probability lies between 0 and 1.", where=row.where)
    margin = _number(row, found["margin"]) if "margin" in found else None
    told = row.fields.get("provenance")
    provenance = dict(told) if isinstance(told, dict) else {"kind": "pairs", "where": row.where}
    pair = Pair(chosen, rejected, _prompt(row, found) if "prompt" in found else "", margin, probability, provenance)
    if probability >= 0.5:
        return pair
    return replace(pair, chosen=rejected, rejected=chosen, probability=1 - probability, margin=None if margin is None else -margin)


def _by_prompt(rows: Sequence[Answers]) -> list[Answers]:
    """Answers to one prompt, an answer a row, brought together."""
    groups: dict[str, list[Answers]] = {}
    for row in rows:
        groups.setdefault(folded(row.prompt), []).append(row)
    out = []
    for same in groups.values():
        first = same[0]
        rated = all(one.ratings for one in same)
        out.append(
            replace(
                first,
                texts=tuple(one.texts[0] for one in same),
                scores=tuple(one.scores[0] for one in same),
                ratings=tuple(one.ratings[0] for one in same) if rated else (),
                about=tuple({**one.about[0], "where": one.where} for one in same),
            )
        )
    return out


def _distinct(rows: Sequence[Answers]) -> tuple[list[Answers], int]:
    """Texts that stand several times as one, their ratings joined and their scores averaged: a text in two splits would be a leak."""
    groups: dict[str, list[Answers]] = {}
    for row in rows:
        groups.setdefault(folded(row.texts[0]), []).append(row)
    out = []
    for same in groups.values():
        first = same[0]
        if len(same) > 1:
            scores = tuple(one.scores[0] for one in same if one.scores)
            ratings = sum((one.ratings[0] for one in same if one.ratings), ())
            first = replace(first, scores=(sum(scores) / len(scores),) if scores else (), ratings=(ratings,) if ratings else ())
        out.append(first)
    return out, len(rows) - len(out)


def _ratings_table(source: str, columns: Mapping[str, str], encoding: str) -> dict[str, tuple[float, ...]]:
    """Ratings by id."""
    table: dict[str, tuple[float, ...]] = {}
    found: dict[str, str] = {}
    for row in read_rows(source, columns=dict(columns), encoding=encoding):
        found = found or _columns(row, columns)
        if "id" not in found or "ratings" not in found:
            hints = ["Name them:  --ratings-columns id=NAME --ratings-columns ratings=NAME"]
            raise DataError("a table of ratings needs an id and the ratings of each row.", where=row.where, hints=hints)
        identity = _plain(row, found, "id") or ""
        if identity in table:
            raise DataError(f"the id '{identity}' stands twice.", where=row.where)
        table[identity] = tuple(_numbers(row.fields[found["ratings"]], found["ratings"], row.where))
    return table


def _ratings_of(row: RawRow, found: Mapping[str, str], rated: Mapping[str, Any] | None, identity: str | None) -> tuple[float, ...]:
    if rated is not None:
        if identity is None:
            raise SpecError("ratings are joined by id, and the texts have none.", where=row.where, hints=["Name it:  --columns id=NAME"])
        if identity not in rated:
            raise DataError(f"there are no ratings of id '{identity}'.", where=row.where)
        own: tuple[float, ...] = rated[identity]
        return own
    return tuple(_numbers(row.fields.get(found["ratings"]), found["ratings"], row.where)) if "ratings" in found else ()


def _numbers(value: Any, column: str, where: str) -> list[float]:
    """A list of numbers, or one written as text ("[3, 2]", "3 2", "3;2")."""
    if isinstance(value, str):
        try:
            value = (
                json.loads(value)
                if value.strip().startswith("[")
                else [float(part) for part in value.replace(",", " ").replace(";", " ").split()]
            )
        except ValueError:
            value = None
    if not isinstance(value, list) or not value or not all(_finite(number) for number in value):
        raise DataError(f"'{column}' is to be a list of numbers.", where=where, hints=["Form:  [3, 2, 4]"])
    return [float(number) for number in value]


def _list(row: RawRow, column: str, count: int) -> list[float]:
    numbers = _numbers(row.fields.get(column), column, row.where)
    if len(numbers) != count:
        raise DataError(f"'{column}' has {len(numbers)} numbers for {count} answers.", where=row.where)
    return numbers


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)  # true and false are 1 and 0: right and wrong answers


def _number(row: RawRow, column: str) -> float:
    value = row.fields.get(column)
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"'{column}' is {value!r}, not a finite number.", where=row.where)
    return number


def _plain(row: RawRow, found: Mapping[str, str], role: str) -> str | None:
    """An id or a group as text."""
    if role not in found:
        return None
    value = row.fields.get(found[role])
    if value is None or not str(value).strip():
        raise DataError(f"the row has no {role} ('{found[role]}' is empty).", where=row.where)
    return str(value).strip()


def _prompt(row: RawRow, found: Mapping[str, str]) -> Any:
    """A prompt: a text, or a list of messages. "" where there is no such column."""
    if "prompt" not in found:
        return ""
    value = row.fields.get(found["prompt"])
    if isinstance(value, list) and value and all(isinstance(turn, Mapping) and isinstance(turn.get("content"), str) for turn in value):
        return value
    return _text(row, found["prompt"])


def _text(row: RawRow, column: str) -> str:
    value = row.fields.get(column)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):  # an answer as one message
        value = value[0].get("content")
    if not isinstance(value, str) or not value.strip():
        what = "missing" if column not in row.fields else "empty" if value is None or value == "" or isinstance(value, str) else "no text"
        raise DataError(f"'{column}' is {what}.", where=row.where, hints=[f"Its keys: {', '.join(map(str, row.fields))}"])
    return value


def texts_of(pairs: Iterable[Pair]) -> list[str]:
    """What a pair is known by where it must not stand in two splits: its prompt, or where it has none both texts."""
    out: list[str] = []
    for pair in pairs:
        out += [folded(pair.prompt)] if pair.prompt else [folded(pair.chosen), folded(pair.rejected)]
    return out
