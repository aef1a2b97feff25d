"""Rows and dialogues that are too long: counted, refused, dropped or shortened, never cut in silence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from tunesmith.core.errors import DataError, unknown
from tunesmith.core.record import Message
from tunesmith.core.row import Row, Segment
from tunesmith.data.rendering import Renderer, Tools, renderer_for
from tunesmith.data.textrow import TextRow

Policy = Literal["error", "drop", "truncate-left-of-prompt"]

_SHOWN = 5
_CHARACTER = 4  # tokens that one character may span at most in a byte-level vocabulary


@dataclass(frozen=True, slots=True)
class LengthReport:
    """What a length limit did. longest: tokens on the longest path before. examples: where the first over-long rows are from."""

    policy: Policy
    max_tokens: int
    rows: int
    kept: int
    dropped: int = 0
    truncated: int = 0
    tokens_cut: int = 0
    longest: int = 0
    examples: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        if not self.dropped and not self.truncated:
            return f"{self.rows:,} rows, the longest {self.longest:,} of {self.max_tokens:,} tokens"
        what = (
            f"{self.dropped:,} dropped" if self.dropped else f"{self.truncated:,} shortened by {self.tokens_cut:,} tokens of their prompts"
        )
        return f"{self.rows:,} rows, {what} (over {self.max_tokens:,} tokens; the longest had {self.longest:,})"


def longest_path(row: Row) -> int:
    """Tokens on a row's longest path from root to leaf: what the model's context has to hold."""
    return max((sum(len(row.segments[part]) for part in row.path(leaf)) for leaf in row.leaves()), default=0)


def fit(rows: Sequence[Row], max_tokens: int, policy: Policy = "error", tokenizer: Any = None) -> tuple[list[Row], LengthReport]:
    """Rows of which no path is longer than `max_tokens`, and what was done for it; see `Limit`.

    Raises DataError where a row is too long and cannot be shortened, and where nothing is left.
    """
    limit = Limit(max_tokens, policy, tokenizer)
    kept = limit.part(rows)
    return kept, limit.report()


class Limit:
    """A length limit on rows that come in parts. over: the over-long rows so far.

    "error" refuses over-long rows. "drop" leaves them out. "truncate-left-of-prompt" removes tokens from the left of the
    contents of turns, the oldest turn first and system turns last; what the template wrote (bos, headers, the answer
    header) and every supervised token stay. With a tokenizer no character is cut in half.
    """

    def __init__(self, max_tokens: int, policy: Policy = "error", tokenizer: Any = None) -> None:
        if policy not in get_args(Policy):
            raise unknown("length policy", policy, get_args(Policy))
        self.max_tokens, self.policy, self.tokenizer = max_tokens, policy, tokenizer
        self.rows = self.over = self.longest = self._cut = 0
        self._shown: list[tuple[str, int]] = []  # the first over-long rows: where they are from, and their tokens

    def part(self, rows: Sequence[Row]) -> list[Row]:
        """The rows of this part that may be used. Raises DataError where one has to be shortened and cannot be."""
        kept = []
        for row in rows:
            self.rows += 1
            length = longest_path(row)
            self.longest = max(self.longest, length)
            if length <= self.max_tokens:
                kept.append(row)
                continue
            self.over += 1
            if len(self._shown) < _SHOWN:
                self._shown.append((row.where or f"row {self.rows}", length))
            if self.policy == "truncate-left-of-prompt":
                kept.append(_shorten(row, length, self.max_tokens, self.tokenizer))
                self._cut += length - longest_path(kept[-1])
        return kept

    def report(self) -> LengthReport:
        """What was done, all parts together. Raises DataError for over-long rows under "error", and where all were dropped."""
        if self.over and self.policy == "error":
            raise self._too_long()
        dropped = self.over if self.policy == "drop" else 0
        if dropped and dropped == self.rows:
            raise DataError(f"all {self.rows} rows are longer than {self.max_tokens} tokens.", hints=[f"The longest has {self.longest}."])
        return LengthReport(
            self.policy,
            self.max_tokens,
            self.rows,
            self.rows - dropped,
            dropped=dropped,
            truncated=self.over - dropped,
            tokens_cut=self._cut,
            longest=self.longest,
            examples=tuple(where for where, _ in self._shown),
        )

    def _too_long(self) -> DataError:
        where, length = self._shown[0]
        listed = "; ".join(f"{place} ({tokens})" for place, tokens in self._shown)
        return DataError(
            f"{self.over} of {self.rows} rows are longer than {self.max_tokens} tokens; the first has {length}.",
            where=where,
            hints=[
                f"Too long: {listed}{' ...' if self.over > _SHOWN else ''}",
                f"Allow more tokens ({self.longest} hold all), or choose a policy: drop, truncate-left-of-prompt",
            ],
        )


def _shorten(row: Row, length: int, max_tokens: int, tokenizer: Any) -> Row:
    spans = row.cuttable if isinstance(row, TextRow) else ()
    root = row.segments[0]
    excess = length - max_tokens
    keep = np.ones(len(root), np.bool_)
    left: list[tuple[int, int]] = []
    for start, end in spans:
        if root.supervised[start:end].any():
            continue
        stop = start + min(excess, end - start)
        stop = _whole_character(root, stop, end, tokenizer) if start < stop < end else stop
        keep[start:stop] = False
        excess -= stop - start
        left.append((stop, end))
        if excess <= 0:
            break
    if excess > 0 or _bare(row, keep):
        most = sum(end - start for start, end in spans)
        raise DataError(
            f"the row has {length} tokens, and shortening its prompt cannot bring it to {max_tokens}.",
            where=row.where,
            hints=[
                f"The contents of its prompt are {most} tokens; {length - most} are the answer and the template's own.",
                "Policy drop leaves it out.",
            ],
        )
    segments = (root.part(keep), *row.segments[1:])
    places = np.concatenate([[0], np.cumsum(keep)])
    remaining = [*left, *spans[len(left) :]]
    moved = tuple((int(places[start]), int(places[end])) for start, end in remaining if start < end)
    return TextRow(segments, row.where, cuttable=moved, notes=(*_notes(row), "the prompt was shortened from the left"))


def _bare(row: Row, keep: np.ndarray) -> bool:
    """Would a path begin with a token that is learned, with nothing left to predict it from?"""
    if keep.any():
        return bool(row.segments[0].supervised[keep][0])
    return any(part.parent == 0 and bool(part.supervised[:1].any()) for part in row.segments)


def _notes(row: Row) -> tuple[str, ...]:
    return row.notes if isinstance(row, TextRow) else ()


def _whole_character(root: Segment, stop: int, end: int, tokenizer: Any) -> int:
    """The cut moved right until what remains does not begin within a character."""
    if tokenizer is None:
        return stop
    for place in range(stop, min(stop + _CHARACTER, end)):
        if not tokenizer.decode(root.ids[place:end][:8].tolist(), clean_up_tokenization_spaces=False).startswith("\ufffd"):
            return place
    return stop


def drop_oldest_turns(
    tokenizer: Any,
    messages: Sequence[Message],
    max_tokens: int,
    *,
    tools: Tools | None = None,
    template: str | Path | None = None,
    renderer: Renderer | None = None,
) -> tuple[list[Message], int]:
    """The dialogue without its oldest exchanges, so that it fits, and how many messages were dropped.

    An exchange is a user turn and all that answers it (assistant turns, tool calls and results); exchanges go whole. What
    stands before the first user turn (system turns) and the last exchange stay. The length is that of the prompt, or of the
    whole dialogue where it ends with an assistant turn. Raises DataError where the last exchange alone is too long.
    """
    renderer = renderer or renderer_for(tokenizer, template)
    starts = [index for index, message in enumerate(messages) if message.get("role") == "user"] or [len(messages)]
    head = [message for message in messages[: starts[0]] if message.get("role") != "assistant"]
    length = 0
    for start in [0, *starts[1:]]:
        left = [*head, *messages[start:]] if start else list(messages)
        ends_open = bool(left) and left[-1].get("role") != "assistant"
        length = len(renderer.render(left, tools=tools, supervise="none", generation_prompt=ends_open).ids)
        if length <= max_tokens:
            return left, len(messages) - len(left)
    raise DataError(
        f"the last exchange alone is {length} tokens, more than {max_tokens}.",
        hints=["Allow more tokens, or shorten the last user turn: it is never dropped."],
    )
