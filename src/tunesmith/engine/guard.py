"""Stopping a run that has gone wrong before its weights have, or that its processes do not begin alike."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from itertools import islice

from tunesmith.core.errors import RunError
from tunesmith.core.row import Row
from tunesmith.engine.model import Model
from tunesmith.engine.processes import Processes
from tunesmith.engine.rundir import RunFolder
from tunesmith.spec import Spec

FIRST, LAST = 5, 20
"""Losses that are remembered: of the start, and of late."""


def remembered(losses: Sequence[float], loss: float) -> list[float]:
    """The losses to judge later ones by: the first few and the last few, with one more."""
    kept = [*losses, loss]
    return kept if len(kept) <= FIRST + LAST else [*kept[:FIRST], *kept[-LAST:]]


def exploded(loss: float, seen: Sequence[float], factor: float) -> bool:
    """Whether a loss exceeds `factor` times the recent median, and twice the start."""
    return len(seen) >= 2 * FIRST and loss > factor * statistics.median(seen[FIRST:]) and loss > 2 * max(seen[:FIRST])


def gone_wrong(loss: float, norm: float, seen: Sequence[float], factor: float) -> str:
    """Empty for a step that may be taken, else what is wrong with it. The gradient's norm also tells whether all of it is finite."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return "is not a number"
    return "exploded" if factor < math.inf and exploded(loss, seen, factor) else ""


def bad_step(wrong: str, step: int, loss: float, norm: float, seen: Sequence[float], rows: Sequence[Row]) -> tuple[str, list[str]]:
    """(What is to be said of a step that is not taken, hints)."""
    was = f"{statistics.median(seen[-LAST:]):.3f}" if seen else "not known"
    places = ", ".join(dict.fromkeys(row.where for row in rows[:4] if row.where))
    what = f"the loss {wrong} at step {step}: loss {loss:.4g} (it was {was}), gradient norm {norm:.4g}"
    return what, [f"The step's rows: {places}, ... ({len(rows)} in all)"]


def check_alike(processes: Processes, spec: Spec, model: Model, rows: Sequence[Row]) -> None:
    """Raises RunError, in every process, unless all begin with the same. rows: those that the run begins with."""
    digest = hashlib.sha256()
    for name, parameter in model.adapter.named_parameters():
        if name not in model.adapter.trained:  # those are the base's, which has a fingerprint
            digest.update(parameter.detach().cpu().numpy().tobytes())
    for row in islice(rows, spec.train.batch):
        for segment in row.segments:
            digest.update(segment.ids.tobytes())
    hints = ["Every machine needs the same files, and the same versions of everything."]
    for what, value in (
        ("spec", spec.model_dump(mode="json", exclude={"base": {"device"}})),
        ("base", [model.base.fingerprint, str(model.base.dtype)]),
        ("number of rows", len(rows)),
        ("first rows and new weights", digest.hexdigest()),
    ):
        processes.same(what, value, hints)


def diverged(what: str, lr: float, folder: RunFolder, hints: Sequence[str] = ()) -> RunError:
    """The error that ends the run, with its last good checkpoint and what to try."""
    steps = folder.checkpoints.steps()
    kept = f"the last good checkpoint is {folder.checkpoints.path(steps[-1])}" if steps else "there is no checkpoint yet"
    return RunError(
        f"{what}, learning rate {lr:.2g}; {kept}.",
        where=str(folder.path),
        hints=[
            *hints,
            f"Most often the learning rate is too high: try  train.lr={lr / 4:.1g}  or a longer  train.warmup",
            "If it happens at once: try  base.dtype=fp32, and look at the rows with  tunesmith data show",
        ],
    )
