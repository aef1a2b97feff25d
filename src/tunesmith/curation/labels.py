"""Who says which answer is better, where no file does: a judge that compares or rates, or a reward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from tunesmith.curation.pairs import Answers, Pair, Rules, folded, kept, ordered, oriented, pairs_of
from tunesmith.engine.journal import digest
from tunesmith.rollout.judges import Duel, Judge
from tunesmith.rollout.rewards import Rewards
from tunesmith.rollout.sample import Sample


@dataclass(frozen=True, slots=True)
class JudgeLabels:
    """A judge's soft preferences as probabilities, or, with `rate`, its ratings as scores. What brought no verdict makes no pair."""

    judge: Judge
    rate: bool = False

    @property
    def told(self) -> str:
        """What was asked, and what brought no verdict."""
        return f"judge {self.judge.name}: {self.judge.tally.line()}"

    def __call__(self, answers: Sequence[Answers], rules: Rules) -> list[list[Pair]]:
        """The margin of a compared pair is how sure the judge is, |2p - 1|; of a rated one the difference of the ratings."""
        return self._rated(answers, rules) if self.rate else self._compared(answers, rules)

    def _compared(self, answers: Sequence[Answers], rules: Rules) -> list[list[Pair]]:
        places = [(own, i, j) for own in answers for i, j in _among(own, rules)]
        asked = [Duel(own.texts[i], own.texts[j], as_text(own.prompt), own.where) for own, i, j in places]
        found: dict[int, list[Pair]] = {id(own): [] for own in answers}
        for (own, i, j), said in zip(places, self.judge.compare(asked), strict=True):
            if (p := said.preference) is None:
                continue
            told: dict[str, Any] = {"judge": self.judge.name, "rubric": self.judge.rubric_digest}
            if said.flips is not None:
                told["flips"] = said.flips
            found[id(own)].append(oriented(own, i, j, p, 2 * p - 1, "judge", **told))
        return [_few(found[id(own)], rules) for own in answers]

    def _rated(self, answers: Sequence[Answers], rules: Rules) -> list[list[Pair]]:
        asked = [(as_text(own.prompt), text) for own in answers for text in own.texts]
        ratings = iter(self.judge.rate(asked, [own.where for own in answers for _ in own.texts]))
        told = {"judge": self.judge.name, "rubric": self.judge.rubric_digest}
        return [_scored(own, [next(ratings) for _ in own.texts], rules, told) for own in answers]


@dataclass(frozen=True, slots=True)
class RewardLabels:
    """Rewards as scores. Answers for which none spoke make no pair. named: the expressions, for provenance."""

    rewards: Rewards
    named: tuple[str, ...]
    told: str = ""

    def __call__(self, answers: Sequence[Answers], rules: Rules) -> list[list[Pair]]:
        """Raises RewardError where a reward fails."""
        samples = [
            Sample(
                prompt=tuple([{"role": "user", "content": own.prompt}] if isinstance(own.prompt, str) else own.prompt),
                completion=text,
                answer=None if own.fields.get("answer") is None else str(own.fields["answer"]),
                fields=own.fields,
                finished=own.about[at].get("finished", "end") if own.about else "end",
                where=own.where,
                group=number,
            )
            for number, own in enumerate(answers)
            for at, text in enumerate(own.texts)
        ]
        total = iter(self.rewards.score(samples).total)
        told = {"reward": list(self.named)}
        return [
            _scored(own, [None if math.isnan(value) else value for value in _take(total, len(own.texts))], rules, told) for own in answers
        ]


def _take(values: Iterator[float], count: int) -> list[float]:
    return [next(values) for _ in range(count)]


def _among(answers: Answers, rules: Rules) -> list[tuple[int, int]]:
    """The pairs that a judge is asked about: all, or `per_prompt` of them drawn by content, since each costs two questions.

    Hard pairs can only be told from easy ones when all are judged.
    """
    texts = answers.texts
    found = [(i, j) for i, j in combinations(range(len(texts)), 2) if folded(texts[i]) != folded(texts[j])]
    if rules.per_prompt is None or rules.hard is not None or len(found) <= rules.per_prompt:
        return found
    return sorted(found, key=lambda pair: digest([rules.seed, answers.prompt, *sorted(texts[at] for at in pair)]))[: rules.per_prompt]


def _few(pairs: Sequence[Pair], rules: Rules) -> list[Pair]:
    found = kept(pairs, rules)
    return found if rules.per_prompt is None else ordered(found, rules)[: rules.per_prompt]


def _scored(answers: Answers, scores: Sequence[float | None], rules: Rules, told: dict[str, Any]) -> list[Pair]:
    """The pairs of the answers that have a score."""
    known = [at for at, score in enumerate(scores) if score is not None]
    own = replace(
        answers,
        texts=tuple(answers.texts[at] for at in known),
        scores=tuple(float(scores[at] or 0.0) for at in known),
        ratings=(),
        about=tuple(answers.about[at] for at in known) if answers.about else (),
    )
    return [replace(pair, provenance={**pair.provenance, **told}) for pair in pairs_of(own, rules)]


def as_text(prompt: Any) -> str:
    """A prompt as a judge reads it: a dialogue as its turns, each under the name of its speaker."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{str(turn.get('role', '')).capitalize()}: {turn.get('content') or ''}" for turn in prompt)
