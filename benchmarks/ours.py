"""Our side of a training benchmark: python benchmarks/ours.py FOLDER BASE DTYPE"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from work import read, say

from tunesmith.adapters import load_adapter
from tunesmith.bases import load_base
from tunesmith.bases.memory import PeakMemory
from tunesmith.core.row import single
from tunesmith.engine.feed import Batch, Fixed
from tunesmith.engine.model import Model, add_adapter, attach_to
from tunesmith.engine.rundir import RunFolder, read_metrics
from tunesmith.engine.train import Trainer
from tunesmith.spec import make_spec


class InOrder(Fixed):
    """Rows as they come."""

    def batch(self, step: int) -> Batch:
        return Batch([self.rows[index] for index in range(step * self.size, min((step + 1) * self.size, len(self.rows)))])


def main(folder: Path, source: str, dtype: str) -> None:
    """Train the folder's rows in their order and say losses, speed and peak memory."""
    work, rows = read(folder)
    base = load_base(source, dtype=dtype)
    with PeakMemory() as memory, tempfile.TemporaryDirectory() as kept:
        if work.full:
            model = attach_to(base, "full", keep_original=False)
        else:
            model = Model(base)
            _ = model.forward
            adapter = load_adapter(base.model, folder / "start", name="bench")
            add_adapter(base, adapter)
            model.adapters.append(adapter)
        train = {
            "steps": work.steps, "batch": work.batch, "lr": work.lr, "schedule": "constant", "warmup": 0,
            "clip": 1.0, "save_every": 10**6, "pack_tokens": 4096, "compile": "on",
        }  # fmt: skip
        spec = make_spec({"name": "bench", "base": source, "train": train})
        made = [single(row["ids"], [bool(x) for x in row["supervised"]]) for row in rows]
        with RunFolder(Path(kept) / "run") as run:
            Trainer(model, InOrder(made, spec), spec, run).run()
            lines = [line for line in read_metrics(run.path / "metrics.jsonl") if "loss" in line]
    say([x["loss"] for x in lines], [x["seconds"] for x in lines], [x["tokens"] for x in lines], work.warm, memory.mb, dtype)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
