"""Train a policy on its own answers in every process of a launcher: torchrun ... sample_together.py BASE RUNS_FOLDER PLAN.json.

A plan is a list of runs: {name, objective, train, rollout}. Without a launcher this process trains alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.bases import load_base
from tunesmith.core.record import Record
from tunesmith.engine.model import Model, attach_to
from tunesmith.engine.processes import leave, start
from tunesmith.engine.rundir import RunFolder
from tunesmith.engine.runs import save_run
from tunesmith.engine.train import Trainer
from tunesmith.rollout.answers import Answer, Prompt
from tunesmith.rollout.begin import critic_of, dev_reward, rollouts
from tunesmith.rollout.rewards import Rewards
from tunesmith.rollout.scoring import Rewarded, scored_by
from tunesmith.spec import make_spec


def score(prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> Rewarded:
    """1 where more than two tokens are below 150."""
    return Rewarded([float(sum(token < 150 for token in answer.ids) > 2) for group in answers for answer in group], problems=["odd"])


def letters(completions: list[str]) -> list[float]:
    """How many letters an answer has."""
    return [float(sum(map(str.isalpha, text))) for text in completions]


def train(base: str, runs: Path, plan: dict[str, Any]) -> None:
    processes = start("cpu", 60)
    spec = make_spec({"base": {"model": base, "dtype": "fp32"}, "adapter": "lora(rank=4)", **plan})
    begun = Model(load_base(base, dtype="fp32", device="cpu"))
    critic = critic_of(begun, spec) if spec.objective == "ppo" else None
    model = attach_to(begun, spec.adapter, seed=spec.train.seed)
    records = [Record("messages", ({"role": "user", "content": f"Number {n}?"},), where=f"line {n}") for n in range(9)]
    rewarded = scored_by(Rewards(spec.rewards)) if spec.rewards else score
    with RunFolder(runs / plan["name"], keep=spec.train.keep, processes=processes) as folder:
        folder.begin(spec, {})
        feed = rollouts(model, spec, records, rewarded, folder.path, start=begun, critic=critic, processes=processes)
        dev = dev_reward(model, spec, records[:5], rewarded, processes=processes)
        Trainer(model, feed, spec, folder, critic=critic, dev=dev).run()
        if processes.first:
            save_run(model, folder.path)
        folder.finish({})


def main(base: str, runs: str, plans: str) -> None:
    for plan in json.loads(Path(plans).read_text()):
        train(base, Path(runs), plan)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
