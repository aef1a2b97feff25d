"""Train runs in every process of a launcher, one after another, as a plan says.

Usage: torchrun ... train_together.py BASE ROWS.json RUNS_FOLDER PLAN.json. A plan is a list of runs: {name, adapter, dtype,
train}, and where asked: dev (the rows are judged), labels (of a task head, which learns from labelled rows), timeout (of
waiting), stop (the second process alone is asked to stop at this step), memory (the second process's holds packs of so many
tokens), die or fail (the second process is killed, or raises, in this step), slow (seconds added to each micro-batch). Beside
each run's folder every process leaves its gradients of the first step, NAME.RANK.safetensors.
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
import torch
from safetensors.torch import save_file

from tunesmith.adapters import Way, states_width
from tunesmith.bases import load_base
from tunesmith.core.errors import Interrupted, RunError, TunesmithError
from tunesmith.core.row import Row, Segment, single
from tunesmith.engine.model import Model, attach_to
from tunesmith.engine.pack import build_pack
from tunesmith.engine.processes import leave, start
from tunesmith.engine.rundir import RunFolder
from tunesmith.engine.runs import save_run
from tunesmith.engine.train import DevMetric, Trainer
from tunesmith.spec import make_spec


def train(base: str, rows: list[Any], runs: Path, plan: dict[str, Any]) -> None:
    """One run of the plan."""
    processes = start("cpu", plan.get("timeout", 60))
    values = {"base": {"model": base, "dtype": plan.get("dtype", "fp32")}, "name": plan["name"], "adapter": plan["adapter"]}
    spec = make_spec({**values, "train": plan["train"], **({"objective": "classify"} if "labels" in plan else {})})
    model = attach_to(load_base(base, dtype=plan.get("dtype", "fp32"), device="cpu"), plan["adapter"], seed=spec.train.seed)
    if "labels" in plan:
        model.adapter.give_head(states_width(model.base.model), plan["labels"], Way("last"), seed=spec.train.seed)
        rows = [labelled(row, number % len(plan["labels"])) for number, row in enumerate(rows)]
    with RunFolder(runs / plan["name"], keep=spec.train.keep, processes=processes) as folder:
        if not folder.started:
            folder.begin(spec, {})
        trainer = Trainer(model, rows, spec, folder, dev=judge(model, rows) if plan.get("dev") else None)
        misbehave(trainer, plan, runs)
        trainer.run(resume=True)
        if processes.first:
            save_run(model, folder.path)
        folder.finish({})


def labelled(row: Row, label: int) -> Row:
    """The same text with a label at its end, and nothing else to learn."""
    (part,) = row.segments
    labels = np.full(len(part), np.nan, np.float32)
    labels[-1] = label
    return Row((Segment(part.ids, np.zeros(len(part), np.bool_), labels=labels),), where=row.where)


def judge(model: Model, rows: list[Any]) -> DevMetric:
    """How likely the rows are, each process by itself, as it likes, in its own time."""

    def score() -> dict[str, float]:
        with torch.no_grad():
            return {"likelihood": sum(float(model.forward(build_pack([row])).log_probs.sum()) for row in rows[: 3 + os.getpid() % 3])}

    return score


def misbehave(trainer: Trainer, plan: dict[str, Any], runs: Path) -> None:
    """Note gradients, and do to the second process what the plan says."""
    rank, step, backward = trainer.processes.rank, trainer.optimizer.step, trainer._backward

    def noted(lr: float, scale: float) -> None:
        if trainer.state.step == 0:
            grads = {name: master.grad.clone() for name, master in trainer.optimizer.masters.items() if master.grad is not None}
            spread = {"spread": json.dumps(sorted(trainer.optimizer.spread))}
            save_file(grads, runs / f"{plan['name']}.{rank}.safetensors", spread)
        step(lr, scale)

    def watched(rows: list[Any], micro: int, *more: Any) -> torch.Tensor:
        now = trainer.state.step + 1
        time.sleep(plan.get("slow", 0))
        if rank == 1 and plan.get("die") == now:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and plan.get("fail") == now:
            raise RunError("the second process has had enough.")
        if rank == 1 and plan.get("stop") == now:
            trainer._ask_to_stop()
        if rank == 1 and sum(row.tokens for row in rows) > plan.get("memory", 10**9):
            raise MemoryError
        return backward(rows, micro, *more)

    trainer.optimizer.step, trainer._backward = noted, watched  # type: ignore[method-assign]


def main(base: str, rows: str, runs: str, plans: str) -> None:
    made = [single(row["ids"], row["mask"], row["where"]) for row in json.loads(Path(rows).read_text())]
    for plan in json.loads(Path(plans).read_text()):
        try:
            train(base, made, Path(runs), plan)
        except Interrupted:
            if "stop" not in plan:
                raise


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except TunesmithError as error:
        print(error, file=sys.stderr)
        leave(error.exit_code)
    leave(0)
