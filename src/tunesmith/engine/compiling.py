"""Compiled layers: one graph for all blocks of a model, in training only, and only where it repays.

What Inductor gains is the element-wise work between the matrix products (norms, rotary embedding, activations), which it
fuses; attention over packs stays the engine's own and splits each block in two. Compiling costs some tens of seconds the
first time, so a short run is not compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.adapters.sites import blocks
from tunesmith.core.errors import TunesmithError
from tunesmith.engine.prepacked import laid_out, repays

_log = logging.getLogger(__name__)

Choice = Literal["auto", "on", "off"]

REPAYS = 3e13
"""Planned tokens x values in the blocks from which compiling repays: it takes about 25 s on two cores and gains about 0.1 ms a token
with 106M values."""

BACKEND = "inductor"

_GRAPHS = 64
"""Graphs of one piece of code before Dynamo gives up; the limit is shared by all models of a process, and the default is 8."""


def decide(choice: Choice, model: PreTrainedModel, tokens: int) -> tuple[bool, str]:
    """Whether to compile a run of so many training tokens, and why not or why, in words."""
    if choice == "off":
        return False, "switched off"
    try:
        _, layers = blocks(model)
    except TunesmithError:
        return False, "its layers were not found"
    if choice == "auto":
        if not torch.cuda.is_available() and (missing := _no_compiler()):
            return False, missing
        work = tokens * sum(p.numel() for layer in layers for p in layer.parameters())
        if work < REPAYS:
            return False, "too few tokens to repay it"
    return True, "one graph for the layers"


def _no_compiler() -> str:
    """Empty, or why Inductor has no C++ compiler to call."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as cause:  # its own error class moves between versions
        return f"no C++ compiler ({str(cause).splitlines()[0][:80]})"
    return ""


@contextmanager
def compiled(model: PreTrainedModel, on: bool, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Run the model's blocks compiled wherever gradients are on. The first failure turns it off, with a line saying why.

    Frozen weights are laid out for the kernels meanwhile, which changes no bit: a run that is compiled has the tokens to repay it.

    Hook guards are switched on: without them Dynamo does not see that adapters are attached to some layers only, or later,
    and gives wrong results silently.
    """
    if not on:
        yield
        return
    _, layers = blocks(model)
    run = _Layers(list(layers), say)
    settings = {"skip_nnmodule_hook_guards": False, "recompile_limit": _GRAPHS, "accumulated_recompile_limit": 4 * _GRAPHS}
    before = {layer: layer._compiled_call_impl for layer in layers}
    with laid_out(model, repays(model, copies=2)), torch._dynamo.config.patch(settings):
        for layer in layers:
            layer._compiled_call_impl = run.call(layer)
        try:
            yield
        finally:
            for layer, impl in before.items():
                layer._compiled_call_impl = impl


class _Layers:
    """The compiled call of each block, with the way back to eager that all share."""

    def __init__(self, layers: list[nn.Module], say: Callable[[str], None]) -> None:
        self.say, self.on = say, True

    def call(self, layer: nn.Module) -> Callable[..., Any]:
        """What `layer(...)` does while compiled."""
        fast = torch.compile(layer._call_impl, dynamic=True, backend=BACKEND)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not (self.on and torch.is_grad_enabled()):
                return layer._call_impl(*args, **kwargs)
            try:
                return fast(*args, **kwargs)
            except Exception as cause:
                if not _of_the_compiler(cause):
                    raise
                self.on = False
                reason = " ".join(str(cause).split()[:30]) or type(cause).__name__
                self.say(f"layers run uncompiled: {reason}")
                return layer._call_impl(*args, **kwargs)

        return call


def _of_the_compiler(cause: BaseException) -> bool:
    return type(cause).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))
