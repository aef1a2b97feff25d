"""A tiny policy, prompts in words, and a reward that can be had by saying one token more often."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tunesmith.bases import Base, load_base
from tunesmith.core.record import Record
from tunesmith.engine.model import Model, attach_to
from tunesmith.engine.rundir import RunFolder
from tunesmith.engine.train import Trainer
from tunesmith.rollout.answers import Answer, Prompt
from tunesmith.rollout.begin import critic_of, rollouts
from tunesmith.rollout.scoring import Rewarded, Score
from tunesmith.spec import Spec, make_spec

THINGS = ("foxes", "dogs", "phones", "films", "parcels", "answers", "texts", "batteries", "lives", "hours", "jumps", "days")

WANTED = range(100, 160)
"""Tokens that the toy reward likes."""


def _liking(prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> Rewarded:
    """The share of an answer's tokens that are wanted."""
    total = [sum(token in WANTED for token in answer.ids) / len(answer.ids) for own in answers for answer in own]
    return Rewarded(total, {"liking": total})


@pytest.fixture
def liking() -> Score:
    """The toy reward."""
    return _liking


@pytest.fixture
def base(tiny_base_folder: Path) -> Base:
    """The tiny base, loaded in fp32."""
    return load_base(tiny_base_folder, dtype="fp32", device="cpu")


@pytest.fixture
def records() -> list[Record]:
    """Twelve questions."""
    return [
        Record("messages", ({"role": "user", "content": f"Say something about {thing}, please."},), where=f"questions.jsonl, line {n + 1}")
        for n, thing in enumerate(THINGS)
    ]


@pytest.fixture
def spec_of() -> Callable[..., Spec]:
    """A spec with few short answers. rollout, train: keys of these sections."""

    def make(objective: str = "grpo", *, adapter: str = "lora(rank=4)", train: dict[str, Any] | None = None, **rollout: Any) -> Spec:
        return make_spec(
            {
                "base": "tiny",
                "adapter": adapter,
                "objective": objective,
                "train": {"steps": 6, "lr": 1e-2, "schedule": "constant", "warmup": 0, "save_every": 1, "keep": 20, **(train or {})},
                "rollout": {"prompts": 4, "samples": 4, "max_new_tokens": 10, "batch": 16, "show": 0, **rollout},
            }
        )

    return make


@pytest.fixture
def make_run(base: Base, records: list[Record], tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer whose feed are rollouts, on a base of its own, in a run folder of its own."""

    def make(
        spec: Spec, name: str = "run", *, score: Score = _liking, louder: float = 1.0, template: Path | None = None, **given: Any
    ) -> Trainer:
        start = Model(load_base(base.source, dtype="fp32", device="cpu", template=template and str(template)))
        start.base.model.get_output_embeddings().weight.data.mul_(louder)  # so that few weights can change what it says
        folder = RunFolder(tmp_path / "runs" / name, keep=spec.train.keep)
        folder.path.mkdir(parents=True, exist_ok=True)
        critic = critic_of(start, spec) if spec.objective.startswith("ppo") else None
        model = attach_to(start, spec.adapter, seed=spec.train.seed)
        feed = rollouts(model, spec, records, score, folder.path, start=start, critic=critic, **given)
        return Trainer(model, feed, spec, folder, critic=critic)

    return make
