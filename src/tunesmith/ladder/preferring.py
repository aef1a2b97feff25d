"""Runs that learn from answers held against one another: their rows, what the reference says of them, and how they do on dev."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from tunesmith.core.packages import cache_dir
from tunesmith.core.record import Record
from tunesmith.core.row import Row
from tunesmith.data.preferences import preference_rows, rated_rows
from tunesmith.data.rowcache import RowCache
from tunesmith.engine.losses import judge
from tunesmith.engine.model import Model
from tunesmith.engine.processes import current
from tunesmith.engine.reference import with_reference
from tunesmith.evaluation.choosing import choice_rows, framed
from tunesmith.ladder.objective import objective_of
from tunesmith.spec import objective_call

if TYPE_CHECKING:
    from tunesmith.ladder.job import Job


def made_answers(job: Job, records: Iterable[Record], cache: RowCache | None) -> Iterator[Row]:
    """Records as rows of a prompt and its answers."""
    unit, renderer = objective_of(job.spec).unit, job.start.renderer
    if unit == "scores":
        return choice_rows(job.base.kind, renderer, job.task, records, cache)
    records = [framed(job.task, record) for record in records]
    if unit == "answers":
        return iter(rated_rows(renderer, records, cache=cache, seed=job.spec.data.seed))
    return iter(preference_rows(renderer, records, cache=cache))


def referred(job: Job, rows: Sequence[Row]) -> Sequence[Row]:
    """The rows with what the reference says of them, where the objective reads it: the run's start, before anything is trained."""
    if not objective_of(job.spec).reads_reference:
        return rows
    return with_reference(job.start, rows, cache=cache_dir() / "reference", reporter=job.reporter)


@torch.no_grad()
def judge_answers(job: Job, model: Model, rows: Sequence[Row]) -> Mapping[str, float]:
    """The objective's own figures on dev rows; the share of answers in their right order comes first."""
    call = objective_call(job.spec.objective)
    with model.active():
        found = judge(model, rows, objective_of(job.spec), call.options, job.spec.train.pack_tokens, current())
    return {"accuracy": found["accuracy"], **found}
