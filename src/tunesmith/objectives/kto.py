"""Learning from answers that are good or bad, each by itself (KTO)."""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.core.loss import Loss
from tunesmith.objectives.options import ABOVE_0, NOT_BELOW_0, checked
from tunesmith.objectives.registry import objective

READS = ("sums", "sums_reference", "good", "kl")


@objective(
    "kto",
    unit="answers",
    reads=READS,
    denominator="answers of the step",
    wants=checked("kto", beta=ABOVE_0, desirable=NOT_BELOW_0, undesirable=NOT_BELOW_0),
)
def kto(
    sums: Tensor,
    sums_reference: Tensor,
    good: Tensor,
    kl: Tensor | None,
    *,
    beta: float = 0.1,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> Loss:
    """Kahneman-Tversky optimisation: 1 - sigmoid(beta (x - kl)) of a good answer, 1 - sigmoid(beta (kl - x)) of a bad one.

    Ethayarajh et al. 2024 (2402.01306), eq. 7; x = lp - ref, from an answer's summed log-probabilities under policy and reference.
    sums, sums_reference: lp and ref, nats, [answers]. good: 1 or 0, [answers]. kl: the mean of x over answers that belong to other
    prompts, of the whole step, a scalar; below 0, or where there are none, it is 0, and it is held fixed. desirable, undesirable:
    weights of good and of bad answers, where one kind is rare: the sum of all weights of the good is to be 1 to 4/3 of that of the
    bad. The denominator counts answers, whatever their weight.

    Metrics: `accuracy`, answers on the side of kl where they belong; `margin`, beta (x - kl) with the sign of the label; `kl`.
    """
    anchor = sums.new_zeros(()) if kl is None else kl.detach().clamp(min=0)
    gap = beta * (sums - sums_reference - anchor)
    signed = torch.where(good > 0.5, gap, -gap)
    weights = torch.where(good > 0.5, desirable, undesirable).to(gap.dtype)
    losses = weights * torch.sigmoid(-signed)
    with torch.no_grad():
        metrics = {"accuracy": (signed > 0).sum(), "margin": signed.sum(), "kl": anchor * len(losses)}
    return Loss(losses.sum(), weight=float(len(losses)), metrics=metrics)
