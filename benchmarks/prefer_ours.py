"""Our side of `dpo` and `reward`: python benchmarks/prefer_ours.py FOLDER BASE DTYPE [on|off]"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ours import InOrder
from prefer import read_work, say

from tunesmith.adapters import load_adapter
from tunesmith.bases import load_base
from tunesmith.bases.memory import PeakMemory
from tunesmith.core.row import Row, Segment, segment
from tunesmith.engine.model import Model, add_adapter
from tunesmith.engine.reference import with_reference
from tunesmith.engine.rundir import RunFolder, read_metrics
from tunesmith.engine.train import Trainer
from tunesmith.spec import make_spec


def pair(ids: Mapping[str, Sequence[int]], name: str) -> Row:
    """A prompt and its two answers. For `reward` a head is asked at the last token of each, and no word is learned."""
    answers = [_answer(ids[which], which, rank, name) for rank, which in enumerate(("chosen", "rejected"))]
    return Row((segment(ids["prompt"], name="prompt"), *answers))


def _answer(ids: Sequence[int], which: str, rank: int, name: str) -> Segment:
    if name == "dpo":
        return segment(ids, True, 0, which).with_given(rank=rank)
    labels = np.full(len(ids), np.nan, np.float32)
    labels[-1] = 0.0
    return Segment(np.asarray(ids, np.int32), np.zeros(len(ids), np.bool_), 0, which, labels).with_given(rank=rank)


def main(folder: Path, source: str, dtype: str, layers: str = "on") -> None:
    """Train the folder's pairs in their order and say losses, speed and peak memory. layers: compiled (on) or not (off)."""
    settings, pairs = read_work(folder)
    base = load_base(source, dtype=dtype)
    rows = [pair(ids, settings["name"]) for ids in pairs]
    with PeakMemory() as memory, tempfile.TemporaryDirectory() as kept:
        model = Model(base)
        _ = model.forward
        began = time.perf_counter()
        if settings["name"] == "dpo":
            rows = with_reference(model, rows)
        reading = time.perf_counter() - began
        adapter = load_adapter(base.model, folder / "start", name="bench")
        add_adapter(base, adapter)
        model.adapters.append(adapter)
        train = {
            "steps": settings["steps"], "batch": settings["batch"], "lr": settings["lr"], "schedule": "constant", "warmup": 0,
            "save_every": 10**6, "pack_tokens": 4096, "compile": layers,
        }  # fmt: skip
        spec = make_spec({"name": "bench", "base": source, "objective": settings["name"], "train": train})
        with RunFolder(Path(kept) / "run") as run:
            Trainer(model, InOrder(rows, spec), spec, run).run()
            lines = [line for line in read_metrics(run.path / "metrics.jsonl") if "loss" in line]
    say([x["loss"] for x in lines], [x["seconds"] for x in lines], reading, settings, memory.mb, dtype)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
