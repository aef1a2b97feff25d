"""How a head that scores candidates is asked: every candidate of a question on a path of its own, what they share once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from tunesmith.core.errors import DataError
from tunesmith.core.record import Record
from tunesmith.data.labelled import Reading, answered_rows, labelled_rows
from tunesmith.data.preferences import scored_rows
from tunesmith.data.rendering import Renderer
from tunesmith.data.rowcache import RowCache
from tunesmith.data.textrow import TextRow
from tunesmith.engine.asking import Progress
from tunesmith.engine.heads import task_answers
from tunesmith.engine.model import Model
from tunesmith.evaluation.fitting import PACK_TOKENS, fitted
from tunesmith.evaluation.task import Task


def choice_rows(kind: str, renderer: Renderer, task: Task, records: Iterable[Record], cache: RowCache | None = None) -> Iterator[TextRow]:
    """Records as a head scores their candidates: one row each, in order, a tree of the question and its candidates.

    An encoder reads question and candidate as a pair, as its tokenizer writes pairs. A decoder reads the candidate as the answer
    to the question, as the chat template writes it. kind: of the base. A candidate's label says how many candidates further the
    right one stands. Raises DataError for a record without candidates, and for a dialogue where an encoder needs one text.
    """
    for compared, some in groupby(records, lambda record: bool(record.answers)):
        if compared:
            yield from scored_rows(kind, renderer, some if kind == "encoder" else (framed(task, record) for record in some), cache)
            continue
        readings = (_reading(kind, task, record) for record in some)
        yield from labelled_rows(renderer, readings, cache) if kind == "encoder" else answered_rows(renderer, readings)


def framed(task: Task, record: Record) -> Record:
    """A record of answers with the task's system turn and instruction around its prompt, or as its prompt where it has none; its
    answers as they are."""
    return replace(record, messages=tuple(task.ask(record))) if record.messages or task.instruction else record


def _reading(kind: str, task: Task, record: Record) -> Reading:
    gold = task.gold(record)
    if not record.choices or gold not in record.choices:
        raise DataError("the row has no candidates with the right one among them.", where=record.where)
    right = record.choices.index(gold)
    labels = tuple(float(right - place) for place in range(len(record.choices)))
    if kind == "encoder":
        return Reading(0.0, text=one_text(record), others=record.choices, labels=labels, where=record.where)
    return Reading(0.0, messages=tuple(task.ask(record)), others=record.choices, labels=labels, where=record.where)


def one_text(record: Record) -> str:
    """What an encoder reads of a record. Raises DataError for a dialogue of several turns."""
    if record.shape in ("label", "value"):
        return record.text
    turns = record.asked()
    if len(turns) == 1 and isinstance(turns[0].get("content"), str):
        return str(turns[0]["content"])
    what = f"an encoder reads one text, and this row is a dialogue of {len(turns)} turns before its answer."
    hints = ["Nearest that works here:  columns  text  and  label", "Or take a decoder as base."]
    raise DataError(what, where=record.where, hints=hints)


def choice_scores(
    model: Model, task: Task, records: Sequence[Record], progress: Progress | None = None
) -> tuple[list[TextRow], list[list[float]]]:
    """The records as rows, and the head's score of each candidate."""
    head = model.head
    assert head is not None
    rows = fitted(model, choice_rows(model.base.kind, model.renderer, task, records))
    scores: list[list[float]] = [[] for _ in records]
    for places, said in task_answers(model.forward, head, rows, PACK_TOKENS):
        for row, score in zip(said.rows, said.logits[:, 0].tolist(), strict=True):
            scores[places[row]].append(score)
        if progress:
            progress(len(places))
    return rows, scores
