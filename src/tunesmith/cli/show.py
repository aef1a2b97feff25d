"""Results as people read them, and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from tunesmith.cli.common import stdout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table
    from rich.text import Text

    from tunesmith.evaluation.results import ClassScore, Evaluation
    from tunesmith.ladder.comparison import Comparison
    from tunesmith.ladder.training import Run
    from tunesmith.report import ReportPaths
    from tunesmith.report.schema import Answer, Judge, Question, Report

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
    console.print()
    show_judges(report.judges)
    console.print(f"report    {paths.html}", soft_wrap=True)


def show_judges(judges: Sequence[Judge]) -> None:
    """Who judged, by what, and whether that was ever held against people."""
    for judge in judges:
        stdout().print(f"judge     {judge.line()}", soft_wrap=True)


def show_run(run: Run) -> None:
    """What a finished run ended with, and what can be done with it."""
    from tunesmith.report.schema import Judge

    result = run.result
    best = [
        f"best dev {key.removeprefix('dev_')} {value:.3f} at step {result['best_step']}" for key, value in _dev(result) if value is not None
    ]
    spent = f"{result['steps']} steps in {result['train_seconds']:.0f} s, peak {result['peak_memory_mb']:,.0f} MB"
    console = stdout()
    console.print(" · ".join([f"trained   {run.folder}", spent, *best]), soft_wrap=True)
    show_judges([Judge(**values) for values in result.get("judges", [])])
    talks = "" if run.model.head is not None else f"  ·  tunesmith chat {run.folder}"
    console.print(f"next      tunesmith evaluate {run.folder} QUESTIONS{talks}", soft_wrap=True)


def _dev(result: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in result.items() if key.startswith("dev_") and key != "dev_seconds"]


def show_evaluation(evaluation: Evaluation, history: str = "") -> None:
    """Score with its interval, each label's figures, who judged, and what an answer costs. history: whose turns a dialogue was continued
    from."""
    from tunesmith.ladder.judging import judge_of

    interval, console = evaluation.interval(), stdout()
    whose = f" under {'the gold' if history == 'gold' else 'its own'} history" if history else ""
    words = [f"{evaluation.task.measure} {evaluation.score:.3f}{whose} (95 %: {interval.low:.3f} to {interval.high:.3f})"]
    if evaluation.task.kind == "tags":
        words += [f"macro F1 {evaluation.macro_f1():.3f}"]
    if evaluation.task.kind == "label":
        words += [f"macro F1 {evaluation.macro_f1():.3f}", f"{evaluation.unparseable} unparseable"]
    console.print(f"{evaluation.system} · {evaluation.n:,} questions", style="bold", soft_wrap=True)
    console.print(" · ".join(words), soft_wrap=True)
    if figures := evaluation.figures():
        told = [f"{one.name.replace('_', ' ')} {one.value:.4g} ({one.low:.4g} to {one.high:.4g})" for one in figures]
        console.print(" · ".join(told), soft_wrap=True)
    cost = f"{evaluation.prompt_tokens:.1f} + {evaluation.completion_tokens:.1f} tokens and {evaluation.seconds:.3f} s an answer"
    peak = f" · peak {evaluation.peak_memory_mb:,.0f} MB" if evaluation.peak_memory_mb else ""
    console.print(f"{cost}{peak}", soft_wrap=True)
    show_judges(judge_of(evaluation.task))
    for note in evaluation.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)
    if classes := evaluation.classes():
        console.print(_class_table(classes, ("type", "spans") if evaluation.task.kind == "tags" else ("label", "questions")))


def _class_table(classes: Sequence[ClassScore], names: tuple[str, str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(names[0])
    for column in ("precision", "recall", "F1", names[1]):
        table.add_column(column, justify="right")
    for one in classes:
        table.add_row(Text(one.label), f"{one.precision:.3f}", f"{one.recall:.3f}", f"{one.f1:.3f}", f"{one.support:,}")
    return table


def evaluation_values(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as plain values, every answer included."""
    from tunesmith.ladder.judging import judge_of

    interval, matrix = evaluation.interval(), evaluation.confusion()
    return {
        "system": evaluation.system,
        "task": evaluation.task.name,
        "metric": evaluation.task.measure,
        "history": evaluation.task.history,
        "n_questions": evaluation.n,
        "score": evaluation.score,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "macro_f1": evaluation.macro_f1(),
        "figures": [asdict(one) for one in evaluation.figures()],
        "unparseable": evaluation.unparseable,
        "prompt_tokens_per_answer": evaluation.prompt_tokens,
        "completion_tokens_per_answer": evaluation.completion_tokens,
        "seconds_per_answer": evaluation.seconds,
        "peak_memory_mb": evaluation.peak_memory_mb,
        "classes": [asdict(one) for one in evaluation.classes()],
        "confusion": asdict(matrix) if matrix else None,
        "judges": [judge.model_dump() for judge in judge_of(evaluation.task)],
        "notes": evaluation.notes,
        "answers": [asdict(one) for one in evaluation.judged],
    }


def show_comparison(comparison: Comparison, report: Report) -> None:
    """The table of systems, a line for each verdict, and a handful of questions that they answer differently."""
    from rich.text import Text

    from tunesmith.report.terminal import STYLES

    console, names = stdout(), [system.name for system in comparison.systems]
    console.print(comparison)
    console.print()
    for (a, b), made in comparison.verdicts.items():
        text = Text(f"{names[a]} against {names[b]}: ").append(made.verdict, style=STYLES[made.verdict])
        more = f", {made.questions_needed:,} more questions would decide it" if made.questions_needed else ""
        text.append(f" ({made.wins:,} won, {made.losses:,} lost, p = {made.p_adjusted:.2g}{more})")
        console.print(text, soft_wrap=True)
    show_judges(report.judges)
    _show_differences(report)


def _show_differences(report: Report) -> None:
    """A handful of questions that the systems answer differently, side by side."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    first, last = report.rungs[0].name, report.rungs[-1].name
    apart = [question for question in report.questions if len(set(_scores(question).values())) > 1]
    won = [question for question in apart if _scores(question)[last] > _scores(question)[first]]
    others = [question for question in apart if question not in won]
    shown = [*won[: max(HANDFUL // 2, HANDFUL - len(others))], *others[: max(HANDFUL // 2, HANDFUL - len(won))]]
    if not shown:
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=Text("Where they differ"), title_justify="left", title_style="bold")
    table.add_column("question", ratio=2)
    table.add_column("gold")
    for rung in report.rungs:
        table.add_column(Text(rung.name), ratio=1)
    for question in shown:
        answers = [_answer(question.answers[rung.name]) for rung in report.rungs]
        table.add_row(Text(_short(question.text)), Text(_short(question.gold)), *answers)
    stdout().print(table)


def _scores(question: Question) -> dict[str, float]:
    return {name: answer.score if answer.score is not None else float(answer.correct) for name, answer in question.answers.items()}


def _answer(answer: Answer) -> Text:
    from rich.text import Text

    graded = answer.score is not None and answer.score not in (0.0, 1.0)
    text = Text("✓ " if answer.correct else f"{answer.score:.2f} " if graded else "✗ ", style="green" if answer.correct else "red")
    return text.append(_short(answer.text), style="default")


def _short(text: str, limit: int = 120) -> str:
    folded = " ".join(text.split())
    return folded if len(folded) <= limit else f"{folded[: limit - 1]}…"
