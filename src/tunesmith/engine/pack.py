"""Packs: whole rows laid side by side up to a token budget, with a plan of who attends to whom.

Nothing is padded and nothing crosses rows: every segment attends to itself and its ancestors only. A pack is plain
index arithmetic over rows; it knows no model.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.adapters import Route
from tunesmith.core.errors import RunError
from tunesmith.core.row import ROOT, Row, Segment
from tunesmith.engine.buckets import Bucket, Span, fill_buckets, padded_queries
from tunesmith.engine.virtual import NO_EXTRA, Extra, inserted


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a pack that go one way, and lie there one after another. route: names of adapters; None: all that are switched on.

    extra: virtual tokens among them. rows, tokens, spans: how many. leading: spans before those of the rows: one, where virtual
    tokens that all paths begin with lie there once.
    """

    route: Route | None
    extra: Extra
    rows: int
    tokens: int
    spans: int
    leading: int


@dataclass(slots=True)
class Pack:
    """Rows ready for one forward.

    ids, positions: [tokens]. source: index of the token whose hidden state predicts each target, [targets].
    target: token id, [targets]. segment: which segment (over the whole pack) each target belongs to, [targets].
    segment_row, segment_index: for each segment, its row in the pack and its index in that row. own, above: for each
    segment, the flat indices of its tokens and of its ancestors' (root first). lengths: tokens of the row (its longest
    path) for each token, [tokens], for NEFTune. back: for each token, where the concatenated bucket outputs hold its
    answer, [tokens]. unrolled: every path lies there on its own, so that models that look ahead can read it; a segment
    on several paths is then read from the first. spans: of each stretch that is attended as one, its tokens and those
    before them, like own and above: the segments, or the paths of an unrolled pack. shared: some token is a key of several
    spans. padded: the token of each padded query of all buckets, one after another; pad: places among them that are padding.
    kept: what a device's attention makes of the pack once and needs in every layer. laid: the rows as they lie in it, with the
    virtual tokens that stand within them; segments are the same ones in the same order. parts: one, or several where rows go
    through different adapters. order: place of each row among those given, [rows]; another than the given one with several parts.
    """

    rows: list[Row]
    ids: Tensor
    positions: Tensor
    source: Tensor
    target: Tensor
    segment: Tensor
    segment_row: list[int]
    segment_index: list[int]
    lengths: Tensor
    own: list[np.ndarray]
    above: list[np.ndarray]
    spans: list[Span]
    buckets: list[Bucket]
    back: Tensor
    unrolled: bool
    shared: bool
    padded: Tensor
    pad: Tensor
    laid: list[Row]
    parts: list[Part]
    order: list[int]
    kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def places(self) -> Iterator[tuple[Bucket, slice]]:
        """Each bucket, and where its queries lie among the padded ones of all buckets."""
        end = 0
        for bucket in self.buckets:
            begin, end = end, end + bucket.query.numel()
            yield bucket, slice(begin, end)

    def to(self, device: torch.device) -> Pack:
        """The same on a device; itself if it is there already."""
        if self.ids.device == device:
            return self
        names = ("ids", "positions", "source", "target", "segment", "lengths", "back", "padded", "pad")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, buckets=[bucket.to(device) for bucket in self.buckets], **moved)

    @property
    def tokens(self) -> int:
        return int(self.ids.numel())

    @property
    def segments(self) -> int:
        return len(self.segment_row)

    @property
    def mixed(self) -> bool:
        """Whether rows are told which adapters they go through."""
        return self.parts[0].route is not None

    def words(self, tokens: np.ndarray) -> np.ndarray:
        """Of these flat indices those that are no virtual tokens."""
        vocabulary = max(part.extra.vocabulary for part in self.parts)
        if not vocabulary:
            return tokens
        return tokens[self.ids[torch.from_numpy(tokens).to(self.ids.device)].cpu().numpy() < vocabulary]

    def given(self, name: str) -> Tensor | None:
        """What is given under a name at each target, [targets]; None where nothing is. Raises ValueError where some targets have none."""
        found: list[np.ndarray] = []
        missing = False
        for row, index in zip(self.segment_row, self.segment_index, strict=True):
            part = self.laid[row].segments[index]
            if part.supervised.any():
                missing = missing or name not in part.given
                found.append(part.given[name][part.supervised] if name in part.given else np.zeros(0, np.float32))
        if missing and any(len(values) for values in found):
            raise ValueError(f"'{name}' is given at some targets of the pack and not at others")
        return None if missing or not found else torch.from_numpy(np.concatenate(found)).to(self.ids.device)

    def path(self, segment: int) -> Tensor:
        """Flat indices of all tokens from the root to the end of a segment."""
        return torch.from_numpy(np.concatenate([self.above[segment], self.own[segment]])).to(self.ids.device)


def best_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Global best-fit decreasing: indices of the items of each bin. Raises RunError where one item exceeds the budget."""
    order = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    if order and sizes[order[0]] > budget:
        raise RunError(
            f"a row of {sizes[order[0]]:,} tokens does not fit in a pack of {budget:,}.",
            hints=["Raise train.pack_tokens, or lower data.max_tokens."],
        )
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for index in order:
        at = bisect.bisect_left(room, (sizes[index], -1))
        if at == len(room):
            bins.append([])
            free, number = budget, len(bins) - 1
        else:
            free, number = room.pop(at)
        bins[number].append(index)
        bisect.insort(room, (free - sizes[index], number))
    return [sorted(items) for items in bins]


def pack_rows(rows: Sequence[Row], budget: int, *, unroll: bool = False, extra: Extra = NO_EXTRA) -> list[Pack]:
    """Packs that hold all rows, each whole. Order within a pack follows the order given. What virtual tokens take that lie in a
    pack once comes on top of the budget."""
    sizes = [row_tokens(row, unroll=unroll, extra=extra) for row in rows]
    return [build_pack([rows[index] for index in items], unroll=unroll, extra=extra) for items in best_fit(sizes, budget)]


def row_tokens(row: Row, *, unroll: bool = False, extra: Extra = NO_EXTRA) -> int:
    """Tokens that a row takes in a pack."""
    laid = inserted(row, extra)
    if not unroll:
        return laid.tokens
    return unrolled_tokens(laid) + (0 if extra.shared else len(extra.root) * len(laid.leaves()))


def unrolled_tokens(row: Row) -> int:
    """Tokens of a row whose paths lie side by side, shared ones counted once a path."""
    return sum(len(row.segments[index]) for leaf in row.leaves() for index in row.path(leaf))


def build_pack(rows: Sequence[Row], *, unroll: bool = False, extra: Extra = NO_EXTRA) -> Pack:
    """One pack of these rows. unroll: every root-to-leaf path for itself, for models that see a token's continuation. extra:
    virtual tokens to put among them."""
    return _pack([(None, extra, list(range(len(rows))))], rows, unroll)


def build_mixed(rows: Sequence[Row], routes: Sequence[Route], extras: Mapping[Route, Extra], *, unroll: bool = False) -> Pack:
    """One pack of rows that each go through adapters of their own; those of one route lie together. extras: of each route."""
    together: dict[Route, list[int]] = {}
    for index, route in enumerate(routes):
        together.setdefault(route, []).append(index)
    return _pack([(route, extras[route], chosen) for route, chosen in together.items()], rows, unroll)


def _pack(groups: Sequence[tuple[Route | None, Extra, list[int]]], given: Sequence[Row], unroll: bool) -> Pack:
    """A pack of groups of rows, each (route, virtual tokens, which of the rows given)."""
    order = [index for _, _, chosen in groups for index in chosen]
    laid, layouts, parts, lengths = list[Row](), list[_Layout](), list[Part](), list[np.ndarray]()
    for route, extra, chosen in groups:
        own = [inserted(given[index], extra) for index in chosen]
        layout = _unrolled(own, extra) if unroll else _layout(own, extra)
        leading = int(len(extra.root) > 0 and (extra.shared or not unroll))
        parts.append(Part(route, extra, len(own), len(layout.ids), len(layout.spans), leading))
        lengths.append(_lengths(own, layout, len(extra.root)))
        laid += own
        layouts.append(layout)
    layout = _beside(layouts, parts)
    buckets, back = fill_buckets(layout.spans, len(layout.ids))
    source, target, owner = _targets(laid, layout)
    as_tensor = torch.from_numpy
    return Pack(
        rows=[given[index] for index in order],
        ids=as_tensor(layout.ids),
        positions=as_tensor(_concat([np.arange(len(span.own)) + len(span.above) for span in layout.spans])),
        source=as_tensor(source),
        target=as_tensor(target),
        segment=as_tensor(owner),
        segment_row=layout.row,
        segment_index=layout.index,
        lengths=as_tensor(_concat(lengths)),
        own=layout.own,
        above=layout.above,
        spans=layout.spans,
        buckets=buckets,
        back=back,
        unrolled=unroll,
        shared=any(len(span.above) for span in layout.spans),
        padded=torch.cat([bucket.query.flatten() for bucket in buckets]),
        pad=padded_queries(buckets),
        laid=laid,
        parts=parts,
        order=order,
    )


def _concat(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class _Layout:
    """Where everything lies. ids: of the flat tokens. For each segment: its tokens, its ancestors' tokens, its row and index
    in it. spans: what is attended as one, in the order of the flat tokens; span_row: the row of each, -1 for the root of all."""

    ids: np.ndarray
    own: list[np.ndarray]
    above: list[np.ndarray]
    row: list[int]
    index: list[int]
    spans: list[Span]
    span_row: list[int]


def _layout(rows: Sequence[Row], extra: Extra) -> _Layout:
    root = extra.root
    out = _Layout(np.concatenate([root, _ids([segment for row in rows for segment in row.segments])]), [], [], [], [], [], [])
    start = len(root)
    for number, row in enumerate(rows):
        first = len(out.own)
        for index, segment in enumerate(row.segments):
            own = np.arange(start, start + len(segment), dtype=np.int64)
            above = np.arange(len(root), dtype=np.int64)
            if segment.parent != ROOT:
                parent = first + segment.parent
                above = np.concatenate([out.above[parent], out.own[parent]])
            out.own.append(own)
            out.above.append(above)
            out.row.append(number)
            out.index.append(index)
            start += len(segment)
    before = [_alone(root)] if len(root) else []
    out.spans, out.span_row = before + [Span(*pair) for pair in zip(out.own, out.above, strict=True)], [-1] * len(before) + out.row
    return out


def _alone(root: np.ndarray) -> Span:
    return Span(np.arange(len(root), dtype=np.int64), np.zeros(0, dtype=np.int64))


def _unrolled(rows: Sequence[Row], extra: Extra) -> _Layout:
    """Paths side by side. A segment on several paths lies in the first of them. Virtual tokens at the start of all paths lie
    there once, if it is known that they do not look at what follows, and else in each of them."""
    out = _Layout(np.zeros(0), [], [], [], [], [], [])
    shared, each = (extra.root, extra.root[:0]) if extra.shared else (extra.root[:0], extra.root)
    pieces: list[np.ndarray] = [shared]
    start, above = len(shared), np.arange(len(shared), dtype=np.int64)
    if len(shared):
        out.spans.append(_alone(shared))
        out.span_row.append(-1)
    for number, row in enumerate(rows):
        place: dict[int, Span] = {}
        for leaf in row.leaves():
            begin, start = start, start + len(each)
            pieces.append(each)
            for index in row.path(leaf):
                end = start + len(row.segments[index])
                place.setdefault(index, Span(np.arange(start, end), np.concatenate([above, np.arange(begin, start)])))
                pieces.append(row.segments[index].ids)
                start = end
            out.spans.append(Span(np.arange(begin, start), above))
            out.span_row.append(number)
        for index in range(len(row.segments)):
            out.own.append(place[index].own)
            out.above.append(place[index].above)
            out.row.append(number)
            out.index.append(index)
    out.ids = _concat(pieces).astype(np.int64)
    return out


def _beside(layouts: Sequence[_Layout], parts: Sequence[Part]) -> _Layout:
    """Layouts one after another; itself where there is one."""
    if len(layouts) == 1:
        return layouts[0]
    out = _Layout(_concat([layout.ids for layout in layouts]), [], [], [], [], [], [])
    start = first = 0
    for layout, part in zip(layouts, parts, strict=True):
        out.own += [own + start for own in layout.own]
        out.above += [above + start for above in layout.above]
        out.row += [row + first for row in layout.row]
        out.index += layout.index
        out.spans += [Span(span.own + start, span.above + start) for span in layout.spans]
        start, first = start + part.tokens, first + part.rows
    return out


def _ids(segments: Sequence[Segment]) -> np.ndarray:
    return _concat([segment.ids for segment in segments]).astype(np.int64)


def _targets(rows: Sequence[Row], layout: _Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    source, target, owner = [], [], []
    for number, (own, above) in enumerate(zip(layout.own, layout.above, strict=True)):
        segment = rows[layout.row[number]].segments[layout.index[number]]
        at = np.flatnonzero(segment.supervised)
        if len(at) and at[0] + len(above) == 0:
            raise ValueError("the first token of a path cannot be supervised: nothing predicts it")
        path = np.concatenate([above, own])
        source.append(path[at + len(above) - 1])
        target.append(segment.ids[at].astype(np.int64))
        owner.append(np.full(len(at), number, dtype=np.int64))
    return _concat(source), _concat(target), _concat(owner)


def _lengths(rows: Sequence[Row], layout: _Layout, root: int) -> np.ndarray:
    longest = [0] * len(rows) + [root + 1]  # the last one for the root of all, whose row is -1
    for span, row in zip(layout.spans, layout.span_row, strict=True):
        longest[row] = max(longest[row], len(span.above) + len(span.own) - root)
    return _concat([np.full(len(span.own), longest[row], dtype=np.int64) for span, row in zip(layout.spans, layout.span_row, strict=True)])
