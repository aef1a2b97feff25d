"""A run is a folder: its spec, its environment, its metrics, its checkpoints, its result.

One run at a time. Where several processes train together the first alone writes, and the others ask it what there is.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from tunesmith.core.errors import RunError
from tunesmith.engine.checkpoint import Checkpoints, unwritable, write_whole
from tunesmith.engine.processes import ALONE, Processes, launched
from tunesmith.spec import Spec, load_spec


class RunFolder:
    """`runs/NAME/`. Use as a context manager: entering takes the lock, leaving gives it back.

    processes: that enter together and call the same methods in the same order.
    """

    def __init__(self, path: Path, keep: int = 2, processes: Processes = ALONE) -> None:
        self.path, self.processes = path, processes
        self.checkpoints = Checkpoints(path / "checkpoints", keep)
        self._lock = FileLock(path / ".lock")

    def __enter__(self) -> RunFolder:
        if launched() != self.processes.count:
            raise RunError(
                f"the launcher started {launched()} processes, and this works on one.",
                hints=["Several processes only train:  accelerate launch ... -m tunesmith train SPEC"],
            )
        if self.processes.first:
            self._take()
        if self.processes.told(str(os.getpid())) not in self._read_holder():
            raise RunError(
                "the run folder that the first process made is not to be seen here.",
                where=str(self.path.absolute()),
                hints=["Several machines need one folder that all of them see: start them in a shared one."],
            )
        return self

    def _take(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            (self.path / ".holder").write_text(f"process {os.getpid()}")
        except Timeout:
            holder = self._read_holder()
            raise RunError(
                f"another process{holder} is using this run folder.",
                where=str(self.path),
                hints=["Wait for it, or give this run another name:  name=NAME"],
            ) from None
        except OSError as cause:
            self._lock.release()
            raise unwritable(cause, self.path) from None

    def __exit__(self, *cause: object) -> None:
        if self.processes.first:
            (self.path / ".holder").unlink(missing_ok=True)
            self._lock.release()

    def _read_holder(self) -> str:
        try:
            return f" ({(self.path / '.holder').read_text()})"
        except OSError:
            return ""

    @property
    def started(self) -> bool:
        return bool(self.processes.told((self.path / "spec.yaml").exists()))

    @property
    def finished(self) -> bool:
        return bool(self.processes.told((self.path / "result.json").exists()))

    def begin(self, spec: Spec, environment: dict[str, Any]) -> None:
        """Write what the run is. Raises RunError where the folder holds a run already."""
        if self.started:
            state = "a finished run" if self.finished else "a run that was begun"
            raise RunError(
                f"the folder holds {state}.",
                where=str(self.path),
                hints=["Go on with it:  --resume", "Or start anew beside it:  name=NAME", "Or overwrite it:  --overwrite"],
            )
        if not self.processes.first:
            return
        write_whole(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")
        text = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_whole(self.path / "spec.yaml", text)  # last: a folder with a spec has everything

    def clear(self) -> None:
        """Remove an earlier run from its folder (asked for with --overwrite). Raises RunError for a folder that holds no run."""
        started = self.started
        if not self.processes.first:
            return
        items = [item for item in self.path.iterdir() if item.name not in (".lock", ".holder")]
        if not started and any(item.name != "environment.json" and not item.name.endswith(".writing") for item in items):
            raise RunError(
                "the folder holds files and no run; nothing was removed.",
                where=str(self.path),
                hints=["Give the run another name:  name=NAME"],
            )
        for item in items:
            shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()

    def spec(self) -> Spec:
        """The spec that the run was begun with."""
        return load_spec(self.path / "spec.yaml")

    def environment(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "environment.json").read_text()))

    def result(self) -> dict[str, Any]:
        """What the run ended with. Raises RunError where it has not ended."""
        try:
            return dict(json.loads((self.path / "result.json").read_text()))
        except OSError:
            hint = "Finish it:  tunesmith train SPEC --resume" if self.started else "Train one:  tunesmith train spec.yaml"
            raise RunError("there is no finished run here.", where=str(self.path), hints=[hint]) from None

    def finish(self, result: dict[str, Any]) -> None:
        """Write the run's result, whole or not at all."""
        if self.processes.first:
            write_whole(self.path / "result.json", json.dumps(result, indent=2) + "\n")


class Metrics:
    """`metrics.jsonl`: one JSON object a line. On resuming, lines after the checkpoint are cut off.

    on: whether this process writes; the others' calls do nothing.
    """

    def __init__(self, path: Path, offset: int = 0, *, on: bool = True) -> None:
        self.path, self.on = path, on
        if not on:
            return
        with path.open("ab") as file:
            file.truncate(min(offset, path.stat().st_size))

    def write(self, **values: Any) -> None:
        """Append one line. Raises RunError when the disk is full."""
        if not self.on:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as cause:
            raise unwritable(cause, self.path) from None

    def offset(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.on else 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without one that a kill left unfinished; none where there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
