"""The report as Markdown: for a pull request, a wiki, a mail."""

from __future__ import annotations

import re

from tunesmith.report import numbers, sections, verdict
from tunesmith.report.schema import Confusion, Report, Rung

LONG_ANSWER = 300


def to_markdown(report: Report) -> str:
    """The same content as the page, in GitHub's Markdown. Text of the report is escaped: it shows as it was written."""
    concluded = verdict.conclude(report)
    trained = verdict.is_trained(concluded.rung) or any(verdict.is_trained(rung) for rung in report.rungs)
    parts = [
        f"# {text(report.title)}",
        f"**{text(concluded.headline)}.**",
        f"Recommended: **{text(concluded.rung.title)}**. {text(report.recommendation.reason)}",
        _evidence(concluded),
        f"Task: {text(report.task)} · base: {text(report.base)} · {report.n_questions:,} questions · {text(report.created)}",
        "\n".join(f"- Judge: {text(judge.line())}" for judge in report.judges),
        "## Rungs",
        _rungs(report, concluded.rung, trained),
        _versus(report),
        _confusion(concluded.rung),
        _questions(report),
        _prompts(report),
        _settings(report),
        _notes(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _evidence(concluded: verdict.Verdict) -> str:
    if concluded.versus is None:
        return ""
    word = concluded.versus.verdict
    return f"{verdict.GLYPHS[word]} {word}: {text(concluded.evidence)}"


def text(words: str) -> str:
    """Words as they are, on one line, whatever signs of Markdown or HTML they hold."""
    escaped = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", " ".join(words.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def fenced(words: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", words)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{words}\n{fence}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table, the first column to the left and the others to the right. Cells must be escaped already."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rungs(report: Report, chosen: Rung, trained: bool) -> str:
    scale = numbers.scale_of(report)
    head = ["rung", scale.name, "95 % interval", "macro F1", "unparseable", "tokens read", "tokens written", "time an answer"]
    head += ["training", "parameters", "memory"] if trained else []
    rows = []
    for rung in report.rungs:
        title = f"**{text(rung.title)}**" if rung is chosen else text(rung.title)
        row = [title, scale.score(rung.accuracy), scale.bounds(rung.ci_low, rung.ci_high), f"{rung.macro_f1:.3f}", str(rung.unparseable)]
        row += [numbers.count(rung.prompt_tokens_per_answer), numbers.count(rung.completion_tokens_per_answer)]
        row.append(numbers.duration(rung.seconds_per_answer))
        if trained:
            row += [
                numbers.duration(rung.train_seconds),
                numbers.parameters(rung.trainable_parameters),
                numbers.memory(rung.peak_memory_mb),
            ]
        rows.append(row)
    return table([text(cell) for cell in head], rows)


def _versus(report: Report) -> str:
    scale = numbers.scale_of(report)
    rows = []
    for line in sections.comparisons(report):
        made = line.versus
        needed = f"{made.questions_needed:,}" if made.questions_needed else ""
        difference = f"{scale.gain(made.difference)} ({scale.gain_bounds(made.difference_low, made.difference_high)})"
        row = [text(line.rung.title), text(line.against), str(made.wins), str(made.losses), difference]
        rows.append([*row, numbers.p_value(made.p_adjusted), f"{verdict.GLYPHS[made.verdict]} {made.verdict}", needed])
    if not rows:
        return ""
    head = ["rung", "against", "wins", "losses", "difference (95 %)", "p after correction", "verdict", "questions needed"]
    return f"## Did each step help?\n\n{table(head, rows)}"


def _confusion(rung: Rung) -> str:
    confusion: Confusion | None = rung.confusion
    if confusion is None:
        return ""
    rows = [
        [text(gold), *(f"**{n}**" if label == gold else str(n) for label, n in zip(confusion.labels, counts, strict=True))]
        for gold, counts in zip(confusion.gold, confusion.counts, strict=True)
    ]
    head = ["gold \\ answer", *(text(label) for label in confusion.labels)]
    return f"## Confusion matrix: {text(rung.title)}\n\n{table(head, rows)}"


def _questions(report: Report) -> str:
    if not report.questions:
        return ""
    rows = []
    for line in sections.asked(report):
        cells = []
        for _, answer in line.answers:
            shown = "" if answer is None else sections.said(answer, bool(report.labels))[0]
            cells.append(numbers.ABSENT if answer is None else f"{'✓' if answer.correct else '✗'} {text(_short(shown))}")
        rows.append([text(_short(line.question.text)), sections.KINDS[line.kind], text(_short(line.question.gold)), *cells])
    head = ["question", "", "gold", *(text(rung.title) for rung in report.rungs)]
    return f"## Questions, side by side\n\n{table(head, rows)}"


def _short(words: str) -> str:
    return words if len(words) <= LONG_ANSWER else f"{words[:LONG_ANSWER]} …"


def _prompts(report: Report) -> str:
    blocks = [f"### {text(rung.title)}\n\n{fenced(rung.prompt)}" for rung in report.rungs if rung.prompt]
    return "\n\n".join(["## What the model read for the first question", *blocks]) if blocks else ""


def _settings(report: Report) -> str:
    groups = [("Settings", report.settings), ("Environment", report.environment)]
    blocks = [f"## {name}\n\n{fenced(chr(10).join(f'{k}: {v}' for k, v in sections.flat(values)))}" for name, values in groups if values]
    return "\n\n".join(blocks)


def _notes(report: Report) -> str:
    return "\n".join(["## Notes", "", *(f"- {text(note)}" for note in report.notes)]) if report.notes else ""
