"""Judges of a run: who scores answers in the end must not have rewarded or taught them, and every report names who judged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from tunesmith.bases import Base
from tunesmith.core.errors import SpecError
from tunesmith.core.progress import Reporter
from tunesmith.curation.checking import UNCHECKED, held_against
from tunesmith.engine.model import Model
from tunesmith.engine.server import Server
from tunesmith.evaluation.judging import open_measure
from tunesmith.evaluation.task import Task
from tunesmith.report.schema import Judge
from tunesmith.rewardspec import JudgeSpec
from tunesmith.rollout.judges import Judge as Judging
from tunesmith.rollout.judges import check_judge_source
from tunesmith.rollout.judging import judges_among
from tunesmith.rollout.named import labellers_of, lineage, refuse_labeller, refuse_shared_judge, stands_on
from tunesmith.rollout.rewards import Rewards
from tunesmith.rollout.rubric import first_line
from tunesmith.spec import Spec


def check_judge(spec: Spec) -> None:
    """Raises SpecError for a judge of the outcome that cannot judge, or that rewards or teaches in this run or in one it begins from.
    Nothing is loaded."""
    judge = spec.evaluate.judge
    if judge is not None:
        refuse_shared_judge(judge.model, lineage(spec))
        check_judge_source(judge.model)


def rates_alone(spec: Spec) -> bool:
    """Does a judge rate the answers to the test questions by themselves, so that these need none of their own?"""
    return spec.evaluate.judge is not None and spec.evaluate.judge.asks == "rating"


def with_judge(
    task: Task,
    given: JudgeSpec | None,
    specs: Iterable[Spec] = (),
    *,
    runs: Iterable[str] = (),
    base: Base | None = None,
    reporter: Reporter | None = None,
) -> Task:
    """The task with its judge opened; as it is where none is given.

    specs: of the runs whose answers will be judged. runs: their folders, as far as they are finished. base: one that is loaded
    already. Raises SpecError for a task that no judge scores, and for a judge that gave a reward in one of the runs or labelled its
    preferences; and what opening the judge raises.
    """
    if given is None:
        return task
    refuse_unjudged(task)
    refuse_shared_judge(given.model, [each for spec in specs for each in lineage(spec)])
    refuse_labeller(given.model, [account for run in runs for account in labellers_of(run)])
    measure = open_measure(given, base=base, reporter=reporter)
    if reporter:
        reporter.line("judge", named(measure.judge, "scores the answers", rates=not measure.compares).line())
    return replace(task, judge=measure)


def refuse_unjudged(task: Task) -> None:
    """Raise SpecError for a task whose answers are no free words."""
    if task.kind != "generate":
        what = f"a judge scores answers in free words, and the task is of kind {task.kind}, which is judged by {task.measure}."
        raise SpecError(what, where="evaluate.judge", hints=["Leave evaluate.judge out, or let answers be generated:  task.kind=generate"])


def lends_base(given: JudgeSpec | None, base: Base) -> bool:
    """Does the judge stand on this base, whose own weights then have to be kept while adapters are trained?"""
    return given is not None and stands_on(given.model, base)


def named(judge: Judging, role: str, *, rates: bool, root: Path | None = None) -> Judge:
    """A judge as a report names it. role: what it does. root: folder of runs, where checks of judges lie."""
    return Judge(
        role=role, name=judge.name, rubric=first_line(judge.rubric), checked=held_against(root or Path("runs"), judge, rates=rates)
    )


def judge_of(task: Task, root: Path | None = None) -> list[Judge]:
    """The judge that scored a task's answers, if one did."""
    measure = task.judge
    return [] if measure is None else [named(measure.judge, "scored the answers", rates=not measure.compares, root=root)]


def reward_judges(rewards: Rewards, role: str = "gave the reward", root: Path | None = None) -> list[Judge]:
    """The judges among a run's rewards, opened now if they were not yet."""
    found = [(one.name, scoring) for one in rewards.rewards for scoring in judges_among([one.scoring])]
    return [named(scoring.judge, f"{role} {name}", rates=scoring.rate, root=root) for name, scoring in found]


def labelling_judges(accounts: Iterable[Mapping[str, str]]) -> list[Judge]:
    """The judges among the models that labelled what a run learned from, as `tunesmith pairs` noted them."""
    said = [account for account in accounts if "name" in account]
    return [
        Judge(role="labelled the preferences", name=one["name"], rubric=one.get("rubric", ""), checked=one.get("checked", UNCHECKED))
        for one in said
    ]


def kindred(task: Task, models: Iterable[Model | Server]) -> list[str]:
    """What a reader must know of a judge that stands on the base of what it judges."""
    if task.judge is None or isinstance(task.judge.judge.model, Server):
        return []
    own = task.judge.judge.model.base.fingerprint
    if not any(isinstance(model, Model) and model.base.fingerprint == own for model in models):
        return []
    return ["the judge stands on the base of what it judges; models favour what they would say themselves (Panickssery et al. 2024)"]
