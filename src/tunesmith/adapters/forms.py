"""Forms: the small trainable modules that listen at a site. Each knows its mathematics and nothing of models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Form(nn.Module):
    """Something trainable that listens at a site of the base.

    active: switched on. layer: of its site, -1 outside of blocks. left_out: its layer does without (`Adapter.drop`).
    before: it changes what enters the site (`enter`), else what leaves it (`leave`). writes: it writes what it learned into
    the base's own weight, which then holds its delta already. waits: it has to see some of the data before it is trained
    (`watch`), of so many `samples` of it. kept: names of what `stored` gives, where that is not its parameters. last: it
    comes after all forms of its site that are not.
    """

    before = False
    last = False
    writes = False
    waits = False
    samples = 0
    kept: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.active, self.left_out = True, False
        self.layer = -1

    def enter(self, x: Tensor) -> Tensor:
        """What enters the site instead of x, [..., inputs]."""
        return x

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        """What leaves the site instead of `out`, [..., outputs]; x: what entered it, [..., inputs]."""
        return out

    def delta(self) -> Tensor | None:
        """The change of the site's weight that this form amounts to, fp32 [outputs, inputs]; None where it is no such change."""
        return None

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """The affine map (weight [outputs, inputs], bias [outputs]) with this form in it, fp32; None where no such map does it."""
        change = self.delta()
        return None if change is None else (weight + change, bias)

    def penalty(self) -> Tensor | None:
        """What the form adds to the loss in training, a scalar, fp32; None for nothing."""
        return None

    def listener(self) -> Form | None:
        """A form of its own at the module that the sub-layer's input enters, where it needs one; see `Site.source`."""
        return None

    def joined(self, peers: Sequence[Form]) -> None:
        """Told once all forms of its term are in place. peers: these forms, itself among them, in the order of their sites."""

    def begin(self, step: int, total: int, seed: int) -> None:
        """Told before the forward of a step, counted from 0, of a run with this seed; by all processes alike."""

    def graded(self, step: int, total: int) -> None:
        """Told when the gradients of a step, counted from 1, of `total` are whole, before the update."""

    def updated(self, step: int, total: int) -> None:
        """Told after the update of a step."""

    def rate(self, name: str) -> float:
        """Factor on the learning rate of one of its parameters."""
        return 1.0

    def flops(self) -> int:
        """Operations that it adds to a token's forward while it is not merged; two for each value that a token meets."""
        return 2 * sum(parameter.numel() for parameter in self.parameters())

    def settle(self) -> None:
        """Bring the base's weight in line, where it `writes`: called after its values or `active` changed."""

    def watch(self, on: bool) -> None:
        """Look at what passes the site and at its gradient: called before each sample, and with False at the end, to decide."""

    def stored(self) -> dict[str, Tensor]:
        """What its file holds, by the names in `kept`."""
        return {}

    def restore(self, values: dict[str, Tensor]) -> None:
        """Take back what `stored` gave. Raises AdapterError for what cannot be."""


class LowRank(Form):
    """y = W x + s B A dropout(x), s = alpha / r, or alpha / sqrt(r) with rank-stabilised scaling.

    Hu et al. 2021 (2106.09685), section 4.1; Kalajdzievski 2023 (2312.03732) for the scaling. A [rank, inputs] is
    kaiming-uniform (a = sqrt 5), B [outputs, rank] is zero, so the site computes exactly the base at the start.
    Parameters are fp32 whatever the base's dtype; the products run in the dtype of x. active: switched on.
    """

    def __init__(self, inputs: int, outputs: int, *, rank: int, alpha: float, dropout: float = 0.0, stabilised: bool = False) -> None:
        super().__init__()
        self.rank, self.alpha, self.stabilised = rank, alpha, stabilised
        self.a = nn.Parameter(torch.empty(rank, inputs, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(outputs, rank, dtype=torch.float32))
        self.dropout = dropout
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(A x [..., rank], s B [outputs, rank]) in the dtype of x: the two whose product is added, for whoever forms it in parts."""
        return nn.functional.linear(self.dropped(x), self.a.to(x.dtype)), (self.b * self.scale).to(x.dtype)

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        return self.added(out, x, self.a, self.b)

    def added(self, out: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """out + s B A dropout(x), formed in one product with a backward of its own."""
        function: Any = _AddLowRank
        added: Tensor = function.apply(out, self.dropped(x), a, b, self.scale)
        return added

    def dropped(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout) if self.training and self.dropout else x

    def delta(self) -> Tensor:
        """The change of the weight that this form amounts to, fp32 [outputs, inputs]."""
        return self.scale * (self.b @ self.a)


class _AddLowRank(torch.autograd.Function):
    """out + s B A x: two thin products forward, the second added into `out`, and four backward."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        a, b = a.to(x.dtype), (b * scale).to(x.dtype)
        inner = x.flatten(0, -2) @ a.t()
        ctx.save_for_backward(x, inner, a, b)
        ctx.scale = scale
        added = torch.empty_like(out)  # not a view of the product: models add to it in place
        torch.addmm(out.flatten(0, -2), inner, b.t(), out=added.view(-1, out.shape[-1]))
        return added

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b = ctx.saved_tensors
        go = grads[0].flatten(0, -2)
        through = go @ b
        dx = (through @ a).view(x.shape) if ctx.needs_input_grad[1] else None
        da = (through.t() @ x.flatten(0, -2)).float()
        db = (go.t() @ inner).float().mul_(ctx.scale)
        return grads[0], dx, da, db, None


class TokenRows(nn.Module):
    """Trained vectors for some words of a table, in place of the frozen ones.

    rows [words, width], fp32, beginning as the table has them. words: their ids. active: switched on.
    """

    words: Tensor
    place: Tensor

    def __init__(self, weight: Tensor, words: Sequence[int]) -> None:
        super().__init__()
        self.active = True
        self.rows = nn.Parameter(weight[list(words)].detach().float().clone())
        self.register_buffer("words", torch.tensor(list(words)), persistent=False)
        place = torch.full((weight.shape[0],), -1)
        place[list(words)] = torch.arange(len(words))
        self.register_buffer("place", place, persistent=False)  # [vocab], a word's row, -1 for the frozen ones

    def embed(self, ids: Tensor, out: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Replace the vectors of new words, times `scale` as the table's others are. ids [...], out [..., width]."""
        at = self.place[ids]
        new = at >= 0
        if not bool(new.any()):
            return out
        return out.masked_scatter(new[..., None], (self.rows[at[new]] * scale).to(out.dtype))

    def weight(self, frozen: Tensor) -> Tensor:
        """The whole table, [vocab, width], new rows trainable and the others not."""
        return frozen.detach().index_copy(0, self.words, self.rows.to(frozen.dtype))
