"""Policy gradients without a critic: the GRPO family. One loss of a token, and for each method what it takes of it.

w is how much likelier a token is than when it was sampled, A its answer's advantage. `log_probs`, `old`, `advantage`, `reference`:
[targets], of each token the policy sampled: its log-probability now, as it was sampled, the answer's advantage, and the
log-probability under the reference, nats. old None: as it was sampled is as it is now, so w is exactly 1. reference is read where
beta is above 0. answer: the number of the answer a token belongs to, [targets], never falling. entropy: of the policy at each
token, for the metric.

Metrics are means over tokens, or over answers of their means where the denominator counts answers: `ratio` (w); `clip_low` and
`clip_high`, tokens that clipping leaves without a pull because w is below 1 - clip and A < 0, or above 1 + clip_high and A > 0;
`old_kl` from the policy that sampled (k3), where old is given; `kl` from the reference, where beta is above 0; and `entropy`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.errors import SpecError
from tunesmith.core.loss import Loss
from tunesmith.objectives.actions import AGGREGATIONS, Aggregation, Answers, Estimator, Ratio, estimate, ratio_by, ratio_of, weigh
from tunesmith.objectives.options import ABOVE_0, ABOVE_1, COUNT, NONE, NOT_BELOW_0, PART, check, one_of
from tunesmith.objectives.registry import Wants, objective
from tunesmith.objectives.wanted import Wanted

READS = ("log_probs", "old", "advantage", "reference", "answer", "entropy")

_actions = partial(objective, unit="actions", reads=READS)

RANGES = {
    "clip": PART,
    "clip_high": ABOVE_0 | NONE,
    "dual_clip": ABOVE_1 | NONE,
    "beta": NOT_BELOW_0,
    "kl": one_of("k1", "k2", "k3"),
    "aggregation": one_of(*AGGREGATIONS),
    "ratio": one_of("token", "sequence", "product"),
    "max_tokens": COUNT | NONE,
}


def _asking(name: str, aggregation: Aggregation) -> Wants:
    def wants(logging: bool, **options: Any) -> Wanted:
        check(name, options, **RANGES)
        how = options.get("aggregation", aggregation)
        if how == "dr_grpo" and options.get("max_tokens") is None:
            hints = [f"Name the most tokens that are sampled:  {name}(max_tokens=256)"]
            raise SpecError(f"objective {name}: max_tokens has to be given, by which a sum over tokens is divided.", hints=hints)
        return Wanted(entropy=logging, detached=frozenset({"entropy"}) if logging else frozenset())

    return wants


@dataclass(frozen=True, slots=True)
class Pull:
    """What a step pulls at each token, [targets]. losses: with gradient. low, high: where clipping has taken the pull away."""

    losses: Tensor
    low: Tensor
    high: Tensor


def clipped(w: Tensor, advantage: Tensor, clip: float, clip_high: float | None = None, dual_clip: float | None = None) -> Pull:
    """-min(w A, clip(w, 1 - clip, 1 + clip_high) A) of each token (Schulman et al. 2017, 1707.06347, eq. 7).

    clip_high: None for clip (apart from it: Yu et al. 2025, 2503.14476, eq. 10). dual_clip: at most -dual_clip A where A < 0 (Ye et
    al. 2020, 1912.09729, eq. 5).
    """
    top = 1 + (clip if clip_high is None else clip_high)
    losses = -torch.minimum(w * advantage, w.clamp(1 - clip, top) * advantage)
    if dual_clip is not None:
        losses = torch.where(advantage < 0, torch.minimum(losses, -dual_clip * advantage), losses)
    return Pull(losses, (w < 1 - clip) & (advantage < 0), (w > top) & (advantage > 0))


@dataclass(frozen=True, slots=True)
class Step:
    """The readings of the module's docstring, and how they are summed."""

    log_probs: Tensor
    old: Tensor | None
    reference: Tensor | None
    answers: Answers
    entropy: Tensor | None
    how: Aggregation
    longest: int = 0

    def loss(self, pull: Pull, w: Tensor, beta: float, kl: Estimator) -> Loss:
        """The sum of what pulls at tokens, + beta times the divergence from the reference, with metrics."""
        losses, seen = pull.losses, {"ratio": w, "clip_low": pull.low, "clip_high": pull.high}
        if beta:
            if self.reference is None:
                raise ValueError("a penalty on the divergence needs the reference's log-probabilities")
            seen["kl"] = estimate(kl, self.log_probs, self.reference)
            losses = losses + beta * seen["kl"]
        if self.old is not None:
            seen["old_kl"] = estimate("k3", self.old, self.log_probs)
        if self.entropy is not None:
            seen["entropy"] = self.entropy
        with torch.no_grad():
            metrics = {name: self.answers.logged(values.to(w.dtype), self.how, self.longest) for name, values in seen.items()}
        return Loss(self.answers.total(losses, self.how), self.answers.weight(self.how, self.longest), metrics)


@_actions("grpo", denominator=AGGREGATIONS["grpo"].said, wants=_asking("grpo", "grpo"), weigh=weigh("grpo"))
def grpo(
    log_probs: Tensor, old: Tensor | None, advantage: Tensor, reference: Tensor | None, answer: Tensor, entropy: Tensor | None = None,
    *, clip: float = 0.2, clip_high: float | None = None, dual_clip: float | None = None, beta: float = 0.0, kl: Estimator = "k3",
    ratio: Ratio = "token", aggregation: Aggregation = "grpo", max_tokens: int | None = None,
) -> Loss:  # fmt: skip
    """Group relative policy optimisation: -min(w A, clip(w, 1 - clip, 1 + clip_high) A) + beta KL a token, the mean over each answer.

    Shao et al. 2024 (2402.03300), eq. 3; the advantages are a group's rewards less their mean, over their deviation. clip_high: none
    for clip. dual_clip: at most -dual_clip A where A < 0 (Ye et al. 2020, 1912.09729). beta: of the divergence from the reference
    (0.04 in the paper), whose estimator is kl: k3 there; k2 has the gradient of the divergence itself, that of k1 is 0 on average.
    ratio: w of the token, "sequence" for the geometric mean over its answer, "product" for the whole answer's. aggregation: how
    tokens are summed, and by what the sum is divided: grpo, luspo, dapo, dr_grpo (which takes max_tokens) or bnpo.
    """
    answers = Answers.of(answer)
    w = ratio_by(ratio, log_probs, old, answers)
    step = Step(log_probs, old, reference, answers, entropy, aggregation, max_tokens or 0)
    return step.loss(clipped(w, advantage, clip, clip_high, dual_clip), w, beta, kl)


@_actions("dr_grpo", denominator=AGGREGATIONS["dr_grpo"].said, wants=_asking("dr_grpo", "dr_grpo"), weigh=weigh("dr_grpo"))
def dr_grpo(
    log_probs: Tensor, old: Tensor | None, advantage: Tensor, reference: Tensor | None, answer: Tensor, entropy: Tensor | None = None,
    *, max_tokens: int, clip: float = 0.2, clip_high: float | None = None, dual_clip: float | None = None, beta: float = 0.0,
    kl: Estimator = "k3",
) -> Loss:  # fmt: skip
    """GRPO done right: the sum over tokens, divided by answers times max_tokens, so that long answers are not pulled at less.

    Liu et al. 2025 (2503.20783), section 3.2; its advantages are rewards less their group's mean, not divided by the deviation.
    max_tokens: the most that are sampled, which is the same for all answers. The other options: as for grpo.
    """
    return grpo(
        log_probs, old, advantage, reference, answer, entropy,
        clip=clip, clip_high=clip_high, dual_clip=dual_clip, beta=beta, kl=kl, aggregation="dr_grpo", max_tokens=max_tokens,
    )  # fmt: skip


@_actions("gspo", denominator=AGGREGATIONS["grpo"].said, wants=_asking("gspo", "grpo"), weigh=weigh("grpo"))
def gspo(
    log_probs: Tensor, old: Tensor | None, advantage: Tensor, reference: Tensor | None, answer: Tensor, entropy: Tensor | None = None,
    *, clip: float = 3e-4, clip_high: float | None = 4e-4, beta: float = 0.0, kl: Estimator = "k3",
) -> Loss:  # fmt: skip
    """Group sequence policy optimisation: GRPO with one w an answer, the geometric mean of its tokens' ratios.

    Zheng et al. 2025 (2507.18071), eq. 5 and 7, section 5.1 for clip and clip_high: a mean of many ratios strays less than one of
    them does. The other options: as for grpo.
    """
    return grpo(log_probs, old, advantage, reference, answer, entropy, clip=clip, clip_high=clip_high, beta=beta, kl=kl, ratio="sequence")


@_actions("cispo", denominator=AGGREGATIONS["dapo"].said, wants=_asking("cispo", "dapo"), weigh=weigh("dapo"))
def cispo(
    log_probs: Tensor, old: Tensor | None, advantage: Tensor, reference: Tensor | None, answer: Tensor, entropy: Tensor | None = None,
    *, clip_high: float = 4.0, beta: float = 0.0, kl: Estimator = "k3", aggregation: Aggregation = "dapo", max_tokens: int | None = None,
) -> Loss:  # fmt: skip
    """Clipped weights, not clipped updates: -min(w, 1 + clip_high) A log p a token, the weight held fixed.

    MiniMax 2025 (2506.13585), eq. 4: rare tokens keep their gradient, which clipping takes away. clip_high: Khatri et al. 2025
    (2510.13786) hold w to at most 5. The other options: as for grpo.
    """
    answers = Answers.of(answer)
    w = ratio_of(log_probs, old)
    cap = w.detach().clamp(max=1 + clip_high)
    never = torch.zeros_like(advantage, dtype=torch.bool)
    pull = Pull(-cap * advantage * log_probs, never, (w > 1 + clip_high) & (advantage > 0))
    return Step(log_probs, old, reference, answers, entropy, aggregation, max_tokens or 0).loss(pull, w, beta, kl)


@_actions("dapo", denominator=AGGREGATIONS["dapo"].said, wants=_asking("dapo", "dapo"), weigh=weigh("dapo"))
def dapo(
    log_probs: Tensor, old: Tensor | None, advantage: Tensor, reference: Tensor | None, answer: Tensor, entropy: Tensor | None = None,
    *, clip: float = 0.2, clip_high: float | None = 0.28, dual_clip: float | None = None, beta: float = 0.0, kl: Estimator = "k3",
    aggregation: Aggregation = "dapo", max_tokens: int | None = None,
) -> Loss:  # fmt: skip
    """Decoupled clip: GRPO with a higher bound upward, and every token of the step with the same weight.

    Yu et al. 2025 (2503.14476), eq. 8 and 10. Its other parts, dynamic sampling, the mask of truncated answers and the penalty on
    overlong ones, are switches of the rollout. The options: as for grpo.
    """
    return grpo(
        log_probs, old, advantage, reference, answer, entropy,
        clip=clip, clip_high=clip_high, dual_clip=dual_clip, beta=beta, kl=kl, aggregation=aggregation, max_tokens=max_tokens,
    )  # fmt: skip


@_actions("rloo", denominator=AGGREGATIONS["grpo"].said, wants=_asking("rloo", "grpo"), weigh=weigh("grpo"))
def rloo(
    log_probs: Tensor, old: Tensor | None, advantage: Tensor, reference: Tensor | None, answer: Tensor, entropy: Tensor | None = None,
    *, clip: float = 0.2, clip_high: float | None = None, beta: float = 0.0, kl: Estimator = "k3",
) -> Loss:  # fmt: skip
    """REINFORCE leave-one-out: -min(w A, clip(w, 1 - clip, 1 + clip_high) A) an answer, w the ratio of its whole probability.

    Ahmadian et al. 2024 (2402.14740), eq. 3, where w is 1; clipped where answers are used again. An answer's advantage is its
    reward less the mean of the others'; a penalty on the divergence belongs into the reward there. The options: as for grpo.
    """
    return grpo(log_probs, old, advantage, reference, answer, entropy, clip=clip, clip_high=clip_high, beta=beta, kl=kl, ratio="product")
