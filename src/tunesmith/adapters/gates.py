"""Gates: what a form adds counts as much as a trained gate lets through; and the unions of methods that the literature names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.adapters.bottleneck import Bottleneck, pfeiffer, scaled_parallel
from tunesmith.adapters.forms import Form
from tunesmith.adapters.keys import KeyValueSites, key_value_sites
from tunesmith.adapters.lowrank import Names, lora
from tunesmith.adapters.methods import Plan, method, plan
from tunesmith.adapters.prefixes import Prefix, prefix
from tunesmith.adapters.sites import Site
from tunesmith.adapters.virtual import Encode, VirtualTokens
from tunesmith.core.errors import AdapterError


@method("gate")
def gate(*, of: str) -> list[Plan]:
    """A gate on any method that listens at sites: y = h + g (form(h) - h), g = sigmoid(w z + b), z what the form reads.

    of: the expression, in quotes, for example gate(of='lora(rank=8)'). From Mao et al. 2022 · 2110.07577, who take the mean of z
    over the text. That reads a token's future on a decoder, and depends on padding and on what else stands in a batch; and what
    passes a site does not say where texts begin and end, in a pack or in a step of generation. So the gate is each token's own
    here, on encoders too: causal, the same packed and alone, cached and not. w ~ N(0, 0.02), b = 0, so it begins half open.
    Trains one value an input more. Cannot be merged. When to use it: to let training choose among several methods.
    """
    return [_gated(part) for part in plan(of)]


@method("mam")
def mam(*, tokens: int = 30, hidden: int = 512, reduction: float = 2, bottleneck: int | None = None, scale: float = 4) -> list[Plan]:
    """Mix-and-match adapter: prefix(tokens=30) + scaled_parallel(sites=[ffn], reduction=2, scale=4).

    He et al. 2022 · 2110.04366, section 4.6: a short prefix for attention, which needs little, and most values for the
    feed-forward (bottleneck=512 in the paper, on models 1,024 wide). hidden: width of the prefix's MLP in training. Not the base
    at the start, for the prefix. Costs what its parts do. When to use it: where quality counts more than time in use.
    """
    return [prefix(tokens=tokens, hidden=hidden), scaled_parallel(reduction=reduction, bottleneck=bottleneck, scale=scale)]


@method("unipelt")
def unipelt(
    *,
    tokens: int = 10,
    hidden: int = 512,
    reduction: float = 16,
    rank: int = 8,
    alpha: float = 16,
    sites: Names = ("q", "v"),
) -> list[Plan]:
    """UniPELT: a prefix, Pfeiffer adapters and LoRA at once, each behind a gate of its own at every layer.

    Mao et al. 2022 · 2110.07577; sizes as there. sites: of LoRA. Gates as in `gate`: each token's own, for the paper's mean over
    the text reads the future on decoders. The prefix's keys and values are the same for all tokens of a text, which its gate
    therefore cannot read: it is one trained number a layer, g = sigmoid(b), on keys and values. Not the base at the start.
    Costs what its parts do. When to use it: for few samples, where no single method is known to be the best.
    """
    parts = [pfeiffer(reduction=reduction), lora(rank=rank, alpha=alpha, sites=sites)]
    inner = prefix(tokens=tokens, hidden=hidden)  # checks the options

    def make(model: Any, encode: Encode | None) -> VirtualTokens:
        width = int(model.get_input_embeddings().weight.shape[1])
        return GatedPrefix(tokens, width, key_value_sites(model, tokens, "unipelt"), hidden or 0)

    return [replace(inner, make_tokens=make), *(_gated(part) for part in parts)]


def _gated(part: Plan) -> Plan:
    """The same plan with a gate on each of its forms. Raises AdapterError for what is no form at a site."""
    build = part.make
    if part.kind != "listen" or build is None:
        raise AdapterError(
            f"gate: {part.method} is no form at sites whose change a gate could weigh.",
            hints=["Nearest that works here:  gate(of='lora')  ·  unipelt, for a prefix with a gate"],
        )
    return replace(part, make=_behind_gate(part.method, build), alone=False, form={})


def _behind_gate(name: str, build: Callable[[Site], Form]) -> Callable[[Site], Form]:
    def make(site: Site) -> Form:
        inner = build(site)
        if inner.writes or inner.waits or inner.kept or isinstance(inner, Gate):
            raise AdapterError(f"gate: {name} changes more than what passes its sites, so its change cannot be weighed token by token.")
        return Gate(inner, site)

    return make


class Gate(Form):
    """y = h + g (inner(h) - h), g = sigmoid(w z + b) for each token, z what the inner form reads. w [1, inputs], b [1], fp32."""

    def __init__(self, inner: Form, site: Site) -> None:
        super().__init__()
        self.inner = inner
        self.before, self.last = inner.before, inner.last
        width = inner.down.shape[1] if isinstance(inner, Bottleneck) else site.inputs
        self.weight = nn.Parameter(torch.randn(1, width) * 0.02)
        self.bias = nn.Parameter(torch.zeros(1))

    def open(self, z: Tensor) -> Tensor:
        """g of each token, [..., 1]."""
        return torch.sigmoid(nn.functional.linear(z, self.weight.to(z.dtype), self.bias.to(z.dtype)))

    def enter(self, x: Tensor) -> Tensor:
        return torch.lerp(x, self.inner.enter(x), self.open(x))

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        if isinstance(self.inner, Bottleneck):
            z = self.inner.reads(out, x)
            changed = self.inner.changed(out, z)
        else:
            z, changed = x, self.inner.leave(out, x)
        return torch.lerp(out, changed, self.open(z).expand(*z.shape[:-1], out.shape[-1]).view_as(out))

    def listener(self) -> Form | None:
        return self.inner.listener()

    def penalty(self) -> Tensor | None:
        return self.inner.penalty()

    def joined(self, peers: Sequence[Form]) -> None:
        inner = [peer.inner for peer in peers if isinstance(peer, Gate)]
        for peer, form in zip(peers, inner, strict=True):
            form.layer = peer.layer
        self.inner.joined(inner)

    def begin(self, step: int, total: int, seed: int) -> None:
        self.inner.begin(step, total, seed)

    def graded(self, step: int, total: int) -> None:
        self.inner.graded(step, total)

    def updated(self, step: int, total: int) -> None:
        self.inner.updated(step, total)

    def rate(self, name: str) -> float:
        return self.inner.rate(name.removeprefix("inner.")) if name.startswith("inner.") else 1.0

    def flops(self) -> int:
        return self.inner.flops() + 2 * self.weight.numel()


class GatedPrefix(Prefix):
    """A prefix whose keys and values are scaled at each layer by sigmoid(gates), gates [layers], fp32, zero at the start."""

    def __init__(self, count: int, width: int, sites: KeyValueSites, hidden: int) -> None:
        super().__init__(count, width, sites, hidden)
        self.gates = nn.Parameter(torch.zeros(sites.layers))

    def flat(self) -> Tensor:
        of_layer = super().flat().view(self.count, self.sites.layers, -1)
        return (of_layer * torch.sigmoid(self.gates)[:, None]).flatten(1)
