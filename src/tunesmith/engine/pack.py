"""Packs: whole rows laid side by side up to a token budget, with a plan of who attends to whom.

Nothing is padded and nothing crosses rows: every segment attends to itself and its ancestors only. A pack is plain
index arithmetic over rows; it knows no model.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.errors import RunError
from tunesmith.core.row import ROOT, Row, Segment
from tunesmith.engine.virtual import NO_EXTRA, Extra, inserted

_PAD_WASTE = 1.3
"""A bucket is closed when padding would make its attention cost more than this times the exact cost."""


LONG = 640 * 640
"""Queries x keys from which saved probabilities cost more memory than computing them again costs time."""


@dataclass(slots=True)
class Bucket:
    """Segments of similar size, attended to in one batched product.

    query: token indices, [segments, queries]; key: token indices, [segments, keys]; padded with 0.
    query_at, key_at: positions on the path, same shapes; padded keys have a position that nothing may see.
    pad: flat indices of the padded queries.
    """

    query: Tensor
    key: Tensor
    query_at: Tensor
    key_at: Tensor
    pad: Tensor
    _allowed: dict[tuple[bool, int | None], Tensor] = field(default_factory=dict)
    _unseen: dict[tuple[bool, int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def allowed(self, causal: bool, window: int | None) -> Tensor:
        """[segments, queries, keys]: True where the query may see the key."""
        name = (causal, window)
        if name not in self._allowed:
            distance = self.query_at[:, :, None] - self.key_at[:, None, :]
            seen = (self.key_at >= 0)[:, None, :].expand(distance.shape)
            if causal:
                seen = seen & (distance >= 0)
            if window is not None:
                seen = seen & (distance.abs() < window)
            self._allowed[name] = seen.contiguous()
        return self._allowed[name]

    def unseen(self, causal: bool, window: int | None, dtype: torch.dtype) -> Tensor:
        """[segments, queries, keys]: to be added to scores: 0 where the query may see the key, else minus infinity."""
        name = (causal, window, dtype)
        if name not in self._unseen:
            nothing = torch.zeros(self.query.shape[0], self.query.shape[1], self.key.shape[1], dtype=dtype, device=self.query.device)
            self._unseen[name] = nothing.masked_fill_(~self.allowed(causal, window), float("-inf"))
        return self._unseen[name]

    @property
    def long(self) -> bool:
        """Whether its probabilities take more memory to keep than time to compute again."""
        return self.query.shape[1] * self.key.shape[1] > LONG

    def to(self, device: torch.device) -> Bucket:
        """The same on a device."""
        query, key, query_at, key_at, pad = (x.to(device) for x in (self.query, self.key, self.query_at, self.key_at, self.pad))
        return Bucket(query, key, query_at, key_at, pad)


class Span(NamedTuple):
    """Tokens that are attended as one, and the tokens that they continue; flat indices, in order."""

    own: np.ndarray
    above: np.ndarray


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
    kept: what a device's attention makes of the pack once and needs in every layer. extra: virtual tokens in it. laid: the rows
    as they lie in it, with the virtual tokens that stand within them; segments are the same ones in the same order.
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
    extra: Extra
    laid: list[Row]
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
    def leading(self) -> int:
        """Spans before those of the rows: one, where virtual tokens that all paths begin with lie there once."""
        return int(len(self.extra.root) > 0 and (self.extra.shared or not self.unrolled))

    def words(self, tokens: np.ndarray) -> np.ndarray:
        """Of these flat indices those that are no virtual tokens."""
        if not self.extra:
            return tokens
        return tokens[self.ids[torch.from_numpy(tokens).to(self.ids.device)].cpu().numpy() < self.extra.vocabulary]

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
    laid = [inserted(row, extra) for row in rows]
    layout = _unrolled(laid, extra) if unroll else _layout(laid, extra)
    buckets, back = _buckets(layout.spans, len(layout.ids))
    source, target, owner = _targets(laid, layout)
    as_tensor = torch.from_numpy
    return Pack(
        rows=list(rows),
        ids=as_tensor(layout.ids),
        positions=as_tensor(_concat([np.arange(len(span.own)) + len(span.above) for span in layout.spans])),
        source=as_tensor(source),
        target=as_tensor(target),
        segment=as_tensor(owner),
        segment_row=layout.row,
        segment_index=layout.index,
        lengths=as_tensor(_lengths(rows, layout, len(extra.root))),
        own=layout.own,
        above=layout.above,
        spans=layout.spans,
        buckets=buckets,
        back=back,
        unrolled=unroll,
        shared=any(len(span.above) for span in layout.spans),
        padded=torch.cat([bucket.query.flatten() for bucket in buckets]),
        pad=_pads(buckets),
        extra=extra,
        laid=laid,
    )


def _pads(buckets: Sequence[Bucket]) -> Tensor:
    """Places of the padded queries among those of all buckets."""
    starts = np.cumsum([0, *(bucket.query.numel() for bucket in buckets)])
    return torch.cat([bucket.pad + int(start) for bucket, start in zip(buckets, starts, strict=False)])


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


def _buckets(spans: Sequence[Span], tokens: int) -> tuple[list[Bucket], Tensor]:
    sizes = [(len(span.above) + len(span.own), len(span.own)) for span in spans]
    order = sorted((index for index, size in enumerate(sizes) if size[1]), key=lambda index: sizes[index])
    groups: list[list[int]] = []
    exact = 0
    for index in order:
        keys, queries = sizes[index]
        if groups:
            group = groups[-1]
            widest = max(queries, *(sizes[i][1] for i in group))
            if keys * widest * (len(group) + 1) <= _PAD_WASTE * (exact + keys * queries):
                group.append(index)
                exact += keys * queries
                continue
        groups.append([index])
        exact = keys * queries
    back = np.zeros(tokens, dtype=np.int64)
    buckets, offset = [], 0
    for group in groups:
        buckets.append(_bucket([spans[index] for index in group], back, offset))
        offset += buckets[-1].query.numel()
    return buckets, torch.from_numpy(back)


def _bucket(group: Sequence[Span], back: np.ndarray, offset: int) -> Bucket:
    queries = max(len(span.own) for span in group)
    keys = max(len(span.above) + len(span.own) for span in group)
    query, key = np.zeros((len(group), queries), np.int64), np.zeros((len(group), keys), np.int64)
    query_at, key_at = np.zeros_like(query), np.full_like(key, -1)
    padded = np.ones((len(group), queries), bool)
    for at, (own, above) in enumerate(group):
        n, m = len(own), len(above)
        query[at, :n], key[at, :m], key[at, m : m + n] = own, above, own
        query_at[at, :n], query_at[at, n:], key_at[at, : m + n] = np.arange(m, m + n), m, np.arange(m + n)
        padded[at, :n] = False
        back[own] = offset + at * queries + np.arange(n)
    as_tensor = torch.from_numpy
    pad = as_tensor(np.flatnonzero(padded.ravel()))
    return Bucket(as_tensor(query), as_tensor(key), as_tensor(query_at), as_tensor(key_at), pad)
