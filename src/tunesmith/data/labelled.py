"""Rows for task heads: a text as the tokenizer writes it alone, or a question as a dialogue, and what shall be said of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import tee

import numpy as np

from tunesmith.core.errors import DataError, RenderError
from tunesmith.core.record import Message, Record
from tunesmith.core.row import Segment
from tunesmith.data.rendering import Renderer
from tunesmith.data.rowcache import RowCache
from tunesmith.data.rows import iter_rows
from tunesmith.data.templates import added_around
from tunesmith.data.textrow import TextRow


@dataclass(frozen=True, slots=True)
class Reading:
    """What a head reads and what it shall say of it. text: alone; or messages: rendered up to where an answer would begin.

    label: a class's number or a value; NaN is not allowed, so a mere question has any number.
    """

    label: float
    text: str = ""
    messages: tuple[Message, ...] = ()
    where: str = ""


def labelled_rows(renderer: Renderer, readings: Iterable[Reading], cache: RowCache | None = None) -> Iterator[TextRow]:
    """One row a reading, in order; what is said of it is asked at its last token, and nothing else is learned from.

    A text stands between what its tokenizer puts around a text ([CLS] and [SEP], <s> and </s>), or before the eos token.
    Only the text itself may be shortened, never what stands around it. Raises DataError for a reading without words,
    RenderError where the template fails; both name the place.
    """
    head, tail = added_around(renderer.tokenizer)
    ended = len(tail or ([] if renderer.tokenizer.eos_token_id is None else [renderer.tokenizer.eos_token_id]))
    first, second = tee(readings)
    alone = (Record("text", text=one.text, where=one.where) for one in first if not one.messages)
    texts = iter_rows(renderer.tokenizer, alone, renderer=renderer, cache=cache)
    for one in second:
        row = _question(renderer, one.messages, one.where) if one.messages else next(texts)
        start, end = len(head), len(row.segments[0]) - max(ended, 1)
        cuttable = row.cuttable if one.messages else ((start, end),) if start < end else ()
        yield replace(row, segments=(_asked(row.segments[0], one.label),), cuttable=cuttable)


def _question(renderer: Renderer, messages: Sequence[Message], where: str) -> TextRow:
    try:
        rendered = renderer.prompt(messages)
    except RenderError as cause:
        raise RenderError(cause.what, where=cause.where or where, hints=cause.hints) from cause
    if not rendered.ids:
        raise DataError("the row asks nothing.", where=where)
    ids = np.asarray(rendered.ids, np.int32)
    return TextRow((Segment(ids, np.zeros(len(ids), np.bool_)),), where, cuttable=rendered.cuttable, notes=rendered.notes)


def _asked(part: Segment, label: float) -> Segment:
    """The same tokens, nothing of them a target, with a label at the last."""
    labels = np.full(len(part), np.nan, np.float32)
    labels[-1] = label
    return Segment(part.ids, np.zeros(len(part), np.bool_), part.parent, part.name, labels)
