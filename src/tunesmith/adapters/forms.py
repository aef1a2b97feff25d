"""Forms: the small trainable modules that listen at a site. Each knows its mathematics and nothing of models."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """y = W x + s B A dropout(x), s = alpha / r, or alpha / sqrt(r) with rank-stabilised scaling.

    Hu et al. 2021 (2106.09685), section 4.1; Kalajdzievski 2023 (2312.03732) for the scaling. A [rank, inputs] is
    kaiming-uniform (a = sqrt 5), B [outputs, rank] is zero, so the site computes exactly the base at the start.
    Parameters are fp32 whatever the base's dtype; the products run in the dtype of x. active: switched on.
    """

    def __init__(self, inputs: int, outputs: int, *, rank: int, alpha: float, dropout: float = 0.0, stabilised: bool = False) -> None:
        super().__init__()
        self.active = True
        self.rank, self.alpha, self.stabilised = rank, alpha, stabilised
        self.a = nn.Parameter(torch.empty(rank, inputs, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(outputs, rank, dtype=torch.float32))
        self.dropout = dropout
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.stabilised else self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> what is added to the site's output, [..., outputs]."""
        if self.training and self.dropout:
            x = nn.functional.dropout(x, self.dropout)
        inner = nn.functional.linear(x, self.a.to(x.dtype))
        return nn.functional.linear(inner, (self.b * self.scale).to(x.dtype))

    def delta(self) -> Tensor:
        """The change of the weight that this form amounts to, fp32 [outputs, inputs]."""
        return self.scale * (self.b @ self.a)


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
