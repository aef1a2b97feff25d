"""What an evaluation found, question by question, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean

from tunesmith.evaluation.metrics import ClassScore, ConfusionMatrix, confusion, macro_f1, per_class
from tunesmith.evaluation.statistics import Interval, Verdict, paired_bootstrap, verdicts, wilson
from tunesmith.evaluation.task import Task

__all__ = ["ClassScore", "Evaluation", "Judged", "compare_all"]


@dataclass(frozen=True, slots=True)
class Judged:
    """One question answered and judged. text: as said (or the label scored highest); label: as parsed, None where no label
    could be read; score: 0 to 1."""

    key: str
    where: str
    question: str
    gold: str
    text: str
    label: str | None
    score: float

    @property
    def correct(self) -> bool:
        return self.score >= 1.0


@dataclass(slots=True)
class Evaluation:
    """One system on one set of questions.

    prompt_tokens, completion_tokens: mean a question, as a server would bill them. seconds: mean a question.
    peak_memory_mb: of this process; 0 where a server answered. prompt: the exact text read for the first question.
    notes: what a reader must know. histories: of dialogues that were asked both ways, the mean score under the "gold"
    history and under the system's "own".
    """

    system: str
    task: Task
    judged: list[Judged]
    prompt_tokens: float
    completion_tokens: float
    seconds: float
    peak_memory_mb: float
    prompt: str
    notes: list[str] = field(default_factory=list)
    histories: dict[str, float] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.judged)

    @property
    def scores(self) -> list[float]:
        return [one.score for one in self.judged]

    @property
    def score(self) -> float:
        """Mean score: the accuracy, for tasks that are right or wrong."""
        return fmean(self.scores)

    @property
    def unparseable(self) -> int:
        """Answers that name no label; they count as wrong."""
        return sum(one.label is None for one in self.judged) if self.task.kind == "label" else 0

    def interval(self) -> Interval:
        """95 %: Wilson for right and wrong, BCa bootstrap for graded scores."""
        if all(score in (0.0, 1.0) for score in self.scores):
            return wilson(int(sum(self.scores)), self.n)
        return paired_bootstrap(self.scores, [0.0] * self.n)

    def macro_f1(self) -> float:
        """Mean F1 over labels; for generated text the mean score."""
        return macro_f1(*self._labels()) if self.task.kind == "label" else self.score

    def classes(self) -> list[ClassScore]:
        """Precision, recall and F1 of each label; none for generated text."""
        return per_class(*self._labels()) if self.task.kind == "label" else []

    def confusion(self) -> ConfusionMatrix | None:
        return confusion(*self._labels()) if self.task.kind == "label" else None

    def _labels(self) -> tuple[list[str], list[str | None], tuple[str, ...]]:
        return [one.gold for one in self.judged], [one.label for one in self.judged], self.task.labels


def compare_all(evaluations: list[Evaluation], pairs: list[tuple[int, int]], margin: float = 0.02) -> list[Verdict]:
    """Paired verdicts for pairs (a, b) of evaluations of the same questions, corrected for one another (Holm).

    Raises ValueError where two evaluations are not of the same questions in the same order.
    """
    keys = [[one.key for one in evaluation.judged] for evaluation in evaluations]
    if any(other != keys[0] for other in keys):
        raise ValueError("evaluations of different questions cannot be compared")
    return verdicts([(evaluations[a].scores, evaluations[b].scores) for a, b in pairs], margin=margin) if pairs else []
