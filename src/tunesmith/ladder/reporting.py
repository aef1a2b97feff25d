"""From evaluations to a report: paired verdicts, the recommendation with its reason, the questions worth reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from tunesmith.evaluation.results import Evaluation, Figure, aligned, compare_all
from tunesmith.evaluation.statistics import Verdict
from tunesmith.evaluation.task import Task
from tunesmith.ladder.job import Job
from tunesmith.ladder.rungs import Rung
from tunesmith.report.numbers import scale_for
from tunesmith.report.schema import Answer, ClassScore, Confusion, CurvePoint, Judge, Question, Recommendation, Report, Versus
from tunesmith.report.schema import Rung as RungReport

Pair = tuple[int, int]


@dataclass(slots=True)
class Climbed:
    """A rung that has answered."""

    rung: Rung
    evaluation: Evaluation
    curve: list[CurvePoint]


def build_report(job: Job, done: list[Climbed], environment: dict[str, Any], judges: Sequence[Judge] = ()) -> Report:
    """Everything that a climb found, as data. judges: who scored the answers, if a metric did not."""
    spec = job.spec
    report = report_of(
        done,
        title=f"{job.task.name}: which adaptation was worth it?",
        task=job.task,
        base=job.base.name,
        metric=done[0].evaluation.task.measure,
        margin=spec.climb.margin,
        target=spec.climb.target,
        show=spec.climb.show,
        judges=judges,
    )
    report.settings, report.environment = spec.model_dump(mode="json"), environment
    report.notes = list(dict.fromkeys([*filter(None, job.notes), *report.notes]))
    report.command = "tunesmith demo" if spec.name == "demo" else f"tunesmith climb {spec.name}.yaml"
    return report


def report_of(
    done: list[Climbed],
    *,
    title: str,
    task: Task,
    base: str,
    metric: str,
    margin: float,
    target: float | None = None,
    show: int = 20,
    judges: Sequence[Judge] = (),
) -> Report:
    """A report on any systems that answered the same questions: on those that every one has a score for."""
    evaluations = aligned([climbed.evaluation for climbed in done])
    done = [replace(climbed, evaluation=own) for climbed, own in zip(done, evaluations, strict=True)]
    verdicts = paired_verdicts(evaluations, margin)
    graded = task.kind == "tags" or any(score not in (0.0, 1.0) for evaluation in evaluations for score in evaluation.scores)
    return Report(
        title=title,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        task=task.name,
        base=base,
        n_questions=evaluations[0].n,
        labels=list(task.labels) if task.kind == "label" else [],
        metric=metric,
        judges=list(judges),
        rungs=[rung_report(c, i, verdicts, evaluations) for i, c in enumerate(done)],
        recommendation=recommend(done, verdicts, target),
        questions=notable_questions(done, show),
        notes=[f"{c.rung.title}: {note}" for c in done for note in [*c.evaluation.notes, *map(_told, c.evaluation.figures())]],
        interval_method="BCa bootstrap" if graded else "Wilson",
        paired_test="paired permutation" if graded else "exact McNemar",
    )


def _told(figure: Figure) -> str:
    return f"{figure.name.replace('_', ' ')} {figure.value:.4g} (95 %: {figure.low:.4g} to {figure.high:.4g})"


def paired_verdicts(evaluations: list[Evaluation], margin: float) -> dict[Pair, Verdict]:
    """Verdicts for every comparison that the report makes, corrected together (Holm): each rung against the one before
    it and the best before it, and the best of all against every cheaper one."""
    best = _best(evaluations, len(evaluations))
    pairs = {(i, i - 1) for i in range(1, len(evaluations))}
    pairs |= {(i, _best(evaluations, i)) for i in range(1, len(evaluations))}
    pairs |= {(best, i) for i in range(best)}
    ordered = sorted(pairs)
    return dict(zip(ordered, compare_all(evaluations, ordered, margin), strict=True))


def _best(evaluations: list[Evaluation], before: int) -> int:
    """The first of the rungs with the highest score, among those before."""
    return max(range(before), key=lambda i: evaluations[i].score)


def recommend(done: list[Climbed], verdicts: dict[Pair, Verdict], target: float | None) -> Recommendation:
    """The cheapest rung that reaches the target; without a target, the cheapest that the best one does not beat.

    Rungs are in the order of their cost. An undecided difference is no reason to pay more, and is said.
    """
    evaluations = [climbed.evaluation for climbed in done]
    scale, best = scale_for(evaluations[0].task.measure), _best(evaluations, len(done))
    if target is not None:
        return _for_target(done, best, target)
    cheaper = [i for i in range(best) if verdicts[best, i].verdict != "better"]
    chosen = cheaper[0] if cheaper else best
    name, score = done[chosen].rung.name, evaluations[chosen].score
    if chosen != best:
        v = verdicts[best, chosen]
        more = f"; {v.questions_needed:,} more questions would settle it" if v.questions_needed else ""
        other = f"{done[best].rung.name} reaches {scale.score(evaluations[best].score)}"
        return Recommendation(rung=name, reason=f"{scale.told(score)}; {other} but is not shown to be better ({v.verdict}, {_p(v)}{more}).")
    if best == 0:
        return Recommendation(rung=name, reason=f"{scale.told(score)}; nothing after it does better.")
    rival = max(range(best), key=lambda i: evaluations[i].score)
    v = verdicts[best, rival]
    saved = evaluations[rival].prompt_tokens - evaluations[best].prompt_tokens
    tokens = f" It reads {saved:.0f} tokens less an answer." if saved >= 1 else ""
    more = f"{100 * v.difference:.1f} points more" if scale.percent else f"{v.difference:.3f} more"
    return Recommendation(
        rung=name,
        reason=f"{scale.told(score)}, {more} than {done[rival].rung.name}, the best before it: "
        f"{v.wins} questions won, {v.losses} lost ({_p(v)}).{tokens}",
    )


def _for_target(done: list[Climbed], best: int, target: float) -> Recommendation:
    scale = scale_for(done[0].evaluation.task.measure)
    for climbed in done:
        score, low = climbed.evaluation.score, climbed.evaluation.interval().low
        if score >= target:
            sure = "its whole interval lies above it" if low >= target else f"but its interval begins at {scale.score(low)}"
            reason = f"the cheapest rung to reach the target of {scale.score(target)}: {scale.told(score)}, {sure}."
            return Recommendation(rung=climbed.rung.name, reason=reason)
    found = done[best]
    return Recommendation(
        rung=found.rung.name,
        reason=f"no rung reaches the target of {scale.score(target)}; this one comes nearest with {scale.score(found.evaluation.score)}.",
    )


def _p(v: Verdict) -> str:
    return "p < 0.001" if v.p_adjusted < 0.001 else f"p = {v.p_adjusted:.3f}"


def versus(v: Verdict, rung: str) -> Versus:
    """A verdict as the report holds it."""
    return Versus(
        rung=rung, difference_low=v.low, difference_high=v.high, **{k: x for k, x in asdict(v).items() if k not in ("low", "high")}
    )


def rung_report(climbed: Climbed, index: int, verdicts: dict[Pair, Verdict], evaluations: list[Evaluation]) -> RungReport:
    """One rung's figures."""
    rung, found = climbed.rung, climbed.evaluation
    interval, matrix = found.interval(), found.confusion()
    result = rung.run.result if rung.run else {}
    before = _best(evaluations, index) if index else None
    return RungReport(
        name=rung.name,
        title=rung.title,
        description=rung.description,
        accuracy=found.score,
        ci_low=interval.low,
        ci_high=interval.high,
        macro_f1=found.macro_f1(),
        unparseable=found.unparseable,
        prompt_tokens_per_answer=found.prompt_tokens,
        completion_tokens_per_answer=found.completion_tokens,
        seconds_per_answer=found.seconds,
        train_seconds=result.get("train_seconds", 0.0) + result.get("dev_seconds", 0.0),
        peak_memory_mb=max(found.peak_memory_mb, result.get("peak_memory_mb", 0.0)),
        trainable_parameters=result.get("trainable_parameters", 0),
        versus_previous=versus(verdicts[index, index - 1], evaluations[index - 1].system) if index else None,
        versus_best_before=versus(verdicts[index, before], evaluations[before].system) if before is not None else None,
        classes=[ClassScore(**asdict(one)) for one in found.classes()],
        confusion=Confusion(labels=list(matrix.labels), gold=list(matrix.gold), counts=[list(row) for row in matrix.counts])
        if matrix
        else None,
        curve=climbed.curve,
        prompt=found.prompt,
        settings=rung.settings,
    )


def notable_questions(done: list[Climbed], count: int) -> list[Question]:
    """Questions with every rung's answer: those that the best rung won or lost against its best rival come first."""
    evaluations = [climbed.evaluation for climbed in done]
    best = _best(evaluations, len(done))
    others = [i for i in range(len(done)) if i != best]
    rival = max(others, key=lambda i: evaluations[i].score) if others else best
    mine, theirs = evaluations[best].scores, evaluations[rival].scores
    won = [i for i in range(len(mine)) if mine[i] > theirs[i]]
    lost = [i for i in range(len(mine)) if mine[i] < theirs[i]]
    mixed = [i for i in range(len(mine)) if mine[i] == theirs[i] and len({e.scores[i] for e in evaluations}) > 1]
    same = [i for i in range(len(mine)) if i not in {*won, *lost, *mixed}]
    first_lost = _spread(lost, count - min(len(won), -(-count // 2)))
    first_won = _spread(won, count - len(first_lost))
    picked = [*first_won, *first_lost, *mixed, *same][:count]
    graded = any(score not in (0.0, 1.0) for evaluation in evaluations for score in evaluation.scores)
    return [_question(done, index, graded) for index in picked]


def _spread(items: list[int], count: int) -> list[int]:
    """At most so many, evenly over the list: questions often stand in the order of their labels."""
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


def _question(done: list[Climbed], index: int, graded: bool) -> Question:
    first = done[0].evaluation.judged[index]
    answers = {}
    for climbed in done:
        one = climbed.evaluation.judged[index]
        answers[climbed.rung.name] = Answer(text=one.text, label=one.label, correct=one.correct, score=one.score if graded else None)
    return Question(id=first.key, text=first.question, gold=first.gold, answers=answers)
