"""Several systems on the same questions, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core.progress import Reporter
from tunesmith.core.record import Record
from tunesmith.evaluation.evaluate import System, evaluate
from tunesmith.evaluation.results import Evaluation, Judged, aligned
from tunesmith.evaluation.statistics import Verdict
from tunesmith.evaluation.task import Task
from tunesmith.ladder.judging import kindred
from tunesmith.ladder.reporting import Climbed, paired_verdicts, report_of
from tunesmith.ladder.rungs import Rung
from tunesmith.report import to_table
from tunesmith.report.schema import Judge, Report


@dataclass(slots=True)
class Comparison:
    """evaluations: in the order given. verdicts: (a, b) -> how a does against b, corrected for one another. judges: who scored the
    answers, if a metric did not, and who rewarded them in training."""

    task: Task
    systems: list[System]
    evaluations: list[Evaluation]
    verdicts: dict[tuple[int, int], Verdict]
    margin: float
    judges: Sequence[Judge] = ()

    @property
    def verdict(self) -> Verdict:
        """The second system against the first."""
        return self.verdicts[1, 0]

    def wins(self, count: int = 5) -> list[tuple[Judged, Judged]]:
        """Questions that the second system answers better than the first: (second's, first's) answers."""
        return self._differ(1, 0, count)

    def losses(self, count: int = 5) -> list[tuple[Judged, Judged]]:
        """Questions that the first system answers better than the second: (second's, first's) answers."""
        return [(b, a) for a, b in self._differ(0, 1, count)]

    def _differ(self, better: int, worse: int, count: int) -> list[tuple[Judged, Judged]]:
        both = zip(self.evaluations[better].judged, self.evaluations[worse].judged, strict=True)
        return [(a, b) for a, b in both if a.score > b.score][:count]

    def report(self) -> Report:
        """The comparison as a report."""
        done = [
            Climbed(Rung(s.name, s.name, f"{s.name}, asked zero-shot.", s), e, [])
            for s, e in zip(self.systems, self.evaluations, strict=True)
        ]
        report = report_of(
            done,
            title=" or ".join(system.name for system in self.systems) + "?",
            task=self.task,
            base=self.systems[0].source,
            metric=self.task.measure,
            margin=self.margin,
            judges=self.judges,
        )
        report.notes += kindred(self.task, [system.model for system in self.systems])
        return report

    def __rich__(self) -> Any:
        return to_table(self.report())

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, color_system=None)
        with console.capture() as captured:
            console.print(self)
        v, names = self.verdict, [system.name for system in self.systems]
        return (
            f"{captured.get()}{names[1]} is {v.verdict} than {names[0]}: {v.wins} questions won, {v.losses} lost, p = {v.p_adjusted:.2g}"
            if v.verdict in ("better", "worse")
            else f"{captured.get()}{names[1]} against {names[0]}: {v.verdict} ({v.wins} won, {v.losses} lost, p = {v.p_adjusted:.2g})"
        )


def compare_systems(
    systems: Sequence[System],
    task: Task,
    records: Sequence[Record],
    *,
    margin: float = 0.02,
    judges: Sequence[Judge] = (),
    reporter: Reporter | None = None,
) -> Comparison:
    """Ask each system every record, and compare on those that every one has a score for. Raises what `evaluate` raises."""
    for system in systems:
        system.way(task)  # a refusal comes before any work
    evaluations = aligned([evaluate(system, task, records, reporter=reporter) for system in systems])
    verdicts = paired_verdicts(evaluations, margin)
    return Comparison(task, list(systems), evaluations, verdicts, margin, judges)
