"""The weight of a site, whatever its make: as [outputs, inputs] in fp32."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tunesmith.core.errors import AdapterError


def is_transposed(module: Any) -> bool:
    """Does this linear map keep its weight as [inputs, outputs]? So does transformers' Conv1D."""
    return type(module).__name__ == "Conv1D"


def is_quantised(module: Any) -> bool:
    """Is the weight kept in a packed form, not as floating-point numbers?"""
    weight = getattr(module, "weight", None)
    return not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2


def weight_of(module: Any, who: str) -> Tensor:
    """The site's weight, [outputs, inputs], fp32; a view or a copy. Raises AdapterError, naming `who`, where it is quantised."""
    if is_quantised(module):
        raise AdapterError(
            f"{who} needs the weight itself, and that of a {type(module).__name__} is quantised.",
            hints=["Nearest that works here:  lora, which leaves the weight alone", "Or load the base without quantisation."],
        )
    weight: Tensor = module.weight.detach()
    return (weight.t() if is_transposed(module) else weight).float()


def bias_of(module: Any) -> Tensor | None:
    """The site's bias, [outputs], fp32; None where it has none."""
    bias = getattr(module, "bias", None)
    return bias.detach().float() if isinstance(bias, Tensor) else None
