"""IA3: what passes a site is scaled, each of its values by a trained number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.adapters.forms import Form
from tunesmith.adapters.lowrank import Layers, Names
from tunesmith.adapters.methods import Plan, method, names_of
from tunesmith.adapters.sites import Site
from tunesmith.adapters.weights import bias_of, weight_of
from tunesmith.core.errors import AdapterError


@method("ia3")
def ia3(*, sites: Names = ("k", "v", "down"), inputs: Names = ("down",), layers: Layers = None) -> Plan:
    """Infused adapter by inhibiting and amplifying inner activations: y = l * (W x + b), and W (l * x) + b for the down projection.

    Liu et al. 2022 · 2205.05638. l begins at one, so it starts as the base. Keys and values are scaled as they leave, the inner
    values of the feed-forward as they enter its down projection; inputs: the sites, among `sites`, that are scaled as they
    enter. Where one map computes queries, keys and values, name it: ia3(sites=[qkv, down]) scales all three, as PEFT does. Trains
    one value a row or column, the fewest of the methods that change weights; costs one product of a value, and nothing once
    merged. When to use it: few samples, many tasks. It wants a learning rate ten times that of lora (3e-3 in the paper).
    """
    chosen, entering = names_of("ia3", sites), names_of("ia3", inputs) if inputs else ()
    strangers = [name for name in entering if name not in chosen and "all" not in chosen]
    if strangers and entering != ("down",):
        raise AdapterError(f"ia3: '{strangers[0]}' is among inputs, but not among sites.", hints=["Name it in both."])

    def make(site: Site) -> Form:
        return Scaled(site, entering=site.name in entering)

    form: dict[str, Any] = {"inputs": entering}
    return Plan("ia3", "listen", chosen, None if layers is None else tuple(layers), form, make=make, lr=3e-3)


class Scaled(Form):
    """y = l * out, or W (l * x) + b where it is `before`. scale: l, [outputs] or [inputs], fp32, one at the start."""

    def __init__(self, site: Site, *, entering: bool) -> None:
        super().__init__()
        self.before = entering
        self.scale = nn.Parameter(torch.ones(site.inputs if entering else site.outputs))
        self.__dict__["module"] = site.module  # not a submodule: it is this form that belongs to it

    def enter(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype)

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        return out * self.scale.to(out.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.scale.detach()
        return (weight * scale, bias) if self.before else (weight * scale[:, None], None if bias is None else bias * scale)

    def delta(self) -> Tensor | None:
        """None where the site has a bias that is scaled, too."""
        module = self.__dict__["module"]
        if not self.before and bias_of(module) is not None:
            return None
        weight = weight_of(module, "ia3")
        return self.merged(weight, None)[0] - weight

    def flops(self) -> int:
        return self.scale.numel()
