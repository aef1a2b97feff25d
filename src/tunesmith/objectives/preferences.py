"""Learning from pairs of answers: the losses of the DPO family.

A loss is a function of a few numbers a pair. lp and ref are an answer's summed log-probabilities under the policy and the
reference, x = lp - ref its log-ratio, D = x_c - x_r the chosen one's less the rejected one's, and s the log-sigmoid. soft is the
probability that the chosen answer is the better one, 1 where nobody doubts it; a loss is then its mean over both orders, each as
likely as it is. All tensors are [pairs], and losses are summed over pairs.

Metrics, sums over pairs: `accuracy`, 1 where the chosen answer has the larger implicit reward, a tie half; `chosen`, `rejected`,
these rewards; `margin`, their difference. The implicit reward is beta x, or what a loss has in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tunesmith.core.loss import Loss
from tunesmith.objectives.options import ABOVE_0, DOUBT, NONE, NOT_BELOW_0, SOME_DOUBT, checked, one_of
from tunesmith.objectives.registry import objective

BOTH = ("chosen", "rejected")
REFERENCE = ("chosen_reference", "rejected_reference")
LENGTHS = ("chosen_length", "rejected_length")

_pairs = partial(objective, unit="pairs", denominator="pairs of the step")


def _ratios(
    chosen: Tensor, rejected: Tensor, chosen_reference: Tensor, rejected_reference: Tensor, beta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """beta x of both answers."""
    return beta * (chosen - chosen_reference), beta * (rejected - rejected_reference)


def _summed(loss: Callable[[Tensor, Tensor], Tensor], won: Tensor, lost: Tensor, soft: Tensor, scale: float = 1.0) -> Loss:
    """A loss of what the chosen and the rejected answer have (won, lost), over both orders, and how `scale` times these compare."""
    losses = soft * loss(won, lost) + (1 - soft) * loss(lost, won)
    with torch.no_grad():
        chosen, rejected = scale * won, scale * lost
        right = (chosen > rejected).to(losses.dtype) + 0.5 * (chosen == rejected).to(losses.dtype)
        metrics = {"accuracy": right.sum(), "margin": (chosen - rejected).sum(), "chosen": chosen.sum(), "rejected": rejected.sum()}
    return Loss(losses.sum(), weight=float(len(losses)), metrics=metrics)


@_pairs("dpo", reads=(*BOTH, *REFERENCE, "soft"), wants=checked("dpo", beta=ABOVE_0, label_smoothing=DOUBT))
def dpo(
    chosen: Tensor, rejected: Tensor, chosen_reference: Tensor, rejected_reference: Tensor, soft: Tensor,
    *, beta: float = 0.1, label_smoothing: float = 0.0,
) -> Loss:  # fmt: skip
    """Direct preference optimisation: -s(beta D).

    Rafailov et al. 2023 (2305.18290), eq. 7. beta: how dear it is to leave the reference. label_smoothing e: the conservative DPO
    of Mitchell 2023, -(1 - e) s(beta D) - e s(-beta D), for labels of which a share e is wrong.
    """
    won, lost = _ratios(chosen, rejected, chosen_reference, rejected_reference, beta)
    e = label_smoothing
    return _summed(lambda c, r: -(1 - e) * logsigmoid(c - r) - e * logsigmoid(r - c), won, lost, soft)


@_pairs("robust_dpo", reads=(*BOTH, *REFERENCE, "soft"), wants=checked("robust_dpo", beta=ABOVE_0, label_smoothing=DOUBT))
def robust_dpo(
    chosen: Tensor, rejected: Tensor, chosen_reference: Tensor, rejected_reference: Tensor, soft: Tensor,
    *, beta: float = 0.1, label_smoothing: float = 0.1,
) -> Loss:  # fmt: skip
    """DPO under flipped labels: [-(1 - e) s(beta D) + e s(-beta D)] / (1 - 2 e).

    Chowdhury et al. 2024 (2403.00409), eq. 11: where a share e of the labels is flipped at random (label_smoothing), its mean over
    the flips is the loss of the clean labels. beta: as for dpo.
    """
    won, lost = _ratios(chosen, rejected, chosen_reference, rejected_reference, beta)
    e = label_smoothing
    return _summed(lambda c, r: (-(1 - e) * logsigmoid(c - r) + e * logsigmoid(r - c)) / (1 - 2 * e), won, lost, soft)


@_pairs("hinge", reads=(*BOTH, *REFERENCE, "soft"), wants=checked("hinge", beta=ABOVE_0))
def hinge(
    chosen: Tensor, rejected: Tensor, chosen_reference: Tensor, rejected_reference: Tensor, soft: Tensor, *, beta: float = 0.1
) -> Loss:
    """Sequence-likelihood calibration on log-ratios: max(0, 1 - beta D).

    Zhao et al. 2023 (2305.10425), as Liu et al. 2024 (2309.06657), section 2.2, normalise it by the reference. beta: one over the
    margin at which a pair has said all it has to say.
    """
    won, lost = _ratios(chosen, rejected, chosen_reference, rejected_reference, beta)
    return _summed(lambda c, r: torch.relu(1 - (c - r)), won, lost, soft)


@_pairs("ipo", reads=(*BOTH, *REFERENCE, *LENGTHS, "soft"), wants=checked("ipo", beta=ABOVE_0, normalise=one_of("length") | NONE))
def ipo(
    chosen: Tensor, rejected: Tensor, chosen_reference: Tensor, rejected_reference: Tensor,
    chosen_length: Tensor, rejected_length: Tensor, soft: Tensor, *, beta: float = 0.1, normalise: Literal["length"] | None = "length",
) -> Loss:  # fmt: skip
    """Identity preference optimisation: (D - 1 / (2 beta))^2, which wants a margin and no more.

    Azar et al. 2023 (2310.12036), eq. 17. normalise: length, log-ratios a token, as its authors computed it and TRL does, or
    none, summed ones, as the equation stands and OpenRLHF has it. A beta for one is not a beta for the other.
    """
    won, lost = _ratios(chosen, rejected, chosen_reference, rejected_reference)
    if normalise == "length":
        won, lost = won / chosen_length, lost / rejected_length
    return _summed(lambda c, r: (c - r - 1 / (2 * beta)) ** 2, won, lost, soft, scale=beta)


@_pairs("exo", reads=(*BOTH, *REFERENCE, "soft"), wants=checked("exo", beta=ABOVE_0, label_smoothing=SOME_DOUBT))
def exo(
    chosen: Tensor, rejected: Tensor, chosen_reference: Tensor, rejected_reference: Tensor, soft: Tensor,
    *, beta: float = 0.1, label_smoothing: float = 1e-3,
) -> Loss:  # fmt: skip
    """Efficient exact optimisation on pairs: q log(q / p) + (1 - q) log((1 - q) / (1 - p)), q = sigmoid(beta D).

    Ji et al. 2024 (2402.00856), eq. 16: the KL from the policy's odds of the two answers to the label's, p = 1 - e with e the
    label_smoothing; with soft labels p = soft (1 - e) + (1 - soft) e. beta: as for dpo.
    """
    won, lost = _ratios(chosen, rejected, chosen_reference, rejected_reference, beta)
    p = soft * (1 - label_smoothing) + (1 - soft) * label_smoothing

    def loss(c: Tensor, r: Tensor) -> Tensor:
        log_q, log_not = logsigmoid(c - r), logsigmoid(r - c)
        return log_q.exp() * (log_q - p.log()) + log_not.exp() * (log_not - torch.log1p(-p))

    return _summed(loss, won, lost, torch.ones_like(soft))


@_pairs("nca", reads=(*BOTH, *REFERENCE, "soft"), wants=checked("nca", beta=ABOVE_0))
def nca(chosen: Tensor, rejected: Tensor, chosen_reference: Tensor, rejected_reference: Tensor, soft: Tensor, *, beta: float = 0.1) -> Loss:
    """Noise-contrastive alignment of a pair: -s(beta x_c) - [s(-beta x_c) + s(-beta x_r)] / 2, which keeps the chosen one likely.

    Chen et al. 2024 (2402.05369), section 3.2. beta: as for dpo.
    """
    won, lost = _ratios(chosen, rejected, chosen_reference, rejected_reference, beta)
    return _summed(lambda c, r: -logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-r), won, lost, soft)


@_pairs("bco", reads=(*BOTH, *REFERENCE, "soft"), wants=checked("bco", beta=ABOVE_0))
def bco(chosen: Tensor, rejected: Tensor, chosen_reference: Tensor, rejected_reference: Tensor, soft: Tensor, *, beta: float = 0.1) -> Loss:
    """Binary classifier optimisation of a pair, without a shift of rewards: -s(beta x_c) - s(-beta x_r).

    Jung et al. 2024 (2404.04656), eq. 6 with delta = 0. beta: as for dpo.
    """
    won, lost = _ratios(chosen, rejected, chosen_reference, rejected_reference, beta)
    return _summed(lambda c, r: -logsigmoid(c) - logsigmoid(-r), won, lost, soft)


@_pairs("sppo", reads=(*BOTH, *REFERENCE, "soft"), wants=checked("sppo", beta=ABOVE_0))
def sppo(
    chosen: Tensor, rejected: Tensor, chosen_reference: Tensor, rejected_reference: Tensor, soft: Tensor, *, beta: float = 0.1
) -> Loss:
    """Self-play preference optimisation: (x_c - (p - 1/2) / beta)^2 + (x_r + (p - 1/2) / beta)^2, p the preference's probability.

    Wu et al. 2024 (2405.00675), eq. 4.7 with eta = 1 / beta, and p = soft; where p is 1 it is TRL's sppo_hard.
    """
    won, lost = _ratios(chosen, rejected, chosen_reference, rejected_reference)
    wanted = (soft - 0.5) / beta
    return _summed(lambda c, r: (c - wanted) ** 2 + (r + wanted) ** 2, won, lost, torch.ones_like(soft), scale=beta)


@_pairs("apo_zero", reads=(*BOTH, *REFERENCE, "soft"), wants=checked("apo_zero", beta=ABOVE_0))
def apo_zero(
    chosen: Tensor, rejected: Tensor, chosen_reference: Tensor, rejected_reference: Tensor, soft: Tensor, *, beta: float = 0.1
) -> Loss:
    """Anchored preference optimisation, for answers better than the policy's own: sigmoid(-beta x_c) + sigmoid(beta x_r).

    D'Oosterlinck et al. 2024 (2408.06266), eq. 7: chosen ones become likelier and rejected ones less likely. beta: as for dpo.
    """
    won, lost = _ratios(chosen, rejected, chosen_reference, rejected_reference, beta)
    return _summed(lambda c, r: torch.sigmoid(-c) + torch.sigmoid(r), won, lost, soft)


@_pairs("apo_down", reads=(*BOTH, *REFERENCE, "soft"), wants=checked("apo_down", beta=ABOVE_0))
def apo_down(
    chosen: Tensor, rejected: Tensor, chosen_reference: Tensor, rejected_reference: Tensor, soft: Tensor, *, beta: float = 0.1
) -> Loss:
    """Anchored preference optimisation, for answers worse than the policy's own: sigmoid(beta x_c) + sigmoid(-beta D).

    D'Oosterlinck et al. 2024 (2408.06266), eq. 8: both become less likely, rejected ones more so. beta: as for dpo.
    """
    won, lost = _ratios(chosen, rejected, chosen_reference, rejected_reference, beta)
    return _summed(lambda c, r: torch.sigmoid(c) + torch.sigmoid(r - c), won, lost, soft)


@_pairs("discopop", reads=(*BOTH, *REFERENCE, "soft"), wants=checked("discopop", beta=ABOVE_0, tau=ABOVE_0))
def discopop(
    chosen: Tensor, rejected: Tensor, chosen_reference: Tensor, rejected_reference: Tensor, soft: Tensor,
    *, beta: float = 0.1, tau: float = 0.05,
) -> Loss:  # fmt: skip
    """A loss that a language model discovered: -(1 - m) s(z) + m exp(-z), z = beta D and m = sigmoid(z / tau).

    Lu et al. 2024 (2406.08414), eq. 5: logistic where the pair is wrong, exponential where it is right. beta: as for dpo. tau: how
    soon the one becomes the other.
    """
    won, lost = _ratios(chosen, rejected, chosen_reference, rejected_reference, beta)

    def loss(c: Tensor, r: Tensor) -> Tensor:
        z = c - r
        return -torch.sigmoid(-z / tau) * logsigmoid(z) + torch.exp(logsigmoid(z / tau) - z)  # one exponent, which cannot overflow

    return _summed(loss, won, lost, soft)


@_pairs("simpo", reads=(*BOTH, *LENGTHS, "soft"), wants=checked("simpo", beta=ABOVE_0, gamma=NOT_BELOW_0))
def simpo(
    chosen: Tensor, rejected: Tensor, chosen_length: Tensor, rejected_length: Tensor, soft: Tensor, *, beta: float = 2.0, gamma: float = 1.0
) -> Loss:
    """Simple preference optimisation, without a reference: -s(beta (lp_c / len_c - lp_r / len_r) - gamma).

    Meng et al. 2024 (2405.14734), eq. 6. beta: scale of the mean log-probability of a token. gamma: the margin that is asked for
    (TRL's simpo_gamma is this one too).
    """
    won, lost = beta * chosen / chosen_length, beta * rejected / rejected_length
    return _summed(lambda c, r: -logsigmoid(c - r - gamma), won, lost, soft)


@_pairs("orpo", reads=(*BOTH, *LENGTHS, "soft"), wants=checked("orpo", weight=ABOVE_0))
def orpo(chosen: Tensor, rejected: Tensor, chosen_length: Tensor, rejected_length: Tensor, soft: Tensor, *, weight: float = 0.1) -> Loss:
    """Odds-ratio preference optimisation, without a reference: -m_c - weight s(log odds_c - log odds_r), odds = p / (1 - p).

    Hong et al. 2024 (2403.07691), eq. 6 and 7: m is the mean log-probability of an answer's tokens, and p = exp(m). weight: of the
    odds ratio, beside the likelihood of the chosen answer (lambda there).
    """

    def loss(c: Tensor, r: Tensor) -> Tensor:
        return -c - weight * logsigmoid((c - _log_not(c)) - (r - _log_not(r)))

    return _summed(loss, chosen / chosen_length, rejected / rejected_length, soft)


def _log_not(log_p: Tensor) -> Tensor:
    """log(1 - p) from log p, exact at both ends; a certain answer counts as all but certain."""
    bounded = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return torch.where(bounded > -0.693, torch.log(-torch.expm1(bounded)), torch.log1p(-torch.exp(bounded)))
