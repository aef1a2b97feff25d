"""What an evaluation found, question by question, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import fmean

from tunesmith.core.errors import RunError
from tunesmith.evaluation.metrics import ClassScore, ConfusionMatrix, confusion, macro_f1, per_class
from tunesmith.evaluation.rating import Figure, figures_of
from tunesmith.evaluation.ratios import Ratio, compared
from tunesmith.evaluation.statistics import Interval, Measured, Verdict, judged, paired_bootstrap, verdicts, wilson
from tunesmith.evaluation.tagging import Tagged
from tunesmith.evaluation.task import Task

__all__ = ["ClassScore", "Evaluation", "Figure", "Judged", "aligned", "compare_all"]


@dataclass(frozen=True, slots=True)
class Judged:
    """One question answered and judged. text: as said (or the label scored highest; or the tags of all words, as `gold`);
    label: as parsed, None where no label could be read; score: 0 to 1."""

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
    def ratio(self) -> Ratio | None:
        """Of tags, the sums that the F1 of all spans is the ratio of: it is no mean over sentences. None for other tasks."""
        return self._tagged().ratio() if self.task.kind == "tags" else None

    @property
    def score(self) -> float:
        """Mean score: the accuracy, for tasks that are right or wrong. Of tags the F1 of spans, all sentences together."""
        ratio = self.ratio
        return fmean(self.scores) if ratio is None else ratio.value

    def sums(self) -> tuple[float, float]:
        """(top, bottom) of the score, so that those of parts of the questions add up to that of all."""
        ratio = self.ratio
        return (sum(self.scores), float(self.n)) if ratio is None else (float(ratio.top.sum()), float(ratio.bottom.sum()))

    @property
    def unparseable(self) -> int:
        """Answers that name no label; they count as wrong."""
        return sum(one.label is None for one in self.judged) if self.task.kind in ("label", "choice") else 0

    def interval(self) -> Interval:
        """95 %: Wilson for right and wrong, BCa bootstrap for graded scores and over sentences."""
        if (ratio := self.ratio) is not None:
            return ratio.interval()
        if all(score in (0.0, 1.0) for score in self.scores):
            return wilson(int(sum(self.scores)), self.n)
        return paired_bootstrap(self.scores, [0.0] * self.n)

    def macro_f1(self) -> float:
        """Mean F1 over labels, or over types of spans; for anything else the score."""
        if self.task.kind == "tags":
            return fmean(one.f1 for one in self.classes()) if self.classes() else 0.0
        return macro_f1(*self._labels()) if self.task.kind == "label" else self.score

    def classes(self) -> list[ClassScore]:
        """Precision, recall and F1 of each label, or of each type of span; none for anything else."""
        if self.task.kind == "tags":
            return self._tagged().types()
        return per_class(*self._labels()) if self.task.kind == "label" else []

    def figures(self) -> list[Figure]:
        """What stands beside the score, with intervals: of spans precision, recall and the F1 of strict reading; of numbers MSE,
        MAE and correlations."""
        if self.task.kind == "value":
            return figures_of([float(one.gold) for one in self.judged], [float(one.text) for one in self.judged])
        if self.task.kind != "tags" or self.task.scheme == "plain":
            return []
        read = self._tagged()
        named = {"precision": read.precision(), "recall": read.recall(), "strict_f1": self._tagged(strict=True).ratio()}
        return [Figure(name, ratio.value, *_ends(ratio.interval())) for name, ratio in named.items()]

    def confusion(self) -> ConfusionMatrix | None:
        return confusion(*self._labels()) if self.task.kind == "label" else None

    def _tagged(self, *, strict: bool = False) -> Tagged:
        return Tagged.read([(one.gold, one.text) for one in self.judged], self.task.labels, self.task.scheme, strict=strict)

    def _labels(self) -> tuple[list[str], list[str | None], tuple[str, ...]]:
        return [one.gold for one in self.judged], [one.label for one in self.judged], self.task.labels


def _ends(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def compare_all(evaluations: list[Evaluation], pairs: list[tuple[int, int]], margin: float = 0.02) -> list[Verdict]:
    """Paired verdicts for pairs (a, b) of evaluations of the same questions, corrected for one another (Holm).

    Raises ValueError where two evaluations are not of the same questions in the same order.
    """
    keys = [[one.key for one in evaluation.judged] for evaluation in evaluations]
    if any(other != keys[0] for other in keys):
        raise ValueError("evaluations of different questions cannot be compared")
    if not pairs:
        return []
    if evaluations[0].task.kind == "tags":
        return judged([_compared(evaluations[a], evaluations[b]) for a, b in pairs], margin=margin)
    return verdicts([(evaluations[a].scores, evaluations[b].scores) for a, b in pairs], margin=margin)


def aligned(evaluations: list[Evaluation]) -> list[Evaluation]:
    """The evaluations on the questions that all of them scored: a judge may have left some out, of some systems.

    Raises RunError where no question is left.
    """
    asked = [{(one.key, one.where) for one in evaluation.judged} for evaluation in evaluations]
    common = set.intersection(*asked) if asked else set()
    if all(own == common for own in asked):
        return evaluations
    if not common:
        raise RunError("there is no question on which the judge gave a verdict for every system.", hints=["evaluate.judge.no_verdict=tie"])
    return [replace(each, judged=[one for one in each.judged if (one.key, one.where) in common]) for each in evaluations]


def _compared(a: Evaluation, b: Evaluation) -> Measured:
    """Two systems by a ratio over all questions; single ones are won by their own score."""
    mine, theirs = a.ratio, b.ratio
    assert mine is not None and theirs is not None
    both = list(zip(a.scores, b.scores, strict=True))
    return compared(mine, theirs, sum(x > y for x, y in both), sum(y > x for x, y in both))
