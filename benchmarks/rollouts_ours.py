"""Our side of `grpo`: python benchmarks/rollouts_ours.py FOLDER BASE DTYPE [sample|record|dynamic [on|off]]"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rollouts as work
from rollouts import REPLAYED, asks, read_work, say, vowels

from tunesmith.adapters import load_adapter
from tunesmith.bases import load_base
from tunesmith.bases.memory import PeakMemory
from tunesmith.core.record import Record
from tunesmith.data.rendering import Renderer
from tunesmith.engine.model import Model, add_adapter
from tunesmith.engine.rundir import RunFolder, read_metrics
from tunesmith.engine.train import Trainer
from tunesmith.rollout.answers import Answer, Prompt
from tunesmith.rollout.begin import rollouts
from tunesmith.rollout.rewards import Rewards
from tunesmith.rollout.scoring import Rewarded, scored_by
from tunesmith.spec import make_spec

SECONDS = ("seconds", "sampling_seconds", "scoring_seconds", "recording_seconds")


class Recorded:
    """The work's reward, as a run would have it from its spec. said: what was asked of it, prompt by prompt, each iteration's answers."""

    def __init__(self, dynamic: bool) -> None:
        reward = asks if dynamic else vowels
        self.score = scored_by(Rewards([f"{Path(work.__file__)}:{reward.__name__}"]))
        self.said: list[dict[str, list[list[int]]]] = []

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> Rewarded:
        named = zip(prompts, answers, strict=True)
        self.said.append({json.dumps(prompt.ids): [answer.ids for answer in said] for prompt, said in named})
        return self.score(prompts, answers)


@contextmanager
def endless(model: Model) -> Iterator[None]:
    """No answer ends early within it."""
    model.base.model.generation_config.eos_token_id = None
    model.base.tokenizer.eos_token = None
    own = Renderer.stop_ids
    Renderer.stop_ids = property(lambda self: [])  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Renderer.stop_ids = own  # type: ignore[method-assign]


def spec_of(source: str, settings: dict[str, Any], steps: int, dynamic: bool, layers: str) -> Any:
    """The run: GRPO as TRL is told to do it, or DAPO with the answers learned from that were cut off, which are all."""
    rollout = {"prompts": settings["prompts"], "samples": settings["samples"], "max_new_tokens": settings["tokens"], "show": 0}
    if dynamic:
        rollout |= {"truncated": "keep"}
    train = {
        "steps": steps, "lr": settings["lr"], "schedule": "constant", "warmup": 0, "save_every": 10**6, "pack_tokens": 4096,
        "compile": layers,
    }  # fmt: skip
    return make_spec({"name": "bench", "base": source, "objective": "dapo" if dynamic else "grpo", "train": train, "rollout": rollout})


def main(folder: Path, source: str, dtype: str, how: str = "sample", layers: str = "on") -> None:
    """Take the work's steps and say losses, gradient norms, speed, shares of the time and peak memory. layers: compiled (on) or not."""
    settings, texts = read_work(folder)
    base = load_base(source, dtype=dtype)
    records = [Record("messages", ({"role": "user", "content": text},)) for text in texts]
    recorded, steps = Recorded(how == "dynamic"), REPLAYED if how == "record" else settings["steps"]
    start, model = Model(base), Model(base)
    with PeakMemory() as memory, tempfile.TemporaryDirectory() as kept, endless(model):
        adapter = load_adapter(base.model, folder / "start", name="bench")
        add_adapter(base, adapter)
        model.adapters.append(adapter)
        spec = spec_of(source, settings, steps, how == "dynamic", layers)
        with RunFolder(Path(kept) / "run") as run:
            Trainer(model, rollouts(model, spec, records, recorded, run.path, start=start), spec, run).run()
            lines = [line for line in read_metrics(run.path / "metrics.jsonl") if "loss" in line]
    if how == "record":
        (folder / "said.json").write_text(json.dumps(recorded.said))
    counted = lines[settings["warm"] :]
    spent = {name: sum(line[name] for line in counted) / max(1, len(counted)) for name in SECONDS}
    more: dict[str, Any] = {"losses": [x["loss"] for x in lines], "norms": [x["grad_norm"] for x in lines], "spent": spent}
    if how == "dynamic":
        more |= useful(settings, counted)
    say([x["seconds"] for x in lines], settings, memory.mb, dtype, **more)


def useful(settings: dict[str, Any], lines: Sequence[dict[str, float]]) -> dict[str, float]:
    """Tokens a second of whole steps: of all answers, and of those whose group is not rewarded all alike."""
    tokens, seconds = settings["samples"] * settings["tokens"], sum(line["seconds"] for line in lines)
    groups = sum(line["groups"] for line in lines)
    told = sum(line["groups"] * (1 - line["degenerate"]) for line in lines)
    return {
        "useful_tokens_per_second": tokens * told / seconds,
        "sampled_tokens_per_second": tokens * groups / seconds,
        "useful_share": told / groups,
        "rounds": sum(line["rounds"] for line in lines) / len(lines),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
