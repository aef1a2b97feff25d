"""The `tunesmith` command. Frameworks are imported when a verb runs, so that help is there at once."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tunesmith import __version__
from tunesmith.cli import (
    adapter,
    chat,
    climb,
    compare,
    data,
    demo,
    doctor,
    evaluate,
    generate,
    judge,
    methods,
    objectives,
    pairs,
    pipeline,
    plan,
    sites,
    train,
)
from tunesmith.cli.common import Session, complain
from tunesmith.core.errors import TunesmithError

_QUIET = ("--quiet", "-q")


class House(TyperGroup):
    """The verbs in the order of their use; a user's mistake is told without a traceback, and a bug keeps its own."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`--quiet` is understood wherever it stands before `--`."""
        end = args.index("--") if "--" in args else len(args)
        head = [word for word in args[:end] if word not in _QUIET]
        asked = ["--quiet"] if len(head) < end else []
        return super().parse_args(ctx, [*asked, *head, *args[end:]])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TunesmithError as error:
            complain(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=House,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tunesmith {__version__}")
        raise typer.Exit


@app.callback()
def _everywhere(
    ctx: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only results and errors.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Adapts a language model to a task and proves, with numbers, which adaptation was worth it.

    Results go to stdout, progress to stderr.

    Example:
      tunesmith demo
    """
    ctx.obj = Session(quiet)


app.command("demo")(demo.demo)
app.command("climb")(climb.climb)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("pipeline")(pipeline.pipeline)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.add_typer(data.app, name="data")
app.command("pairs")(pairs.pairs)
app.add_typer(judge.app, name="judge")
app.add_typer(adapter.app, name="adapter")
app.command("export")(adapter.export)
app.command("methods")(methods.methods)
app.command("objectives")(objectives.objectives)
app.command("sites")(sites.sites)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """What the console script runs. Exit codes: 0, 2 for a mistake, 3 for a run that cannot go on, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal without Unicode gets question marks, not a crash
    try:
        app()
    except SystemExit as end:
        if "tunesmith.engine.processes" in sys.modules:  # otherwise nobody trained with others
            from tunesmith.engine.processes import leave

            leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
