"""Rows for task heads: a text as the tokenizer writes it alone, or a question as a dialogue, and what shall be said of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import tee

import numpy as np

from tunesmith.core.errors import DataError, RenderError
from tunesmith.core.record import Message, Record
from tunesmith.core.row import SECOND, Segment
from tunesmith.data.rendering import Renderer
from tunesmith.data.rowcache import RowCache
from tunesmith.data.rows import iter_rows
from tunesmith.data.templates import added_around, added_between, marks_second
from tunesmith.data.textrow import TextRow


@dataclass(frozen=True, slots=True)
class Reading:
    """What a head reads and what it shall say of it. text: alone; or messages: rendered up to where an answer would begin.

    others: texts that follow it, each on a path of its own: the second one of a pair, or candidates. label: a class's number
    or a value; NaN is not allowed, so a mere question has any number. labels: one each of the others, where they differ.
    """

    label: float
    text: str = ""
    messages: tuple[Message, ...] = ()
    where: str = ""
    others: tuple[str, ...] = ()
    labels: tuple[float, ...] = ()


def labelled_rows(renderer: Renderer, readings: Iterable[Reading], cache: RowCache | None = None) -> Iterator[TextRow]:
    """One row a reading, in order; what is said of it is asked at its last token, and nothing else is learned from.

    A text stands between what its tokenizer puts around a text ([CLS] and [SEP], <s> and </s>), or before the eos token.
    Only the text itself may be shortened, never what stands around it. Raises DataError for a reading without words,
    RenderError where the template fails; both name the place.
    """
    around = _Around.of(renderer)
    first, second = tee(readings)
    alone = (Record("text", text=text, where=one.where) for one in first if not one.messages for text in (one.text, *one.others))
    texts = iter_rows(renderer.tokenizer, alone, renderer=renderer, cache=cache)
    for one in second:
        if one.messages:
            row = _question(renderer, one.messages, one.where)
            yield replace(row, segments=(asked_last(row.segments[0], one.label),))
            continue
        row = next(texts)
        start, end = around.inside(row)
        cuttable = ((start, end),) if start < end else ()
        if not one.others:
            yield replace(row, segments=(asked_last(row.segments[0], one.label),), cuttable=cuttable)
            continue
        others = [next(texts) for _ in one.others]
        notes = tuple(dict.fromkeys(note for each in (row, *others) for note in each.notes))
        labels = one.labels or (one.label,)
        leaves = [asked_last(around.second(other), label) for other, label in zip(others, labels, strict=True)]
        root = around.first(row)
        yield TextRow((root, *leaves), row.where, cuttable=((start, len(row.segments[0]) - around.ended),), notes=notes)


@dataclass(frozen=True, slots=True)
class _Around:
    """What stands around texts. head: before one; between: after the first of two. ended: tokens after a text. second_name: of
    the segment of a second text."""

    head: list[int]
    between: list[int]
    ended: int
    second_name: str

    @classmethod
    def of(cls, renderer: Renderer) -> _Around:
        head, tail = added_around(renderer.tokenizer)
        eos = [] if renderer.tokenizer.eos_token_id is None else [renderer.tokenizer.eos_token_id]
        name = SECOND if marks_second(renderer.tokenizer) else ""
        return cls(head, added_between(renderer.tokenizer), len(tail or eos), name)

    def inside(self, row: TextRow) -> tuple[int, int]:
        """Where the text itself begins and ends in its row, of which the last token is asked and stays."""
        return len(self.head), len(row.segments[0]) - max(self.ended, 1)

    def first(self, row: TextRow) -> Segment:
        """The text as the first of two: with what stands before it and between the two."""
        ids = row.segments[0].ids
        return _untaught(np.concatenate([ids[: len(ids) - self.ended], np.asarray(self.between, np.int32)]))

    def second(self, row: TextRow) -> Segment:
        """The text as the second of two, which continues the first."""
        return replace(_untaught(row.segments[0].ids[len(self.head) :]), parent=0, name=self.second_name)


def _untaught(ids: np.ndarray) -> Segment:
    return Segment(ids.astype(np.int32), np.zeros(len(ids), np.bool_))


def _question(renderer: Renderer, messages: Sequence[Message], where: str) -> TextRow:
    try:
        rendered = renderer.prompt(messages)
    except RenderError as cause:
        raise RenderError(cause.what, where=cause.where or where, hints=cause.hints) from cause
    if not rendered.ids:
        raise DataError("the row asks nothing.", where=where)
    ids = np.asarray(rendered.ids, np.int32)
    return TextRow((_untaught(ids),), where, cuttable=rendered.cuttable, notes=rendered.notes)


def answered_rows(renderer: Renderer, readings: Iterable[Reading]) -> Iterator[TextRow]:
    """One row a reading of messages: the dialogue up to where an answer would begin, and `others` as its answers, with the end
    of a turn. Each is asked at its last token. Raises RenderError where the prompt depends on the answer; it names the place.
    """
    for one in readings:
        try:
            row = renderer.options(one.messages, one.others, where=one.where)
        except RenderError as cause:
            raise RenderError(cause.what, where=cause.where or one.where, hints=cause.hints) from cause
        leaves = [asked_last(part, label) for part, label in zip(row.segments[1:], one.labels, strict=True)]
        yield replace(row, segments=(row.segments[0], *leaves))


def asked_last(part: Segment, label: float) -> Segment:
    """The same tokens, nothing of them a target, with a label at the last."""
    labels = np.full(len(part), np.nan, np.float32)
    labels[-1] = label
    return Segment(part.ids, np.zeros(len(part), np.bool_), part.parent, part.name, labels)
