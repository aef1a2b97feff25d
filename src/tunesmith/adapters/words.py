"""Vectors of new words: rows of the embedding, and of the head where it has its own table, that are trained alone.

The table itself stays frozen. Whatever is switched on replaces its rows: in the embedding's output, in the head's logits,
and in `head_weight` and `head_terms`, for whoever multiplies with the head's weight without calling it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from tunesmith.adapters.forms import TokenRows
from tunesmith.adapters.hooks import ByName
from tunesmith.adapters.sites import is_encoder_decoder
from tunesmith.core.errors import AdapterError


def attach_words(model: Any, words: Sequence[int], name: str, *, trained: Iterable[nn.Parameter] = ()) -> dict[str, TokenRows]:
    """Put trainable rows for `words` on each table of the model, and return them by module path.

    trained: parameters that are trained whole; a table among them needs no rows. Raises AdapterError for ids beyond the table.
    """
    if is_encoder_decoder(model):
        what = f"{type(model).__name__} looks words up in the encoder and in the decoder, each by a table of its own make."
        raise AdapterError(what, hints=["Nearest that works here:  leave the new words out, and train an adapter on those that there are"])
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    whole = {id(parameter) for parameter in trained}
    paths = {id(module): path for path, module in model.named_modules()}
    out: dict[str, TokenRows] = {}
    shared = head is not None and head.weight is embedding.weight
    for module in (embedding,) if head is None or shared else (embedding, head):
        if id(module.weight) in whole:
            continue
        if not 0 <= min(words) <= max(words) < module.weight.shape[0]:
            raise AdapterError(f"words {min(words)} to {max(words)}: the model has vectors for 0 to {module.weight.shape[0] - 1}.")
        rows = TokenRows(module.weight, words).to(module.weight.device)
        _owned(module)[name] = rows
        out[paths[id(module)]] = rows
    for module, hook in ((embedding, _embed), (head, _logits)):
        if module is not None and "ts_words" not in module.__dict__:
            module.__dict__["ts_words"] = ()
            module.register_forward_hook(hook, prepend=True)  # forms at the head add to the logits of new words, too
    if out:
        refresh(model)
    return out


def refresh(model: Any) -> None:
    """Put into force which rows are switched on, in the order in which they were attached."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module in (embedding, head):
        if module is not None and "ts_words" in module.__dict__:
            owner = embedding if head is not None and head.weight is embedding.weight else module
            module.__dict__["ts_words"] = tuple(rows for rows in _owned(owner).values() if rows.active)


def remove_words(model: Any, name: str) -> None:
    """Take an adapter's rows off."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None and hasattr(module, "ts_rows") and name in module.ts_rows:
            del module.ts_rows[name]
    refresh(model)


def head_weight(head: nn.Module) -> Tensor:
    """The head's weight with the rows that are switched on in their places, [vocab, width]."""
    weight: Any = head.weight
    for rows in head.__dict__.get("ts_words", ()):
        weight = rows.weight(weight)
    return cast(Tensor, weight)


def head_terms(head: nn.Module, hidden: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(input [..., width], weight [vocab, width]) of each product that the head's logits, less its bias, are the sum of.

    The first is the hidden state and the head's weight, the others what each low-rank form that is switched on adds. For
    whoever reads the head without calling it.
    """
    return [(hidden, head_weight(head)), *(form.factors(hidden) for form in head.__dict__.get("ts_active", ()))]


def _owned(module: Any) -> nn.ModuleDict:
    if not hasattr(module, "ts_rows"):
        module.ts_rows = ByName()
    return cast(nn.ModuleDict, module.ts_rows)


def _embed(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    scale = getattr(module, "embed_scale", 1.0)  # some families' embedding scales what it looks up
    for rows in module.__dict__["ts_words"]:
        out = rows.embed(args[0], out, scale)
    return out


def _logits(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    for rows in module.__dict__["ts_words"]:
        bias = None if module.bias is None else module.bias[rows.words]
        new = nn.functional.linear(args[0], rows.rows.to(args[0].dtype), bias)
        out = out.index_copy(-1, rows.words, new.to(out.dtype))
    return out
