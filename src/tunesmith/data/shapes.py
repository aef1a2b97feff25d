"""Which shape a row has: found from its columns, or from those that the user names; never guessed between two."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from tunesmith.core.errors import DataError, SpecError, TunesmithError, nearest, unknown
from tunesmith.core.record import Message, Record, Shape
from tunesmith.data import dialogues
from tunesmith.data.files import RawRow, ReadOptions
from tunesmith.data.forheads import candidates, number, question, words_and_tags
from tunesmith.data.names import NAMES
from tunesmith.data.preferred import PARTED, listed

PARTS: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("messages",),
    "alpaca": ("instruction", "completion"),
    "prompt": ("prompt", "completion"),
    "label": ("text", "label"),
    "value": ("text", "value"),
    "tokens": ("tokens", "tags"),
    "choices": ("prompt", "choices", "answer"),
    "text": ("text",),
    "pair": ("chosen", "rejected"),
    "ranking": ("answers",),
    "rated": ("prompt", "completion", "good"),
    "question": ("prompt",),
    "asked": ("messages",),
}
"""The columns that a row of each shape must have."""

ALLOWED: Mapping[str, tuple[str, ...]] = {
    "messages": ("system", "reasoning", "tools"),
    "sharegpt": ("system", "reasoning", "tools"),
    "alpaca": ("input", "history", "system", "reasoning", "tools"),
    "prompt": ("system", "reasoning", "tools"),
    "label": ("reasoning", "text_pair"),
    "value": ("text_pair",),
    "tokens": (),
    "choices": ("system", "reasoning"),
    "text": (),
    "pair": ("prompt", "margin", "probability", "system", "tools"),
    "ranking": ("prompt", "scores", "system", "tools"),
    "rated": ("system", "tools"),
    "question": ("answer", "system", "tools"),
    "asked": ("system", "tools"),
}
"""The columns that it may have besides (and any may name a group)."""

NARROWED: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages", "sharegpt"),
    "prompt": ("prompt", "alpaca"),
    "sharegpt": ("sharegpt",),
    "alpaca": ("alpaca",),
    "label": ("label",),
    "value": ("value",),
    "tokens": ("tokens",),
    "choices": ("choices",),
    "text": ("text",),
    "pair": ("pair",),
    "ranking": ("ranking",),
    "rated": ("rated",),
    "question": ("question", "asked"),
}
"""The kinds that shape=NAME asks for."""

_LISTS = ("tokens", "tags")
_LEARNED = ("completion", "label", "value", "tags", "answer", "chosen", "rejected", "answers", "good")
_TOLD: Mapping[str, str | None] = {"value": "value", "rated": "good", "question": None, "asked": None}
"""Kinds that are read only where the shape, or this column, is named: a score beside a text is seldom what is to be learned."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How the rows of one file are read. kind: a key of PARTS. columns: the column of each part."""

    kind: str
    columns: Mapping[str, str]

    def describe(self) -> str:
        """One line: the shape, and the keys that choose it."""
        return f"{self.kind}:   " + " ".join(f"data.columns.{part}={column}" for part, column in self.columns.items())


def check_options(options: ReadOptions) -> None:
    """Refuse column roles and shapes that are not known, and columns of two shapes at once."""
    for role in options.columns:
        if role not in NAMES:
            raise unknown("key of data.columns", role, NAMES)
    if options.shape is not None and options.shape not in NARROWED:
        raise unknown("data.shape", options.shape, NARROWED)
    if not _kinds(options):
        named = ", ".join(options.columns)
        kinds = [f"{kind}: {', '.join((*PARTS[kind], *ALLOWED[kind], 'group'))}" for kind in PARTS]
        asked = f" as shape '{options.shape}'" if options.shape else ""
        raise SpecError(f"no shape has all of these columns{asked}: {named}.", where="data.columns", hints=kinds)


def _kinds(options: ReadOptions) -> list[str]:
    wanted = set(options.columns) - {"group"}
    kinds = NARROWED[options.shape] if options.shape else tuple(PARTS)
    if not options.shape:
        kinds = tuple(kind for kind in kinds if kind not in _TOLD or _TOLD[kind] in wanted)
    return [kind for kind in kinds if wanted <= {*PARTS[kind], *ALLOWED[kind]}]


def recognise(raw: RawRow, options: ReadOptions) -> Reading:
    """The one reading of a row.

    Raises DataError if a named column is missing (with the nearest), if no shape fits, and if several do (listing the
    keys that choose between them).
    """
    for role, column in options.columns.items():
        if str(column) not in raw.fields:
            raise _unknown_column(role, str(column), raw)
    readings = [reading for kind in _kinds(options) for reading in _readings(kind, raw, options)]
    if options.shape is None and len(readings) > 1:
        readings = _without_weaker(readings)
    if len(readings) == 1:
        return readings[0]
    if readings:
        hints = ["Choose one:", *(f"  {reading.describe()}" for reading in readings[:6])]
        raise DataError(f"the row can be read in {len(readings)} ways (its keys: {_keys(raw)}).", where=raw.where, hints=hints)
    raise _unreadable(raw, options)


def _readings(kind: str, raw: RawRow, options: ReadOptions) -> list[Reading]:
    parts = PARTS[kind]
    if kind in ("pair", "ranking") and _matches("prompt", raw, options):  # which not all have
        parts = ("prompt", *parts)
    found = [_matches(part, raw, options) for part in parts]
    choices = [
        Reading(kind, dict(zip(parts, columns, strict=True))) for columns in itertools.product(*found) if len(set(columns)) == len(columns)
    ]
    if kind == "ranking" and not (options.shape or "answers" in options.columns):  # a list of answers may be of equally good ones
        scored = bool(_matches("scores", raw, options))
        return [reading for reading in choices if scored or listed(raw.fields[reading.columns["answers"]])[1]]
    if kind in ("messages", "sharegpt"):
        return [reading for reading in choices if dialogues.form_of(raw.fields[reading.columns["messages"]]) == kind]
    if kind == "tokens":
        return [reading for reading in choices if all(isinstance(raw.fields[column], list | tuple) for column in reading.columns.values())]
    if kind == "choices":
        return [reading for reading in choices if candidates(raw.fields[reading.columns["choices"]]) is not None]
    return choices


def _matches(part: str, raw: RawRow, options: ReadOptions) -> list[str]:
    if part in options.columns:
        return [str(options.columns[part])]
    taken = {str(column) for column in options.columns.values()}
    return [column for column in raw.fields if column.strip().casefold() in NAMES[part] and column not in taken]


def _without_weaker(readings: list[Reading]) -> list[Reading]:
    """Plain text yields to anything with an answer; a prompt that is a part of an alpaca row, or has choices, to the whole row."""
    whole = {reading.columns["completion"] for reading in readings if reading.kind == "alpaca"}
    chosen = {reading.columns["prompt"] for reading in readings if reading.kind == "choices"}
    kept = [
        reading
        for reading in readings
        if reading.kind != "text"
        and not (reading.kind == "prompt" and reading.columns["prompt"] in chosen)
        and not (
            reading.kind == "prompt"
            and reading.columns["completion"] in whole
            and reading.columns["prompt"].casefold() in ("instruction", "input")
        )
    ]
    return kept or readings


def _unknown_column(role: str, column: str, raw: RawRow) -> TunesmithError:
    close = nearest(column, raw.fields)
    hints = [f"Did you mean:   data.columns.{role}={close[0]}"] if close else []
    return DataError(f"there is no column '{column}' for data.columns.{role}.", where=raw.where, hints=[*hints, f"Known: {_keys(raw)}"])


def _keys(raw: RawRow) -> str:
    return ", ".join(map(str, raw.fields)) or "none"


def _unreadable(raw: RawRow, options: ReadOptions) -> DataError:
    words = _matches("tokens", raw, options)
    if words and (options.shape == "tokens" or isinstance(raw.fields[words[0]], list | tuple)):
        hints = ['Form:  {"tokens": ["Ada", "left"], "tags": ["B-PER", "O"]}', "Or a word, a tab and its tag a line:  data.shape=tokens"]
        return DataError(f"the row has no list of tags beside its list of words (its keys: {_keys(raw)}).", where=raw.where, hints=hints)
    for column in _matches("messages", raw, options):
        if "messages" in options.columns or isinstance(raw.fields[column], list):
            hints = ['Form:  [{"role": "user", "content": "..."}, ...]  or  [{"from": "human", "value": "..."}, ...]']
            return DataError(f"the column '{column}' is no dialogue.", where=raw.where, hints=hints)
    kinds = _kinds(options)
    asked = "prompt" in kinds and (_matches("prompt", raw, options) or "prompt" in options.columns)
    if asked or (kinds in (["label"], ["value"]) and _matches("text", raw, options)):
        return no_answer(raw, f"its keys: {_keys(raw)}", "completion" if asked else kinds[0])
    hints = [
        "Name the columns, one of:",
        "  data.columns.text=NAME data.columns.label=NAME",
        "  data.columns.prompt=NAME data.columns.completion=NAME",
        "  data.columns.messages=NAME",
        "  data.columns.chosen=NAME data.columns.rejected=NAME",
        f"Or see the rows:   tunesmith data show {raw.source}",
    ]
    return DataError(f"no column is known to hold a text or a dialogue (its keys: {_keys(raw)}).", where=raw.where, hints=hints)


def no_answer(raw: RawRow, why: str, part: str = "completion") -> DataError:
    """The error for a row that nothing can be learnt from."""
    hints = [
        f"Name the column:   tunesmith train spec.yaml data.columns.{part}=NAME",
        f"Or see the rows:   tunesmith data show {raw.source}",
    ]
    return DataError(f"the row has no answer to learn from ({why}).", where=raw.where, hints=hints)


def to_record(raw: RawRow, reading: Reading, options: ReadOptions) -> Record:
    """Read one row. Raises DataError where it deviates from its file's first row, or lacks a text or an answer."""
    _check_same(raw, reading, options)
    group = _group(raw, options)
    reasoning = _optional_text("reasoning", raw, reading, options)
    known: dict[str, Any] = {"reasoning": reasoning, "fields": raw.fields, "where": raw.where, "group": group}
    if reading.kind in ("label", "text", "value"):
        label = _label(raw, reading.columns["label"]) if reading.kind == "label" else None
        value = number(raw, reading.columns["value"]) if reading.kind == "value" else None
        text, pair = _text(raw, reading.columns["text"]), _optional_text("text_pair", raw, reading, options) or ""
        shape: Shape = "label" if label is not None else "value" if value is not None else "text"
        return Record(shape, text=text, label=label, value=value, pair=pair, **known)
    if reading.kind == "tokens":
        tokens, tags = words_and_tags(raw, reading.columns["tokens"], reading.columns["tags"])
        return Record("tokens", text=" ".join(tokens), tokens=tokens, tags=tags, **known)
    if reading.kind == "choices":
        among, right = question(raw, reading.columns["choices"], reading.columns["answer"])
        turns = (*_turns(raw, reading.columns["prompt"], "user"), {"role": "assistant", "content": among[right]})
        turns = dialogues.with_system(turns, _optional_text("system", raw, reading, options), raw.where)
        return Record("choices", messages=turns, choices=among, **known)
    if reading.kind in PARTED:
        parts = PARTED[reading.kind](raw, reading.columns, lambda part: _optional(part, raw, reading, options))
        parts["messages"] = dialogues.with_system(parts["messages"], _optional_text("system", raw, reading, options), raw.where)
        tools = dialogues.tool_schemas(_optional("tools", raw, reading, options), raw.where)
        return Record(cast(Shape, "question" if reading.kind == "asked" else reading.kind), tools=tools, **parts, **known)
    messages = dialogues.with_system(_messages(raw, reading, options), _optional_text("system", raw, reading, options), raw.where)
    if not dialogues.has_answer(messages):
        raise no_answer(
            raw, "no message of an assistant" if "messages" in reading.columns else f"'{reading.columns['completion']}' is empty"
        )
    tools = dialogues.tool_schemas(_optional("tools", raw, reading, options), raw.where)
    plain = reading.kind in ("prompt", "alpaca") and [m["role"] for m in messages if m["role"] != "system"] == ["user", "assistant"]
    return Record("prompt" if plain else "messages", messages=messages, tools=tools, **known)


def _check_same(raw: RawRow, reading: Reading, options: ReadOptions) -> None:
    missing = [part for part, column in reading.columns.items() if column not in raw.fields]
    same = not missing
    if same and reading.kind in ("messages", "sharegpt"):
        same = dialogues.form_of(raw.fields[reading.columns["messages"]]) in (reading.kind, None)
    if same:
        return
    if len(missing) == 1 and missing[0] in _LEARNED:
        raise no_answer(raw, f"its keys: {_keys(raw)}", missing[0])
    try:
        other = recognise(raw, ReadOptions(shape=options.shape)).kind
    except TunesmithError:
        other = None
    if other is not None and other != reading.kind:
        hints = ["Rows of one file have one shape: put the others into a file of their own, in the same folder."]
        raise DataError(f"the row reads as '{other}', and the file's first row as '{reading.kind}'.", where=raw.where, hints=hints)
    if not missing:
        raise DataError(f"the row does not read as '{reading.kind}', as the file's first row does.", where=raw.where)
    raise DataError(f"the row has no '{reading.columns[missing[0]]}' (its keys: {_keys(raw)}).", where=raw.where)


def _messages(raw: RawRow, reading: Reading, options: ReadOptions) -> tuple[Message, ...]:
    if "messages" in reading.columns:
        column = reading.columns["messages"]
        if dialogues.form_of(raw.fields[column]) is None:
            raise DataError(f"the column '{column}' holds no dialogue.", where=raw.where)
        read = dialogues.openai_messages if reading.kind == "messages" else dialogues.sharegpt_messages
        return read(raw.fields[column], raw.where)
    answer = _turns(raw, reading.columns["completion"], "assistant")
    if reading.kind == "prompt":
        return (*_turns(raw, reading.columns["prompt"], "user"), *answer)
    context = _optional_text("input", raw, reading, options)
    asked = _text(raw, reading.columns["instruction"])
    history = dialogues.history_messages(_optional("history", raw, reading, options), raw.where)
    return (*history, {"role": "user", "content": f"{asked}\n{context}" if context else asked}, *answer)


def _turns(raw: RawRow, column: str, role: str) -> tuple[Message, ...]:
    """A prompt or a completion: a text, or itself a list of messages."""
    value = raw.fields[column]
    if not isinstance(value, str) and dialogues.form_of(value) == "messages":
        return dialogues.openai_messages(value, raw.where)
    if role == "assistant" and _blank(value):
        raise no_answer(raw, f"'{column}' is empty")
    return ({"role": role, "content": _text(raw, column)},)


def _optional(part: str, raw: RawRow, reading: Reading, options: ReadOptions) -> Any:
    """The value of a part that a row may have, under the name given, else under the first usual one."""
    if part not in ALLOWED[reading.kind]:
        return None
    used = set(reading.columns.values())
    column = next((column for column in _matches(part, raw, options) if column in raw.fields and column not in used), None)
    return raw.fields[column] if column is not None else None


def _optional_text(part: str, raw: RawRow, reading: Reading, options: ReadOptions) -> str | None:
    value = _optional(part, raw, reading, options)
    if _blank(value):
        return None
    if not isinstance(value, str):
        raise DataError(f"the {part} is {type(value).__name__}, not text.", where=raw.where)
    return value


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and math.isnan(value))


def _text(raw: RawRow, column: str) -> str:
    value = raw.fields[column]
    if _blank(value):
        hints = [f"Remove the row, or see it:  tunesmith data show {raw.source}"]
        raise DataError(f"the text in '{column}' is {'null' if not isinstance(value, str) else 'empty'}.", where=raw.where, hints=hints)
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return _spelt(value)
    raise DataError(
        f"'{column}' holds a {type(value).__name__}, not a text.",
        where=raw.where,
        hints=["One text a row is read; write it out as a string."],
    )


def _spelt(value: bool | int | float) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _label(raw: RawRow, column: str) -> str:
    value = raw.fields[column]
    if _blank(value):
        raise no_answer(raw, f"'{column}' is empty", "label")
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list | tuple):
        what = "several labels a row are not read yet; nearest that is: one label a row"
        raise DataError(f"'{column}' holds a list: {what}.", where=raw.where)
    if isinstance(value, float) and not value.is_integer():
        hints = [f"To learn the number:  data.columns.value={column}  with  objective: regress"]
        hints += ["Or write classes instead, for example 'low', 'middle', 'high'."]
        raise DataError(f"'{column}' holds {value}, a score and not a class.", where=raw.where, hints=hints)
    if isinstance(value, bool | int | float):
        return _spelt(value)
    raise DataError(f"'{column}' holds a {type(value).__name__}, not a label.", where=raw.where)


def _group(raw: RawRow, options: ReadOptions) -> str | None:
    if "group" not in options.columns:
        return None
    value = raw.fields.get(str(options.columns["group"]))
    if _blank(value):
        raise DataError(
            f"the row has no group ('{options.columns['group']}' is empty).",
            where=raw.where,
            hints=["Give it one, so that it cannot straddle a split."],
        )
    return str(value)
