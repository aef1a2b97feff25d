"""Low-rank changes of a weight: LoRA and what differs from it in its start, its scale, its learning rate or its length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.adapters.forms import Form, LowRank
from tunesmith.adapters.methods import Plan, method, names_of
from tunesmith.adapters.sites import Site
from tunesmith.adapters.weights import bias_of, is_quantised, weight_of
from tunesmith.core.errors import AdapterError

Names = Sequence[str] | str
Layers = Sequence[int] | None


@method("lora")
def lora(*, rank: int = 16, alpha: float = 32, dropout: float = 0.0, sites: Names = ("q", "v"), layers: Layers = None) -> Plan:
    """Low-rank adaptation: y = W x + (alpha / r) B A dropout(x).

    Hu et al. 2021 · 2106.09685. A is kaiming-uniform, B zero: it starts as the base. Sites q and v as in the paper; alpha = 2 r
    as is usual since. Several terms give sites ranks and alphas of their own: lora(rank=4, sites=[q]) + lora(rank=16, sites=[v]).
    Trains r (inputs + outputs) values a site; costs two thin products a site, and nothing once merged. When to use it: first.
    """
    return _plan("lora", rank, alpha, dropout, sites, layers, stabilised=False)


@method("rslora")
def rslora(*, rank: int = 16, alpha: float = 16, dropout: float = 0.0, sites: Names = ("q", "v"), layers: Layers = None) -> Plan:
    """Rank-stabilised LoRA: y = W x + (alpha / sqrt(r)) B A dropout(x).

    Kalajdzievski 2023 · 2312.03732. With alpha / r the step shrinks as the rank grows; with alpha / sqrt(r) it does not. At the
    defaults the scale is 4, at rank 64 it is 2. Costs as lora. When to use it: at ranks of 32 and above.
    """
    return _plan("rslora", rank, alpha, dropout, sites, layers, stabilised=True)


@method("lora_plus")
def lora_plus(
    *, rank: int = 16, alpha: float = 32, ratio: float = 16, dropout: float = 0.0, sites: Names = ("q", "v"), layers: Layers = None
) -> Plan:
    """LoRA+: lora whose B learns with `ratio` times the learning rate of A.

    Hayou et al. 2024 · 2402.12354, where 2^4 is advised. Since B starts at zero and A does not, one rate is too low for B in
    wide models. train.lr is that of A: take it lower than for lora. Costs and files as lora. When to use it: for hard tasks
    and few steps.
    """
    if not 0 < ratio < math.inf:
        raise AdapterError(f"lora_plus: ratio must be a number above 0, not {ratio}.")
    return _plan("lora_plus", rank, alpha, dropout, sites, layers, make=lambda site, form: FasterB(site, ratio=ratio, **form))


@method("pissa")
def pissa(
    *,
    rank: int = 16,
    alpha: float = 32,
    iterations: int = 0,
    dropout: float = 0.0,
    sites: Names = ("q", "v"),
    layers: Layers = None,
) -> Plan:
    """Principal singular values and vectors: lora that starts from the weight's own r largest singular triplets.

    y = W x + s (B A - B0 A0) x, s = alpha / r, with W = U S V': A0 = sqrt(S_r / s) V_r', B0 = U_r sqrt(S_r / s), and A, B begin
    there. Meng, Wang and Zhang 2024 · 2404.02948. The paper takes s B0 A0 out of W; here W stays, which is the same function,
    and it starts as the base. iterations: 0 for the exact SVD, n for the paper's fast one with n subspace iterations (16 is
    near exact), which attaches sooner on large weights. Trains as many values as lora; it adds, and is exported as, lora of
    rank 2 r. When to use it: where lora learns too slowly, at small ranks.
    """
    if type(iterations) is not int or iterations < 0:
        raise AdapterError(f"pissa: iterations must be a whole number of at least 0, not {iterations!r}.")
    return _plan("pissa", rank, alpha, dropout, sites, layers, make=lambda site, form: Principal(site, iterations=iterations, **form))


@method("qlora")
def qlora(*, rank: int = 64, alpha: float = 16, dropout: float = 0.1, sites: Names = ("all",), layers: Layers = None) -> Plan:
    """QLoRA: lora at every linear map of a base whose own maps are kept in 4 bits, y = dequantise(W) x + (alpha / r) B A dropout(x).

    Dettmers et al. 2023 · 2305.14314; rank, alpha, dropout and sites as there. The base has to be loaded so:
    `base: {model: ..., quantise: nf4}`, where the scales are quantised too unless `double_quantisation: false`, and dtype is the
    one that it computes in. Whatever else lora does it does; any other method that leaves the weights alone works on such a base.
    Costs as lora, and each map becomes numbers again once a forward and once a backward, which slowed its products by 3 to 12 % on
    packs of 1,000 tokens; the maps take 4.13 bits a value. Merges once the base is made floating-point again (`dequantise`).
    When to use it: a base that does not fit.
    """
    return _plan("qlora", rank, alpha, dropout, sites, layers, make=_on_four_bits)


def _on_four_bits(site: Site, form: dict[str, Any]) -> Form:
    if not is_quantised(site.module):
        raise AdapterError(
            f"qlora listens at maps that are kept in 4 bits, and {site.path} is not.",
            hints=["Load the base so:  base.quantise=nf4", "Nearest that works here:  lora(rank=64, alpha=16, sites=[all])"],
        )
    return LowRank(site.inputs, site.outputs, **form)


@method("dora")
def dora(*, rank: int = 16, alpha: float = 32, dropout: float = 0.0, sites: Names = ("q", "v"), layers: Layers = None) -> Plan:
    """Weight-decomposed low-rank adaptation: a trained length for each row of the weight, and lora for its direction.

    y = g (W x + s B A dropout(x)) + b, g = m / ||W + s B A||, row by row; m begins as ||W||, and the norm counts as a constant in
    the gradient. Liu et al. 2024 · 2402.09353, sections 4.1 and 4.3. Trains `outputs` values a site more than lora; its norms
    cost W A' once a pass, and every row of the output is scaled; nothing once merged. When to use it: at low ranks, where it
    comes closer to full fine-tuning than lora.
    """
    return _plan("dora", rank, alpha, dropout, sites, layers, make=lambda site, form: Directed(site, **form))


def _plan(
    name: str,
    rank: int,
    alpha: float,
    dropout: float,
    sites: Names,
    layers: Layers,
    *,
    stabilised: bool = False,
    make: Callable[[Site, dict[str, Any]], Form] | None = None,
) -> Plan:
    """A term of low rank. make: builds the form of a site from its options; None for plain ones."""
    check_low_rank(name, alpha, dropout, rank=rank)
    form: dict[str, Any] = {"rank": rank, "alpha": float(alpha), "dropout": float(dropout), "stabilised": stabilised}

    def made(site: Site) -> Form:
        check_rank(name, rank, site)
        return LowRank(site.inputs, site.outputs, **form) if make is None else make(site, form)

    return Plan(name, "listen", names_of(name, sites), None if layers is None else tuple(layers), form, make=made, alone=True)


def check_low_rank(name: str, alpha: float, dropout: float, **ranks: int) -> None:
    """Refuse options that no low-rank form can have."""
    for word, rank in ranks.items():
        if type(rank) is not int or rank < 1:
            raise AdapterError(f"{name}: {word} must be a whole number of at least 1, not {rank!r}.")
    if not 0 <= dropout < 1:
        raise AdapterError(f"{name}: dropout must lie in [0, 1), not {dropout}.")
    if not 0 < alpha < math.inf:
        raise AdapterError(f"{name}: alpha must be a number above 0, not {alpha}.")


def check_rank(name: str, rank: int, site: Site) -> None:
    """Refuse a rank that is larger than the matrix."""
    if rank > min(site.inputs, site.outputs):
        raise AdapterError(
            f"{name}: rank {rank} is larger than site {site.name} allows ({site.outputs} x {site.inputs}).",
            hints=[f"Nearest that works here:  rank={min(site.inputs, site.outputs)}"],
        )


class FasterB(LowRank):
    """LowRank whose B learns `ratio` times as fast as A."""

    def __init__(self, site: Site, *, ratio: float, **form: Any) -> None:
        super().__init__(site.inputs, site.outputs, **form)
        self.ratio = float(ratio)

    def rate(self, name: str) -> float:
        return self.ratio if name == "b" else 1.0


class Principal(LowRank):
    """y = W x + s (B A - B0 A0) dropout(x), computed as s [B - B0, B0] [A; A - A0] x: exactly nothing at the start, nothing cancels.

    a0 [rank, inputs], b0 [outputs, rank]: where A and B began, kept in the file.
    """

    kept = ("a", "b", "a0", "b0")
    a0: Tensor
    b0: Tensor

    def __init__(self, site: Site, *, iterations: int, **form: Any) -> None:
        super().__init__(site.inputs, site.outputs, **form)
        a, b = _principal(weight_of(site.module, "pissa"), self.rank, self.scale, iterations)
        with torch.no_grad():
            self.a.copy_(a)
            self.b.copy_(b)
        self.register_buffer("a0", self.a.detach().clone())
        self.register_buffer("b0", self.b.detach().clone())

    def pair(self) -> tuple[Tensor, Tensor]:
        """(A' [2 rank, inputs], B' [outputs, 2 rank]) with s B' A' = s (B A - B0 A0)."""
        return torch.cat([self.a, self.a - self.a0]), torch.cat([self.b - self.b0, self.b0], dim=1)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.pair()
        return nn.functional.linear(self.dropped(x), a.to(x.dtype)), (b * self.scale).to(x.dtype)

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        return self.added(out, x, *self.pair())

    def delta(self) -> Tensor:
        a, b = self.pair()
        return self.scale * (b @ a)

    def flops(self) -> int:
        return 4 * (self.a.numel() + self.b.numel())

    def stored(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).detach() for name in self.kept}

    @torch.no_grad()
    def restore(self, values: dict[str, Tensor]) -> None:
        for name in self.kept:
            own: Tensor = getattr(self, name)
            if own.shape != values[name].shape:
                raise AdapterError(f"'{name}' of pissa has shape {tuple(values[name].shape)}, but {tuple(own.shape)} is needed.")
            own.copy_(values[name])


class Directed(Form):
    """y = g (W x + s B A dropout(x)) + b with g = m / ||W + s B A||, row by row, the norm held constant in the gradient.

    a [rank, inputs], b [outputs, rank], m [outputs], fp32. The norms come from ||W||^2, W A' and A A' alone, in fp32, so the
    whole matrix is never formed; at the start they are those of W exactly, and g is one.
    """

    squares: Tensor

    def __init__(self, site: Site, *, rank: int, alpha: float, dropout: float, stabilised: bool) -> None:
        super().__init__()
        self.low = LowRank(site.inputs, site.outputs, rank=rank, alpha=alpha, dropout=dropout, stabilised=stabilised)
        self.register_buffer("squares", weight_of(site.module, "dora").square().sum(1), persistent=False)
        self.m = nn.Parameter(self.squares.sqrt())
        self.__dict__["module"] = site.module  # not a submodule: it is this form that belongs to it

    def norms(self) -> Tensor:
        """||W + s B A|| row by row, [outputs], without gradient."""
        a, b, scale = self.low.a.detach(), self.low.b.detach(), self.low.scale
        with torch.no_grad():
            crossed = (weight_of(self.__dict__["module"], "dora") @ a.t()).mul(b).sum(1)
            own = (b @ (a @ a.t())).mul(b).sum(1)
            return (self.squares + 2 * scale * crossed + scale**2 * own).clamp_min(0).sqrt()

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        factor = (self.m / self.norms()).to(out.dtype)
        bias = getattr(self.__dict__["module"], "bias", None)
        directed = self.low.leave(out, x) * factor
        return directed if bias is None else directed + (1 - factor) * bias  # the bias is not scaled

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = self.m.detach() / self.norms()
        own = bias_of(self.__dict__["module"])
        turned = bias if bias is None or own is None else factor * (bias - own) + own
        return factor[:, None] * (weight + self.low.delta().detach()), turned

    def delta(self) -> Tensor:
        weight = weight_of(self.__dict__["module"], "dora")
        return self.merged(weight, None)[0] - weight


def _principal(weight: Tensor, rank: int, scale: float, iterations: int) -> tuple[Tensor, Tensor]:
    """(A0 [rank, inputs], B0 [outputs, rank]) with s B0 A0 the weight's best approximation of that rank."""
    if iterations:
        u, s, v = torch.svd_lowrank(weight, q=min(rank + 8, *weight.shape), niter=iterations)  # a few more make it accurate
        v = v.t()
    else:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root
