"""Fitting a step into memory: telling when it did not fit, and computing activations again instead of keeping them."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.adapters import remembering, standing
from tunesmith.core.errors import RunError


def out_of_memory(cause: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU (whose allocator has no error class of its own)."""
    if isinstance(cause, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(cause, RuntimeError) and "can't allocate memory" in str(cause)


def release() -> None:
    """Give back what a failed step held."""
    gc.collect()
    compact()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compact() -> None:
    """Give back the pages between tensors that are held: glibc keeps what was freed, and longer tensors fit into no gap of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class Room:
    """Makes room before a micro-batch that is longer than all before, whose tensors would otherwise lie beside what those left."""

    def __init__(self) -> None:
        self.longest = 0

    def before(self, tokens: int) -> None:
        """Told the tokens of each micro-batch."""
        if tokens > self.longest:
            self.longest = tokens
            compact()


@contextmanager
def recomputing(model: PreTrainedModel, on: bool) -> Iterator[None]:
    """Keep only the blocks' inputs in the forward and compute the rest again in the backward (Chen et al. 2016, 1604.06174).

    transformers does this in training mode only, so the model is put into it with its own dropout at 0, and back after.
    Raises RunError for a model that cannot.
    """
    if not on:
        yield
        return
    if not model.supports_gradient_checkpointing:
        raise RunError(
            f"{type(model).__name__} cannot compute its activations again.",
            hints=["Leave train.checkpointing off, and lower train.pack_tokens to save memory."],
        )
    quiet = [
        (m, name, getattr(m, name))
        for m in model.modules()
        for name in _DROPOUTS.get(type(m), ("attention_dropout", "dropout"))  # T5's attention calls its probability "dropout"
        if isinstance(getattr(m, name, None), float)
    ]
    try:
        for module, name, _ in quiet:
            setattr(module, name, 0.0)
        _switch(model, True)
        with in_mode(model, training=True):
            yield
    finally:
        _switch(model, False)
        for module, name, value in quiet:
            setattr(module, name, value)


def _switch(model: PreTrainedModel, on: bool) -> None:
    """transformers renamed these verbs within version 5."""
    if hasattr(model, "activation_checkpointing_enable"):
        verb: Any = model.activation_checkpointing_enable if on else model.activation_checkpointing_disable
        verb(*([_how(model)] if on else []))
    elif on:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=_how(model))
    else:
        model.gradient_checkpointing_disable()


def _how(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of torch's checkpoint. Keys and values that are given at virtual tokens are those of the layer's own forward."""
    given = any(tokens.forms for tokens in standing(model))
    return {"use_reentrant": False, **({"context_fn": remembering(model)} if given else {})}


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Every module of the model in training or evaluation mode for a while, and each as it was after."""
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = training
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


_DROPOUTS: dict[type[nn.Module], tuple[str, ...]] = {nn.Dropout: ("p",)}
