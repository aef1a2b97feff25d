"""Climbing: every rung answers the same questions, each rung is kept as soon as it is done, and a report says which was
worth it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tunesmith.core.errors import DataError, SpecError
from tunesmith.core.progress import Quiet, Reporter
from tunesmith.engine.rundir import RunFolder
from tunesmith.evaluation.evaluate import evaluate
from tunesmith.evaluation.results import Evaluation, Judged
from tunesmith.evaluation.task import Task
from tunesmith.ladder.heads import TRAINING, check_rungs_of
from tunesmith.ladder.job import Job, environment, prepare, run_folder
from tunesmith.ladder.judging import judge_of, kindred, lends_base, with_judge
from tunesmith.ladder.reporting import Climbed, build_report
from tunesmith.ladder.rungs import Rung, make_rungs
from tunesmith.ladder.streaming import check_rungs
from tunesmith.ladder.training import on_dtype_of
from tunesmith.report import ReportPaths, write_report
from tunesmith.report.schema import CurvePoint, Report
from tunesmith.spec import Spec


def climb(
    spec: Spec, *, resume: bool = False, overwrite: bool = False, reporter: Reporter | None = None, root: Path | None = None
) -> tuple[Report, ReportPaths]:
    """Climb the spec's rungs on its test questions and write runs/NAME/report.{html,json,md}.

    resume: rungs that are done are taken as they are. Raises TunesmithError subclasses for what a user can mend.
    """
    reporter = reporter or Quiet()
    makers = make_rungs(spec.climb.rungs)
    check_rungs(spec)
    if spec.data.test is None:
        raise SpecError(
            "there are no questions: data.test is missing.", hints=["Hold some back:  data.test=400", "Or name a file:  data.test=FILE"]
        )
    with run_folder(spec, root) as folder:
        if overwrite and not resume:
            folder.clear()
        _begin(folder, spec, resume)
        job = prepare(on_dtype_of(spec, folder.environment()) if folder.started else spec, reporter=reporter)
        check_rungs_of(spec, job.start)
        task = with_judge(job.task, spec.evaluate.judge, base=job.base, reporter=reporter)
        task.check(job.splits.test)
        if not folder.started:
            folder.begin(spec, environment(job.base))
        job.keep_base = spec.climb.rungs[-1].split("(")[0].strip() not in TRAINING or lends_base(spec.evaluate.judge, job.base)
        _say_questions(job)
        done: list[Climbed] = []
        for expression, maker in makers:
            done.append(_one_rung(job, task, folder, expression, maker(job, folder.path), [c.rung.name for c in done]))
        report = build_report(job, done, environment(job.base), judge_of(task, root))
        report.notes += kindred(task, [job.start])
        paths = write_report(report, folder.path)
        folder.finish({"rungs": [c.rung.name for c in done], "recommendation": report.recommendation.model_dump()})
    return report, paths


def _begin(folder: RunFolder, spec: Spec, resume: bool) -> None:
    if not folder.started:
        return
    if not resume:
        folder.begin(spec, {})  # refuses, with what to do
    if folder.spec().model_dump() != spec.model_dump():
        raise SpecError(
            "the ladder was begun with another spec.", where=str(folder.path), hints=["Give the changed one another name:  name=NAME"]
        )


def _say_questions(job: Job) -> None:
    counts: dict[str, int] = {}
    for record in job.splits.test:
        counts[record.answer() or ""] = counts.get(record.answer() or "", 0) + 1
    shares = " · ".join(f"{count} {label}" for label, count in sorted(counts.items())) if job.task.kind == "label" else ""
    job.reporter.line("questions", f"{len(job.splits.test):,} held out" + (f" ({shares})" if shares else ""))
    for note in job.splits.notes:
        job.reporter.line("", note)


def _one_rung(job: Job, task: Task, folder: RunFolder, expression: str, rung: Rung, taken: list[str]) -> Climbed:
    if rung.name in taken:
        rung.name = rung.system.name = f"{rung.name}-{sum(name.startswith(rung.name) for name in taken) + 1}"
    kept = folder.path / "rungs" / f"{rung.name}.json"
    mark = _mark(job, expression)
    evaluation = _read(kept, mark, task)
    if evaluation is None:
        evaluation = evaluate(rung.system, task, job.splits.test, reporter=job.reporter)
        _write(kept, mark, evaluation)
    interval = evaluation.interval()
    job.reporter.line(
        "rung",
        f"{rung.name}: {task.measure} {evaluation.score:.3f} ({interval.low:.3f} to {interval.high:.3f}) · "
        f"{evaluation.prompt_tokens:.0f} + {evaluation.completion_tokens:.0f} tokens and {evaluation.seconds:.3f} s an answer",
    )
    return Climbed(rung, evaluation, _curve(rung, job.asked_metric))


def _curve(rung: Rung, metric: str) -> list[CurvePoint]:
    points: dict[int, dict[str, float]] = {}
    for line in rung.run.metrics if rung.run else []:
        point = points.setdefault(line["step"], {})
        point |= {key: line[key] for key in ("loss", "lr") if key in line}
        if f"dev_{metric}" in line:
            point["dev_metric"] = line[f"dev_{metric}"]
    return [CurvePoint(step=step, **values) for step, values in sorted(points.items())]


# Finished rungs on disk


def _mark(job: Job, expression: str) -> str:
    """What a kept evaluation depends on."""
    spec = job.spec.model_dump(mode="json", exclude={"base": {"dtype"}})
    parts = [expression, job.base.fingerprint, str(job.base.dtype), [record.key() for record in job.splits.test], spec]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _write(path: Path, mark: str, evaluation: Evaluation) -> None:
    path.parent.mkdir(exist_ok=True)
    values = {name: getattr(evaluation, name) for name in _PLAIN}
    judged = [{name: getattr(one, name) for name in Judged.__slots__} for one in evaluation.judged]
    beside = path.with_suffix(".writing")
    beside.write_text(json.dumps({"mark": mark, **values, "judged": judged}, ensure_ascii=False, indent=1))
    beside.rename(path)


_PLAIN = ("system", "prompt_tokens", "completion_tokens", "seconds", "peak_memory_mb", "prompt", "notes")


def _read(path: Path, mark: str, task: Task) -> Evaluation | None:
    """The kept evaluation of a rung; None where there is none of this very ladder."""
    try:
        values = json.loads(path.read_text())
        if values["mark"] != mark:
            return None
        judged = [Judged(**one) for one in values["judged"]]
        return Evaluation(task=task, judged=judged, **{name: values[name] for name in _PLAIN})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise DataError(
            "the kept answers of this rung are damaged.", where=str(path), hints=["Remove the file and go on with --resume."]
        ) from None
