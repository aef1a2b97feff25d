"""Records to rows: rendered in batches, and kept in a cache under the hash of what they are made from."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, get_args

from tunesmith.core.errors import DataError, RenderError, TunesmithError, unknown
from tunesmith.core.record import Message, Record
from tunesmith.core.row import Row, segment
from tunesmith.data.encoding import Piece
from tunesmith.data.lengths import LengthReport, Policy, drop_oldest_turns, fit
from tunesmith.data.rendering import Plan, Rendered, Renderer, Supervise, options, renderer_for
from tunesmith.data.rowcache import RowCache
from tunesmith.data.sharing import Member, Shared, share_prefix
from tunesmith.data.templates import added_around
from tunesmith.data.textrow import TextRow

__all__ = [
    "LengthReport",
    "Member",
    "Policy",
    "RowCache",
    "Shared",
    "TextRow",
    "drop_oldest_turns",
    "fit",
    "iter_rows",
    "notes_of",
    "options",
    "share_prefix",
    "to_rows",
]

LabelPrompt = Callable[[Record], Sequence[Message]]

CHUNK = 512  # records rendered, encoded and cached together

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Source:
    """What a record's rows are made from, once the label's prompt is written: a dialogue or a text."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]]
    text: str | None
    where: str

    def content(self) -> list[Any]:
        return [list(map(dict, self.messages)), list(map(dict, self.tools)), self.text]


def to_rows(
    tokenizer: Any,
    records: Iterable[Record],
    *,
    supervise: Supervise = "all",
    template: str | Path | None = None,
    label_prompt: LabelPrompt | None = None,
    renderer: Renderer | None = None,
    cache: RowCache | None = None,
) -> list[TextRow]:
    """All rows of these records, in order; see `iter_rows`."""
    return list(
        iter_rows(tokenizer, records, supervise=supervise, template=template, label_prompt=label_prompt, renderer=renderer, cache=cache)
    )


def iter_rows(
    tokenizer: Any,
    records: Iterable[Record],
    *,
    supervise: Supervise = "all",
    template: str | Path | None = None,
    label_prompt: LabelPrompt | None = None,
    renderer: Renderer | None = None,
    cache: RowCache | None = None,
) -> Iterator[TextRow]:
    """Rows one after the other, for records that do not fit in memory.

    "messages" and "prompt" records are rendered as dialogues; a "label" record as `label_prompt(record)` and the label as
    the answer; a "text" record is its tokens between what the tokenizer puts around a text (and eos), all supervised but the
    first. Where the template alters history a dialogue becomes one row an assistant turn (the rows' notes say so).
    renderer: one with options of its own, instead of `template`.
    Raises DataError for a record without anything to learn from, RenderError where a template fails; both name the record.
    """
    if supervise not in get_args(Supervise):
        raise unknown("value of supervise", supervise, get_args(Supervise))
    if renderer is not None and template is not None:
        raise ValueError("give a renderer or a template, not both")
    renderer = renderer or renderer_for(tokenizer, template)
    mark = f"{renderer.fingerprint()} {supervise}" if cache else ""
    for chunk in _chunks(records, CHUNK):
        sources = [_source(record, label_prompt) for record in chunk]
        key = _key(mark, sources) if cache else ""
        made = cache.load(key) if cache else None
        if made is None:
            made = _make(renderer, sources, supervise)
            if cache:
                cache.save(key, made)
        for index, row in made:
            yield row.at(sources[index].where)


def notes_of(rows: Iterable[Row]) -> dict[str, int]:
    """The decisions that rendering took, each with the number of rows it concerns; most frequent first."""
    return dict(Counter(note for row in rows for note in getattr(row, "notes", ())).most_common())


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _key(mark: str, sources: Sequence[_Source]) -> str:
    content = json.dumps([mark, [source.content() for source in sources]], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _source(record: Record, label_prompt: LabelPrompt | None) -> _Source:
    if record.shape == "text":
        if not record.text.strip():
            raise DataError("the text is empty.", where=record.where)
        return _Source((), (), record.text, record.where)
    if record.shape != "label":
        return _Source(record.messages, record.tools, None, record.where)
    if record.label is None:
        raise DataError(
            "the row has no label to learn from.", where=record.where, hints=[f"Its keys: {', '.join(map(str, record.fields))}"]
        )
    if label_prompt is None:
        raise DataError("a text with a label needs a prompt that asks for the label.", where=record.where, hints=["Give label_prompt."])
    return _Source([*label_prompt(record), {"role": "assistant", "content": record.label}], record.tools, None, record.where)


def _make(renderer: Renderer, sources: Sequence[_Source], supervise: Supervise) -> list[tuple[int, TextRow]]:
    """Rows with the index of their source, in the sources' order; the tokenizer is called once a kind of source."""
    made: list[tuple[int, TextRow]] = []
    for with_tools in (False, True):
        planned = [
            (index, plan)
            for index, source in enumerate(sources)
            if source.text is None and bool(source.tools) == with_tools
            for plan in _plans(renderer, source, supervise)
        ]
        tools: list[Mapping[str, Any]] | None = [{}] if with_tools else None
        rendered = _encoded(renderer, planned, sources, tools) if planned else []
        made += [(index, _row(one, sources[index].where, supervise)) for (index, _), one in zip(planned, rendered, strict=True)]
    made += _text_rows(renderer, [(index, source) for index, source in enumerate(sources) if source.text is not None])
    return sorted(made, key=lambda pair: pair[0])


def _plans(renderer: Renderer, source: _Source, supervise: Supervise) -> list[Plan]:
    if supervise != "none" and not any(message.get("role") == "assistant" for message in source.messages):
        roles = ", ".join(str(message.get("role")) for message in source.messages)
        raise DataError("the dialogue has no assistant turn to learn from.", where=source.where, hints=[f"Its roles: {roles or 'none'}"])
    try:
        return renderer.plans(source.messages, tools=source.tools or None, supervise=supervise)
    except RenderError as cause:
        raise _at(cause, source.where) from cause


def _encoded(
    renderer: Renderer, planned: Sequence[tuple[int, Plan]], sources: Sequence[_Source], tools: Sequence[Mapping[str, Any]] | None
) -> list[Rendered]:
    try:
        return renderer.encode([plan for _, plan in planned], tools)
    except RenderError:
        pass  # once more, one by one, to name the record
    found = []
    for index, plan in planned:
        try:
            found += renderer.encode([plan], tools)
        except RenderError as cause:
            raise _at(cause, sources[index].where) from cause
    return found


def _at(cause: TunesmithError, where: str) -> TunesmithError:
    return type(cause)(cause.what, where=cause.where or where, hints=cause.hints)


def _row(rendered: Rendered, where: str, supervise: Supervise) -> TextRow:
    supervised, notes = list(rendered.supervised), rendered.notes
    if supervised and supervised[0]:
        supervised[0] = False
        notes = (*notes, "the first token of a row is not trained on: nothing stands before it")
    if supervise != "none" and not any(supervised):
        raise DataError("no token of the row is trained on.", where=where, hints=[f"As rendered: {rendered.text[:200]!r}"])
    return TextRow((segment(rendered.ids, supervised),), where, cuttable=rendered.cuttable, notes=notes)


def _text_rows(renderer: Renderer, sources: Sequence[tuple[int, _Source]]) -> list[tuple[int, TextRow]]:
    if not sources:
        return []
    head, tail = added_around(renderer.tokenizer)
    eos = renderer.tokenizer.eos_token_id
    tail = tail or ([] if eos is None else [eos])
    pieces: list[list[Piece]] = []
    notes: list[tuple[str, ...]] = []
    for _, source in sources:
        try:
            parts, said = renderer.text_pieces(source.text or "")
        except RenderError as cause:
            raise _at(cause, source.where) from cause
        pieces.append(parts)
        notes.append(said)
    rows = []
    for (index, source), encoded, said in zip(sources, renderer.encoder().encode(pieces), notes, strict=True):
        ids = [*head, *(token for part in encoded for token in part.ids), *tail]
        if len(ids) < 2:
            raise DataError("the text has no token to learn from.", where=source.where)
        rows.append((index, TextRow((segment(ids, [False] + [True] * (len(ids) - 1)),), source.where, notes=said)))
    return rows
