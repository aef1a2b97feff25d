"""Ladder Side-Tuning: a narrow network beside the base, which reads the base's layers and which no gradient leaves downwards."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tunesmith.adapters.forms import Form
from tunesmith.adapters.methods import Plan, method
from tunesmith.adapters.sites import Site
from tunesmith.core.errors import AdapterError

_TEMPERATURE = 0.1
"""Of the gates (Sung et al. 2022, section 3.2)."""


@method("lst")
def lst(*, reduction: float = 8, width: int | None = None, dropout: float = 0.0) -> Plan:
    """Ladder Side-Tuning: a side network of width d / r with a gated shortcut from every layer; the base runs without gradient.

    z_i = m_i W_i h_i + (1 - m_i) s_{i-1}, m_i = sigmoid(a_i / 0.1), s_i = z_i + U_i relu(D_i z_i); s_0 = W_0 h_0; the last states
    are h_L + W s_L. Sung et al. 2022 · 2206.06522; reduction r = 8 and the gates as there, a = 0 at the start. The rungs are the
    paper's adapter blocks and not its transformer blocks: these would attend to other tokens, which only the base's own attention
    can do in packs, trees and caches. W is zero at first, so it begins as the base. width: of the side network itself, instead of
    reduction. The backward does not run through the base, of which nothing is kept for it: that saves most of a step's memory and
    the base's share of the backward. Costs in use about one product of the side's width a layer. Refused where layers share their
    weights. When to use it: where memory for training is what is missing.
    """
    if width is not None and (type(width) is not int or width < 1):
        raise AdapterError(f"lst: width must be a whole number of at least 1, not {width!r}.")
    if not 0 < reduction < math.inf:
        raise AdapterError(f"lst: reduction must be a number above 0, not {reduction}.")
    if not 0 <= dropout < 1:
        raise AdapterError(f"lst: dropout must lie in [0, 1), not {dropout}.")

    def make(site: Site) -> Form:
        if site.calls > 1:
            raise AdapterError(
                "lst: the layers of this model share their weights, so a rung would not know at which of them it stands.",
                hints=["Nearest that works here:  parallel"],
            )
        return Rung(site, width or max(1, int(site.outputs / reduction)), float(dropout))

    return Plan("lst", "listen", ("block",), make=make, lr=1e-3, sublayers=True, chained=True)


class Rung(Form):
    """One layer of the side network; see `lst`. Each forward leaves its state for the next rung in `state`, [..., side].

    shortcut, start (first rung) [side, width], down, up [side, side], gate [1], out (last rung) [width, side]; fp32. The state stays
    until the next forward, since activations may be computed again in the backward.
    """

    last = True

    def __init__(self, site: Site, side: int, dropout: float) -> None:
        super().__init__()
        self.width, self.dropout = site.outputs, dropout
        self.shortcut = nn.Parameter(torch.empty(side, site.inputs))
        self.down = nn.Parameter(torch.randn(side, side) * 0.02)
        self.up = nn.Parameter(torch.randn(side, side) * 0.02)
        self.gate = nn.Parameter(torch.zeros(1))
        self.start: nn.Parameter | None = None
        self.out: nn.Parameter | None = None
        nn.init.kaiming_uniform_(self.shortcut, a=math.sqrt(5))
        self.state: Tensor | None = None
        self.__dict__["below"] = None  # it belongs to another module

    @property
    def left_out(self) -> bool:
        """Never: each rung stands on the one below."""
        return False

    @left_out.setter
    def left_out(self, value: bool) -> None:
        if value:
            raise AdapterError("the rungs of lst stand on one another, so no layer can do without its own.")

    def joined(self, peers: Sequence[Form]) -> None:
        rungs = [peer for peer in peers if isinstance(peer, Rung)]
        at = rungs.index(self)
        self.__dict__["below"] = rungs[at - 1] if at else None
        if at == 0:
            self.start = nn.Parameter(torch.empty_like(self.shortcut))
            nn.init.kaiming_uniform_(self.start, a=math.sqrt(5))
        if at == len(rungs) - 1:
            self.out = nn.Parameter(torch.zeros(self.width, len(self.down), device=self.down.device))

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        """The base's own output; at the last rung with what the side network adds."""
        dtype, linear = out.dtype, nn.functional.linear
        below: Rung | None = self.__dict__["below"]
        if below is not None:
            before = below.state
        else:
            assert self.start is not None
            before = linear(x.detach(), self.start.to(dtype))
        if before is None:
            raise RuntimeError("a rung was reached without the one below it")
        z = torch.lerp(before, linear(out.detach(), self.shortcut.to(dtype)), torch.sigmoid(self.gate / _TEMPERATURE).to(dtype))
        inner = torch.relu(linear(z, self.down.to(dtype)))
        if self.training and self.dropout:
            inner = nn.functional.dropout(inner, self.dropout)
        self.state = z + linear(inner, self.up.to(dtype))
        return out if self.out is None else out + linear(self.state, self.out.to(dtype))
