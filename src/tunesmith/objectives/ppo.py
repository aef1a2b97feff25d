"""Proximal policy optimisation: a policy and a critic that learn from the same tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.core.loss import Loss
from tunesmith.objectives.actions import estimate, ratio_of
from tunesmith.objectives.options import ABOVE_0, ABOVE_1, NONE, NOT_BELOW_0, PART, check
from tunesmith.objectives.policy import clipped
from tunesmith.objectives.registry import objective
from tunesmith.objectives.wanted import Wanted

READS = ("log_probs", "old", "advantage", "values", "value", "return", "entropy")

RANGES = {
    "clip": PART,
    "clip_high": ABOVE_0 | NONE,
    "dual_clip": ABOVE_1 | NONE,
    "value_clip": ABOVE_0 | NONE,
    "value_weight": NOT_BELOW_0,
    "entropy_weight": NOT_BELOW_0,
}


def _wants(logging: bool, **options: Any) -> Wanted:
    check("ppo", options, **RANGES)
    if options.get("entropy_weight", 0.0):
        return Wanted(entropy=True)
    return Wanted(entropy=logging, detached=frozenset({"entropy"}) if logging else frozenset())


@objective("ppo", unit="actions", reads=READS, denominator="tokens of the step", wants=_wants)
def ppo(
    log_probs: Tensor, old: Tensor | None, advantage: Tensor, values: Tensor, value: Tensor, returns: Tensor,
    entropy: Tensor | None = None,
    *, clip: float = 0.2, clip_high: float | None = None, dual_clip: float | None = None, value_clip: float | None = 0.2,
    value_weight: float = 0.1, entropy_weight: float = 0.0,
) -> Loss:  # fmt: skip
    """Proximal policy optimisation: -min(w A, clip(w) A) + value_weight / 2 max((V - R)^2, (clip(V) - R)^2) - entropy_weight H a token.

    Schulman et al. 2017 (1707.06347), eq. 7 and 9; the clipped value as in its authors' code (Huang et al. 2024, 2403.17031).
    log_probs, old, advantage, entropy (H), clip, clip_high, dual_clip: as for grpo; A by `advantage.gae`, whitened. values: V, the
    critic's now, with gradient; value: as recorded; returns: R; all [targets]. value_clip: how far clip(V) may be from the recorded
    value, none for (V - R)^2 alone. entropy_weight: above 0 the entropy is read with its gradient.

    Metrics, sums over tokens: `ratio`, `clip_low`, `clip_high`, `old_kl` as for grpo; `policy_loss`, `value_loss` (without its
    weight), `value_clipped`, `entropy`.
    """
    w = ratio_of(log_probs, old)
    pull = clipped(w, advantage, clip, clip_high, dual_clip)
    errors, held = _value_errors(values, value, returns, value_clip)
    total = pull.losses.sum() + value_weight * errors.sum()
    seen = {
        "ratio": w,
        "clip_low": pull.low,
        "clip_high": pull.high,
        "policy_loss": pull.losses,
        "value_loss": errors,
        "value_clipped": held,
    }
    if old is not None:
        seen["old_kl"] = estimate("k3", old, log_probs)
    if entropy is not None:
        seen["entropy"] = entropy
        total = total - entropy_weight * entropy.sum()
    elif entropy_weight:
        raise ValueError("a bonus on the entropy needs the entropy")
    return Loss(total, float(len(log_probs)), {name: each.detach().to(w.dtype).sum() for name, each in seen.items()})


def _value_errors(values: Tensor, value: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Half the larger of the squared errors of V and of V held near V_old, and where the latter is the larger, [targets]."""
    own = (values - returns).square()
    if clip is None:
        return own / 2, torch.zeros_like(own, dtype=torch.bool)
    near = (torch.clamp(values, value - clip, value + clip) - returns).square()
    return torch.maximum(own, near) / 2, near > own
