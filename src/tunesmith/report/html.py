"""The report as one HTML file that opens offline.

Pictures are SVG drawn by the template, without a script: the page's own content security policy forbids scripts and every
request, so a page that is forwarded, archived or served from a strict host shows the same.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from tunesmith.report import figures, numbers, sections, verdict
from tunesmith.report.schema import Report

COMPACT_RUNGS = 6

if TYPE_CHECKING:
    from jinja2 import Template


def to_html(report: Report) -> str:
    """The page. All text of the report is escaped. Raises DataError where no rung was measured."""
    shown, others = sections.matrices(report)
    trained = [(rung, figures.curves(report, rung)) for rung in report.rungs if rung.curve]
    asked = sections.asked(report)
    return _template().render(
        report=report,
        scale=numbers.scale_of(report),
        verdict=verdict.conclude(report),
        accuracy=figures.accuracy(report),
        costs=[figures.tokens(report), figures.seconds(report)],
        comparisons=sections.comparisons(report),
        curves=[(rung, drawn) for rung, drawn in trained if drawn],
        matrices=shown,
        other_matrices=others,
        classes=sections.classes(report),
        asked=asked,
        compact=bool(report.labels) and len(report.rungs) <= COMPACT_RUNGS,
        kinds=[(kind, name, n) for kind, name in sections.KINDS.items() if (n := sum(line.kind == kind for line in asked))],
        prompts=[rung for rung in report.rungs if rung.prompt],
        shows_unparseable=bool(report.labels) or any(rung.unparseable for rung in report.rungs),
        shows_macro_f1=any(rung.classes for rung in report.rungs),
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tunesmith.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        bound=numbers.bound,
        count=numbers.count,
        duration=numbers.duration,
        memory=numbers.memory,
        moment=numbers.moment,
        parameters=numbers.parameters,
        p=numbers.p_value,
        sentence=verdict.sentence,
        visible=sections.visible,
        flat=sections.flat,
        said=sections.said,
    )
    environment.globals.update(glyphs=verdict.GLYPHS, kind_names=sections.KINDS)
    return environment.get_template("report.html.j2")
