"""Every method learns by every kind of objective: a few steps lower the loss, and a run that was stopped ends with the same bits.

An objective joins with one line in LEARNED. What does not go together is named in REFUSED, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance import EXAMPLES, expression_for

from tunesmith.adapters import Way, load_adapter, save_adapter, states_width
from tunesmith.bases import Base, load_base
from tunesmith.core.errors import Interrupted
from tunesmith.core.row import Row, Segment, segment
from tunesmith.engine.feed import Batch, Fixed
from tunesmith.engine.model import Model, add_adapter, attach_to
from tunesmith.engine.reference import read, with_reference
from tunesmith.engine.rundir import RunFolder
from tunesmith.engine.train import Trainer
from tunesmith.objectives import OBJECTIVES
from tunesmith.spec import Spec, make_spec

LEARNED: dict[str, str] = {
    "sft": "sft",
    "reward": "reward",
    "dpo": "dpo",
    "ppo": "ppo",
    "grpo": "grpo(beta=0.01)",
    "distil": "distil(beta=0.5)",
}
REFUSED: dict[str, str] = {
    "bitfit": "a Llama has no biases",
    "head": "a head alone leaves words as they are: it learns by reward",
}
QUICK = ("lora", "prefix", "pfeiffer", "full")
STEPS = 6
RATES = {"full": 1e-3, "layers": 1e-3, "modules": 1e-3, "fusion": 3e-4}
"""Learning rates of those that a hundredth throws off."""

CELLS = [
    pytest.param(method, objective, marks=[] if method in QUICK else [pytest.mark.slow], id=f"{method}-{objective}")
    for method in EXAMPLES
    for objective in LEARNED
    if method != "bitfit" and (method != "head" or objective == "reward")
]


@pytest.fixture
def folder(tiny_base_folder: Path) -> Path:
    return tiny_base_folder


def base_for(method: str, folder: Path) -> Base:
    return load_base(folder, dtype="fp32", device="cpu", **({"quantise": "nf4"} if method == "qlora" else {}))


def pairs() -> list[Row]:
    """Six prompts with two answers each."""
    drawn = torch.randint(5, 400, (6, 40), generator=torch.Generator().manual_seed(4)).tolist()
    out = []
    for ids in drawn:
        answers = [segment(ids[12:20], True, 0, "chosen"), segment(ids[24:31], True, 0, "rejected")]
        marked = (part.with_given(rank=rank, soft=1.0, margin=0.0) for rank, part in enumerate(answers))
        out.append(Row((segment(ids[:12]), *marked)))
    return out


def scored(rows: Sequence[Row]) -> list[Row]:
    """The same for a task head, which is asked at the end of each answer."""

    def asked(part: Segment) -> Segment:
        labels = np.full(len(part), np.nan, np.float32)
        labels[-1] = -part.given["rank"][-1]
        return Segment(part.ids, np.zeros(len(part), np.bool_), part.parent, part.name, labels, part.given)

    return [Row((row.segments[0], *map(asked, row.segments[1:]))) for row in rows]


def sampled(start: Model, rows: Sequence[Row]) -> list[Row]:
    """The same as answers that a policy gave: the first of each prompt was the better one."""
    told = []
    for row, numbers in zip(with_reference(start, rows), read(start, rows), strict=True):
        at, parts = 0, []
        for rank, part in enumerate(row.segments[1:]):
            given = {"advantage": 1.0 - 2 * rank, "value": 0.0, "return": 1.0 - rank, "old": numbers[at : at + len(part)]}
            parts.append(part.with_given(**given))
            at += len(part)
        told.append(Row((row.segments[0], *parts)))
    return told


class Whole(Fixed):
    """All rows in every step."""

    def batch(self, step: int) -> Batch:
        return Batch(self.rows)


class Learner:
    """A method with an objective on a tiny base, in a run folder."""

    def __init__(self, method: str, objective: str, folder: Path, root: Path) -> None:
        self.base = base_for(method, folder)
        start = Model(self.base)
        rows = pairs()
        named = LEARNED[objective]
        rows = {"sft": rows, "reward": scored(rows), "distil": rows}.get(objective) or sampled(start, rows)
        self.teacher = self._teacher(start) if objective == "distil" else None
        expression = expression_for(method, self.base.model)
        train = {"steps": STEPS, "lr": RATES.get(method, 1e-2), "schedule": "constant", "warmup": 0}
        rollout = {"samples": 2, "prompts": 6} if OBJECTIVES[objective].samples else {}
        values = {"base": "tiny", "adapter": expression, "objective": named, "train": {**train, "save_every": 2}, "rollout": rollout}
        self.spec: Spec = make_spec({**values, "teacher": "x"} if objective == "distil" else values)
        critic = self._critic(start) if objective == "ppo" else None  # before the policy, which may change the base's own weights
        self.model = attach_to(start, expression, seed=1)
        if objective == "reward":
            self.model.adapter.give_head(states_width(self.base.model), ("score",), Way("last", says="choice"), seed=1)
        run = RunFolder(root)
        root.mkdir(parents=True, exist_ok=True)
        self.trainer = Trainer(self.model, Whole(rows, self.spec), self.spec, run, critic=critic, teacher=self.teacher)

    def _teacher(self, start: Model) -> Model:
        teacher = attach_to(start, "lora(rank=4)", name="teacher")
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, parameter in teacher.adapter.named_parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return teacher

    def _critic(self, start: Model) -> Model:
        critic = attach_to(start, "lora(rank=2)", name="critic", seed=2)
        critic.adapter.give_head(states_width(self.base.model), ("value",), Way("last", says="value"), seed=2)
        return critic


@pytest.mark.parametrize(("method", "objective"), CELLS)
def test_it_learns_saves_and_goes_on_where_it_was_stopped(method: str, objective: str, folder: Path, tmp_path: Path) -> None:
    whole = Learner(method, objective, folder, tmp_path / "whole")
    state = whole.trainer.run()
    assert state.step == STEPS and state.losses[-1] < state.losses[0] - 1e-6, state.losses

    cut = Learner(method, objective, folder, tmp_path / "cut")
    batch = cut.trainer.feed.batch
    cut.trainer.feed.batch = lambda step: (cut.trainer._ask_to_stop() if step == 2 else None, batch(step))[1]  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        cut.trainer.run()
    again = Learner(method, objective, folder, tmp_path / "cut")
    again.trainer.run(resume=True)
    first, second = whole.model.adapter.state(), again.model.adapter.state()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

    where = tmp_path / "saved"
    where.mkdir()
    save_adapter(whole.model.adapter, where, base="tiny", fingerprint=whole.base.fingerprint)
    other = base_for(method, folder)
    loaded = Model(other)
    _ = loaded.forward
    loaded.adapters.append(load_adapter(other.model, where, fingerprint=other.fingerprint))
    add_adapter(other, loaded.adapter)
    assert torch.allclose(said(loaded), said(whole.model), atol=1e-4)


def said(model: Model) -> torch.Tensor:
    with torch.no_grad(), model.active():
        return model.forward(model.forward.pack(pairs())).log_probs


def test_every_kind_of_objective_is_in_the_suite() -> None:
    """One of each unit at least: what is read, not the formula, is what a method could break."""
    here: dict[str, Callable[..., Any]] = {OBJECTIVES[name].unit: OBJECTIVES[name].function for name in LEARNED}
    assert {"tokens", "scores", "pairs", "actions"} <= here.keys()
    assert set(EXAMPLES) - {cell.values[0] for cell in CELLS} == {"bitfit"} and set(REFUSED) <= set(EXAMPLES)
