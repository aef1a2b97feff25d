"""A dialogue laid out as text (a plan), and the same as token ids with its mask (rendered)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from tunesmith.data.encoding import Encoded, Piece
from tunesmith.data.layout import Span


@dataclass(frozen=True, slots=True)
class Rendered:
    """A dialogue as a model reads it.

    ids: [tokens]. supervised: True where the token is a target, [tokens]. text: what the ids encode. turns: token spans
    (start, end) of the supervised turns, end-of-turn token included. prompt_length: tokens before the last assistant turn
    (all, if there is none). cuttable: token spans of contents that may be shortened, in the order in which to shorten them:
    oldest first, system turns last. notes: decisions a reader must know.
    """

    ids: list[int]
    supervised: list[bool]
    text: str
    turns: list[Span]
    notes: tuple[str, ...] = ()
    prompt_length: int = 0
    cuttable: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A dialogue laid out as text: what remains is to encode it. turns: message indices of the turns to supervise."""

    pieces: list[Piece]
    turns: frozenset[int]
    last: int
    contents: list[Span] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def assemble(plan: Plan, encoded: Sequence[Encoded]) -> Rendered:
    """The plan's tokens, mask and spans, from the encoding of its pieces."""
    ids: list[int] = []
    supervised: list[bool] = []
    offsets: list[Span] | None = []
    turns: dict[int, Span] = {}
    prompt_length = None
    for piece, part in zip(plan.pieces, encoded, strict=True):
        start = len(ids)
        if piece.turn == plan.last >= 0 and prompt_length is None:
            prompt_length = start
        ids.extend(part.ids)
        target = piece.supervised and piece.turn in plan.turns
        supervised.extend([target] * len(part.ids))
        if target:
            turns[piece.turn] = (turns.get(piece.turn, (start, start))[0], len(ids))
        offsets = None if offsets is None or part.offsets is None else offsets + part.offsets
    cuttable = tuple(_tokens_inside(offsets, plan.contents)) if offsets else ()
    text = "".join(piece.text for piece in plan.pieces)
    length = len(ids) if prompt_length is None else prompt_length
    return Rendered(ids, supervised, text, list(turns.values()), plan.notes, length, cuttable)


def _tokens_inside(offsets: list[Span], spans: Sequence[Span]) -> list[Span]:
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    found = ((bisect_left(starts, start), bisect_right(ends, end)) for start, end in spans)
    return [(first, last) for first, last in found if first < last]
