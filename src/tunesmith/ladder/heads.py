"""Task heads in a run: whether the objective, the base and the adapter go together, and the head that is put on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, cast

import numpy as np

from tunesmith.adapters import Pool, Says, TaskHead, Way, states_width
from tunesmith.adapters.methods import plan
from tunesmith.bases import Base
from tunesmith.bases.pooling import has_pooler, own_pooling
from tunesmith.core.errors import AdapterError, SpecError
from tunesmith.core.record import Record
from tunesmith.engine.model import Model
from tunesmith.evaluation.classifying import SAYS, check_head_task, objective_for
from tunesmith.evaluation.tagging import subwords_of
from tunesmith.evaluation.task import Task
from tunesmith.ladder.objective import check_compared, compares, objective_of
from tunesmith.objectives import Objective
from tunesmith.spec import Spec

if TYPE_CHECKING:
    from tunesmith.ladder.job import Job

TRAINING = ("sft", *SAYS)
"""Rungs that train; the others prompt."""

_OUTPUTS: Mapping[Says, tuple[str, ...]] = {"value": ("value",), "choice": ("score",)}
"""What the one output of a head is called that says no labels."""


def objective_reads_labels(spec: Spec) -> bool:
    """Is a task head what the spec trains?"""
    return objective_of(spec).reads_labels


def labels_of(spec: Spec, start: Model, task: Task) -> tuple[str, ...]:
    """What the outputs of the head are called: as the run's own head, if that is trained on, else as the task says.

    Raises SpecError where a head that is trained on answers for another kind of task, or knows other labels than the task's.
    """
    says, wanted = SAYS[objective_of(spec).name], outputs_of(objective_of(spec), task)
    head = kept_head(spec, start)
    if head is None:
        return wanted
    hints = ["Train another head on top of it:  adapter: lora(rank=8) + head"]
    if head.way.says != says:
        what = f"{spec.base.model} has a head of objective {objective_for(head.way.says)}, and {spec.objective} trains another kind."
        raise SpecError(what, where="adapter", hints=hints)
    if set(head.labels) != set(wanted):
        what = f"{spec.base.model} has a head for {', '.join(head.labels)}, and these samples have {', '.join(wanted)}."
        raise SpecError(what, where="adapter", hints=hints)
    return head.labels


def outputs_of(objective: Objective, task: Task) -> tuple[str, ...]:
    """What the outputs of a new head are called."""
    return _OUTPUTS.get(SAYS[objective.name], task.labels)


def kept_head(spec: Spec, start: Model) -> TaskHead | None:
    """The head of the run that is gone on with, if its own adapter is trained on."""
    return start.head if spec.adapter == "continue" else None


def scale_of(spec: Spec, start: Model, records: Iterable[Record]) -> tuple[float, float]:
    """(mean, standard deviation) that numbers are measured by: those of the training samples, or of a head that is trained on.

    Raises SpecError where all numbers are alike.
    """
    if SAYS.get(objective_of(spec).name) != "value":
        return 0.0, 1.0
    if head := kept_head(spec, start):
        return head.way.mean, head.way.deviation
    values = np.fromiter((record.value for record in records if record.value is not None), np.float64)
    if not len(values) or not float(np.ptp(values)):
        raise SpecError("all numbers of the training samples are alike: there is nothing to learn.", where="data.columns.value")
    return float(values.mean()), float(values.std())


def check_objective(spec: Spec, start: Model, task: Task, witnesses: Iterable[Record]) -> None:
    """Refuse an objective that the base, the task or the adapter cannot serve, before anything is trained.

    witnesses: training samples, among them one of each label that occurs.
    """
    objective = objective_of(spec)
    base = start.base
    if compares(objective):
        check_compared(objective, witnesses)
    if objective.reads_labels:
        check_head_task(base, task, objective.name)
        labels_of(spec, start, task)
        if task.kind == "label":
            _check_seen(task, witnesses)
        if task.kind == "tags" and spec.data.stream and (not spec.task.labels or spec.task.scheme == "auto"):
            what = "data.stream holds no samples to read the tags from."
            raise SpecError(what, where="task.labels", hints=["Name them:  task.labels=[O, B-PER, I-PER] task.scheme=IOB2"])
        return
    fitting = "reward" if compares(objective) else objective_for(task.kind) or "classify"
    if base.kind == "encoder":
        what = f"{base.name} is an encoder: it predicts no next word, which objective {objective.name} learns from."
        hints = [f"Nearest that works here:  objective: {fitting}  (a task head, for {_SAMPLES[fitting]})"]
        raise SpecError(what, where="objective", hints=hints)
    if task.kind in ("tags", "value"):
        what = f"objective {objective.name} learns from words that answer, and these samples are {_SAMPLES[fitting]}."
        raise SpecError(what, where="objective", hints=[f"Nearest that works here:  objective: {fitting}"])
    with_head = start.head is not None if spec.adapter == "continue" else any(part.kind == "head" for part in plan(spec.adapter))
    if with_head:
        what = f"objective {objective.name} learns from words, and the adapter has a task head, which it would leave untrained."
        raise SpecError(what, where="adapter", hints=[f"Train the head:  objective: {fitting}", "Or leave  head  out of the adapter."])


_SAMPLES: Mapping[str, str] = {
    "classify": "samples with labels",
    "tag": "words with tags",
    "regress": "texts with a number",
    "choose": "questions with candidates",
    "reward": "answers held against one another",
}


def _check_seen(task: Task, witnesses: Iterable[Record]) -> None:
    unseen = sorted(set(task.labels) - {task.gold(record) for record in witnesses})
    if unseen:
        what = f"no training sample has the label '{unseen[0]}', so a head cannot learn it."
        raise SpecError(what, where="task.labels", hints=["Leave it out of task.labels, or add samples of it."])


def check_rungs_of(spec: Spec, start: Model) -> None:
    """Refuse rungs that the base cannot climb, and a training rung that is not of the spec's objective."""
    names = [rung.split("(")[0].strip() for rung in spec.climb.rungs]
    prompting = [name for name in names if name not in TRAINING]
    if prompting and start.base.kind == "encoder":
        what = f"{', '.join(prompting)}: {start.base.name} is an encoder: it reads texts and answers no prompt."
        fitting = objective_of(spec).name if objective_reads_labels(spec) else "classify"
        raise SpecError(what, where="climb.rungs", hints=[f"Nearest that works here:  climb.rungs=[{fitting}]  with  objective: {fitting}"])
    objective = objective_of(spec)
    own = objective.name if objective.reads_labels else "sft"
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
    adapter, base, says = model.adapter, model.base, SAYS[objective_of(job.spec).name]
    named = adapter.head_plan
    form = named.form if named is not None else plan("head")[0].form
    encoder = base.kind == "encoder"
    mean, deviation = job.scale
    way = Way(
        cast(Pool, _pool(base, says, form["pool"])),
        form["hidden"],
        form["dropout"],
        bias=encoder or says == "tags",
        limit=job.limit if job.spec.data.overlong == "truncate-left-of-prompt" else None,
        says=says,
        mean=mean,
        deviation=deviation,
        subwords=subwords_of(base.kind, job.task),
        theirs="score" if says == "tags" and not encoder else "",
    )
    adapter.give_head(states_width(base.model), job.labels, way, seed=job.spec.train.seed)
    added = "" if named is not None else f", added since objective {objective_of(job.spec).name} needs one"
    job.reporter.line("head", f"{_described(job, way)}{added}")


def _pool(base: Base, says: Says, wanted: str) -> str:
    """What the head reads. Raises AdapterError where it cannot."""
    if says == "tags":
        if wanted not in ("auto", "last"):
            raise AdapterError("a head that tags words reads each word's own state.", hints=["Nearest that works here:  head"])
        return "last"
    own = own_pooling(base)
    pool = own if wanted == "auto" else wanted
    if pool == "pooler" and not has_pooler(base):
        raise AdapterError(f"{base.name} has no pooler of its own.", hints=[f"Nearest that works here:  head(pool={own})"])
    return pool


def _described(job: Job, way: Way) -> str:
    said = {"mean": "the mean of a text's states", "pooler": "the base's own pooler", "first": "the first state", "last": "the last state"}
    if way.says == "tags":
        return f"{len(job.labels)} tags ({', '.join(job.labels)}) from each word's {_PIECES[way.subwords]}"
    if way.says == "value":
        return f"a number from {said[way.pool]}, in deviations ({way.deviation:.4g}) from the mean ({way.mean:.4g})"
    if way.says == "choice":
        return f"a score of each candidate from {said[way.pool]}"
    return f"{len(job.labels)} labels ({', '.join(job.labels)}) from {said[way.pool]}"


_PIECES: Mapping[str, str] = {"first": "first piece", "last": "last piece", "all": "pieces, all of them"}
