"""Groups of answers with their rewards: sampled, scored, and where asked for sampled again until groups have something to say."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from tunesmith.engine.processes import Processes
from tunesmith.objectives.advantage import carries_signal
from tunesmith.rollout.answers import Answer, Prompt
from tunesmith.rollout.order import drawn
from tunesmith.rollout.sample import ToolCall
from tunesmith.rollout.sampling import seed_of
from tunesmith.rollout.scoring import Rewarded, Score, Totals
from tunesmith.rolloutspec import RolloutSpec

Play = Callable[[Sequence[Prompt], int, Sequence[int]], list[list[Answer]]]
"""(prompts, seed of the round, seed of each prompt) -> the answers to each prompt."""


@dataclass(frozen=True, slots=True)
class Group:
    """The answers to one prompt. prompt: its place among the run's prompts. outcome: rewards, before lengths shape them."""

    prompt: int
    answers: list[Answer]
    outcome: list[float]
    parts: dict[str, list[float]]

    @property
    def signal(self) -> bool:
        """Are the answers rewarded differently?"""
        return bool(carries_signal(torch.tensor([self.outcome], dtype=torch.float64))[0])


@dataclass(frozen=True, slots=True)
class Gathered:
    """What an iteration learns from. groups: these. left: groups that were replaced, or would have been. rounds: of sampling. position:
    prompts drawn so far in the run. sampling, scoring: seconds. problems: of rewards, passed over."""

    groups: list[Group]
    left: list[Group]
    rounds: int
    position: int
    sampling: float
    scoring: float
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Gatherer:
    """Draws prompts and has them answered and scored. processes: that share the prompts of a round, and all are given all of it."""

    prompts: Sequence[Prompt]
    play: Play
    score: Score
    spec: RolloutSpec
    seed: int
    processes: Processes
    _seconds: dict[str, float] = field(default_factory=dict)
    _problems: list[str] = field(default_factory=list)

    def gather(self, iteration: int, position: int, *, dynamic: bool) -> Gathered:
        """The groups of an iteration. dynamic: groups whose answers are all rewarded alike are replaced by other prompts'.

        Yu et al. 2025 (2503.14476), section 3.2; `rollout.tries` rounds at most, after which there may be fewer groups.
        """
        groups, left, rounds, asked = list[Group](), list[Group](), 0, 0
        self._seconds, self._problems = {"sampling": 0.0, "scoring": 0.0}, []
        while len(groups) < self.spec.prompts and rounds < (self.spec.tries if dynamic else 1):
            chosen = drawn(position, self.spec.prompts - len(groups), len(self.prompts), self.seed)
            for group in self._round(chosen, seed_of(self.seed, iteration), asked):
                (groups if group.signal or not dynamic else left).append(group)
            position, asked, rounds = position + len(chosen), asked + len(chosen), rounds + 1
        return Gathered(groups, left, rounds, position, **self._seconds, problems=self._problems)

    def _round(self, chosen: Sequence[int], seed: int, asked: int) -> list[Group]:
        """Answers to some prompts. asked: prompts of the iteration before these, whose answers are drawn otherwise."""
        rank, count = self.processes.rank, self.processes.count
        own = list(chosen[rank::count])
        prompts = [self.prompts[place] for place in own]
        began = time.perf_counter()
        answers = self.play(prompts, seed, [asked + place for place in range(rank, len(chosen), count)])
        sampled = time.perf_counter()
        rewarded = self.score(prompts, answers)
        self._seconds["sampling"] += sampled - began
        self._seconds["scoring"] += time.perf_counter() - sampled
        groups = _groups(own, answers, rewarded)
        if not self.processes.several:
            self._problems += rewarded.problems
            return groups
        told = self.processes.gathered([[asdict(group) for group in groups], rewarded.problems])
        self._problems += [problem for _, problems in told for problem in problems]
        parts = [of_rank for of_rank, _ in told]
        groups = [_group(parts[place % count][place // count]) for place in range(len(chosen))]
        return groups if rewarded.totals is None else _together(groups, rewarded.totals)


def _groups(prompts: Sequence[int], answers: Sequence[list[Answer]], rewarded: Rewarded) -> list[Group]:
    out, start = [], 0
    for prompt, said in zip(prompts, answers, strict=True):
        own = slice(start, start + len(said))
        out.append(Group(prompt, said, rewarded.total[own], {name: values[own] for name, values in rewarded.parts.items()}))
        start += len(said)
    return out


def _together(groups: Sequence[Group], totals: Totals) -> list[Group]:
    """Groups that several processes scored, with the rewards that one process would have given them all."""
    parts = {name: [value for group in groups for value in group.parts[name]] for name in groups[0].parts}
    places, start = [], 0
    for group in groups:
        places.append(range(start, start + len(group.answers)))
        start += len(group.answers)
    found = totals(places, parts)
    return [replace(group, outcome=list(found[own.start : own.stop])) for group, own in zip(groups, places, strict=True)]


def _group(values: Mapping[str, Any]) -> Group:
    """From plain values."""
    answers = [Answer(**{**one, "calls": [ToolCall(**call) for call in one["calls"]]}) for one in values["answers"]]
    return Group(values["prompt"], answers, values["outcome"], values["parts"])
