"""Finding out how a model can be run, by running it: packed or padded, own head or the model's.

A handful of tokens are computed alone under the model's own attention and again in a pack. A model is packed only if
the numbers agree, the attention interface was really called, and rows do not leak into one another.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.core.errors import BaseError
from tunesmith.core.row import Row, segment, single
from tunesmith.engine import attention
from tunesmith.engine.forward import Forward
from tunesmith.engine.pack import Pack, build_pack

_log = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_MAGNIFY = 100.0
"""Factor on what enters the head."""

_LOOSE = 0.25
"""Nats; half-precision attention differs this much at most between two exact orders of computation."""


@torch.no_grad()
def probe(model: PreTrainedModel) -> Forward:
    """The right way to run this model. Raises BaseError where not even the padded path gives the model's own numbers."""
    rows = _rows(model)
    pack = build_pack(rows)
    padded = Forward(model, packed=False, direct_head=False, why="")
    truth = padded(pack).log_probs
    if not bool(torch.isfinite(truth).all()):
        raise BaseError(
            "the model gives NaN or infinite probabilities on a probe of 20 tokens.",
            hints=["Try base.dtype=fp32; if that fails too, the weights are damaged."],
        )
    direct = _direct_head(padded, pack)
    why = _packable(model, pack, truth, direct)
    return Forward(model, packed=not why, direct_head=direct, why=why)


def _rows(model: PreTrainedModel) -> list[Row]:
    table: Any = model.get_input_embeddings()
    vocabulary = int(table.weight.shape[0])
    ids = np.random.default_rng(0).integers(5, max(6, min(vocabulary, 30_000) - 1), 23)
    tree = Row((segment(ids[:6]), segment(ids[6:10], True, 0, "a"), segment(ids[10:15], True, 0, "b")))
    return [tree, single(ids[15:], [False] + [True] * 7)]


def _direct_head(forward: Forward, pack: Pack) -> bool:
    """Is the model's logit exactly head(last hidden state)? Not so with soft-caps, scales or a transform before it.

    What enters the head is magnified, since a soft-cap shows on large logits only.
    """
    head = forward.model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    seen: list[Tensor] = []

    def magnify(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        return (args[0] * _MAGNIFY, *args[1:])

    hook = head.register_forward_pre_hook(magnify)
    try:
        logits = forward._padded(pack)
    finally:
        hook.remove()
    forward.direct_head = True
    try:
        hidden = forward._padded(pack)
    except Exception as cause:  # a model whose body cannot be called alone, or gives something else
        _log.debug("the model's body gives no hidden states: %s", cause)
        return False
    if len(seen) != 1 or hidden.shape[-1] != head.in_features or hidden.dtype != head.weight.dtype:
        return False
    ours = nn.functional.linear(hidden * _MAGNIFY, head.weight, head.bias)
    return bool((ours - logits).abs().max() <= 0.02 * logits.abs().max())


def _packable(model: PreTrainedModel, pack: Pack, truth: Tensor, direct: bool) -> str:
    """Empty where packs compute what rows compute alone, else the reason why not."""
    own = model.config._attn_implementation
    forward = Forward(model, packed=True, direct_head=direct)
    try:
        windows = _windows(forward, pack)
        if not windows:
            return "its attention does not go through transformers' attention interface"
        if reason := _masked_layers(model, windows):
            return reason
        got = forward(pack).log_probs
        if not _close(got, truth, model_dtype=model.dtype):
            return f"a pack differs from rows alone by {float((got - truth).abs().max()):.3f} nats"
        if _leaks(forward, pack):
            return "rows in a pack leak into one another (recurrent state)"
    except Exception as cause:  # any failure here only means: not packed, and the reason is shown
        return f"the packed forward fails ({type(cause).__name__}: {str(cause).splitlines()[0][:120] if str(cause) else ''})"
    finally:
        if model.config._attn_implementation != own:
            model.set_attn_implementation(own)
    return ""


def _windows(forward: Forward, pack: Pack) -> list[int | None]:
    """Calls of packed attention in a forward of the model: the sliding window of each."""
    seen: list[int | None] = []
    original = attention.attend

    def noted(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pack: Pack,
        scale: float,
        causal: bool,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        seen.append(window)
        return original(query, key, value, pack, scale, causal, window, softcap)

    attention.attend = noted
    try:
        forward(pack)
    finally:
        attention.attend = original
    return seen


def _masked_layers(model: PreTrainedModel, windows: list[int | None]) -> str:
    """Empty, or why some layers' attention is narrower than it is told: too short rows would not show it.

    Such layers rely on a mask of the model's own, which a pack does not have.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    if "chunked_attention" in kinds:
        return "some of its layers attend within chunks"
    if "sliding_attention" in kinds and all(window is None for window in windows):
        return "its sliding window is not told to the attention interface"
    return ""


def _leaks(forward: Forward, pack: Pack) -> bool:
    """Changing the first row must not move the second by one bit: shapes and order of computation are the same."""
    first, second = pack.rows
    changed = Row(tuple(segment(s.ids[::-1].copy(), s.supervised, s.parent, s.name) for s in first.segments))
    count = second.supervised_tokens
    before, after = forward(pack).log_probs[-count:], forward(build_pack([changed, second])).log_probs[-count:]
    return not _close(before, after, model_dtype=torch.float32)


def _close(a: Tensor, b: Tensor, *, model_dtype: torch.dtype) -> bool:
    return bool((a - b).abs().max() <= _TOLERANCE.get(model_dtype, _LOOSE))
