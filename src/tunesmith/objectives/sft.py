"""Supervised fine-tuning: the likelihood of the answers."""

from __future__ import annotations

from torch import Tensor

from tunesmith.core.loss import Loss
from tunesmith.objectives.registry import objective


@objective("sft", reads="tokens", denominator="supervised tokens of the step")
def sft(log_probs: Tensor) -> Loss:
    """Negative log-likelihood, summed over supervised tokens.

    log_probs: log-probability of each supervised token under the policy, nats, [targets]. The mean is over the
    supervised tokens of the whole optimisation step, so that neither accumulation nor packing changes the loss.
    """
    return Loss(-log_probs.sum(), weight=float(log_probs.numel()))
