"""Answers of the policy as rewards see them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tunesmith.rollout.answers import Answer, Prompt
from tunesmith.rollout.sample import Sample

Totals = Callable[[Sequence[Sequence[int]], Mapping[str, Sequence[float]]], Sequence[float]]
"""(places of the answers to each prompt, parts of all answers by name) -> total of each answer."""


@dataclass(frozen=True, slots=True)
class Rewarded:
    """Rewards of answers, in the order of prompts. total: NaN where there is none. parts: what it is made of, by name. problems: what
    went wrong and was passed over. totals: how totals follow from parts, where it takes the answers of all processes to say."""

    total: list[float]
    parts: dict[str, list[float]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    totals: Totals | None = None


class Score(Protocol):
    """The rewards of answers to prompts; every group of answers whole."""

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> Rewarded: ...


class Scored(Protocol):
    """What `Rewards.score` returns: the sum of an answer's rewards, each of them by name, and what went wrong."""

    @property
    def total(self) -> Sequence[float]: ...

    @property
    def parts(self) -> Mapping[str, Sequence[Any]]: ...

    @property
    def problems(self) -> Sequence[Any]: ...


class Scorer(Protocol):
    """`Rewards`, or what is like it."""

    def score(self, samples: Sequence[Sample]) -> Scored: ...

    def totals(self, groups: Sequence[Sequence[int]], parts: Mapping[str, Sequence[float]]) -> Sequence[float]: ...


def scored_by(rewards: Scorer) -> Score:
    """The rewards of a spec, for the answers of a rollout."""

    def score(prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> Rewarded:
        samples = [sample for number, own in enumerate(zip(prompts, answers, strict=True)) for sample in samples_of(*own, number)]
        found = rewards.score(samples) if samples else None
        if found is None:
            return Rewarded([], totals=rewards.totals)
        parts = {name: _numbers(values) for name, values in found.parts.items()}
        return Rewarded(_numbers(found.total), parts, [str(problem) for problem in found.problems], rewards.totals)

    return score


def samples_of(prompt: Prompt, answers: Sequence[Answer], group: int) -> list[Sample]:
    """The answers to a prompt with all that its row says."""
    record = prompt.record
    return [
        Sample(
            prompt=prompt.messages,
            completion=answer.text,
            ids=tuple(answer.ids),
            answer=record.answer(),
            fields=record.fields,
            finished="end" if answer.ended else "length",
            where=record.where,
            group=group,
            calls=tuple(answer.calls),
        )
        for answer in answers
    ]


def _numbers(values: Sequence[Any]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]
