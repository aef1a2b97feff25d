"""Weights laid out for the matrix kernels of this CPU, for the time of a generation or of a run.

oneDNN multiplies faster with weights in a blocked layout, which torch's `linear` makes anew at every call; made once, the same
bits come out sooner: for the few rows of a decoding step, which reads every weight once, and for the thousands of a training
step alike. Modules keep their hooks: only what stands between them is exchanged, and put back at the end. In training only
frozen weights are laid out, a second time transposed for the backward; whoever writes to one all the same is noticed by the
count of its changes, and it is laid out again.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.adapters.forms import LowRank

_STEPS = 8
"""Decoding steps from which laying out repays: it costs what about 4 steps of 64 rows save."""

_SHARE = 0.5
"""Of the free memory; a layout is a second copy of the weights."""

_OWN = "forward"


def repays(model: nn.Module, steps: int = _STEPS, copies: int = 1) -> bool:
    """Is a layout worth its time, and is there memory for it?

    steps: products of each weight with some 64 rows. copies: two where the frozen weights are laid out for a backward as well.
    """
    if steps < _STEPS or not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    import psutil

    size = sum(module.weight.numel() * 2 for module in _linears(model) if copies == 1 or _frozen(module))
    return 0 < copies * size < _SHARE * psutil.virtual_memory().available


@contextmanager
def prepacked(model: nn.Module, rows: int, wanted: bool = True, *, forms: bool = True) -> Iterator[None]:
    """Linear layers in bf16 on the CPU compute from a blocked copy of their weights, laid out for `rows` rows, no gradient.

    forms: where a plain low-rank form alone listens at one, its B lies in the same copy: W x + s B A x is one product of (x, A x),
    and rounded once instead of twice. Without them all bits stay the same.
    """
    changes: _Changes = {}
    for module in _linears(model) if wanted else ():
        form = _listening(module) if forms else None
        changes[module, _OWN] = _forward(module, rows) if form is None else _with_form(module, form, rows)
        if form is not None:
            changes[form, "leave"] = _as_it_is
    with _exchanged(changes):
        yield


@contextmanager
def laid_out(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Frozen linear layers in bf16 on the CPU compute from blocked copies of their weights, forward and backward."""
    frozen = [module for module in _linears(model) if _frozen(module)] if wanted else []
    before = {module.weight.data_ptr(): _layouts.get(module.weight.data_ptr()) for module in frozen}
    try:
        for module in frozen:
            _layouts[module.weight.data_ptr()] = _Layout(module.weight.detach())
        with _exchanged({(module, _OWN): types.MethodType(_through, module) for module in frozen}):
            yield
    finally:
        for place, layout in before.items():
            _layouts.pop(place, None)
            if layout is not None:
                _layouts[place] = layout


_Changes = dict[tuple[nn.Module, str], Callable[..., Tensor]]


@contextmanager
def _exchanged(changes: _Changes) -> Iterator[None]:
    """Modules run these methods instead of their own."""
    before = {place: place[0].__dict__.get(place[1]) for place in changes}
    try:
        for (module, name), method in changes.items():
            module.__dict__[name] = method
        yield
    finally:
        for (module, name), own in before.items():
            module.__dict__.pop(name, None)
            if own is not None:
                module.__dict__[name] = own


def _linears(model: nn.Module) -> Iterator[nn.Linear]:
    """Linear layers in bf16 on the CPU that run their own code, or that of `laid_out`."""
    for module in model.modules():
        if type(module) is nn.Linear and getattr(module.__dict__.get(_OWN), "__func__", _through) is _through:
            weight = module.weight
            if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.is_contiguous():
                yield module


def _frozen(module: Any) -> bool:
    """Nothing writes into its weight, neither an optimiser nor a form that does so uncounted."""
    trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    return not trained and not any(form.writes for form in getattr(module, "ts_forms", {}).values())


def _blocked(weight: Tensor, rows: int) -> Tensor:
    laid: Tensor = _operations._reorder_linear_weight(weight, rows)
    return laid


def _forward(module: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    known = _layout_of(module.weight)
    weight = _blocked(module.weight.detach(), rows) if known is None else known.forward
    bias = None if module.bias is None else module.bias.detach()

    def forward(x: Tensor) -> Tensor:
        out: Tensor = _product(x, weight, bias, "none", [], "")
        return out

    return forward


def _listening(module: Any) -> LowRank | None:
    """The form that changes what leaves a module, where it is the only one there and adds a low-rank product and nothing else."""
    active: tuple[Any, ...] = getattr(module, "ts_active", ())
    if len(active) != 1 or module.ts_before or module.__dict__.get("ts_router") is not None:
        return None
    form = active[0]
    plain = isinstance(form, LowRank) and (type(form).leave, type(form).added) == (LowRank.leave, LowRank.added)
    return form if plain and not (form.training and form.dropout) and "leave" not in form.__dict__ else None


def _with_form(module: nn.Linear, form: LowRank, rows: int) -> Callable[[Tensor], Tensor]:
    dtype = module.weight.dtype
    whole = torch.cat([module.weight.detach(), (form.b.detach() * form.scale).to(dtype)], 1)
    weight, a = _blocked(whole, rows), _blocked(form.a.detach().to(dtype), rows)
    bias = None if module.bias is None else module.bias.detach()

    def forward(x: Tensor) -> Tensor:
        inner = _product(x, a, None, "none", [], "")
        out: Tensor = _product(torch.cat([x, inner], -1), weight, bias, "none", [], "")
        return out

    return forward


def _as_it_is(out: Tensor, x: Tensor) -> Tensor:
    """What leaves a module whose product held its form's."""
    return out


class _Layout:
    """A frozen weight's two layouts. weight: itself, whose memory is nobody else's while it is held here."""

    __slots__ = ("backward", "forward", "version", "weight")

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.renew()

    def renew(self) -> None:
        """Lay out what the weight is now."""
        self.version = self.weight._version
        self.forward, self.backward = _blocked(self.weight, _ROWS), _blocked(self.weight.t().contiguous(), _ROWS)


_ROWS = 2048
"""Rows of a product in training, about; the layout is the same for other numbers."""

_layouts: dict[int, _Layout] = {}
"""Of frozen weights, by where they lie."""


def _layout_of(weight: Tensor) -> _Layout | None:
    """The layouts of a weight as it is now; None where it has none."""
    found = _layouts.get(weight.data_ptr())
    if found is None or found.weight.shape != weight.shape or found.weight.dtype != weight.dtype:
        return None
    if found.version != found.weight._version:
        found.renew()
    return found


def _through(module: nn.Linear, x: Tensor) -> Tensor:
    """The forward of a module within `laid_out`."""
    function: Any = _Product
    out: Tensor = function.apply(x, module.weight, module.bias)
    return out


class _Product(torch.autograd.Function):
    """x W^T + b with a gradient to x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        out: Tensor = torch.ops.tunesmith.linear(x, weight, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return torch.ops.tunesmith.linear_back(grads[0], weight), None, None


# The products are operators, so that compiled code calls them as they are. A weight is known by its place: one compiled block
# serves all layers.

_operations: Any = torch.ops.mkldnn
_product = _operations._linear_pointwise.default
_library = torch.library.Library("tunesmith", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define("linear_back(Tensor grad, Tensor weight) -> Tensor")


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    layout = _layout_of(weight)
    if layout is None or not x.numel():
        return nn.functional.linear(x, weight, bias)
    out: Tensor = _product(x, layout.forward, bias, "none", [], "")
    return out


def _linear_back(grad: Tensor, weight: Tensor) -> Tensor:
    layout = _layout_of(weight)
    if layout is None or not grad.numel():
        return grad @ weight
    out: Tensor = _product(grad.contiguous(), layout.backward, None, "none", [], "")
    return out


_library.impl("linear", _linear, "CPU")
_library.impl("linear", lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]), "Meta")
_library.impl("linear_back", _linear_back, "CPU")
_library.impl("linear_back", lambda grad, weight: grad.new_empty(*grad.shape[:-1], weight.shape[1]), "Meta")
