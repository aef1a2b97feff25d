"""How a task head is asked: what it reads of a record, and its answers in packs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from tunesmith.bases import Base
from tunesmith.core.errors import DataError, SpecError
from tunesmith.core.record import Record
from tunesmith.data.labelled import Reading, labelled_rows
from tunesmith.data.lengths import fit
from tunesmith.data.rendering import Renderer
from tunesmith.data.rowcache import RowCache
from tunesmith.data.textrow import TextRow
from tunesmith.engine.asking import Progress
from tunesmith.engine.heads import task_logits
from tunesmith.engine.model import Model
from tunesmith.evaluation.task import Task

PACK_TOKENS = 4096
"""Tokens of a pack; nothing is kept for a backward."""


def check_head_task(base: Base, task: Task) -> None:
    """Refuse what a task head cannot heed: a task without labels, words of an instruction that an encoder never reads."""
    if task.kind != "label":
        hints = ["Name the column:  data.columns.label=NAME", "Or the labels:  task={kind: label, labels: [positive, negative]}"]
        raise SpecError("objective classify needs samples with labels, and these have none.", where="task", hints=hints)
    for key in ("instruction", "system"):
        if base.kind == "encoder" and getattr(task, key):
            what = f"task.{key} says how a question is put, and {base.name} is an encoder: its head reads the text alone."
            raise SpecError(what, where=f"task.{key}", hints=[f"Leave task.{key} out."])
    if task.scoring != "auto":
        what = f"task.scoring={task.scoring} asks for the answer in words, and objective classify trains a head that gives labels."
        raise SpecError(what, where="task.scoring", hints=["Leave task.scoring out."])


def head_rows(
    kind: str, renderer: Renderer, task: Task, labels: Sequence[str], records: Iterable[Record], cache: RowCache | None = None
) -> Iterator[TextRow]:
    """Records as a task head reads them, one row each, in order, with the number of the right label. kind: of the base.

    An encoder, and a decoder whose task has no words of its own, reads the text alone; a decoder with task.instruction or
    task.system, or with a dialogue, reads the question as the chat template writes it, up to where an answer would begin.
    Raises DataError for a record without one of the labels, or that is no text where a text is needed.
    """
    return labelled_rows(renderer, (_reading(kind, task, labels, record) for record in records), cache)


def _reading(kind: str, task: Task, labels: Sequence[str], record: Record) -> Reading:
    gold = task.gold(record)
    if gold is None:
        raise DataError("the row has no label.", where=record.where, hints=[f"Its keys: {', '.join(map(str, record.fields))}"])
    if gold not in labels:
        what = f"'{gold[:60]}' is none of the labels that the head knows ({', '.join(labels)})."
        raise DataError(what, where=record.where, hints=["Correct the label, or list it:  task.labels=[...]"])
    number = float(labels.index(gold))
    if kind == "encoder":
        return Reading(number, text=_text(record), where=record.where)
    if record.shape == "label" and not task.instruction and task.system is None:
        return Reading(number, text=record.text, where=record.where)
    return Reading(number, messages=tuple(task.ask(record)), where=record.where)


def _text(record: Record) -> str:
    if record.shape == "label":
        return record.text
    turns = record.asked()
    if len(turns) == 1 and isinstance(turns[0].get("content"), str):
        return str(turns[0]["content"])
    what = f"an encoder reads one text, and this row is a dialogue of {len(turns)} turns before its label."
    raise DataError(what, where=record.where, hints=["Nearest that works here:  columns  text  and  label", "Or take a decoder as base."])


def label_logits(model: Model, task: Task, records: Sequence[Record], progress: Progress | None = None) -> tuple[list[TextRow], Tensor]:
    """The records as rows, and what the model's head says of each, fp32 [records, labels of the head].

    Texts are shortened as in training, where that was allowed; else one beyond the context raises DataError.
    Raises SpecError where the head knows other labels than the task's.
    """
    head, base = model.head, model.base
    if head is None:
        raise SpecError(f"{base.name} has no task head.", hints=["Train one:  objective: classify"])
    if set(head.labels) != set(task.labels):
        what = f"the head was trained on the labels {', '.join(head.labels)}, and the task has {', '.join(task.labels)}."
        raise SpecError(what, where="task.labels", hints=[f"task.labels=[{', '.join(head.labels)}]"])
    rows: Sequence[TextRow] = list(head_rows(base.kind, model.renderer, task, head.labels, records))
    if limit := head.way.limit or model.context_length:
        fitted, _ = fit(rows, limit, "truncate-left-of-prompt" if head.way.limit else "error", base.tokenizer)
        rows = cast(Sequence[TextRow], fitted)
    logits = torch.zeros(len(rows), len(head.labels))
    for places, said in task_logits(model.forward, head, rows, PACK_TOKENS):
        logits[torch.tensor(places)] = said.float().cpu()
        if progress:
            progress(len(places))
    return list(rows), logits
