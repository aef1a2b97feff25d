"""Bottleneck adapters: two thin linear maps with a nonlinearity between them, behind a sub-layer or beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.adapters.forms import Form
from tunesmith.adapters.lowrank import Layers, Names
from tunesmith.adapters.methods import Plan, method, names_of
from tunesmith.adapters.sites import Site
from tunesmith.core.errors import AdapterError, unknown

Drop = int | Literal["random"]
"""Lower layers without an adapter: so many, or in training a number that is drawn at each step."""

_NONLINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "swish": nn.functional.silu,
    "tanh": torch.tanh,
}
_INITS = ("bert", "lora")
_DROPS = 0xAD  # keeps the draws of AdapterDrop apart from others with the same seed


@dataclass(frozen=True, slots=True)
class Shape:
    """How a bottleneck is made; see `bottleneck`."""

    reduction: float = 16
    width: int | None = None
    parallel: bool = False
    scale: float = 1.0
    nonlinearity: str = "relu"
    init: str = "bert"
    residual: bool = True
    dropout: float = 0.0
    random_drop: bool = False


@method("bottleneck")
def bottleneck(
    *,
    sites: Names = ("ffn",),
    parallel: bool = False,
    reduction: float = 16,
    bottleneck: int | None = None,
    scale: float = 1.0,
    nonlinearity: str = "relu",
    init: str = "bert",
    residual: bool = True,
    dropout: float = 0.0,
    drop: Drop = 0,
    layers: Layers = None,
) -> Plan:
    """A bottleneck adapter anywhere: y = h + s U f(D z + d) + u, with z = h behind a sub-layer, or its input beside it (parallel).

    h is what leaves the site: a sub-layer (attn, ffn), the block, or a linear map. He et al. 2022 · 2110.04366 for the space.
    reduction: width of h over that of the bottleneck; bottleneck: its width itself, instead. scale: s. nonlinearity: f, one of
    relu, gelu, silu (swish), tanh. init: "bert", all weights N(0, 0.02), so that it begins near the base; "lora", U zero and D
    kaiming-uniform, so that it begins as the base. residual: without it y = s U f(D h + d) + u takes the place of h. dropout:
    behind f, in training. drop: AdapterDrop, see adapter_drop. Trains about 2 d^2 / reduction values a site. Costs two thin
    products a site, also in use: it cannot be merged. When to use it: for a form that no other name has.
    """
    shape = Shape(reduction, bottleneck, parallel, scale, nonlinearity, init, residual, dropout)
    return plan_bottleneck("bottleneck", names_of("bottleneck", sites), shape, drop, layers)


@method("houlsby")
def houlsby(
    *,
    reduction: float = 16,
    bottleneck: int | None = None,
    nonlinearity: str = "swish",
    init: str = "bert",
    dropout: float = 0.0,
    drop: Drop = 0,
    layers: Layers = None,
) -> Plan:
    """Houlsby adapters: h + U f(D h + d) + u behind attention and behind the feed-forward of every layer, before the residual sum.

    Houlsby et al. 2019 · 1902.00751, fig. 2. They start near the base (init=bert: N(0, 0.02)); the paper trains the norms as
    well, which is another method here, `norms`. Options as in bottleneck. Trains twice as much as pfeiffer and takes twice the
    time in use. When to use it: where pfeiffer is not enough and parallel is no choice.
    """
    shape = Shape(reduction, bottleneck, nonlinearity=nonlinearity, init=init, dropout=dropout)
    return plan_bottleneck("houlsby", ("attn", "ffn"), shape, drop, layers)


@method("pfeiffer")
def pfeiffer(
    *,
    reduction: float = 16,
    bottleneck: int | None = None,
    nonlinearity: str = "relu",
    init: str = "bert",
    dropout: float = 0.0,
    drop: Drop = 0,
    layers: Layers = None,
) -> Plan:
    """Pfeiffer adapters: h + U f(D h + d) + u behind the feed-forward of every layer, before the residual sum.

    Pfeiffer et al. 2021 · 2005.00247, in the form that He et al. 2022 · 2110.04366 give it. Starts near the base. Options as in
    bottleneck. Trains d^2 / 8 values a layer at the default reduction. When to use it: as the first of the adapters with a
    bottleneck, and for what `fusion` is to join.
    """
    shape = Shape(reduction, bottleneck, nonlinearity=nonlinearity, init=init, dropout=dropout)
    return plan_bottleneck("pfeiffer", ("ffn",), shape, drop, layers)


@method("parallel")
def parallel(
    *,
    sites: Names = ("ffn",),
    reduction: float = 2,
    bottleneck: int | None = None,
    nonlinearity: str = "relu",
    init: str = "lora",
    dropout: float = 0.0,
    drop: Drop = 0,
    layers: Layers = None,
) -> Plan:
    """Parallel adapters: h + U f(D x + d) + u, where x is what enters the sub-layer and h what leaves it.

    He et al. 2022 · 2110.04366, section 4.2; sites: ffn, which they found better, or attn. Starts as the base. Options as in
    bottleneck. Costs two products of half the model's width a layer at the default reduction. When to use it: instead of
    pfeiffer, with as many values.
    """
    shape = Shape(reduction, bottleneck, parallel=True, nonlinearity=nonlinearity, init=init, dropout=dropout)
    return plan_bottleneck("parallel", names_of("parallel", sites), shape, drop, layers)


@method("scaled_parallel")
def scaled_parallel(
    *,
    sites: Names = ("ffn",),
    reduction: float = 2,
    bottleneck: int | None = None,
    scale: float = 4,
    nonlinearity: str = "relu",
    init: str = "lora",
    dropout: float = 0.0,
    drop: Drop = 0,
    layers: Layers = None,
) -> Plan:
    """Scaled parallel adapters: h + s (U f(D x + d) + u), where x is what enters the sub-layer and h what leaves it.

    He et al. 2022 · 2110.04366, table 6: s = 4 did better than 1 and than a trained one. Starts as the base. Options as in
    bottleneck, costs as parallel. When to use it: the strongest of the adapters with a bottleneck where time in use allows.
    """
    shape = Shape(reduction, bottleneck, parallel=True, scale=scale, nonlinearity=nonlinearity, init=init, dropout=dropout)
    return plan_bottleneck("scaled_parallel", names_of("scaled_parallel", sites), shape, drop, layers)


@method("adapter_drop")
def adapter_drop(
    *,
    drop: Drop = "random",
    sites: Names = ("ffn",),
    reduction: float = 16,
    bottleneck: int | None = None,
    nonlinearity: str = "relu",
    init: str = "bert",
    dropout: float = 0.0,
) -> Plan:
    """AdapterDrop: Pfeiffer adapters that do without those of the n lowest layers.

    Rücklé et al. 2021 · 2010.11918. drop=random: at each step n is drawn evenly from 0 to L - 1, from the run's seed and the
    step's number, so that one adapter serves every n in use: all layers, or `adapter.drop(n)`, or in Python load and drop. With
    drop=n the n lowest layers have no adapter, in training and in use. No gradient is taken below the lowest adapter, so that a
    step costs less. When to use it: where time in use matters more than the last point of quality (the paper: five of twelve
    layers dropped cost about one point).
    """
    shape = Shape(reduction, bottleneck, nonlinearity=nonlinearity, init=init, dropout=dropout)
    return plan_bottleneck("adapter_drop", names_of("adapter_drop", sites), shape, drop, None)


def plan_bottleneck(name: str, sites: Sequence[str], shape: Shape, drop: Drop, layers: Layers) -> Plan:
    """A plan with a bottleneck at each of the sites. Raises AdapterError for options that make no sense."""
    _check(name, shape, drop)
    if drop and layers is not None:
        raise AdapterError(f"{name}: drop and layers both say which layers have an adapter.", hints=["Give one of the two."])
    if drop == "random":
        shape = Shape(**{key: getattr(shape, key) for key in Shape.__slots__} | {"random_drop": True})
    lowest = 0 if drop == "random" else int(drop)

    def make(site: Site) -> Form:
        return Bottleneck(site, shape)

    chosen = None if layers is None else tuple(layers)
    return Plan(name, "listen", tuple(sites), chosen, make=make, lr=1e-4, sublayers=True, lowest=lowest)


def _check(name: str, shape: Shape, drop: Drop) -> None:
    if drop != "random" and (type(drop) is not int or drop < 0):
        raise AdapterError(f"{name}: drop must be a whole number of layers of at least 0, or random, not {drop!r}.")
    if shape.width is not None:
        if type(shape.width) is not int or shape.width < 1:
            raise AdapterError(f"{name}: bottleneck must be a whole number of at least 1, not {shape.width!r}.")
    elif not 0 < shape.reduction < math.inf:
        raise AdapterError(f"{name}: reduction must be a number above 0, not {shape.reduction}.")
    if shape.nonlinearity not in _NONLINEAR:
        raise unknown("nonlinearity", shape.nonlinearity, _NONLINEAR, error=AdapterError)
    if shape.init not in _INITS:
        raise unknown("init", shape.init, _INITS, error=AdapterError)
    if not 0 <= shape.dropout < 1:
        raise AdapterError(f"{name}: dropout must lie in [0, 1), not {shape.dropout}.")
    if not math.isfinite(shape.scale) or shape.scale == 0:
        raise AdapterError(f"{name}: scale must be a number other than 0, not {shape.scale}.")
    if shape.parallel and not shape.residual:
        raise AdapterError(
            f"{name}: a parallel adapter stands beside the sub-layer, so there is no output of it without the sub-layer's.",
            hints=["Leave residual=false out, or leave parallel out."],
        )


class Input(Form):
    """Keeps what enters a sub-layer for a form that listens where the sub-layer ends. It owns no parameter."""

    before = True

    def __init__(self) -> None:
        super().__init__()
        self.x: Tensor | None = None

    def enter(self, x: Tensor) -> Tensor:
        self.x = x
        return x

    def take(self) -> Tensor:
        """What entered, once: kept no longer than needed."""
        x, self.x = self.x, None
        if x is None:
            raise RuntimeError("the sub-layer ended without having begun")
        return x


class Bottleneck(Form):
    """h + s (U f(D z + d) + u), z = h or, parallel, what enters the sub-layer.

    down [width, inputs], down_bias [width], up [outputs, width], up_bias [outputs]; fp32, the products in the dtype of z.
    skipped: left out for a step of training (AdapterDrop).
    """

    last = True  # behind what changes the linear map at which the sub-layer ends

    def __init__(self, site: Site, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.skipped = False
        self.layers_in_all = 1
        inputs = site.inputs if shape.parallel else site.outputs
        width = shape.width or max(1, int(site.outputs / shape.reduction))
        self.down = nn.Parameter(torch.empty(width, inputs, dtype=torch.float32))
        self.down_bias = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.up = nn.Parameter(torch.zeros(site.outputs, width, dtype=torch.float32))
        self.up_bias = nn.Parameter(torch.zeros(site.outputs, dtype=torch.float32))
        if shape.init == "lora":
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        else:
            nn.init.normal_(self.down, std=0.02)
            nn.init.normal_(self.up, std=0.02)
        self.__dict__["source"] = Input() if shape.parallel and site.source else None  # it belongs to another module

    def listener(self) -> Form | None:
        return cast(Form | None, self.__dict__["source"])

    def reads(self, out: Tensor, x: Tensor) -> Tensor:
        """z: `out`, or, parallel, what enters the sub-layer."""
        if not self.shape.parallel:
            return out
        source: Input | None = self.__dict__["source"]
        return x if source is None else source.take()

    def addition(self, z: Tensor) -> Tensor:
        """s (U f(D z + d) + u), [..., outputs]."""
        shape, dtype = self.shape, z.dtype
        inner = _NONLINEAR[shape.nonlinearity](nn.functional.linear(z, self.down.to(dtype), self.down_bias.to(dtype)))
        if self.training and shape.dropout:
            inner = nn.functional.dropout(inner, shape.dropout)
        return nn.functional.linear(inner, (self.up * shape.scale).to(dtype), (self.up_bias * shape.scale).to(dtype))

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        return self.changed(out, self.reads(out, x))

    def changed(self, out: Tensor, z: Tensor) -> Tensor:
        """What becomes of `out`, given what the form reads."""
        if self.training and self.skipped:
            return out
        added = self.addition(z).view_as(out)
        return out + added if self.shape.residual else added

    def joined(self, peers: Sequence[Form]) -> None:
        self.layers_in_all = 1 + max(peer.layer for peer in peers if isinstance(peer, Bottleneck))

    def begin(self, step: int, total: int, seed: int) -> None:
        """Draw how many lower layers this step leaves out; all peers draw the same number."""
        if self.shape.random_drop:
            self.skipped = self.layer < int(np.random.default_rng([seed, step, _DROPS]).integers(self.layers_in_all))
