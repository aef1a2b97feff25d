"""Stretches of tokens that are attended as one, in buckets of similar size: each bucket is one batched product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_PAD_WASTE = 1.3
"""A bucket is closed when padding would make its attention cost more than this times the exact cost."""

LONG = 640 * 640
"""Queries x keys from which saved probabilities cost more memory than computing them again costs time."""


class Span(NamedTuple):
    """Tokens that are attended as one, and the tokens that they continue; flat indices, in order."""

    own: np.ndarray
    above: np.ndarray


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


def fill_buckets(spans: Sequence[Span], tokens: int) -> tuple[list[Bucket], Tensor]:
    """Spans in buckets, and where the concatenated outputs of these hold the answer of each of so many tokens, [tokens]."""
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


def padded_queries(buckets: Sequence[Bucket]) -> Tensor:
    """Places of the padded queries among those of all buckets."""
    starts = np.cumsum([0, *(bucket.query.numel() for bucket in buckets)])
    return torch.cat([bucket.pad + int(start) for bucket, start in zip(buckets, starts, strict=False)])
