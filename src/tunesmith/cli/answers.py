"""`tunesmith data show` of preference data: prompts with their answers, and what is known of them together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from tunesmith.core.record import Message, Record
    from tunesmith.core.row import Row
    from tunesmith.data.rendering import Rendered, Renderer
    from tunesmith.spec import Spec


def show_answers(
    console: Console,
    described: Spec,
    reading: tuple[Any, Renderer] | None,
    records: Sequence[Record],
    source: str,
    shown: int,
    counted: int,
) -> None:
    """Show the first records, and count over all. reading: (tokenizer, renderer) to show tokens, None to show words.

    shown: records to show. counted: records that are counted in tokens, at most.
    """
    if reading is None:
        for record in records[:shown]:
            _show_words(console, record)
    else:
        _show_tokens(console, described, *reading, records, shown, counted)
    _show_counts(console, records)
    if reading is None:
        console.print(f"Name a base to see tokens:  tunesmith data show {source} --base BASE", soft_wrap=True)


def _show_counts(console: Console, records: Sequence[Record]) -> None:
    from tunesmith.data.comparing import compared

    asked = [record for record in records if record.shape == "question"]
    if asked:
        console.print(f"questions: {len(asked):,} · with their answer: {sum(bool(record.answers) for record in asked):,}", soft_wrap=True)
    if len(asked) < len(records):
        for line in compared(records).lines():
            console.print(line, soft_wrap=True)


def _show_words(console: Console, record: Record) -> None:
    console.print(_headline(record), soft_wrap=True)
    for message in record.messages:
        _show_turn(console, str(message.get("role")), message, "not bold dim")
    for name, answer in zip(_names(record), record.answers, strict=True):
        for message in answer:
            _show_turn(console, name, message, "green" if name in ("chosen", "good", "1", "answer") else "red")
    console.print()


def _headline(record: Record) -> Text:
    """Where a record stands, and how sure its order is."""
    from rich.text import Text

    known = {"margin": record.margin, "probability": record.soft if record.soft not in (None, 1.0) else None}
    said = " · ".join(f"{name} {value:g}" for name, value in known.items() if value is not None)
    return Text(f"── {record.where} ──", style="bold").append(f"  {said}" if said else "", style="not bold dim")


def _show_turn(console: Console, name: str, message: Message, style: str) -> None:
    from rich.text import Text

    text = Text(f"{name}: ", style="bold")
    text.append(str(message.get("content") or message.get("tool_calls") or ""), style=style)
    console.print(text, soft_wrap=True)


def _names(record: Record) -> list[str]:
    if record.shape == "rated":
        return ["good" if record.good else "bad"]
    if record.shape == "question":
        return ["answer"] * len(record.answers)
    tie = " (a tie)" if record.soft == 0.5 else ""
    if len(record.answers) == 2:
        return [f"chosen{tie}", f"rejected{tie}"]
    return [f"{place}" for place in range(1, len(record.answers) + 1)]


def _show_tokens(
    console: Console, described: Spec, tokenizer: Any, renderer: Renderer, records: Sequence[Record], shown: int, counted: int
) -> None:
    from tunesmith.data.lengths import longest_path
    from tunesmith.data.rendering import Rendered
    from tunesmith.data.rows import notes_of
    from tunesmith.data.view import coloured, plain

    made = list(_rows(described, tokenizer, renderer, records[:counted]))
    for record, row in zip(records[:shown], made, strict=False):
        console.print(_headline(record), soft_wrap=True)
        console.print(coloured(tokenizer, row) if console.is_terminal else plain(tokenizer, row), soft_wrap=True)
        console.print()
    sizes = [(len(row.ids), len(row.ids)) if isinstance(row, Rendered) else (row.tokens, longest_path(row)) for row in made]
    some = f" (the first {len(made):,} of {len(records):,} samples)" if len(made) < len(records) else ""
    longest = max(path for _, path in sizes)
    total = sum(tokens for tokens, _ in sizes)
    console.print(f"{len(made):,} rows{some} · {total:,} tokens · longest prompt with its answer {longest:,} tokens", soft_wrap=True)
    limit = described.data.max_tokens
    if limit is not None and (over := sum(path > limit for _, path in sizes)):
        console.print(
            f"{over:,} rows are over data.max_tokens={limit:,}; with data.overlong={described.data.overlong} training would say so."
        )
    for note, count in notes_of(row for row in made if not isinstance(row, Rendered)).items():
        console.print(f"note: {note} ({count:,} rows)", style="yellow", soft_wrap=True)


def _rows(described: Spec, tokenizer: Any, renderer: Renderer, records: Sequence[Record]) -> Iterator[Row | Rendered]:
    """Records as training reads them, in the task's frame; a rated answer without the one it is held against, a question as its prompt."""
    from tunesmith.bases.kinds import decide_kind, read_config
    from tunesmith.data.preferences import preference_rows, scored_rows
    from tunesmith.data.rows import iter_rows
    from tunesmith.evaluation.choosing import framed
    from tunesmith.evaluation.task import make_task
    from tunesmith.ladder.data import as_messages

    task, where = make_task(described.task, records), described.base.model
    kind = decide_kind(read_config(Path(tokenizer.name_or_path), where, remote_code=described.base.trust_remote_code), "auto", where)
    for record in records:
        asked = record if kind == "encoder" else framed(task, record)
        if record.shape == "question":
            yield renderer.prompt(asked.messages, tools=record.tools or None)
        elif record.shape == "rated":
            whole = as_messages(asked, (*asked.messages, *record.answers[0]))
            yield from iter_rows(tokenizer, [whole], supervise="last", renderer=renderer)
        elif kind == "encoder":
            yield from scored_rows(kind, renderer, [asked])
        else:
            yield from preference_rows(renderer, [asked])
