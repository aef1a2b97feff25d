"""Weights laid out for the matrix kernels of this CPU, for the time of a generation.

A decoding step reads every weight once for a few rows. oneDNN multiplies faster with weights in a blocked layout, which
torch's `linear` makes anew at every call; made once, the same bits come out sooner. Modules keep their hooks: only what
stands between them is exchanged, and put back at the end. Weights may be trained between two generations, so nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_STEPS = 8
"""Decoding steps from which laying out repays: it costs what about 4 steps of 64 rows save."""

_SHARE = 0.5
"""Of the free memory; the layout is a second copy of the weights."""


def repays(model: nn.Module, steps: int) -> bool:
    """Is a layout worth its time, and is there memory for it?"""
    if steps < _STEPS or not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    import psutil

    size = sum(module.weight.numel() * 2 for module in _linears(model))
    return 0 < size < _SHARE * psutil.virtual_memory().available


@contextmanager
def prepacked(model: nn.Module, rows: int, wanted: bool = True) -> Iterator[None]:
    """Linear layers in bf16 on the CPU compute from a blocked copy of their weights, laid out for `rows` rows, no gradient."""
    exchanged: list[nn.Module] = []
    try:
        if wanted:
            for module in _linears(model):
                module.__dict__["forward"] = _forward(module, rows)
                exchanged.append(module)
        yield
    finally:
        for changed in exchanged:
            del changed.__dict__["forward"]


def _linears(model: nn.Module) -> Iterator[nn.Linear]:
    for module in model.modules():
        if type(module) is nn.Linear and "forward" not in module.__dict__:
            weight = module.weight
            if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.is_contiguous():
                yield module


def _forward(module: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    operations: Any = torch.ops.mkldnn
    weight = operations._reorder_linear_weight(module.weight.detach(), rows)
    bias = None if module.bias is None else module.bias.detach()
    product = operations._linear_pointwise.default

    def forward(x: Tensor) -> Tensor:
        out: Tensor = product(x, weight, bias, "none", [], "")
        return out

    return forward
