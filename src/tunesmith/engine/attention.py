"""Attention over a pack: every segment over itself and its ancestors, in a few batched products, or flex attention on a GPU.

Registered with transformers under the name NAME and with no mask function, so that transformers builds no mask; the
pack arrives as the keyword `pack` of the model call. The backward is written out (Dao et al. 2022, app. B.2, without
tiling): for short segments two bf16 batched products beat the fused kernels of the CPU several times.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tunesmith.engine.buckets import Bucket
from tunesmith.engine.flex import flex_attend
from tunesmith.engine.pack import Pack

_log = logging.getLogger(__name__)

NAME = "tunesmith"

_BLOCK = 256
"""Queries of a block of a long segment."""


class NoPack(RuntimeError):
    """The model does not hand on the keyword `pack`, or was not given one."""


def register() -> None:
    """Make `model.set_attn_implementation(NAME)` possible. Idempotent."""
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))


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
        raise NoPack("packed attention needs the pack; call the model through the engine")
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
    if query.is_cuda and _flex.works:
        try:
            return flex_attend(query, key, value, pack, scale, causal, window, softcap)
        except torch.OutOfMemoryError:
            raise
        except Exception as cause:  # a head width or a device that its kernel does not know
            _flex.works = False
            _log.warning("flex attention fails on this device, packs are attended by batched products: %s", str(cause).splitlines()[:1])
    function: Any = _Attend
    attended: Tensor = function.apply(query, key, value, pack, scale, _Rule(causal, window, softcap))
    return attended


@dataclass(slots=True)
class _Flex:
    """Whether flex attention has worked so far in this process."""

    works: bool = True


_flex = _Flex()


@dataclass(frozen=True, slots=True)
class _Rule:
    """Who sees whom (causal, window), and what happens to scores (soft-cap)."""

    causal: bool
    window: int | None
    softcap: float | None


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _grouped(x: Tensor, segments: int, groups: int) -> Tensor:
    """[segments * n, groups * per, dim] -> [segments, groups, per, n, dim]: queries of a key head lie beside one another."""
    return x.view(segments, -1, groups, x.shape[1] // groups, x.shape[2]).permute(0, 2, 3, 1, 4).contiguous()


def _ungrouped(x: Tensor) -> Tensor:
    """The way back: [segments, groups, per, n, dim] -> [segments * n, groups * per, dim]."""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


class _Attend(torch.autograd.Function):
    """Attention of all buckets of a pack by batched matrix products, with the backward written out.

    Grouped queries share their key head by lying beside one another along the query axis, so keys are never repeated. Short
    segments keep their probabilities for the backward. Long ones are computed a block of queries at a time, and again in
    the backward, so nothing of the size queries x keys is kept; a block of a causal segment meets no keys behind its last
    query, which saves half of the work.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, pack: Pack, scale: float, rule: _Rule) -> Tensor:
        trained = any(ctx.needs_input_grad[:3])
        groups, saved, parts = key.shape[1], [], []
        queries = query.index_select(0, pack.padded)
        keys = None if pack.shared else [x.index_select(0, pack.padded) for x in (key, value)]
        for bucket, at in pack.places():
            segments = bucket.query.shape[0]
            taken = [x[at] for x in keys] if keys else [x.index_select(0, bucket.key.flatten()) for x in (key, value)]
            k, v = (_grouped(x, segments, groups)[:, :, 0] for x in taken)
            q = _grouped(queries[at], segments, groups)
            if bucket.long and not trained and rule.softcap is None:
                parts.append(_ungrouped(_fused(q, k, v, bucket, scale, rule)))
                continue
            k = k * scale
            out, kept = _attended(q, k, v, bucket, rule)
            if trained:
                saved.append([q, k, v, *kept])
            parts.append(_ungrouped(out))
        out = _join(parts).index_select(0, pack.back)
        if trained:
            ctx.save_for_backward(out, *(x for group in saved for x in group))
            ctx.sizes, ctx.pack, ctx.scale, ctx.rule, ctx.tokens = [len(x) for x in saved], pack, scale, rule, key.shape[0]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out, *rest = ctx.saved_tensors
        pack: Pack = ctx.pack
        # sum over keys of p dp = sum over the width of out dout (Dao et al. 2022, B.2); padded queries have gradient zero
        total = (grads[0] * out).sum(-1, dtype=_summed(out)).to(out.dtype)
        total, go = (x.index_select(0, pack.padded).index_fill_(0, pack.pad, 0) for x in (total, grads[0]))
        parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        begin = 0
        for (bucket, at), size in zip(pack.places(), ctx.sizes, strict=True):
            q, k, v, *kept = rest[begin : begin + size]
            begin += size
            found = _gradients(q, k, v, kept, go[at], total[at], bucket, ctx.scale, ctx.rule)
            for part, x in zip(parts, found, strict=True):
                part.append(_ungrouped(x))
        dq = _join(parts[0]).index_select(0, pack.back)
        if pack.shared:
            places = torch.cat([bucket.key.flatten() for bucket in pack.buckets])
            dk, dv = (_added(_join(x), places, ctx.tokens) for x in parts[1:])
        else:
            dk, dv = (_join(x).index_select(0, pack.back) for x in parts[1:])
        return dq, dk, dv, None, None, None


def _attended(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, rule: _Rule) -> tuple[Tensor, list[Tensor | None]]:
    """A bucket's outputs, [segments, groups, per, n, dim], and what its backward needs beside queries, keys and values."""
    out, kept = torch.empty_like(q), []
    for span in _spans(bucket, rule):
        p, slope = _probabilities(q, k, bucket, span, rule)
        out[:, :, :, span.rows] = (p @ v[:, :, : span.end]).view(*q.shape[:3], -1, q.shape[-1])
        if not span.again:
            kept += [p, slope]
    return out, kept


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor], go: Tensor, total: Tensor, bucket: Bucket, scale: float, rule: _Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a bucket's queries, [segments, groups, per, n, dim], and keys and values, [segments, groups, 1, m, dim]."""
    segments, groups = q.shape[:2]
    go, total = _grouped(go, segments, groups), _grouped(total[..., None], segments, groups)
    spans = _spans(bucket, rule)
    dq = torch.empty_like(q)
    dtype = k.dtype if len(spans) == 1 else _summed(k)
    dk, dv = (torch.zeros_like(x, dtype=dtype) if len(spans) > 1 else None for x in (k, v))
    for number, span in enumerate(spans):
        p, slope = _probabilities(q, k, bucket, span, rule) if span.again else kept[2 * number : 2 * number + 2]
        g, rows, keys = go[:, :, :, span.rows].flatten(2, 3), q[:, :, :, span.rows].flatten(2, 3), k[:, :, : span.end]
        ds = g @ v[:, :, : span.end].transpose(-1, -2)
        ds.sub_(total[:, :, :, span.rows].flatten(2, 3)).mul_(p)
        if slope is not None:
            ds.mul_(slope)
        dq[:, :, :, span.rows] = (ds @ keys).view(*q.shape[:3], -1, q.shape[-1])  # keys carry the scale already
        own = p.transpose(-1, -2) @ g, ds.transpose(-1, -2) @ rows
        if dk is None or dv is None:
            dv, dk = own
        else:
            dv[:, :, : span.end] += own[0]
            dk[:, :, : span.end] += own[1]
    assert dk is not None and dv is not None
    return dq, dk.mul_(scale).to(k.dtype)[:, :, None], dv.to(v.dtype)[:, :, None]


def _added(x: Tensor, places: Tensor, tokens: int) -> Tensor:
    """Rows of x added up at their places, [tokens, heads, dim]; in fp32 at least, since many may fall on one token."""
    out = torch.zeros(tokens, *x.shape[1:], dtype=_summed(x), device=x.device)
    return out.index_add_(0, places, x.to(out.dtype)).to(x.dtype)


def _summed(x: Tensor) -> torch.dtype:
    """The dtype to add many parts in: fp32 at least."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True, slots=True)
class _Span:
    """Queries that are computed at once. end: keys that they may see lie before. clear: keys before are seen by all of them.
    again: their probabilities are computed again in the backward."""

    rows: slice
    end: int
    clear: int
    again: bool


def _spans(bucket: Bucket, rule: _Rule) -> list[_Span]:
    """All queries at once where segments are short, else in blocks."""
    n, m = bucket.query.shape[1], bucket.key.shape[1]
    if not bucket.long:
        return [_Span(slice(0, n), m, 0, False)]
    starts = range(0, n, _BLOCK)
    if not rule.causal:
        return [_Span(slice(a, min(a + _BLOCK, n)), m, 0, True) for a in starts]
    low, high = bucket.query_at.amin(0).tolist(), bucket.query_at.amax(0).tolist()
    spans = []
    for a in starts:
        b = min(a + _BLOCK, n)
        spans.append(_Span(slice(a, b), min(m, max(high[a:b]) + 1), min(low[a:b]) if rule.window is None else 0, True))
    return spans


def _probabilities(q: Tensor, k: Tensor, bucket: Bucket, span: _Span, rule: _Rule) -> tuple[Tensor, Tensor | None]:
    """Probabilities of a block, [segments, groups, per * block, end], and the slope of the soft-cap, if there is one."""
    scores = q[:, :, :, span.rows].flatten(2, 3) @ k[:, :, : span.end].transpose(-1, -2)
    slope = None
    if rule.softcap is not None:
        squashed = torch.tanh(scores / rule.softcap)
        scores, slope = squashed * rule.softcap, 1 - squashed**2
    unseen = bucket.unseen(rule.causal, rule.window, scores.dtype)[:, None, None, span.rows, span.clear : span.end]
    scores.view(*q.shape[:3], -1, span.end)[..., span.clear :].add_(unseen)
    return torch.softmax(scores, -1), slope


def _fused(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, scale: float, rule: _Rule) -> Tensor:
    """A bucket's outputs by torch's fused attention, which is the fastest for long segments where nothing is trained."""
    segments, groups, per, n, dim = q.shape
    plain = rule.causal and rule.window is None and n == k.shape[2] and not bucket.pad.numel()
    mask = None if plain else bucket.allowed(rule.causal, rule.window)[:, None]
    keys, values = (x.repeat_interleave(per, dim=1) for x in (k, v))
    out = nn.functional.scaled_dot_product_attention(q.flatten(1, 2), keys, values, attn_mask=mask, is_causal=plain, scale=scale)
    return out.view(segments, groups, per, n, dim)
