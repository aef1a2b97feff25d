"""Results as people read them, and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from tunesmith.cli.common import stdout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.evaluation.results import Evaluation
    from tunesmith.ladder.training import Run
    from tunesmith.report import ReportPaths
    from rich.table import Table
    from rich.text import Text

    from tunesmith.evaluation.results import ClassScore
    from tunesmith.report.schema import Answer, Question, Report

HANDFUL = 6


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def show_climb(report: Report, paths: ReportPaths) -> None:
    """The table of the ladder, the evidence behind its verdict, and where the report lies."""
    from tunesmith.report import to_table
    from tunesmith.report.verdict import conclude

    console = stdout()
    console.print(to_table(report))
    if evidence := conclude(report).evidence:
        console.print(f"\n{evidence}")
    console.print(f"\nreport    {paths.html}", soft_wrap=True)


def show_run(run: Run) -> None:
    """What a finished run ended with, and what can be done with it."""
    result = run.result
    best = [f"best dev {key.removeprefix('dev_')} {value:.3f} at step {result['best_step']}" for key, value in _dev(result) if value is not None]
    spent = f"{result['steps']} steps in {result['train_seconds']:.0f} s, peak {result['peak_memory_mb']:,.0f} MB"
    console = stdout()
    console.print(" · ".join([f"trained   {run.folder}", spent, *best]), soft_wrap=True)
    console.print(f"next      tunesmith evaluate {run.folder} QUESTIONS  ·  tunesmith chat {run.folder}", soft_wrap=True)


def _dev(result: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in result.items() if key.startswith("dev_") and key != "dev_seconds"]


def metric_of(evaluation: Evaluation) -> str:
    """The name of the metric that `score` is the mean of."""
    metric = evaluation.task.metric
    return metric if isinstance(metric, str) else next(iter(metric))


def show_evaluation(evaluation: Evaluation, history: str = "") -> None:
    """Score with its interval, each label's figures, and what an answer costs. history: whose turns a dialogue was continued from."""
    interval, console = evaluation.interval(), stdout()
    whose = f" under {'the gold' if history == 'gold' else 'its own'} history" if history else ""
    words = [f"{metric_of(evaluation)} {evaluation.score:.3f}{whose} (95 %: {interval.low:.3f} to {interval.high:.3f})"]
    if evaluation.task.kind == "label":
        words += [f"macro F1 {evaluation.macro_f1():.3f}", f"{evaluation.unparseable} unparseable"]
    console.print(f"{evaluation.system} · {evaluation.n:,} questions", style="bold", soft_wrap=True)
    console.print(" · ".join(words), soft_wrap=True)
    console.print(
        f"{evaluation.prompt_tokens:.1f} + {evaluation.completion_tokens:.1f} tokens and {evaluation.seconds:.3f} s an answer"
        f" · peak {evaluation.peak_memory_mb:,.0f} MB",
        soft_wrap=True,
    )
    for note in evaluation.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)
    if classes := evaluation.classes():
        console.print(_class_table(classes))


def _class_table(classes: Sequence[Any]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("label")
    for column in ("precision", "recall", "F1", "questions"):
        table.add_column(column, justify="right")
    for one in classes:
        table.add_row(Text(one.label), f"{one.precision:.3f}", f"{one.recall:.3f}", f"{one.f1:.3f}", f"{one.support:,}")
    return table


def evaluation_values(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as plain values, every answer included."""
    interval, matrix = evaluation.interval(), evaluation.confusion()
    return {
        "system": evaluation.system,
        "task": evaluation.task.name,
        "metric": metric_of(evaluation),
        "history": evaluation.task.history,
        "n_questions": evaluation.n,
        "score": evaluation.score,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "macro_f1": evaluation.macro_f1(),
        "unparseable": evaluation.unparseable,
        "prompt_tokens_per_answer": evaluation.prompt_tokens,
        "completion_tokens_per_answer": evaluation.completion_tokens,
        "seconds_per_answer": evaluation.seconds,
        "peak_memory_mb": evaluation.peak_memory_mb,
        "classes": [asdict(one) for one in evaluation.classes()],
        "confusion": asdict(matrix) if matrix else None,
        "notes": evaluation.notes,
        "answers": [asdict(one) for one in evaluation.judged],
    }


def show_differences(report: Report) -> None:
    """A handful of questions that the systems answer differently, side by side."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    apart = [question for question in report.questions if _differ(question)][:HANDFUL]
    if not apart:
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=Text("Where they differ"), title_justify="left", title_style="bold")
    table.add_column("question", ratio=2)
    table.add_column("gold")
    for rung in report.rungs:
        table.add_column(Text(rung.name), ratio=1)
    for question in apart:
        answers = [_answer(question.answers[rung.name]) for rung in report.rungs]
        table.add_row(Text(_short(question.text)), Text(_short(question.gold)), *answers)
    stdout().print(table)


def _differ(question: Question) -> bool:
    return len({answer.score if answer.score is not None else answer.correct for answer in question.answers.values()}) > 1


def _answer(answer: Answer) -> Text:
    from rich.text import Text

    graded = answer.score is not None and answer.score not in (0.0, 1.0)
    text = Text("✓ " if answer.correct else f"{answer.score:.2f} " if graded else "✗ ", style="green" if answer.correct else "red")
    return text.append(_short(answer.text), style="default")


def _short(text: str, limit: int = 120) -> str:
    folded = " ".join(text.split())
    return folded if len(folded) <= limit else f"{folded[: limit - 1]}…"
