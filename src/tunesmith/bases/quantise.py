"""Bases in 4 bits: the linear maps of the blocks are kept as NF4 or FP4 codes, and become numbers again for each product.

Dettmers et al. 2023 · 2305.14314, with the codes and kernels of bitsandbytes. Embeddings, norms, biases and the vocabulary
head stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor, nn

from tunesmith.bases.base import Quantised
from tunesmith.core.errors import BaseError, unknown

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

QUANTISED: tuple[str, ...] = get_args(Quantised)
_BLOCK, _OUTER = 64, 256
"""Values that share a scale, and scales that share one in turn, as in the paper (section 3)."""


class FourBit(nn.Module):
    """y = W x + b with a frozen W [outputs, inputs] of 4-bit codes.

    weight: two codes a byte, uint8 [values / 2, 1]; after `dequantise` W itself. scales: one for each 64 values in their order,
    fp32; with double quantisation codes of 8 bits, whose own scales, levels and mean are outer, levels and mean. transposed: was
    kept as [inputs, outputs]. bitsandbytes' own Linear4bit is not used: in evaluation mode, on CPUs with AVX512-BF16, it computes
    in bf16 whatever the base's dtype, and passes no gradient from then on.
    """

    scales: Tensor
    outer: Tensor
    levels: Tensor
    mean: Tensor

    def __init__(self, packed: Tensor, state: Any, bias: Tensor | None, *, transposed: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = (int(size) for size in state.shape)
        self.kind, self.transposed, self.nested = str(state.quant_type), transposed, bool(state.nested)
        self.weight = nn.Parameter(packed.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        none = torch.empty(0, device=packed.device)
        inner = state.state2 if self.nested else None
        self.register_buffer("scales", state.absmax)
        self.register_buffer("outer", none if inner is None else inner.absmax)
        self.register_buffer("levels", none if inner is None else inner.code)
        self.register_buffer("mean", none if inner is None else state.offset)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [outputs, inputs]."""
        if self.weight.is_floating_point():
            return self.weight.to(dtype)
        inputs = self.in_features
        return _dequantised(self.weight, self.scales, self.outer, self.levels, self.mean, self.kind, inputs, dtype)

    def dequantise(self, dtype: torch.dtype) -> None:
        """Keep W itself from here on."""
        self.weight.data = self.dequantised(dtype)
        for name in ("scales", "outer", "levels", "mean"):
            setattr(self, name, torch.empty(0, device=self.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        if self.weight.is_floating_point():
            return nn.functional.linear(x, self.weight, bias)
        if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
            function: Any = _Product
            codes = self.weight, self.scales, self.outer, self.levels, self.mean, self.kind, self.in_features
            out: Tensor = function.apply(x, bias, *codes)
            return out
        return nn.functional.linear(x, self.dequantised(x.dtype), bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourBit:
        """Scales go to another device, and never to another dtype."""
        before = dict(self.named_buffers(recurse=False))
        inherited: Any = super()._apply
        inherited(fn, recurse)
        for name, value in before.items():
            moved: Tensor = getattr(self, name)
            if moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.kind}"


class _Product(torch.autograd.Function):
    """W x + b: W is made once for the forward and once for the backward, and not kept between the two."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        packed: Tensor,
        scales: Tensor,
        outer: Tensor,
        levels: Tensor,
        mean: Tensor,
        kind: str,
        inputs: int,
    ) -> Tensor:
        ctx.save_for_backward(packed, scales, outer, levels, mean)
        ctx.kind, ctx.inputs = kind, inputs
        return nn.functional.linear(x, _dequantised(packed, scales, outer, levels, mean, kind, inputs, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        packed, scales, outer, levels, mean = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = grad @ _dequantised(packed, scales, outer, levels, mean, ctx.kind, ctx.inputs, grad.dtype)
        db = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, None, None, None, None, None, None, None


def _dequantised(
    packed: Tensor, scales: Tensor, outer: Tensor, levels: Tensor, mean: Tensor, kind: str, inputs: int, dtype: torch.dtype
) -> Tensor:
    """W [outputs, inputs]. A block a row: the CPU kernel of bitsandbytes 0.50 takes wrong scales where a block goes on in the next row."""
    ops: Any = torch.ops.bitsandbytes
    if outer.numel():
        scales = ops.dequantize_blockwise(scales, outer, levels, _OUTER, torch.float32) + mean
    rows: Tensor = ops.dequantize_4bit(packed, scales, _BLOCK, kind, [scales.numel(), _BLOCK], dtype)
    return rows.view(-1, inputs)


def check_kind(kind: str) -> None:
    """Refuse a kind of number that there is not, and any where bitsandbytes is missing."""
    if kind not in QUANTISED:
        raise unknown("value of base.quantise", kind, QUANTISED)
    _library()


@torch.no_grad()
def quantise(model: nn.Module, kind: str = "nf4", *, double: bool = True) -> int:
    """Quantise the linear maps of a model's blocks where they stand; returns how many. double: the scales too.

    Adapters come afterwards: raises BaseError where one listens at such a map, and without bitsandbytes.
    """
    check_kind(kind)
    from bitsandbytes.functional import quantize_4bit

    found = list(_linear_maps(model))
    if any(hasattr(module, "ts_forms") for _, module in found):
        raise BaseError("an adapter is attached to the model, so it cannot be quantised.", hints=["Quantise it first, then attach."])
    for path, module in found:
        transposed = not isinstance(module, nn.Linear)
        weight = module.weight.detach().t() if transposed else module.weight.detach()
        packed, state = quantize_4bit(weight.contiguous(), blocksize=_BLOCK, compress_statistics=double, quant_type=kind)
        model.set_submodule(path, FourBit(packed, state, module.bias, transposed=transposed))
    return len(found)


@torch.no_grad()
def dequantise(model: Any, dtype: torch.dtype | None = None) -> int:
    """Make a 4-bit model floating-point again, where it stands and with its adapters on; returns how many maps that were.

    It computes what it did, up to the rounding to dtype (default: the model's own), and takes the memory of a model that was
    never quantised. The values that quantising lost are not to be had back.
    """
    found = [module for module in model.modules() if isinstance(module, FourBit) and not module.weight.is_floating_point()]
    for module in found:
        module.dequantise(dtype or next(p.dtype for p in model.parameters() if p.is_floating_point()))
    return len(found)


def loading(kind: str, double: bool, dtype: torch.dtype, device: torch.device, skeleton: nn.Module) -> dict[str, Any]:
    """Arguments with which transformers quantises as it loads, so that the whole base is never held. skeleton: the same model, empty."""
    inside = {path for path, _ in _linear_maps(skeleton)}
    outside = [path for path, module in skeleton.named_modules() if _is_linear(module) and path not in inside]
    return {"quantization_config": _config(kind, double, dtype, outside), "device_map": {"": device}}


def _config(kind: str, double: bool, dtype: torch.dtype, skip: list[str]) -> BitsAndBytesConfig:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def adopt(model: Any) -> int:
    """Put our own maps in the place of those that transformers loaded in 4 bits; returns how many."""
    from accelerate.hooks import remove_hook_from_submodules
    from bitsandbytes.nn.modules import Linear4bit

    remove_hook_from_submodules(model)
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, Linear4bit)]
    for path, module in found:
        transposed = getattr(module, "source_cls", nn.Linear).__name__ == "Conv1D"
        weight: Any = module.weight
        model.set_submodule(path, FourBit(weight.data, weight.quant_state, module.bias, transposed=transposed))
    for name in ("hf_quantizer", "hf_device_map", "is_quantized", "is_loaded_in_4bit", "quantization_method"):
        model.__dict__.pop(name, None)  # transformers would refuse to move or save what it believes to be its own
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return len(found)


def _linear_maps(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Those that lie in lists of repeated layers and can be cut into whole blocks, by path."""
    lists = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    inside = ((path, module) for path, module in model.named_modules() if path.startswith(lists) and _is_linear(module))
    return ((path, module) for path, module in inside if cast(Any, module).weight.numel() % _BLOCK == 0)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def _library() -> None:
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it warns of kernels for decoding in bf16 that are not used here
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as cause:
        missing = isinstance(cause, ModuleNotFoundError) and cause.name == "bitsandbytes"
        what = "which is not installed" if missing else f"which cannot be imported here: {cause}"
        raise BaseError(f"base.quantise needs bitsandbytes, {what}.", hints=["pip install 'tunesmith[quant]'"]) from None
    finally:
        logger.setLevel(before)
