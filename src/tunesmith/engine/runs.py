"""Finished runs as models: the base they were trained on, with their adapters on it, back through the chain of runs."""

from __future__ import annotations

import os
from pathlib import Path

from tunesmith.adapters import load_adapter, save_adapter
from tunesmith.bases import Base, load_base
from tunesmith.core.errors import RunError
from tunesmith.engine.checkpoint import new_folder
from tunesmith.engine.model import Model, add_adapter, free_name
from tunesmith.engine.rundir import RunFolder
from tunesmith.spec import Spec

ADAPTER = "adapter"
TRAINED = "train"
"""Where a ladder keeps the run of its trained rung."""


def is_run(source: str | os.PathLike[str]) -> bool:
    """Does this name a run folder (rather than a model)?"""
    return (Path(source) / "spec.yaml").is_file()


def open_run(folder: str | os.PathLike[str], *, dtype: str = "auto", device: str = "auto", base: Base | None = None) -> Model:
    """The model that a finished run left, ready to ask or to train further.

    base: the one that it was trained on, loaded already; its adapters then lie beside those of others. Raises RunError where the
    run has not ended, AdapterError for another base.
    """
    path = Path(folder)
    run = RunFolder(path)
    run.result()
    if not (path / ADAPTER).exists() and is_run(path / TRAINED):  # a ladder: its trained rung is meant
        return open_run(path / TRAINED, dtype=dtype, device=device, base=base)
    spec = run.spec()
    model = open_base(spec, dtype=dtype, device=device, base=base)
    if spec.adapter == "continue":  # the adapter went on training: what this run saved replaces what it began with
        Model(model.base, [model.adapters.pop()]).detach()
    name = f"run{len(model.adapters)}" if base is None else free_name(base, path.name)
    adapter = load_adapter(model.base.model, path / ADAPTER, fingerprint=model.base.fingerprint, name=name)
    adapter.freeze()
    add_adapter(model.base, adapter)
    return Model(model.base, [*model.adapters, adapter], path.name)


def open_base(spec: Spec, *, dtype: str = "auto", device: str = "auto", base: Base | None = None) -> Model:
    """What a run began with: a base, or another finished run. base: as of `open_run`."""
    asked = dtype if dtype != "auto" else spec.base.dtype
    if is_run(spec.base.model):
        return open_run(spec.base.model, dtype=asked, device=device, base=base)
    if base is not None:
        return Model(base)
    given = spec.base.model_dump(exclude={"model", "dtype", "device"})
    return Model(load_base(spec.base.model, dtype=asked, device=device, **given))


def save_run(model: Model, folder: Path) -> None:
    """Write the trained adapter into its run, whole or not at all."""
    if not model.adapters:
        raise RunError("there is no adapter to save.")
    with new_folder(folder / ADAPTER) as beside:
        beneath = [each.digest for each in model.adapters[:-1]]
        save_adapter(model.adapter, beside, base=model.base.source, fingerprint=model.base.fingerprint, beneath=beneath)
