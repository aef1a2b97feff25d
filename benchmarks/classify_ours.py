"""Our side of `classify-minilm`: python benchmarks/classify_ours.py FOLDER BASE DTYPE"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from classify import read_work, say
from ours import InOrder

from tunesmith.adapters import load_adapter
from tunesmith.bases import load_base
from tunesmith.bases.memory import PeakMemory
from tunesmith.core.row import Row, Segment
from tunesmith.engine.model import Model, add_adapter
from tunesmith.engine.rundir import RunFolder, read_metrics
from tunesmith.engine.train import Trainer
from tunesmith.spec import make_spec


def labelled(ids: list[int], label: int) -> Row:
    """A row of which the head is asked at the last token."""
    labels = np.full(len(ids), np.nan, np.float32)
    labels[-1] = label
    return Row((Segment(np.asarray(ids, np.int32), np.zeros(len(ids), np.bool_), labels=labels),))


def main(folder: Path, source: str, dtype: str) -> None:
    """Train the folder's rows in their order and say losses, speed and peak memory."""
    settings, rows = read_work(folder)
    batch = settings["batch"]
    steps = -(-len(rows) // batch)
    base = load_base(source, dtype=dtype)
    with PeakMemory() as memory, tempfile.TemporaryDirectory() as kept:
        model = Model(base)
        _ = model.forward
        adapter = load_adapter(base.model, folder / "start", name="bench")
        add_adapter(base, adapter)
        model.adapters.append(adapter)
        train = {"steps": steps, "batch": batch, "lr": settings["lr"], "schedule": "constant", "warmup": 0, "save_every": 10**6}
        spec = make_spec({"name": "bench", "base": source, "objective": "classify", "train": train})
        made = [labelled(row["ids"], row["label"]) for row in rows]
        with RunFolder(Path(kept) / "run") as run:
            Trainer(model, InOrder(made, spec), spec, run).run()
            lines = [line for line in read_metrics(run.path / "metrics.jsonl") if "loss" in line]
    counts = [min(batch, len(rows) - at) for at in range(0, len(rows), batch)]
    say([x["loss"] for x in lines], [x["seconds"] for x in lines], counts, settings["warm"], memory.mb, dtype)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
