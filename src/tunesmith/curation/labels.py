"""Who says which answer is better, where no file does: a judge that compares or rates, or a reward."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from tunesmith.curation.pairs import Answers, Pair, Rules, folded, kept, ordered, oriented, pairs_of
from tunesmith.engine.asking import Reply
from tunesmith.engine.journal import Journal, digest
from tunesmith.rewardspec import function_of
from tunesmith.rollout.judges import Duel, Judge
from tunesmith.rollout.named import LABELLED, account_of, content_of, model_behind
from tunesmith.rollout.rewards import Reward, Rewards
from tunesmith.rollout.rubric import first_line, in_words
from tunesmith.rollout.sample import Sample, groups_of_samples

CHUNK = 64
"""Prompts whose answers are scored between two writings to disk."""


@dataclass(frozen=True)
class JudgeLabels:
    """A judge's soft preferences as probabilities, or, with `rate`, its ratings as scores. What brought no verdict makes no pair.

    checked: what is known of the judge beside people, in a few words, for provenance; see `checking.held_against`.
    """

    judge: Judge
    rate: bool = False
    checked: str = ""

    @property
    def told(self) -> str:
        """What was asked, and what brought no verdict."""
        return f"judge {self.judge.name}: {self.judge.tally.line()}{f'; {self.checked}' if self.checked else ''}"

    def done(self) -> None:
        """Verdicts are kept beyond the pairs: other work may ask the same."""

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
            told = self._provenance()
            if said.flips is not None:
                told["flips"] = said.flips
            found[id(own)].append(oriented(own, i, j, p, 2 * p - 1, "judge", **told))
        return [_few(found[id(own)], rules) for own in answers]

    def _rated(self, answers: Sequence[Answers], rules: Rules) -> list[list[Pair]]:
        asked = [(as_text(own.prompt), text) for own in answers for text in own.texts]
        ratings = iter(self.judge.rate(asked, [own.where for own in answers for _ in own.texts]))
        return [_scored(own, [next(ratings) for _ in own.texts], rules, self._provenance()) for own in answers]

    def _provenance(self) -> dict[str, Any]:
        return {"judge": self.judge.name, "rubric": self.judge.rubric_digest, LABELLED: [self._account]}

    @cached_property
    def _account(self) -> dict[str, str]:
        checked = {"checked": self.checked} if self.checked else {}
        return {**account_of(self.judge.source), "name": self.judge.name, "rubric": first_line(self.judge.rubric), **checked}


@dataclass(slots=True)
class RewardLabels:
    """Rewards as scores. Answers for which none spoke make no pair. named: the expressions, for provenance.

    What each reward says is kept by content until the pairs are written, so that a stopped piece of work scores nothing twice.
    """

    rewards: Rewards
    named: tuple[str, ...]
    told: str = ""
    _journal: Journal | None = field(default=None, repr=False)

    def __call__(self, answers: Sequence[Answers], rules: Rules) -> list[list[Pair]]:
        """Raises RewardError where a reward fails."""
        groups = [_samples(own, number) for number, own in enumerate(answers)]
        parts = self._parts(groups)
        total = iter(self.rewards.totals(groups_of_samples([sample for own in groups for sample in own]), parts))
        models = [model for one in self.rewards.rewards if (model := model_behind(one.spec)) is not None]
        told = {"reward": list(self.named), **({LABELLED: [account_of(model) for model in models]} if models else {})}
        return [
            _scored(own, [None if math.isnan(value) else value for value in _take(total, len(own.texts))], rules, told) for own in answers
        ]

    def done(self) -> None:
        """The pairs are written: what the rewards said need not be kept any longer."""
        if self._journal is not None:
            self._journal.forget()

    def _parts(self, groups: Sequence[Sequence[Sample]]) -> dict[str, list[float]]:
        """What each reward says of all answers, by name; new scores are written down chunk by chunk."""
        journal = self._journal = self._journal or Journal(digest([_identity(one) for one in self.rewards.rewards]), "rewards")
        keys = [digest([_content(sample) for sample in own]) for own in groups]
        found = {key: json.loads(kept.text) for key in keys if (kept := journal.get(key))}
        left = {key: own for key, own in zip(keys, groups, strict=True) if key not in found and own}
        with closing(journal):
            for start in range(0, len(left), CHUNK):
                part = dict(list(left.items())[start : start + CHUNK])
                said, _ = self.rewards.parts([sample for own in part.values() for sample in own])
                values = {name: iter(each) for name, each in said.items()}
                for key, own in part.items():
                    found[key] = {name: _take(each, len(own)) for name, each in values.items()}
                    journal.keep(key, Reply(json.dumps(found[key]), "reward", 0, 0))
        return {
            name: [value for key, own in zip(keys, groups, strict=True) if own for value in found[key][name]] for name in self.rewards.names
        }


def _samples(answers: Answers, group: int) -> list[Sample]:
    """The answers to a prompt as rewards see them."""
    return [
        Sample(
            prompt=tuple([{"role": "user", "content": answers.prompt}] if isinstance(answers.prompt, str) else answers.prompt),
            completion=text,
            answer=None if answers.fields.get("answer") is None else str(answers.fields["answer"]),
            fields=answers.fields,
            finished=answers.about[at].get("finished", "end") if answers.about else "end",
            where=answers.where,
            group=group,
        )
        for at, text in enumerate(answers.texts)
    ]


def _content(sample: Sample) -> list[Any]:
    """What a reward may read of an answer."""
    return [sample.prompt, sample.completion, sample.answer, dict(sample.fields), sample.finished, sample.where]


def _identity(reward: Reward) -> list[Any]:
    """What stays the same where a reward does: how it is written, the file of a function, the weights of a model."""
    there, model = function_of(reward.spec.reward), model_behind(reward.spec)
    file = None if there is None else hashlib.sha256(Path(there[0]).expanduser().read_bytes()).hexdigest()
    return [reward.spec.model_dump(mode="json"), file, None if model is None else content_of(model)]


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
    """A prompt as a judge reads it: a text as it stands, a dialogue as `rubric.in_words` has it."""
    return prompt if isinstance(prompt, str) else in_words(prompt)
