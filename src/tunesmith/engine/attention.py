"""Attention over a pack: every segment over itself and its ancestors, in a few batched products.

Registered with transformers under the name NAME and with no mask function, so that transformers builds no mask; the
pack arrives as the keyword `pack` of the model call. The backward is written out (Dao et al. 2022, app. B.2, without
tiling): for short segments two bf16 batched products beat the fused kernels of the CPU several times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tunesmith.engine.pack import Bucket, Pack

NAME = "tunesmith"

_LONG = 640 * 640
"""Queries x keys from which saved probabilities cost more memory than recomputing them costs time."""

_BLOCK = 256
"""Queries of a block of a long segment."""


def register() -> None:
    """Make `model.set_attn_implementation(NAME)` possible. Idempotent."""
    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    pack: Pack | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function. query [1, heads, tokens, dim], key and value [1, kv heads, tokens, dim].

    Returns [1, tokens, heads, dim]. Arguments that change the result and are not handled here (attention sinks, a
    position bias) raise, so that the probe sends such a model to the padded path.
    """
    if pack is None:
        raise RuntimeError("packed attention needs the pack; call the model through the engine")
    for name in ("s_aux", "position_bias"):
        if extra.get(name) is not None:
            raise NotImplementedError(f"packed attention has no {name}")
    if dropout:
        raise NotImplementedError("packed attention has no dropout")
    given = extra.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if given is None else given)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(q, k, v, pack, scale, causal, sliding_window, softcap)[None], None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pack: Pack,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """query [tokens, heads, dim], key and value [tokens, kv heads, dim] -> [tokens, heads, dim]."""
    products: Any = _Products.apply
    blocks: Any = _Blocks.apply
    gather: Any = _Gather.apply
    parts = []
    for bucket in pack.buckets:
        if bucket.query.shape[1] * bucket.key.shape[1] > _LONG:
            trained = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
            if softcap is None and (query.is_cuda or not trained):
                parts.append(_fused(query, key, value, bucket, scale, causal, window))
            else:
                parts.append(blocks(query, key, value, bucket, scale, causal, window, softcap))
        else:
            parts.append(products(query, key, value, bucket, scale, causal, window, softcap))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    attended: Tensor = gather(joined, pack.back)
    return attended


def _spread(x: Tensor, index: Tensor, groups: int) -> Tensor:
    """[tokens, groups * per, dim] at [segments, n] -> [segments, groups, per * n, dim]."""
    segments, n = index.shape
    heads, dim = x.shape[1:]
    taken = x.reshape(x.shape[0], -1).index_select(0, index.flatten()).view(segments, n, groups, heads // groups, dim)
    return taken.permute(0, 2, 3, 1, 4).reshape(segments, groups, -1, dim)


def _fold(x: Tensor, n: int) -> Tensor:
    """The reverse layout: [segments, groups, per * n, dim] -> [segments * n, groups * per, dim]."""
    segments, groups, _, dim = x.shape
    return x.view(segments, groups, -1, n, dim).permute(0, 3, 1, 2, 4).reshape(segments * n, -1, dim)


class _Products(torch.autograd.Function):
    """Attention of one bucket by batched matrix products; probabilities are kept for the backward.

    Grouped queries share their key head by being stacked along the query axis, so keys are never repeated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bucket: Bucket,
        scale: float,
        causal: bool,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        groups, n = key.shape[1], bucket.query.shape[1]
        q = _spread(query, bucket.query, groups) * scale
        k, v = _spread(key, bucket.key, groups), _spread(value, bucket.key, groups)
        scores = q @ k.transpose(-1, -2)
        slope = None
        if softcap is not None:
            squashed = torch.tanh(scores / softcap)
            scores, slope = squashed * softcap, 1 - squashed**2
        hidden = ~bucket.allowed(causal, window)[:, None, None]
        stacked = scores.view(*scores.shape[:2], -1, n, scores.shape[-1])
        stacked.masked_fill_(hidden, float("-inf"))
        p = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, p, slope)
        ctx.bucket, ctx.scale, ctx.tokens = bucket, scale, query.shape[0]
        return _fold(p @ v, n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p, slope = ctx.saved_tensors
        bucket: Bucket = ctx.bucket
        segments, n = bucket.query.shape
        groups = k.shape[1]
        go = grads[0]
        if bucket.pad.numel():
            go = go.index_fill(0, bucket.pad, 0)
        go = go.view(segments, n, groups, -1, go.shape[-1]).permute(0, 2, 3, 1, 4).reshape(segments, groups, -1, go.shape[-1])
        dv = p.transpose(-1, -2) @ go
        dp = go @ v.transpose(-1, -2)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True))
        if slope is not None:
            ds = ds * slope
        dq = (ds @ k).mul_(ctx.scale)
        dk = ds.transpose(-1, -2) @ q  # q carries the scale already
        out_q = _scatter(_fold(dq, n), bucket.query, bucket.pad, ctx.tokens, add=False)
        m = bucket.key.shape[1]
        out_k, out_v = (_scatter(_fold(x, m), bucket.key, None, ctx.tokens, add=True) for x in (dk, dv))
        return out_q, out_k, out_v, None, None, None, None, None


class _Blocks(torch.autograd.Function):
    """Attention of long segments, a block of queries at a time; nothing but queries, keys and values is kept.

    Probabilities are computed again in the backward. A block of a causal segment meets no keys behind its last query, which
    saves half of the work, and is masked only where its own queries begin.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bucket: Bucket,
        scale: float,
        causal: bool,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        groups, n = key.shape[1], bucket.query.shape[1]
        q = (_spread(query, bucket.query, groups) * scale).unflatten(2, (-1, n))
        k, v = _spread(key, bucket.key, groups), _spread(value, bucket.key, groups)
        ctx.save_for_backward(q, k, v)
        ctx.bucket, ctx.scale, ctx.tokens = bucket, scale, query.shape[0]
        ctx.spans, ctx.mask, ctx.softcap = _spans(bucket, causal, window), (causal, window), softcap
        out = torch.empty_like(q)
        for span in ctx.spans:
            p, _ = _probabilities(q, k, bucket, span, ctx.mask, softcap)
            out[:, :, :, span.first : span.last] = (p @ v[:, :, : span.end]).unflatten(2, (-1, span.last - span.first))
        return _fold(out.flatten(2, 3), n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        bucket: Bucket = ctx.bucket
        segments, n = bucket.query.shape
        groups = k.shape[1]
        go = grads[0].index_fill(0, bucket.pad, 0) if bucket.pad.numel() else grads[0]
        go = go.view(segments, n, groups, -1, go.shape[-1]).permute(0, 2, 3, 1, 4)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=_summed(x)) for x in (k, v))
        for span in ctx.spans:
            p, slope = _probabilities(q, k, bucket, span, ctx.mask, ctx.softcap)
            rows = slice(span.first, span.last)
            g = go[:, :, :, rows].flatten(2, 3)
            dv[:, :, : span.end] += p.transpose(-1, -2) @ g
            dp = g @ v[:, :, : span.end].transpose(-1, -2)
            ds = dp.sub_((dp * p).sum(-1, keepdim=True)).mul_(p)
            if slope is not None:
                ds = ds * slope
            dq[:, :, :, rows] = (ds @ k[:, :, : span.end]).mul_(ctx.scale).unflatten(2, (-1, span.last - span.first))
            dk[:, :, : span.end] += ds.transpose(-1, -2) @ q[:, :, :, rows].flatten(2, 3)
        out_q = _scatter(_fold(dq.flatten(2, 3), n), bucket.query, bucket.pad, ctx.tokens, add=False)
        m = bucket.key.shape[1]
        out_k, out_v = (_scatter(_fold(x.to(k.dtype), m), bucket.key, None, ctx.tokens, add=True) for x in (dk, dv))
        return out_q, out_k, out_v, None, None, None, None, None


def _summed(x: Tensor) -> torch.dtype:
    """The dtype to add many parts in: fp32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True, slots=True)
class _Span:
    """A block of queries, first to last. end: keys that it may see lie before. clear: keys before are seen by all of it."""

    first: int
    last: int
    end: int
    clear: int


def _spans(bucket: Bucket, causal: bool, window: int | None) -> list[_Span]:
    n, m = bucket.query.shape[1], bucket.key.shape[1]
    starts = range(0, n, _BLOCK)
    if not causal:
        return [_Span(a, min(a + _BLOCK, n), m, 0) for a in starts]
    low, high = bucket.query_at.amin(0).tolist(), bucket.query_at.amax(0).tolist()
    spans = []
    for a in starts:
        b = min(a + _BLOCK, n)
        spans.append(_Span(a, b, min(m, max(high[a:b]) + 1), min(low[a:b]) if window is None else 0))
    return spans


def _probabilities(
    q: Tensor, k: Tensor, bucket: Bucket, span: _Span, mask: tuple[bool, int | None], softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Probabilities of a block, [segments, groups, per * block, end], and the slope of the soft-cap, if there is one."""
    scores = q[:, :, :, span.first : span.last].flatten(2, 3) @ k[:, :, : span.end].transpose(-1, -2)
    slope = None
    if softcap is not None:
        squashed = torch.tanh(scores / softcap)
        scores, slope = squashed * softcap, 1 - squashed**2
    hidden = ~bucket.allowed(*mask)[:, None, None, span.first : span.last, span.clear : span.end]
    stacked = scores.unflatten(2, (-1, span.last - span.first))
    stacked[..., span.clear :].masked_fill_(hidden, float("-inf"))
    return torch.softmax(scores, -1), slope


def _scatter(x: Tensor, index: Tensor, pad: Tensor | None, tokens: int, *, add: bool) -> Tensor:
    """[segments * n, heads, dim] back to its tokens, [tokens, heads, dim]; sums in fp32 where tokens are shared."""
    if add:
        out = torch.zeros(tokens, *x.shape[1:], dtype=_summed(x), device=x.device)
        return out.index_add_(0, index.flatten(), x.to(out.dtype)).to(x.dtype)
    out = torch.zeros(tokens, *x.shape[1:], dtype=x.dtype, device=x.device)
    flat = index.flatten()
    if pad is not None and pad.numel():
        keep = torch.ones(flat.shape[0], dtype=torch.bool, device=x.device)
        keep[pad] = False
        flat, x = flat[keep], x[keep]
    return out.index_copy_(0, flat, x)


class _Gather(torch.autograd.Function):
    """Rows of x at distinct indices; the backward is a copy, not a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        out = torch.zeros(ctx.rows, *grads[0].shape[1:], dtype=grads[0].dtype, device=grads[0].device)
        return out.index_copy_(0, index, grads[0]), None


def _fused(query: Tensor, key: Tensor, value: Tensor, bucket: Bucket, scale: float, causal: bool, window: int | None) -> Tensor:
    """Long segments: torch's fused attention, which recomputes probabilities instead of keeping them."""
    heads, n = query.shape[1], bucket.query.shape[1]
    q = _spread(query, bucket.query, heads)
    groups = key.shape[1]
    k, v = (_spread(x, bucket.key, groups).repeat_interleave(heads // groups, dim=1) for x in (key, value))
    plain = causal and window is None and n == bucket.key.shape[1] and not bucket.pad.numel()
    mask = None if plain else bucket.allowed(causal, window)[:, None]
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain, scale=scale)
    return _fold(out, n)
