"""How a task head is asked: what it reads of a record, and its answers in packs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tunesmith.adapters import Says
from tunesmith.bases import Base
from tunesmith.core.errors import DataError, SpecError
from tunesmith.core.record import Record
from tunesmith.data.labelled import Reading, labelled_rows
from tunesmith.data.rendering import Renderer
from tunesmith.data.rowcache import RowCache
from tunesmith.data.textrow import TextRow
from tunesmith.engine.asking import Progress
from tunesmith.engine.heads import task_logits
from tunesmith.engine.model import Model
from tunesmith.evaluation.choosing import choice_rows, one_text
from tunesmith.evaluation.fitting import PACK_TOKENS, fitted
from tunesmith.evaluation.tagging import tag_rows
from tunesmith.evaluation.task import Task

SAYS: Mapping[str, Says] = {"classify": "label", "tag": "tags", "regress": "value", "choose": "choice", "reward": "choice"}
"""What a head says that is trained by an objective."""

_NEEDS: Mapping[Says, tuple[str, str]] = {
    "label": ("samples with labels", "Name the column:  data.columns.label=NAME"),
    "tags": ("words with a tag each", "Name the columns:  data.columns.tokens=NAME data.columns.tags=NAME"),
    "value": ("texts with a number", "Name the column:  data.columns.value=NAME"),
    "choice": ("questions with candidates", "Name the columns:  data.columns.choices=NAME data.columns.answer=NAME"),
}


def objective_for(says: str) -> str | None:
    """The objective that trains a head for tasks of this kind, if there is one."""
    return next((name for name, said in SAYS.items() if said == says), None)


def check_head_task(base: Base, task: Task, objective: str = "classify") -> None:
    """Refuse what a task head cannot heed: a task of another kind, words of an instruction that it never reads."""
    says = SAYS[objective]
    if task.kind != says:
        wanted, hint = _NEEDS[says]
        hints = [hint] + (["Or the labels:  task={kind: label, labels: [positive, negative]}"] if says == "label" else [])
        other = objective_for(task.kind)
        hints += [f"For these samples:  objective: {other}"] if other else []
        raise SpecError(f"objective {objective} needs {wanted}, and these have none.", where="task", hints=hints)
    for key in ("instruction", "system"):
        if getattr(task, key) and (base.kind == "encoder" or says == "tags"):
            why = "a head that tags words reads them alone"
            if says != "tags":
                why = f"{base.name} is an encoder: its head reads the text alone"
            raise SpecError(f"task.{key} says how a question is put, and {why}.", where=f"task.{key}", hints=[f"Leave task.{key} out."])
    if task.scoring != "auto":
        what = f"task.scoring={task.scoring} asks for the answer in words, and objective {objective} trains a head that answers."
        raise SpecError(what, where="task.scoring", hints=["Leave task.scoring out."])


def head_rows(
    kind: str,
    renderer: Renderer,
    task: Task,
    labels: Sequence[str],
    records: Iterable[Record],
    cache: RowCache | None = None,
    *,
    scale: tuple[float, float] = (0.0, 1.0),
) -> Iterator[TextRow]:
    """Records as a task head reads them, one row each, in order, with what it shall say. kind: of the base.

    An encoder, and a decoder whose task has no words of its own, reads the text alone; a decoder with task.instruction or
    task.system, or with a dialogue, reads the question as the chat template writes it, up to where an answer would begin. The
    second text of a pair follows the first as the tokenizer of an encoder writes pairs, on a line of its own for a decoder.
    labels: of the head. scale: (mean, deviation) that numbers are measured by.
    Raises DataError for a record without one of the labels, or that is no text where a text is needed.
    """
    if task.kind == "tags":
        return tag_rows(kind, renderer, task, labels, records)
    if task.kind == "choice":
        return choice_rows(kind, renderer, task, records, cache)
    return labelled_rows(renderer, (_reading(kind, task, _number(task, labels, scale, record), record) for record in records), cache)


def _number(task: Task, labels: Sequence[str], scale: tuple[float, float], record: Record) -> float:
    """What the head shall say of the record."""
    if task.kind == "value":
        if record.value is None:
            raise DataError("the row has no number to learn.", where=record.where, hints=[_NEEDS["value"][1]])
        return (record.value - scale[0]) / scale[1]
    gold = task.gold(record)
    if gold is None:
        raise DataError("the row has no label.", where=record.where, hints=[f"Its keys: {', '.join(map(str, record.fields))}"])
    if gold not in labels:
        what = f"'{gold[:60]}' is none of the labels that the head knows ({', '.join(labels)})."
        raise DataError(what, where=record.where, hints=["Correct the label, or list it:  task.labels=[...]"])
    return float(labels.index(gold))


def _reading(kind: str, task: Task, number: float, record: Record) -> Reading:
    if kind == "encoder":
        return Reading(number, text=one_text(record), others=(record.pair,) if record.pair else (), where=record.where)
    if record.shape in ("label", "value") and not task.instruction and task.system is None:
        return Reading(number, text=f"{record.text}\n{record.pair}" if record.pair else record.text, where=record.where)
    return Reading(number, messages=tuple(task.ask(record)), where=record.where)


def check_head(model: Model, task: Task) -> None:
    """Refuse a task that is not what the model's head was trained for. Raises SpecError."""
    head, base = model.head, model.base
    if head is None:
        raise SpecError(f"{base.name} has no task head.", hints=[f"Train one:  objective: {objective_for(task.kind) or 'classify'}"])
    if head.way.says != task.kind:
        what = f"the head was trained by objective {objective_for(head.way.says)}, and the task is of kind {task.kind}."
        raise SpecError(what, where="task.kind", hints=[f"It answers for {_NEEDS[head.way.says][0]}."])
    if task.kind in ("label", "tags") and set(head.labels) != set(task.labels):
        what = f"the head was trained on the labels {', '.join(head.labels)}, and the task has {', '.join(task.labels)}."
        raise SpecError(what, where="task.labels", hints=[f"task.labels=[{', '.join(head.labels)}]"])


def label_logits(model: Model, task: Task, records: Sequence[Record], progress: Progress | None = None) -> tuple[list[TextRow], Tensor]:
    """The records as rows, and what the model's head says of each whole text, fp32 [records, outputs of the head].

    Texts are shortened as in training, where that was allowed; else one beyond the context raises DataError.
    Raises SpecError where the head was trained for another task or on other labels.
    """
    check_head(model, task)
    head, base = model.head, model.base
    assert head is not None
    rows = fitted(model, head_rows(base.kind, model.renderer, task, head.labels, records))
    logits = torch.zeros(len(rows), len(head.labels))
    for places, said in task_logits(model.forward, head, rows, PACK_TOKENS):
        logits[torch.tensor(places)] = said.float().cpu()
        if progress:
            progress(len(places))
    return rows, logits
