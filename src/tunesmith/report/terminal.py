"""The report as a table for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.report import numbers, verdict
from tunesmith.report.schema import Report, Rung, VerdictWord

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

STYLES: dict[VerdictWord, str] = {"better": "green", "worse": "red", "equivalent": "dim", "undecided": "yellow"}


def to_table(report: Report) -> Table:
    """One line a rung: score with interval, cost, and the verdict against the best rung before it. Fits 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    concluded = verdict.conclude(report)
    title, caption = Text(concluded.headline), Text(report.recommendation.reason)
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, title_style="bold", show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("rung", min_width=17, overflow="fold")
    for column in (numbers.scale_of(report).name, "95 %", "tokens", "time"):
        table.add_column(Text(column), justify="right", no_wrap=True)
    table.add_column("training", justify="right")
    table.add_column("vs best before", min_width=15, no_wrap=True)
    for rung in report.rungs:
        chosen = rung is concluded.rung
        table.add_row(*_cells(report, rung, chosen), style="bold" if chosen else None)
    return table


def _cells(report: Report, rung: Rung, chosen: bool) -> list[Text]:
    from rich.text import Text

    scale = numbers.scale_of(report)
    cells = [
        f"{rung.title} ●" if chosen else rung.title,
        scale.score(rung.accuracy),
        scale.short_bounds(rung.ci_low, rung.ci_high),
        numbers.count(rung.prompt_tokens_per_answer + rung.completion_tokens_per_answer),
        numbers.duration(rung.seconds_per_answer),
        numbers.duration(rung.train_seconds),
    ]
    return [*(Text(cell) for cell in cells), _against(rung, scale)]


def _against(rung: Rung, scale: numbers.Scale) -> Text:
    from rich.text import Text

    made = rung.versus_best_before or rung.versus_previous
    if made is None:
        return Text("")
    line = Text(f"{verdict.GLYPHS[made.verdict]} {made.verdict}", style=STYLES[made.verdict])
    line.append(f"\n{scale.short_gain(made.difference)}, {numbers.p_value(made.p_adjusted).replace(' ', '')}", style="not bold default")
    if made.verdict == "undecided" and made.questions_needed:
        line.append(f"\nneeds {made.questions_needed:,} more", style="not bold default")
    return line
