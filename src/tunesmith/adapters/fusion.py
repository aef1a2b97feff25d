"""AdapterFusion: attention, at every layer and for every token, over what several finished adapters would add."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tunesmith.adapters.bottleneck import Bottleneck, Input
from tunesmith.adapters.files import read_finished
from tunesmith.adapters.forms import Form
from tunesmith.adapters.lowrank import Names
from tunesmith.adapters.methods import Plan, method, plan
from tunesmith.adapters.sites import Site
from tunesmith.core.errors import AdapterError


@method("fusion")
def fusion(*, of: Names, penalty: float = 0.01) -> Plan:
    """AdapterFusion, second stage: y = h + V sum_n s_n z_n, s = softmax_n((Q h) . (K z_n)), z_n what adapter n adds to h.

    Pfeiffer et al. 2021 · 2005.00247, section 3.2. of: the folders of finished runs, fusion(of=[runs/a, runs/b]); in the first
    stage each of them trained one method with a bottleneck on this base (pfeiffer, houlsby, parallel, ...), all at the same
    sites: one task each, or several tasks together. They stay as they are, without their dropout, and are stored with the
    fusion; their task heads and vectors of new words are left behind. h is what leaves the sub-layer, the softmax is taken over
    the adapters, for each token by itself. Q, K, V [d, d] at every site: Q, K ~ N(0, 0.02), V begins at the identity and is
    held there by penalty * ||I - V||^2, so that it begins as about the mean of its adapters. As in the authors' code z_n is
    without the residual, which is added at the end; unlike there, Q and K have no biases, as in the paper. Trains 3 d^2 values
    a site. Costs all the adapters and 3 products of the model's width. When to use it: to bring what was learned elsewhere to a
    task with few samples, without forgetting any of it.
    """
    names = (of,) if isinstance(of, str) else tuple(of)
    if len(names) < 2 or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"fusion: of needs at least two different run folders, not {of!r}.", hints=["fusion(of=[runs/a, runs/b])"])
    if not 0 <= penalty < math.inf:
        raise AdapterError(f"fusion: penalty must be a number of at least 0, not {penalty}.")
    return Plan("fusion", "listen", lr=5e-5, sublayers=True, resolve=partial(_resolved, names, float(penalty)))


_VALUES = ("down", "down_bias", "up", "up_bias")
"""What a bottleneck's file holds of each site."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A finished adapter. values: by name; None where they are still to come from the fusion's own file."""

    name: str
    expression: str
    plan: Plan
    values: Mapping[str, Tensor] | None

    def form(self, site: Site) -> Bottleneck:
        """Its form at a site. Raises AdapterError where it has none there that can be fused."""
        assert self.plan.make is not None
        form = self.plan.make(site)
        if not isinstance(form, Bottleneck) or not form.shape.residual:
            raise _no_bottleneck(self.name, self.expression)
        if self.values is not None:
            own = {name: self.values.get(f"{site.path}.{name}") for name, _ in form.named_parameters()}
            for name, parameter in form.named_parameters():
                value = own[name]
                if value is None or value.shape != parameter.shape:
                    what = f"fusion: {self.name} has no adapter of the right size at {site.path}."
                    raise AdapterError(what, hints=["Load the base that it was trained on."])
                parameter.data.copy_(value)
        return form

    @property
    def places(self) -> frozenset[str]:
        """Paths of its sites, as its file has them."""
        return frozenset(name.rpartition(".")[0] for name in self.values or ())


def _resolved(
    names: Sequence[str], penalty: float, given: Mapping[str, str] | None, fingerprint: str | None, beneath: Sequence[str]
) -> Plan:
    """The plan of a fusion once its adapters are known. given: their expressions, where their values come from elsewhere.

    Raises AdapterError for an adapter that cannot be read, is of another base, stood on other adapters, or listens elsewhere than
    the others.
    """
    parts = [_part(name, given, fingerprint, beneath) for name in names]
    first = parts[0].plan
    for part in parts[1:]:
        if apart := sorted(part.places ^ parts[0].places):
            one, other = (f"{each.name} ({each.expression})" for each in (parts[0], part))
            raise AdapterError(
                f"fusion: {one} and {other} listen at different sites: only one of them at {apart[0]}.",
                hints=["Nearest that works here:  adapters of one method, trained with the same sites and layers"],
            )

    def make(site: Site) -> Form:
        return Fusion(site, [part.form(site) for part in parts], penalty)

    return replace(first, method="fusion", make=make, lr=5e-5, resolve=None, finished={part.name: part.expression for part in parts})


def _part(name: str, given: Mapping[str, str] | None, fingerprint: str | None, beneath: Sequence[str]) -> _Part:
    values: Mapping[str, Tensor] | None = None
    if given is not None:
        if name not in given:
            raise AdapterError(f"fusion: the saved adapter does not say what {name} was.", hints=["Copy it again, or train it again."])
        expression = given[name]
    else:
        expression, found = read_finished(Path(name), fingerprint, beneath)
        values = {name: value for name, value in found.items() if not name.startswith("ts_head.") and not name.endswith(".rows")}
    plans = [each for each in plan(expression) if each.kind != "head"]
    strange = any(name.rpartition(".")[2] not in _VALUES for name in values or ())  # a gate's, for example
    if len(plans) != 1 or plans[0].make is None or not plans[0].sublayers or strange:
        raise _no_bottleneck(name, expression)
    return _Part(name, expression, plans[0], values)


def _no_bottleneck(name: str, expression: str) -> AdapterError:
    return AdapterError(
        f"fusion: {name} ({expression}) is not one method with a bottleneck and a residual, which is what can be fused.",
        hints=["Nearest that works here:  adapter: pfeiffer  (or houlsby, parallel, scaled_parallel, adapter_drop) in the first stage"],
    )


class Fusion(Form):
    """h + V sum_n s_n z_n over finished adapters; see `fusion`. query, key, value [width, width], fp32; the adapters are buffers."""

    last = True

    def __init__(self, site: Site, parts: Sequence[Bottleneck], weight_of_penalty: float) -> None:
        super().__init__()
        self.weight_of_penalty = weight_of_penalty
        width = site.outputs
        self.query = nn.Parameter(torch.randn(width, width) * 0.02)
        self.key = nn.Parameter(torch.randn(width, width) * 0.02)
        self.value = nn.Parameter(torch.eye(width))
        self.parts = nn.ModuleList(parts)
        for part in parts:
            for name, parameter in list(part.named_parameters()):
                delattr(part, name)
                part.register_buffer(name, parameter.detach())
        sources = [part.listener() for part in parts]
        self.__dict__["source"] = next((source for source in sources if source is not None), None)  # one is enough for all
        self.kept = tuple(name for name, _ in (*self.named_parameters(), *self.named_buffers()))

    def train(self, mode: bool = True) -> Fusion:
        """Training mode, in which the finished adapters keep computing without dropout."""
        super().train(mode)
        self.parts.eval()
        return self

    def listener(self) -> Form | None:
        source: Form | None = self.__dict__["source"]
        return source

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        source: Input | None = self.__dict__["source"]
        if source is not None:
            x = source.take()
        parts: list[Bottleneck] = list(self.parts)  # type: ignore[arg-type]
        added = torch.stack([part.addition(x if part.shape.parallel else out).view_as(out) for part in parts], -2)
        mixed = (self.shares(out, added)[..., None] * added).sum(-2)  # V is the same for all, so it is applied once, to their mean
        return out + nn.functional.linear(mixed, self.value.to(out.dtype))

    def shares(self, out: Tensor, added: Tensor) -> Tensor:
        """s of each adapter for each token, [..., adapters], from out [..., width] and added [..., adapters, width]."""
        asked = nn.functional.linear(out, self.query.to(out.dtype)) @ self.key.to(out.dtype)  # (Q h) . (K z) = (K' Q h) . z
        return torch.softmax((added @ asked[..., None])[..., 0], -1, dtype=torch.float32).to(out.dtype)

    def penalty(self) -> Tensor | None:
        if not self.weight_of_penalty:
            return None
        return self.weight_of_penalty * (torch.eye(len(self.value), device=self.value.device) - self.value).square().sum()

    def flops(self) -> int:
        return super().flops() + 2 * sum(buffer.numel() for buffer in self.buffers())

    def stored(self) -> dict[str, Tensor]:
        """Its own values and those of the adapters, so that it can be loaded without their folders."""
        return {name: value.detach() for name, value in (*self.named_parameters(), *self.named_buffers())}

    @torch.no_grad()
    def restore(self, values: dict[str, Tensor]) -> None:
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        for name, value in own.items():
            if value.shape != values[name].shape:
                raise AdapterError(f"the fusion's '{name}' has shape {tuple(values[name].shape)}, but {tuple(value.shape)} is needed.")
            value.copy_(values[name])
