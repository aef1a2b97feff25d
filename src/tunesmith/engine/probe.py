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

from tunesmith.bases.quiet import quiet
from tunesmith.core.errors import BaseError
from tunesmith.core.row import Row, segment, single
from tunesmith.engine import attention
from tunesmith.engine.forward import Forward, uncached
from tunesmith.engine.pack import Pack, build_pack

_log = logging.getLogger(__name__)

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_MAGNIFY = 100.0
"""Factor on what enters the head."""

_LOOSE = 0.25
"""Nats a target in the mean: rounding of half precision between two right orders of computation. Not of the worst target, which moved
by 1.6 nats on a base in 4 bits, where the rows alone were further from the fp32 ones than the pack was (means 0.27 and 0.19)."""

_STATES = {torch.float32: 1e-4, torch.float64: 1e-8}
_LOOSE_STATES = 0.05
"""The same for hidden states, as a share of their size; and for half precision."""


@torch.no_grad()
def probe(model: PreTrainedModel, *, speaks: bool = True) -> Forward:
    """The right way to run this model. speaks: it is meant to predict next words; where it cannot, it gives states only.

    Raises BaseError where not even the padded path gives the model's own numbers.
    """
    try:
        causal = _causal(model)
        rows = _rows(model, trees=causal)
        padded = Forward(model, packed=False, direct_head=False, causal=causal)
        padded.speaks = speaks = speaks and causal and model.get_output_embeddings() is not None
        truth = _read(padded, rows) if causal else torch.cat([_read(padded, [row]) for row in rows])
        together = truth if causal else _read(padded, rows)
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as cause:
        raise BaseError(f"the model fails on a probe of 23 tokens: {type(cause).__name__}: {_first_line(cause)}") from cause
    _check_truth(truth, together, model.dtype)
    findings: dict[str, Any] = {"direct_head": speaks and _direct_head(padded, build_pack(rows)), "causal": causal, "speaks": speaks}
    reasons = []
    for first in _first_positions(model):
        forward = Forward(model, packed=True, first_position=first, **findings)
        if not (why := _packable(forward, rows, truth)):
            return forward
        reasons.append(why)
    return Forward(model, packed=False, why=reasons[0], **findings)


def _check_truth(truth: Tensor, together: Tensor, dtype: torch.dtype) -> None:
    """Rows alone must give numbers, and rows in a padded batch the same ones."""
    if not bool(torch.isfinite(truth).all()):
        raise BaseError(
            f"the model gives NaN or infinite {'probabilities' if truth.ndim == 1 else 'hidden states'} on a probe of 23 tokens.",
            hints=["Try base.dtype=fp32; if that fails too, the weights are damaged."],
        )
    if difference := _apart(together, truth, dtype):
        raise BaseError(
            f"the model does not heed its attention mask: rows in a padded batch differ from rows alone by {difference}.",
            hints=["Nearest that works here:  an encoder that does, such as BERT, RoBERTa, ModernBERT or DeBERTa"],
        )


def _first_line(cause: BaseException) -> str:
    return str(cause).splitlines()[0][:120] if str(cause) else ""


def _causal(model: PreTrainedModel) -> bool:
    """Do earlier tokens stay as they are when later ones change?"""
    (row,) = _rows(model, trees=False)[:1]
    ids = torch.from_numpy(row.segments[0].ids.astype("int64")).to(model.device)
    half = len(ids) // 2
    changed = torch.cat([ids[:half], ids[half:].flip(0)])
    before, after = (_outputs(model, x)[:half] for x in (ids, changed))
    small = _HELD.get(model.dtype, _LOOSE_HELD)
    return not bool((before - after).abs().max() > small * before.abs().max())


_HELD = {torch.float32: 1e-5, torch.float64: 1e-9}
_LOOSE_HELD = 0.02
"""What rounding may move, as a share of the largest output; a model that looks ahead moves far more."""


def _outputs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    out = uncached(model, input_ids=ids[None])
    found: Tensor = out.logits if getattr(out, "logits", None) is not None else out.last_hidden_state
    return found[0].float()


def _rows(model: PreTrainedModel, *, trees: bool) -> list[Row]:
    table: Any = model.get_input_embeddings()
    vocabulary = int(table.weight.shape[0])
    ids = np.random.default_rng(0).integers(5, max(6, min(vocabulary, 30_000) - 1), 23)
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids[ids == pad] = 3  # some models skip it when they count positions
    if not trees:
        return [single(part, False) for part in (ids[:10], ids[10:13], ids[13:])]
    tree = Row((segment(ids[:6]), segment(ids[6:10], True, 0, "a"), segment(ids[10:15], True, 0, "b")))
    return [tree, single(ids[15:], [False] + [True] * 7)]


def _first_positions(model: PreTrainedModel) -> list[int]:
    """Ids that a row's first position may have: 0, or that after the padding's, if the table has as many."""
    config = model.config.get_text_config()
    pad, size = getattr(config, "pad_token_id", None), getattr(config, "max_position_embeddings", None) or 0
    return [0] if pad is None or pad + 32 > size else [0, pad + 1]


def _read(forward: Forward, rows: list[Row]) -> Tensor:
    """Log-probabilities of the targets, or all hidden states where the model has no next word."""
    pack = forward.pack(rows)
    if forward.speaks:
        return forward(pack).log_probs
    return forward.states(pack, torch.arange(pack.tokens))


def _apart(got: Tensor, truth: Tensor, dtype: torch.dtype) -> str:
    """Empty where two readings agree, else by how much they differ."""
    if truth.ndim == 1:
        differences = (got - truth).abs()
        exact = dtype in _TOLERANCE
        nats = float(differences.max() if exact else differences.mean())
        return "" if nats <= _TOLERANCE.get(dtype, _LOOSE) else f"{nats:.3f} nats{'' if exact else ' in the mean'}"
    share = float((got.float() - truth.float()).norm() / truth.float().norm())
    return "" if share <= _STATES.get(dtype, _LOOSE_STATES) else f"{share:.1%} of its hidden states' size"


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
        logits = forward._read(pack, pack.source, body=False)
    finally:
        hook.remove()
    try:
        hidden = forward.states(pack, pack.source)
    except Exception as cause:  # a model whose body cannot be called alone, or gives something else
        _log.debug("the model's body gives no hidden states: %s", cause)
        return False
    if len(seen) != 1 or hidden.shape[-1] != head.in_features or hidden.dtype != head.weight.dtype:
        return False
    ours = nn.functional.linear(hidden * _MAGNIFY, head.weight, head.bias)
    return bool((ours - logits).abs().max() <= 0.02 * logits.abs().max())


def _packable(forward: Forward, rows: list[Row], truth: Tensor) -> str:
    """Empty where packs compute what rows compute alone, else the reason why not."""
    model = forward.model
    own = model.config._attn_implementation
    try:
        with quiet():  # transformers warns where it cannot set the attention; that is found out here
            windows, got = _windows(forward, rows)
        if reason := _masked_layers(model, windows):
            return reason
        if difference := _apart(got, truth, model.dtype):
            return f"a pack differs from rows alone by {difference}"
        if _leaks(forward, rows):
            return "rows in a pack leak into one another (recurrent state)"
    except _NoInterface:
        return "its attention does not go through transformers' attention interface"
    except attention.NoPack:
        return "the model does not hand packs to its attention"
    except NotImplementedError as cause:
        return _first_line(cause)
    except Exception as cause:  # any failure here only means: not packed, and the reason is shown
        return f"the packed forward fails ({type(cause).__name__}: {_first_line(cause)})"
    finally:
        if model.config._attn_implementation != own:
            model.set_attn_implementation(own)
    return ""


class _NoInterface(Exception):
    """Packed attention was never called."""


def _windows(forward: Forward, rows: list[Row]) -> tuple[list[int | None], Tensor]:
    """Calls of packed attention in a forward of the model, the sliding window of each, and what was read."""
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
        got = _read(forward, rows)
    except TypeError:  # it does not take what a pack needs; is it that its attention never comes to the interface?
        if not seen:
            _without_pack(forward, rows)
        raise
    finally:
        attention.attend = original
    if not seen:
        raise _NoInterface
    return seen, got


def _without_pack(forward: Forward, rows: list[Row]) -> None:
    """Raise NoPack where the model's attention comes to the interface, _NoInterface where it does not."""
    ids = torch.from_numpy(rows[0].segments[0].ids.astype("int64")).to(forward.model.device)
    with forward.attention(attention.NAME):
        _outputs(forward.model, ids)
    raise _NoInterface


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


def _leaks(forward: Forward, rows: list[Row]) -> bool:
    """Changing the first row must not move the others: shapes and order of computation are the same."""
    first, *others = rows
    changed = Row(tuple(segment(s.ids[::-1].copy(), s.supervised, s.parent, s.name) for s in first.segments))
    before, after = _read(forward, rows), _read(forward, [changed, *others])
    own = first.supervised_tokens if before.ndim == 1 else first.tokens
    return bool(_apart(after[own:].float(), before[own:].float(), torch.float32))
