"""Train a run in a process of its own and, where asked, kill it at a given moment as `kill -9` would.

Usage: train_and_die.py BASE ROWS.json RUN_FOLDER SPEC.json [MOMENT STEP]. MOMENT is where in the life of step STEP (its
checkpoint, its update) the process dies; "never" (the default) trains to the end, and "slowly" takes its time about it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.bases import load_base
from tunesmith.core.errors import TunesmithError
from tunesmith.core.row import single
from tunesmith.engine import checkpoint
from tunesmith.engine.model import attach_to
from tunesmith.engine.rundir import Metrics, RunFolder
from tunesmith.engine.runs import save_run
from tunesmith.engine.train import Trainer
from tunesmith.spec import make_spec


def die_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str, step: int) -> None:
    """Put the end into the one function during which it is to come."""
    now = {"step": 0}
    original_step, original_save, original_rename = Trainer._one_step, checkpoint.save_file, Path.rename
    original_write = Metrics.write

    def one_step(self: Trainer) -> dict[str, float]:
        now["step"] = self.state.step + 1
        if moment == "slowly":
            time.sleep(0.1)
        values = original_step(self)
        if (moment, now["step"]) == ("after the update", step):
            die_now()
        return values

    def save_file(values: Any, file: Path) -> None:
        at_step = now["step"] == step
        if moment == "within a file" and at_step:
            original_save(values, file)
            file.write_bytes(file.read_bytes()[:-50])
            die_now()
        original_save(values, file)
        if moment == "between the files" and at_step:
            die_now()

    def rename(self: Path, target: Path) -> Path:
        at_step = now["step"] == step and Path(target).name == f"step-{step}"
        if moment == "before the name" and at_step:
            die_now()
        out = original_rename(self, target)
        if moment == "after the name" and at_step:
            die_now()
        return out

    def write(self: Metrics, **values: Any) -> None:
        original_write(self, **values)
        if moment == "within metrics" and now["step"] == step:
            with self.path.open("ab") as file:
                file.write(b'{"step": ')
                file.flush()
            die_now()

    Trainer._one_step, checkpoint.save_file, Path.rename, Metrics.write = one_step, save_file, rename, write  # type: ignore[method-assign]


def main(base: str, rows: str, folder: str, spec: str, moment: str = "never", step: str = "0") -> None:
    values = json.loads(Path(spec).read_text())
    parsed = make_spec(values)
    made = [single(np.asarray(row["ids"]).tolist(), row["mask"], row["where"]) for row in json.loads(Path(rows).read_text())]
    if moment != "never":
        die_at(moment, int(step))
    model = attach_to(load_base(base, dtype=values["base"]["dtype"], device="cpu"), parsed.adapter, seed=parsed.train.seed)
    with RunFolder(Path(folder), keep=parsed.train.keep) as run:
        if not run.started:
            run.begin(parsed, {})
        Trainer(model, made, parsed, run).run(resume=True)
        save_run(model, run.path)
        run.finish({})


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except TunesmithError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
