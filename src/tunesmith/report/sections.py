"""The tables of the page: confusions, classes, questions, prompts and settings, arranged for reading."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup, escape

from tunesmith.report import verdict
from tunesmith.report.schema import Answer, Confusion, Question, Report, Rung, Versus

WIDE_LABELS = 14
TOP_CONFUSIONS = 12

Kind = Literal["won", "lost", "mixed", "wrong", "right"]
KINDS: dict[Kind, str] = {"won": "Won", "lost": "Lost", "mixed": "Rungs disagree", "wrong": "All wrong", "right": "All right"}

_SPECIAL = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk|mask|start_of_turn|end_of_turn|think|/think)>|\[/?INST\]|\[(?:CLS|SEP|MASK|PAD)\]|<<?/?SYS>>?|<[|｜][^<>\n]{1,40}[|｜]>"
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One line of the paired table: a rung against another, and what the other is to it."""

    rung: Rung
    versus: Versus
    against: str
    first_of_rung: bool
    share_won: float


@dataclass(frozen=True, slots=True)
class Cell:
    count: int
    share: float
    right: bool


@dataclass(frozen=True, slots=True)
class Matrix:
    """A confusion matrix with each cell's share of its gold class. mistakes: the most frequent confusions, in words.

    A column for answers that are no label ('(unparseable)') is kept only where there was one.
    """

    rung: Rung
    labels: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    mistakes: tuple[tuple[str, str, int], ...]

    @property
    def wide(self) -> bool:
        return len(self.labels) > WIDE_LABELS


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with every rung's answer, in the order of the rungs."""

    question: Question
    kind: Kind
    answers: tuple[tuple[Rung, Answer | None], ...]


def comparisons(report: Report) -> list[Comparison]:
    """Every paired comparison: with the rung before, and with the best before where that is another one."""
    lines: list[Comparison] = []
    titles = {rung.name: rung.title for rung in report.rungs}
    for rung in report.rungs:
        made: list[Versus] = [versus for versus in (rung.versus_previous, rung.versus_best_before) if versus]
        if len(made) == 2 and made[0].rung == made[1].rung:
            made.pop()
        for index, versus in enumerate(made):
            decided = versus.wins + versus.losses
            share = round(versus.wins / decided * 100, 2) if decided else 50.0
            lines.append(Comparison(rung, versus, titles.get(versus.rung, versus.rung), index == 0, share))
    return lines


def matrices(report: Report) -> tuple[list[Matrix], list[Matrix]]:
    """The matrices to show (the recommended rung beside its rival) and the others."""
    concluded = verdict.conclude(report)
    shown = [rung for rung in (concluded.rival, concluded.rung) if rung and rung.confusion]
    others = [rung for rung in report.rungs if rung.confusion and not any(rung is one for one in shown)]
    return [_matrix(rung, rung.confusion) for rung in shown if rung.confusion], [
        _matrix(rung, rung.confusion) for rung in others if rung.confusion
    ]


def _matrix(rung: Rung, confusion: Confusion) -> Matrix:
    given = [sum(column) for column in zip(*confusion.counts, strict=True)]
    kept = [column for column, label in enumerate(confusion.labels) if given[column] or label in confusion.gold]
    labels = tuple(confusion.labels[column] for column in kept)
    rows = []
    mistakes = []
    for gold, counts in zip(confusion.gold, confusion.counts, strict=True):
        size = sum(counts)
        cells = tuple(Cell(counts[at], counts[at] / size if size else 0.0, confusion.labels[at] == gold) for at in kept)
        rows.append((gold, cells))
        mistakes += [(gold, label, cell.count) for label, cell in zip(labels, cells, strict=True) if cell.count and not cell.right]
    mistakes.sort(key=lambda mistake: -mistake[2])
    return Matrix(rung, labels, tuple(rows), tuple(mistakes[:TOP_CONFUSIONS]))


def classes(report: Report) -> list[tuple[str, int, list[float | None]]]:
    """F1 by class and rung: (label, questions of that class, F1 of each rung or None)."""
    order: dict[str, int] = {}
    for rung in report.rungs:
        for score in rung.classes:
            order.setdefault(score.label, score.support)
    table = []
    for label, support in order.items():
        by_rung: list[float | None] = []
        for rung in report.rungs:
            found = [score.f1 for score in rung.classes if score.label == label]
            by_rung.append(found[0] if found else None)
        table.append((label, support, by_rung))
    return table


def asked(report: Report) -> list[Asked]:
    """The sample questions: what the recommended rung wins over its rival, what it loses, where rungs disagree, the rest."""
    concluded = verdict.conclude(report)
    lines = []
    for question in report.questions:
        answers = tuple((rung, question.answers.get(rung.name)) for rung in report.rungs)
        lines.append(Asked(question, _kind(question, concluded), answers))
    order = list(KINDS)
    return sorted(lines, key=lambda line: order.index(line.kind))


def _kind(question: Question, concluded: verdict.Verdict) -> Kind:
    ours = question.answers.get(concluded.rung.name)
    theirs = question.answers.get(concluded.rival.name) if concluded.rival else None
    if ours and theirs and ours.correct != theirs.correct:
        return "won" if ours.correct else "lost"
    right = {answer.correct for answer in question.answers.values()}
    if len(right) > 1:
        return "mixed"
    return "right" if True in right else "wrong"


def said(answer: Answer, labels: bool) -> tuple[str, str]:
    """What to show of an answer: the label (or the text, where there are no labels), and the text where it says more."""
    if not labels:
        return answer.text, ""
    if answer.label is None:
        return "(unparseable)", answer.text
    same = answer.text.strip().casefold() == answer.label.strip().casefold()
    return answer.label, "" if same else answer.text


def visible(prompt: str) -> Markup:
    """A prompt as HTML in which special tokens, line ends and trailing spaces can be seen; copying gives the exact text."""
    return Markup("\n").join(_visible_line(line) for line in _mark_line_ends(prompt))


def _mark_line_ends(prompt: str) -> list[tuple[str, bool]]:
    lines = prompt.split("\n")
    return [(line, index < len(lines) - 1) for index, line in enumerate(lines)]


def _visible_line(line: tuple[str, bool]) -> Markup:
    text, ends = line
    kept = text.rstrip(" ")
    html = Markup("")
    at = 0
    for found in _SPECIAL.finditer(kept):
        html += escape(kept[at : found.start()]) + Markup('<span class="token">{}</span>').format(found.group())
        at = found.end()
    html += escape(kept[at:])
    if len(kept) < len(text):
        html += Markup('<span class="space">{}</span>').format(text[len(kept) :])
    return html + Markup('<span class="end"></span>') if ends else html


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as dotted keys and written values."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            lines += flat(value, f"{name}.")
        else:
            lines.append((name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)))
    return lines
