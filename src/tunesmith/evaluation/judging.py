"""Answers in free words, scored by a judge: how good each is by itself, or how surely it is better than the answer in the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.bases import Base
from tunesmith.core.errors import RunError
from tunesmith.core.progress import Reporter
from tunesmith.core.record import Record
from tunesmith.rewardspec import JudgeSpec
from tunesmith.rollout.judges import Duel, Judge, open_judge
from tunesmith.rollout.rubric import in_words, rating_on

if TYPE_CHECKING:
    from tunesmith.evaluation.task import Task

RATING, WIN_RATE = "judge_rating", "win_rate"


@dataclass(frozen=True, slots=True)
class Measure:
    """judge: who judges. compares: each answer is held against the one in the data, else it is rated by itself."""

    judge: Judge
    compares: bool = False

    @property
    def name(self) -> str:
        """What the scores are: "judge_rating", 0 the worst of the scale and 1 the best; or "win_rate", the mean probability that the
        answer is better than the one in the data."""
        return WIN_RATE if self.compares else RATING

    def scores(self, task: Task, answers: Sequence[str], records: Sequence[Record]) -> list[float | None]:
        """From 0 to 1 for each answer to a record, in order; None where the judge gave no verdict, and none is to be left out.

        The judge reads the question as the task asks it, without demonstrations. Raises as `Judge.rate`.
        """
        asked = [in_words(task.ask(record)) for record in records]
        if self.compares:
            each = zip(answers, asked, records, strict=True)
            duels = [Duel(answer, record.answer() or "", prompt, record.where) for answer, prompt, record in each]
            return [one.preference for one in self.judge.compare(duels)]
        form = rating_on(self.judge.scale)
        worst, best = min(form.values), max(form.values)
        said = self.judge.rate(list(zip(asked, answers, strict=True)), [record.where for record in records])
        return [None if value is None else (value - worst) / (best - worst) for value in said]


def open_measure(spec: JudgeSpec, *, base: Base | None = None, reporter: Reporter | None = None) -> Measure:
    """The judge of `evaluate.judge`. base: one that is loaded already, which it uses where it stands on it. Raises as `open_judge`."""
    options = spec.model_dump(exclude={"model", "asks"})
    return Measure(open_judge(spec.model, base=base, reporter=reporter, **options), spec.asks == "comparison")


def mean_over_turns(scores: Sequence[float | None], counts: Sequence[int]) -> list[float | None]:
    """The score of each dialogue: the mean over its turns, None where one has none. counts: turns of each."""
    out: list[float | None] = []
    at = 0
    for count in counts:
        own, at = scores[at : at + count], at + count
        known = [score for score in own if score is not None]
        out.append(sum(known) / count if len(known) == count else None)
    return out


def refuse_silence(scores: Sequence[float | None], measure: Measure) -> None:
    """Raise RunError where the judge gave no verdict on any answer."""
    if all(score is None for score in scores):
        hints = [f"It said:  {text}" for text in measure.judge.told] or ["Try another rubric:  evaluate.judge.rubric=FILE"]
        raise RunError(f"the judge gave no verdict on any of {len(scores):,} answers.", where=measure.judge.name, hints=hints)
