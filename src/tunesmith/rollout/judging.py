"""A judge as a reward: it compares the answers to one prompt with one another, or rates each by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from tunesmith.bases import Base
from tunesmith.core.errors import SpecError, unknown
from tunesmith.engine.server import is_server
from tunesmith.rollout.judges import Duel, Judge, NoVerdict, Way, check_judge_source, open_judge
from tunesmith.rollout.rewarding import Scoring, reward
from tunesmith.rollout.rubric import in_words, rating_on, rubric_of
from tunesmith.rollout.sample import Sample

Floats = NDArray[np.float64]


class JudgeReward:
    """A judge that is opened when it is first asked. options: as of `open_judge`. rivals: how many others each answer is compared with,
    None for all; rate: whether answers are rated instead."""

    def __init__(self, source: str, options: dict[str, object], *, rivals: int | None = None, rate: bool = False) -> None:
        self.source, self.rivals, self.rate = source, rivals, rate
        self._options = options
        self._base: Base | None = None
        self._judge: Judge | None = None

    def share(self, base: Base) -> None:
        """Judge with this base, which is loaded already, where the judge is it or a run on it; the policy's adapters stay off then."""
        self._base = base

    @property
    def judge(self) -> Judge:
        """Who judges, opened now if it was not yet. Raises what opening it raises."""
        if self._judge is None:
            self._judge = open_judge(self.source, base=self._base, **self._options)  # type: ignore[arg-type]
        return self._judge

    def check(self) -> None:
        """Raise for a name that cannot judge, before anything is loaded: as `judges.check_judge_source`."""
        check_judge_source(self.source)

    def __call__(self, samples: Sequence[Sample]) -> list[list[float]] | list[float | None]:
        """Of answers to one prompt the probability that the first is preferred to the second, [size, size]; or the rating of each."""
        if self.rate:
            return self.judge.rate([(asked(one), one.completion) for one in samples], [one.where for one in samples])
        places = rounds_of(len(samples), self.rivals, "\n".join(one.completion for one in samples))
        duels = [Duel(samples[i].completion, samples[j].completion, asked(samples[i]), samples[i].where) for i, j in places]
        said = self.judge.compare(duels)
        matrix = np.full((len(samples), len(samples)), np.nan)
        for (i, j), one in zip(places, said, strict=True):
            if one.preference is not None:
                matrix[i, j], matrix[j, i] = one.preference, 1 - one.preference
        found: list[list[float]] = filled(matrix).tolist()
        return found


def judges_among(scorings: Iterable[Scoring]) -> list[JudgeReward]:
    """The judges among rewards, to name them in a report."""
    return [scoring for scoring in scorings if isinstance(scoring, JudgeReward)]


def rounds_of(size: int, rivals: int | None, salt: str) -> list[tuple[int, int]]:
    """Which answers are compared: all pairs, or in a ring drawn by content each with its `rivals` nearest."""
    if rivals is None or rivals >= size - 1:
        return list(combinations(range(size), 2))
    seed = int(hashlib.sha256(salt.encode("utf-8", "surrogatepass")).hexdigest()[:8], 16)
    ring = [int(place) for place in np.random.default_rng(seed).permutation(size)]
    steps = range(1, (rivals + 1) // 2 + 1)
    met = [(ring[at], ring[(at + step) % size]) for step in steps for at in range(size)]
    return sorted({(min(pair), max(pair)) for pair in met})


def filled(matrix: Floats) -> Floats:
    """Preferences that were not asked, or brought no verdict, from the others: those of the Bradley-Terry strengths that fit them.

    matrix: [size, size], NaN where unknown. Fitted by Hunter's minorisation (Hunter 2004, Ann. Stat. 32:384, eq. 3), each pair known to
    half a win more for both, so that an answer that won everything keeps a finite strength.
    """
    unknown_ones = np.isnan(matrix)
    np.fill_diagonal(unknown_ones, False)
    out = matrix.copy()
    np.fill_diagonal(out, 0.5)
    if not unknown_ones.any():
        return out
    known = (~np.isnan(matrix)).astype(np.float64)
    np.fill_diagonal(known, 0.0)
    wins = (np.where(known > 0, matrix, 0.0) + 0.5 * known).sum(1) + 1e-6
    games, strength = 2 * known + 2e-6, np.ones(len(matrix))
    for _ in range(100):
        strength = wins / (games / (strength[:, None] + strength)).sum(1)
        strength /= strength.mean()
    return np.where(unknown_ones, strength[:, None] / (strength[:, None] + strength), out)


def asked(sample: Sample) -> str:
    """The prompt in words, as `rubric.in_words` has it."""
    return in_words(sample.prompt)


def _options(rubric: str | None, reasons: bool, way: str, no_verdict: str, key_env: str | None, model: str) -> dict[str, object]:
    """Checked at once: a run of hours does not end at a misspelt word."""
    if way not in ("auto", *get_args(Way)):
        raise unknown("way of judging", way, ("auto", *get_args(Way)))
    if no_verdict not in get_args(NoVerdict):
        raise unknown("value of no_verdict", no_verdict, get_args(NoVerdict))
    if is_server(model) and way == "likelihood":
        raise SpecError("a server says no likelihoods of given answers.", hints=["Nearest that works here:  way=generation"])
    if key_env is not None and not is_server(model):
        raise SpecError("key_env names the key of a server, and the judge is none.", hints=["Form:  http://HOST:PORT/v1#MODEL"])
    return {"rubric": rubric_of(rubric), "reasons": reasons, "way": way, "no_verdict": no_verdict, "key_env": key_env}


@reward("judge", compares=True)
def judge(
    *,
    model: str,
    rubric: str | None = None,
    reasons: bool = False,
    way: str = "auto",
    both_orders: bool = True,
    rivals: int | None = None,
    no_verdict: str = "error",
    key_env: str | None = None,
) -> Scoring:
    """A judge's soft preferences among the answers to one prompt, both orders asked: the share of the others each is preferred to.

    model: a base, a run or a server. rivals: others that each is compared with, by default all.
    """
    if rivals is not None and rivals < 1:
        raise SpecError("each answer is compared with one other at least.", where="rivals")
    options = _options(rubric, reasons, way, no_verdict, key_env, model)
    return JudgeReward(model, {**options, "both_orders": both_orders}, rivals=rivals)


@reward("judge_rating")
def judge_rating(
    *,
    model: str,
    rubric: str | None = None,
    reasons: bool = False,
    way: str = "auto",
    scale: Sequence[str] = (),
    no_verdict: str = "error",
    key_env: str | None = None,
) -> Scoring:
    """A judge's rating of each answer by itself, from 1 to 10 or in words: one question an answer, where comparing takes two a pair.

    scale: words, the worst first, each worth its place from 1.
    """
    rating_on(scale)
    return JudgeReward(model, {**_options(rubric, reasons, way, no_verdict, key_env, model), "scale": tuple(scale)}, rate=True)
