"""Runs made from runs: their adapters converted, resized or combined, without training.

What comes out is a finished run like any other, with a plain LoRA on the base of the first: it can be asked, compared,
exported and trained further.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.adapters import Adapter, Change, Fit, TaskHead, as_lora, change_of, dare, linear, load_adapter, plain, states_width, ties
from tunesmith.core.errors import AdapterError, unknown
from tunesmith.engine.model import Model
from tunesmith.engine.rundir import RunFolder
from tunesmith.engine.runs import ADAPTER, is_run, open_base, save_run
from tunesmith.spec import Spec

HOWS = ("linear", "average", "stack", "subtract", "ties", "dare", "dare-ties")


@dataclass(frozen=True)
class Made:
    """What an operation made. folder: of the new run. error: Euclidean norm of what a cut to a rank left out, over that of the
    whole change. ranks: smallest and largest. left_out: changed parameters that no LoRA holds."""

    folder: Path
    error: float
    ranks: tuple[int, int]
    parameters: int
    left_out: tuple[str, ...]


def convert_run(source: str | Path, folder: Path, *, rank: int | None = None) -> Made:
    """A run's adapter, or its finished full fine-tune, as plain LoRA.

    rank: None keeps a low-rank change as it is, and gives another as many ranks as it has. Raises AdapterError where it is no
    change of weights, RunError where `folder` holds a run.
    """
    return _make([source], folder, lambda changes: plain(changes[0], rank=rank), {"operation": "convert", "rank": rank})


def combine_runs(
    sources: Sequence[str | Path],
    folder: Path,
    *,
    how: str = "average",
    weights: Sequence[float] | None = None,
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> Made:
    """Several runs' adapters as one plain LoRA.

    how: "linear" with weights, "average", "stack" (all at once), "subtract" (the first less the others), "ties", "dare",
    "dare-ties". The first four are exact where all are low-rank and no rank is given. density: share of entries that ties (0.2)
    and dare (0.5) keep. Raises AdapterError where the runs are not of one base.
    """
    if how not in HOWS:
        raise unknown("way to combine", how, HOWS, error=AdapterError)
    if len(sources) < 2:
        raise AdapterError("combining needs two runs.", hints=["One alone:  tunesmith adapter convert RUN FOLDER"])
    if density is not None and how not in ("ties", "dare", "dare-ties"):
        raise AdapterError(f"density changes nothing for {how}.", hints=["It belongs to ties, dare and dare-ties."])
    if weights is not None and how in ("average", "stack", "subtract"):
        raise AdapterError(f"weights change nothing for {how}, which sets its own.", hints=["Give them to linear, ties or dare."])
    count = len(sources)
    fixed = {"average": [1 / count] * count, "subtract": [1.0] + [-1.0] * (count - 1)}
    used = list(weights) if weights is not None else fixed.get(how, [1.0] * count)

    def combined(changes: list[Change]) -> Fit:
        if how == "ties":
            return plain(ties(changes, used, density=density or 0.2), rank=rank)
        if how.startswith("dare"):
            return plain(dare(changes, used, density=density or 0.5, seed=seed, elect=how == "dare-ties"), rank=rank)
        return plain(linear(changes, used), rank=rank)

    return _make(sources, folder, combined, {"operation": how, "weights": used, "density": density, "rank": rank, "seed": seed})


def _make(sources: Sequence[str | Path], folder: Path, operation: Callable[[list[Change]], Fit], facts: dict[str, Any]) -> Made:
    runs = [RunFolder(Path(source)) for source in sources]
    results = [run.result() for run in runs]
    spec = _on_its_base(runs[0].spec())
    for other in runs[1:]:
        _check_start(spec, _on_its_base(other.spec()), runs[0].path, other.path)
    start = open_base(spec)
    changes, head = [], None
    for run in runs:
        adapter = load_adapter(start.base.model, run.path / ADAPTER, fingerprint=start.base.fingerprint, name="source")
        changes.append(change_of(adapter))
        head = _kept_head(adapter, len(runs), run.path)
        adapter.detach()
    fitted = operation(changes)
    adapter = as_lora(start.base.model, fitted, name="made")
    _give_head(adapter, head)
    with RunFolder(folder) as new:
        new.begin(spec.model_copy(update={"adapter": adapter.expression, "name": folder.name}), runs[0].environment())
        save_run(Model(start.base, [*start.adapters, adapter]), folder)
        made_of = {"made_of": [str(run.path) for run in runs], **facts, "error": fitted.error, "left_out": list(fitted.left_out)}
        new.finish({**results[0], "steps": 0, "trainable_parameters": adapter.trainable(), **made_of})
    ranks = fitted.ranks.values()
    return Made(folder, fitted.error, (min(ranks), max(ranks)), adapter.trainable(), fitted.left_out)


def _on_its_base(spec: Spec) -> Spec:
    """The spec as if its adapter had been new on its base: where it went on with another run's adapter, on that run's base."""
    while spec.adapter == "continue" and is_run(spec.base.model):
        before = RunFolder(Path(spec.base.model)).spec()
        spec = spec.model_copy(update={"base": before.base, "adapter": before.adapter})
    return spec


def _check_start(first: Spec, other: Spec, path: Path, other_path: Path) -> None:
    """Runs on top of runs have to begin at the same one; that bases are the same, their fingerprints tell."""
    if first.base.model != other.base.model and (is_run(first.base.model) or is_run(other.base.model)):
        raise AdapterError(f"{path} began with {first.base.model}, and {other_path} with {other.base.model}.")


def _kept_head(adapter: Adapter, runs: int, path: Path) -> TaskHead | None:
    if adapter.head is not None and runs > 1:
        raise AdapterError(f"{path} has a task head, and heads do not add up.", hints=["Combine runs of sft."])
    return adapter.head


def _give_head(adapter: Adapter, head: TaskHead | None) -> None:
    if head is None:
        return
    adapter.give_head(states_width(adapter.model), head.labels, head.way)
    assert adapter.head is not None
    adapter.head.load_state_dict(head.state_dict())
