"""Learning from rankings of any number of answers (Plackett-Luce), and how the scores of a group compare with its ranks.

A group is the answers to one prompt, one after another, the best first: it begins wherever rank is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.core.loss import Loss
from tunesmith.objectives.options import ABOVE_0, checked
from tunesmith.objectives.registry import objective

READS = ("sums", "sums_reference", "rank")


@objective("plackett_luce", unit="rankings", reads=READS, denominator="rankings of the step", wants=checked("plackett_luce", beta=ABOVE_0))
def plackett_luce(sums: Tensor, sums_reference: Tensor, rank: Tensor, *, beta: float = 0.1) -> Loss:
    """DPO of whole rankings: the sum over ranks k of log sum_{j >= k} exp(beta x_j) - beta x_k, x = lp - ref.

    Rafailov et al. 2023 (2305.18290), eq. 20 (Plackett 1975): each answer in turn is the best of those that are left. Of two
    answers it is dpo. sums, sums_reference: lp and ref, summed log-probabilities under policy and reference, nats, [answers].
    rank: 0 the best of its group, [answers]. beta: how dear it is to leave the reference.

    Metrics, sums over rankings: `accuracy`, share of a ranking's pairs in the right order; `margin`, mean difference of beta x.
    """
    scores = beta * (sums - sums_reference)
    groups = float((rank == 0).sum())
    return Loss(surprise(scores, rank).sum(), weight=groups, metrics=compared(scores, rank))


def surprise(scores: Tensor, rank: Tensor, margin: Tensor | None = None) -> Tensor:
    """-log of the probability that each answer is the best of those not better than it, [answers]; 0 for the last of a group.

    scores, rank: [answers]. margin: by how much an answer is to beat each one after it, [answers].
    """
    group = group_of(rank)
    same = group[:, None] == group
    after = same & (rank[:, None] < rank)
    shown = scores[None, :] + (0 if margin is None else margin[:, None] * after)
    left = torch.where(after | torch.eye(len(rank), dtype=torch.bool, device=rank.device), shown, -torch.inf)
    return torch.logsumexp(left, 1) - scores


def compared(scores: Tensor, rank: Tensor) -> dict[str, Tensor]:
    """Sums over groups of `accuracy`, the share of its pairs that the scores put in the ranks' order (a tie half), and of `margin`,
    the mean by which they do."""
    with torch.no_grad():
        group = group_of(rank)
        pairs = ((group[:, None] == group) & (rank[:, None] < rank)).to(scores.dtype)
        gap = scores[:, None] - scores
        right = (gap > 0).to(scores.dtype) + 0.5 * (gap == 0).to(scores.dtype)
        count = pairs.new_zeros(int((rank == 0).sum())).index_add(0, group, pairs.sum(1)).clamp(min=1)
        share = pairs / count[group][:, None]
        return {"accuracy": (right * share).sum(), "margin": (gap * share).sum()}


def group_of(rank: Tensor) -> Tensor:
    """Number of each answer's group, from 0, [answers]."""
    return (rank == 0).cumsum(0) - 1
