"""Task heads in a run: whether the objective, the base and the adapter go together, and the head that is put on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from tunesmith.adapters import Pool, Way, states_width
from tunesmith.adapters.methods import plan
from tunesmith.bases.pooling import has_pooler, own_pooling
from tunesmith.core.errors import AdapterError, SpecError
from tunesmith.core.record import Record
from tunesmith.engine.model import Model
from tunesmith.evaluation.classifying import check_head_task
from tunesmith.evaluation.task import Task
from tunesmith.objectives import OBJECTIVES, Objective
from tunesmith.spec import Spec, objective_call

if TYPE_CHECKING:
    from tunesmith.ladder.job import Job

TRAINING = ("sft", "classify")
"""Rungs that train; the others prompt."""


def objective_of(spec: Spec) -> Objective:
    """The spec's objective."""
    return OBJECTIVES[objective_call(spec.objective).name]


def objective_reads_labels(spec: Spec) -> bool:
    """Is a task head what the spec trains?"""
    return objective_of(spec).reads_labels


def labels_of(spec: Spec, start: Model, task: Task) -> tuple[str, ...]:
    """What the outputs of the head are called: as the run's own head, if that is trained on, else as the task says.

    Raises SpecError where a head that is trained on knows other labels than the task's.
    """
    head = start.head if spec.adapter == "continue" else None
    if head is not None and set(head.labels) != set(task.labels):
        what = f"{spec.base.model} has a head for {', '.join(head.labels)}, and these samples have {', '.join(task.labels)}."
        raise SpecError(what, where="adapter", hints=["Train another head on top of it:  adapter: lora(rank=8) + head"])
    return head.labels if head is not None else task.labels


def check_objective(spec: Spec, start: Model, task: Task, witnesses: Iterable[Record]) -> None:
    """Refuse an objective that the base, the task or the adapter cannot serve, before anything is trained.

    witnesses: training samples, among them one of each label that occurs.
    """
    objective = objective_of(spec)
    base = start.base
    if objective.reads_labels:
        check_head_task(base, task)
        labels_of(spec, start, task)
        unseen = sorted(set(task.labels) - {task.gold(record) for record in witnesses})
        if unseen:
            what = f"no training sample has the label '{unseen[0]}', so a head cannot learn it."
            raise SpecError(what, where="task.labels", hints=["Leave it out of task.labels, or add samples of it."])
        return
    if base.kind == "encoder":
        what = f"{base.name} is an encoder: it predicts no next word, which objective {objective.name} learns from."
        raise SpecError(
            what, where="objective", hints=["Nearest that works here:  objective: classify  (a task head, for samples with labels)"]
        )
    with_head = start.head is not None if spec.adapter == "continue" else any(part.kind == "head" for part in plan(spec.adapter))
    if with_head:
        what = f"objective {objective.name} learns from words, and the adapter has a task head, which it would leave untrained."
        raise SpecError(what, where="adapter", hints=["Train the head:  objective: classify", "Or leave  head  out of the adapter."])


def check_rungs_of(spec: Spec, start: Model) -> None:
    """Refuse rungs that the base cannot climb, and a training rung that is not of the spec's objective."""
    names = [rung.split("(")[0].strip() for rung in spec.climb.rungs]
    prompting = [name for name in names if name not in TRAINING]
    if prompting and start.base.kind == "encoder":
        what = f"{', '.join(prompting)}: {start.base.name} is an encoder: it reads texts and answers no prompt."
        raise SpecError(what, where="climb.rungs", hints=["Nearest that works here:  climb.rungs=[classify]  with  objective: classify"])
    objective = objective_of(spec)
    own = "classify" if objective.reads_labels else "sft"
    if any(name in TRAINING and name != own for name in names):
        left = [own if name in TRAINING else rung for name, rung in zip(names, spec.climb.rungs, strict=True)]
        what = f"the rung that trains by objective {objective.name} is '{own}'."
        raise SpecError(what, where="climb.rungs", hints=[f"Nearest that works here:  climb.rungs=[{', '.join(left)}]"])
    shown = [name for name in prompting if name != "zero_shot"]
    if shown and start.head is not None and spec.task.scoring == "auto":
        what = f"{', '.join(shown)}: the task head of {spec.base.model} answers, and reads no demonstrations."
        raise SpecError(what, where="climb.rungs", hints=["To ask in words instead:  task.scoring=likelihood"])


def give_head(job: Job, model: Model) -> None:
    """Put the head on that the spec's objective reads, if it reads one and the adapter has none yet."""
    if not objective_of(job.spec).reads_labels or model.head is not None:
        return
    adapter, base = model.adapter, model.base
    named = adapter.head_plan
    form = named.form if named is not None else plan("head")[0].form
    own = own_pooling(base)
    pool = own if form["pool"] == "auto" else form["pool"]
    if pool == "pooler" and not has_pooler(base):
        raise AdapterError(f"{base.name} has no pooler of its own.", hints=[f"Nearest that works here:  head(pool={own})"])
    limit = job.limit if job.spec.data.overlong == "truncate-left-of-prompt" else None
    way = Way(cast(Pool, pool), form["hidden"], form["dropout"], bias=base.kind == "encoder", limit=limit)
    adapter.give_head(states_width(base.model), job.labels, way, seed=job.spec.train.seed)
    said = {"mean": "the mean of a text's states", "pooler": "the base's own pooler", "first": "the first state", "last": "the last state"}
    added = "" if named is not None else ", added since objective classify needs one"
    job.reporter.line("head", f"{len(job.labels)} labels ({', '.join(job.labels)}) from {said[pool]}{added}")
