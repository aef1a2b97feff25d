"""Packs: whole rows laid side by side up to a token budget, with a plan of who attends to whom.

Nothing is padded and nothing crosses rows: every segment attends to itself and its ancestors only. A pack is plain
index arithmetic over rows; it knows no model.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.errors import RunError
from tunesmith.core.row import ROOT, Row

_PAD_WASTE = 1.3
"""A bucket is closed when padding would make its attention cost more than this times the exact cost."""


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

    def to(self, device: torch.device) -> Bucket:
        """The same on a device."""
        query, key, query_at, key_at, pad = (x.to(device) for x in (self.query, self.key, self.query_at, self.key_at, self.pad))
        return Bucket(query, key, query_at, key_at, pad)


@dataclass(slots=True)
class Pack:
    """Rows ready for one forward.

    ids, positions: [tokens]. source: index of the token whose hidden state predicts each target, [targets].
    target: token id, [targets]. segment: which segment (over the whole pack) each target belongs to, [targets].
    segment_row, segment_index: for each segment, its row in the pack and its index in that row. lengths: tokens of
    the row (its longest path) for each token, [tokens], for NEFTune. back: for each token, where the concatenated bucket
    outputs hold its answer, [tokens]. shared: some token is a key of several segments.
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
    buckets: list[Bucket]
    back: Tensor
    shared: bool

    def to(self, device: torch.device) -> Pack:
        """The same on a device; itself if it is there already."""
        if self.ids.device == device:
            return self
        names = ("ids", "positions", "source", "target", "segment", "lengths", "back")
        moved = {name: getattr(self, name).to(device) for name in names}
        return replace(self, buckets=[bucket.to(device) for bucket in self.buckets], **moved)

    @property
    def tokens(self) -> int:
        return int(self.ids.numel())

    @property
    def segments(self) -> int:
        return len(self.segment_row)


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


def pack_rows(rows: Sequence[Row], budget: int) -> list[Pack]:
    """Packs that hold all rows, each whole. Order within a pack follows the order given."""
    return [build_pack([rows[index] for index in items]) for items in best_fit([row.tokens for row in rows], budget)]


def build_pack(rows: Sequence[Row]) -> Pack:
    """One pack of these rows."""
    layout = _layout(rows)
    buckets, back, shared = _buckets(layout)
    source, target, owner = _targets(rows, layout)
    as_tensor = torch.from_numpy
    return Pack(
        rows=list(rows),
        ids=as_tensor(_concat([s.ids for row in rows for s in row.segments]).astype(np.int64)),
        positions=as_tensor(_concat([np.arange(len(p)) + at for p, at in zip(layout.own, layout.offset, strict=True)])),
        source=as_tensor(source),
        target=as_tensor(target),
        segment=as_tensor(owner),
        segment_row=layout.row,
        segment_index=layout.index,
        lengths=as_tensor(_lengths(rows, layout)),
        buckets=buckets,
        back=back,
        shared=shared,
    )


def _concat(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


@dataclass(slots=True)
class _Layout:
    """For each segment of the pack: its tokens, its ancestors' tokens, where its path reaches, its row and index."""

    own: list[np.ndarray]
    above: list[np.ndarray]
    offset: list[int]
    row: list[int]
    index: list[int]


def _layout(rows: Sequence[Row]) -> _Layout:
    out = _Layout([], [], [], [], [])
    start = 0
    for number, row in enumerate(rows):
        first = len(out.own)
        for index, segment in enumerate(row.segments):
            own = np.arange(start, start + len(segment), dtype=np.int64)
            above = np.zeros(0, dtype=np.int64)
            if segment.parent != ROOT:
                parent = first + segment.parent
                above = np.concatenate([out.above[parent], out.own[parent]])
            out.own.append(own)
            out.above.append(above)
            out.offset.append(len(above))
            out.row.append(number)
            out.index.append(index)
            start += len(segment)
    return out


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


def _lengths(rows: Sequence[Row], layout: _Layout) -> np.ndarray:
    longest = [0] * len(rows)
    for own, at, row in zip(layout.own, layout.offset, layout.row, strict=True):
        longest[row] = max(longest[row], at + len(own))
    return _concat([np.full(len(own), longest[row], dtype=np.int64) for own, row in zip(layout.own, layout.row, strict=True)])


def _buckets(layout: _Layout) -> tuple[list[Bucket], Tensor, bool]:
    sizes = [(len(above) + len(own), len(own)) for own, above in zip(layout.own, layout.above, strict=True)]
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
    total = sum(len(own) for own in layout.own)
    back = np.zeros(total, dtype=np.int64)
    buckets, offset = [], 0
    for group in groups:
        buckets.append(_bucket(layout, group, back, offset))
        offset += buckets[-1].query.numel()
    return buckets, torch.from_numpy(back), any(len(above) for above in layout.above)


def _bucket(layout: _Layout, group: list[int], back: np.ndarray, offset: int) -> Bucket:
    queries = max(len(layout.own[i]) for i in group)
    keys = max(len(layout.above[i]) + len(layout.own[i]) for i in group)
    query, key = np.zeros((len(group), queries), np.int64), np.zeros((len(group), keys), np.int64)
    query_at, key_at = np.zeros_like(query), np.full_like(key, -1)
    padded = np.ones((len(group), queries), bool)
    for at, index in enumerate(group):
        own, above = layout.own[index], layout.above[index]
        n, m = len(own), len(above)
        query[at, :n], key[at, :m], key[at, m : m + n] = own, above, own
        query_at[at, :n], query_at[at, n:], key_at[at, : m + n] = np.arange(m, m + n), m, np.arange(m + n)
        padded[at, :n] = False
        back[own] = offset + at * queries + np.arange(n)
    as_tensor = torch.from_numpy
    pad = as_tensor(np.flatnonzero(padded.ravel()))
    return Bucket(as_tensor(query), as_tensor(key), as_tensor(query_at), as_tensor(key_at), pad)
