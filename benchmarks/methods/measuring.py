"""One cell: trained, asked, counted, and what it forgot."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from methods.cells import Cell, Result
from methods.ground import Ground, bare_base, ground, spec_of
from methods.table import Table
from tunesmith.adapters.arithmetic import difference
from tunesmith.adapters.counting import counts, rank_of
from tunesmith.bases.memory import PeakMemory, peak_memory_mb
from tunesmith.core.errors import AdapterError, BaseError, SpecError, TunesmithError
from tunesmith.engine.model import Model
from tunesmith.engine.rundir import RunFolder
from tunesmith.engine.train import Trainer
from tunesmith.evaluation.evaluate import System, evaluate
from tunesmith.evaluation.prompting import zero_shot
from tunesmith.evaluation.results import Evaluation
from tunesmith.ladder.job import Job, trainable_model
from tunesmith.spec import Spec

NEVER = 10**6


def measure(cell: Cell, table: Table, work: Path, *, count: bool = True) -> Result:
    """Run a cell in this process. work: folder for what training writes, removed afterwards. count: the three counts too.

    What the base cannot carry is a result with "refused", a training that went wrong one with "failed".
    """
    began = time.perf_counter()
    try:
        result = _measured(cell, table, work, count and cell.kind == "final")
    except (AdapterError, SpecError, BaseError) as cause:
        result = {"refused": cause.what}
    except TunesmithError as cause:
        result = {"failed": cause.what}
    return {**result, "seconds": round(time.perf_counter() - began, 2)}


def _measured(cell: Cell, table: Table, work: Path, count: bool) -> Result:
    task, method, budget = table.tasks[cell.want.task], table.methods[cell.want.method], cell.budget(table)
    own = ground(task, table.general, method.spec)
    train = {"steps": budget.steps, "batch": budget.batch, "lr": cell.rate, "seed": cell.want.seed, "save_every": NEVER}
    spec = spec_of(task, method.adapter, train, method.spec)
    job = own.job(spec, budget.rows)
    _ = job.rows, job.start.forward  # made before memory is measured
    model, result = _trained(job, work)
    records = job.splits.test if cell.kind == "final" else job.splits.dev
    result |= scored(evaluate(System("cell", model, zero_shot(job.task)), job.task, records))
    if cell.kind == "final":
        result["forgetting"] = own.forgotten(model)
    if count:
        result["counts"] = counted(model, own, spec)
    return result


def _trained(job: Job, work: Path) -> tuple[Model, Result]:
    """The model after the last step. before_mb: resident when the adapter was not yet there."""
    work.mkdir(parents=True, exist_ok=True)
    before = peak_now()
    with tempfile.TemporaryDirectory(dir=work) as folder, PeakMemory() as memory, RunFolder(Path(folder) / "run") as run:
        model = trainable_model(job)
        began = time.process_time()  # of one thread: what other work on the machine does not lengthen
        state = Trainer(model, job.rows, job.spec, run).run()
        seconds = time.process_time() - began
    return model, {
        "steps": state.step,
        "tokens": state.tokens,
        "loss": sum(state.losses[-5:]) / len(state.losses[-5:]),
        "train_seconds": round(seconds, 3),
        "peak_mb": round(memory.mb, 1),
        "before_mb": round(before, 1),
    }


def peak_now() -> float:
    """Resident memory now, MiB."""
    with PeakMemory():
        return peak_memory_mb()


def scored(evaluation: Evaluation) -> Result:
    """Quality as a quotient of two sums over questions: of rights and ones, or of what F1 is made of."""
    ratio, scores = evaluation.ratio, evaluation.scores
    if ratio is not None:
        return {"quality": evaluation.score, "measure": "F1 of spans", "top": ratio.top.tolist(), "bottom": ratio.bottom.tolist()}
    return {"quality": evaluation.score, "measure": "accuracy", "top": scores, "bottom": [1.0] * len(scores)}


def counted(model: Model, own: Ground, spec: Spec) -> Result:
    """The counts of an adapter. What it changed of the base in place is found by loading the base again, so that training needs no
    copy of it."""
    found = counts(model.adapter)
    changed, ranks = found.changed, dict(found.ranks)
    if model.adapter.in_place:
        fresh = bare_base(spec, own.task.keep_layers).model
        change = difference(model.base.model, dict(fresh.named_parameters()))
        ranks = {path: rank_of(change.matrix(path)) for path in change.paths()}
        changed = sum(int(change.matrix(path).count_nonzero()) for path in ranks)
        changed += sum(int(value.count_nonzero()) for value in change.other.values())
    return {
        "of": found.of,
        "trainable": found.trainable,
        "changed": changed,
        "rank": max(ranks.values(), default=0),
        "matrices": len(ranks),
        "stored": found.stored,
        "flops": found.flops,
        "merges": found.merges,
    }


def one_thread() -> None:
    """Cells are run side by side, a thread each."""
    torch.set_num_threads(1)


def environment(own: Ground) -> dict[str, Any]:
    """Versions, hardware and dtype."""
    from tunesmith.ladder.job import environment as found

    return found(own.base)
