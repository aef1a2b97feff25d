"""Attention over a pack by torch's flex attention (Dong et al. 2024, 2412.05496): one kernel that skips what nothing sees.

The same function of a pack as `attention.attend`, for CUDA devices. Who sees whom is a rule over each token's span and
position on the path, and a small table of which spans are ancestors of which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tunesmith.engine.pack import Pack

_Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_KEPT = "flex"


def flex_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: Pack,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """query [tokens, heads, dim], key and value [tokens, kv heads, dim] -> [tokens, heads, dim].

    Compiled on CUDA; elsewhere torch's reference, which holds all scores at once.
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    run: Any = _compiled(flex_attention) if query.is_cuda else flex_attention
    out: Tensor = run(
        q,
        k,
        v,
        score_mod=None if softcap is None else _soft_cap(softcap),
        block_mask=block_mask(pack, causal, window),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[0].transpose(0, 1)


def block_mask(pack: Pack, causal: bool, window: int | None) -> BlockMask:
    """Which blocks of keys each block of queries meets. Made once a pack and kind of layer, on the pack's device."""
    name = (_KEPT, causal, window)
    if name not in pack.kept:
        if _KEPT not in pack.kept:
            pack.kept[_KEPT] = _Places.of(pack)
        make: Any = _compiled(create_block_mask) if pack.ids.is_cuda else create_block_mask
        pack.kept[name] = make(_sees(pack.kept[_KEPT], causal, window), None, None, pack.tokens, pack.tokens, device=pack.ids.device)
    found: BlockMask = pack.kept[name]
    return found


@dataclass(slots=True)
class _Places:
    """span, at: the span of each token and its position on the path, [tokens]. table: [spans, spans], True where the keys of
    the second lie on the path of the first."""

    span: Tensor
    at: Tensor
    table: Tensor

    @classmethod
    def of(cls, pack: Pack) -> _Places:
        span = np.zeros(pack.tokens, np.int64)
        for number, (own, _) in enumerate(pack.spans):
            span[own] = number
        table = np.eye(len(pack.spans), dtype=np.bool_)
        for number, (_, above) in enumerate(pack.spans):
            table[number, span[above]] = True
        device = pack.ids.device
        return cls(torch.from_numpy(span).to(device), pack.positions, torch.from_numpy(table).to(device))


def _sees(places: _Places, causal: bool, window: int | None) -> _Rule:
    span, at, table = places.span, places.at, places.table

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = table[span[query], span[key]]
        distance = at[query] - at[key]
        if causal:
            seen = seen & (distance >= 0)
        if window is not None:
            seen = seen & (distance.abs() < window)
        return seen

    return rule


def _soft_cap(cap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    return capped


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function)
    return compiled
