"""Supervised fine-tuning: the likelihood of the answers."""

from __future__ import annotations

from torch import Tensor

from tunesmith.core.errors import SpecError
from tunesmith.core.loss import Loss
from tunesmith.objectives.registry import objective
from tunesmith.objectives.wanted import Wanted


def _of_sft(logging: bool, *, label_smoothing: float = 0.0) -> Wanted:
    if type(label_smoothing) not in (int, float) or not 0 <= label_smoothing < 1:
        raise SpecError(f"objective sft: label_smoothing must be a number in [0, 1), not {label_smoothing!r}.")
    return Wanted(mean=label_smoothing > 0, best=logging)


def _of_dft(logging: bool) -> Wanted:
    return Wanted(best=logging)


@objective("sft", reads=("log_probs", "mean", "best"), denominator="supervised tokens of the step", wants=_of_sft)
def sft(log_probs: Tensor, mean: Tensor | None = None, best: Tensor | None = None, *, label_smoothing: float = 0.0) -> Loss:
    """Negative log-likelihood, summed over supervised tokens.

    log_probs: log-probability of each supervised token under the policy, nats, [targets]. The mean is over the
    supervised tokens of the whole optimisation step, so that neither accumulation nor packing changes the loss.
    label_smoothing: this share e of each target is spread evenly over the vocabulary, (1 - e) * -log p + e * mean of
    -log p over the vocabulary (Szegedy et al. 2016, 1512.00567, section 7). mean: that mean, [targets], where e > 0.
    best: log-probability of the likeliest token, for the metric `token_accuracy` (a tie counts as right).
    """
    total = -log_probs.sum()
    if label_smoothing:
        if mean is None:
            raise ValueError("label smoothing needs the mean log-probability over the vocabulary")
        total = (1 - label_smoothing) * total - label_smoothing * mean.sum()
    return Loss(total, weight=float(log_probs.numel()), metrics=_accuracy(log_probs, best))


@objective("dft", reads=("log_probs", "best"), denominator="supervised tokens of the step", wants=_of_dft)
def dft(log_probs: Tensor, best: Tensor | None = None) -> Loss:
    """Dynamic fine-tuning: each token's negative log-likelihood times its probability, which is held fixed.

    Wu et al. 2025 (2508.05629), eq. 9: it takes away the weight 1 / p that likelihood gives to tokens the policy finds
    improbable. log_probs, best: as for sft.
    """
    return Loss(-(log_probs.detach().exp() * log_probs).sum(), weight=float(log_probs.numel()), metrics=_accuracy(log_probs, best))


def _accuracy(log_probs: Tensor, best: Tensor | None) -> dict[str, Tensor]:
    return {} if best is None else {"token_accuracy": (log_probs.detach() >= best).sum()}
