"""The teacher of a run that learns what another model says: that model, or a finished run, on the student's own base where it can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.adapters import plan
from tunesmith.bases import load_base
from tunesmith.core.errors import SpecError
from tunesmith.engine.losses import parts_of
from tunesmith.engine.model import Model
from tunesmith.engine.runs import is_run, open_run
from tunesmith.engine.teaching import check_teacher
from tunesmith.rollout.named import chain, lineage
from tunesmith.spec import Spec

if TYPE_CHECKING:
    from tunesmith.ladder.job import Job


def check_teaching(spec: Spec) -> None:
    """Raises SpecError for an objective without the teacher it learns from, and a teacher that no objective listens to."""
    learns = any(part.objective.wanted(part.options).divergence is not None for part in parts_of(spec.objective))
    if learns and spec.teacher is None:
        hints = ["Name a model or a run:  teacher=runs/NAME"]
        raise SpecError(f"objective {spec.objective} learns what a teacher says, and none is named.", where="teacher", hints=hints)
    if spec.teacher is not None and not learns:
        what = f"objective {spec.objective} listens to no teacher."
        raise SpecError(what, where="teacher", hints=["Nearest that does:  objective: distil", "Or leave teacher out."])


def teacher_of(job: Job) -> Model | None:
    """The model that a run learns from, None where it learns from its samples alone. To be called before the run's own adapter is on.

    A run on the student's base shares it. Raises BaseError for a teacher of another vocabulary.
    """
    source = job.spec.teacher
    if source is None:
        return None
    teacher = _shared(job, source) or _apart(job, source)
    check_teacher(teacher, job.start)
    shared = " on the student's own base" if teacher.base is job.base else ""
    job.reporter.line("teacher", f"{source}{shared}")
    return teacher


def _shared(job: Job, source: str) -> Model | None:
    """The teacher on the base that is loaded already; None where it is of another one, or has changed its weights."""
    if source == job.spec.base.model:
        return Model(job.start.base, list(job.start.adapters), "teacher")
    if not is_run(source):
        return None
    specs = [spec for _, spec in chain(source)]
    if any(part.kind == "in-place" for spec in specs if spec.adapter != "continue" for part in plan(spec.adapter)):
        return None
    ours = lineage(job.spec)[-1].base
    same = {"dtype", "device"}
    if specs[-1].base.model_dump(exclude=same) != ours.model_dump(exclude=same):
        return None
    return open_run(source, base=job.base)


def _apart(job: Job, source: str) -> Model:
    dtype, device = str(job.base.dtype).removeprefix("torch."), str(job.base.device)
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]
    return open_run(source, dtype=short, device=device) if is_run(source) else Model(load_base(source, dtype=short, device=device))
