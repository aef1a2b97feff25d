"""Experiment trackers through accelerate: tensorboard, wandb, mlflow, trackio. None unless the spec names one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tunesmith.core.errors import RunError


class Trackers:
    """Where metrics go besides metrics.jsonl. Raises RunError for a tracker whose package is missing."""

    def __init__(self, names: Sequence[str], folder: Path, run: str, config: Mapping[str, Any]) -> None:
        self._accelerator: Any = None
        for name in names:
            if find_spec(name) is None:
                raise RunError(f"the tracker '{name}' is not installed.", hints=[f"pip install {name}", "Or leave it out:  track=[]"])
        if names:
            from accelerate import Accelerator

            self._accelerator = Accelerator(log_with=list(names), project_dir=str(folder), cpu=True)
            self._accelerator.init_trackers(run, config=_flat(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send numbers of a step."""
        if self._accelerator is not None and values:
            self._accelerator.log(dict(values), step=step)

    def end(self) -> None:
        """Finish the trackers' files."""
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:
                tracker.finish()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    out: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool) else str(value)
    return out
