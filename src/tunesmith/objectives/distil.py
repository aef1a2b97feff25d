"""Distillation: the policy is drawn toward a teacher's probabilities, token by token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tunesmith.core.loss import Loss
from tunesmith.objectives.options import ABOVE_0, NOT_BELOW_0, SHARE, check
from tunesmith.objectives.registry import objective
from tunesmith.objectives.wanted import Divergence, Wanted


def _wants(logging: bool, **options: Any) -> Wanted:
    check("distil", options, beta=SHARE, temperature=ABOVE_0, sft=NOT_BELOW_0)
    how = Divergence(options.get("beta", 0.0), options.get("temperature", 1.0))
    detached = frozenset[str]() if options.get("sft", 0.0) else frozenset({"log_probs"})
    return Wanted(divergence=how, best=logging, detached=detached)


@objective("distil", unit="tokens", reads=("divergence", "log_probs", "best"), denominator="supervised tokens of the step", wants=_wants)
def distil(
    divergence: Tensor, log_probs: Tensor, best: Tensor | None = None, *, beta: float = 0.0, temperature: float = 1.0, sft: float = 0.0
) -> Loss:
    """Divergence D of the policy s from a teacher t at each supervised token, + sft times -log s of the token: D + sft (-log s).

    beta 0: D = KL(t || s), forward (Hinton et al. 2015, 1503.02531). beta 1: KL(s || t), reverse (Gu et al. 2024, 2306.08543).
    Between: beta KL(t || m) + (1 - beta) KL(s || m), m = (1 - beta) s + beta t, generalised Jensen-Shannon (Agarwal et al. 2024,
    2306.13649). temperature: of both in D; the loss is not multiplied by its square. sft: weight of the likelihood of the text.
    divergence: D as the head computed it for this beta and temperature, [targets]. log_probs, best: as for sft.

    Metrics, sums over tokens: `divergence`, `surprise` (-log s of the token), `token_accuracy`.
    """
    total = divergence.sum()
    if sft:
        total = total - sft * log_probs.sum()
    metrics = {"divergence": divergence.detach().sum(), "surprise": -log_probs.detach().sum()}
    if best is not None:
        metrics["token_accuracy"] = (log_probs.detach() >= best).sum()
    return Loss(total, weight=float(log_probs.numel()), metrics=metrics)
