"""Tokens that a policy chose itself: how much likelier they are now, how far it is from its reference, and what a sum over them
is divided by. What policy gradients are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.objectives.registry import Amounts, Weigh

Ratio = Literal["token", "sequence", "product"]
Estimator = Literal["k1", "k2", "k3"]
Aggregation = Literal["grpo", "luspo", "dapo", "dr_grpo", "bnpo"]

_FAR = 20.0
"""Log-ratio at which a gradient ends: beyond it exp would soon be infinite, and infinity times an advantage of 0 is no number."""


@dataclass(frozen=True, slots=True)
class Denominator:
    """said: what the sum is divided by. weight: of (tokens, answers, longest answer); None: each micro-batch takes its own mean."""

    said: str
    weight: Callable[[int, int, int], float] | None


AGGREGATIONS: Mapping[Aggregation, Denominator] = {
    "grpo": Denominator("answers of the step, each the mean of its tokens", lambda tokens, answers, longest: float(answers)),
    "luspo": Denominator("answers of the step, each the sum of its tokens", lambda tokens, answers, longest: float(answers)),
    "dapo": Denominator("tokens of the step", lambda tokens, answers, longest: float(tokens)),
    "dr_grpo": Denominator("answers of the step times max_tokens", lambda tokens, answers, longest: float(answers * longest)),
    "bnpo": Denominator("tokens of the micro-batch, and then micro-batches of the step", None),
}
"""Ways to sum over tokens that were sampled. An answer counts where any of its tokens is supervised."""


def weigh(default: Aggregation) -> Weigh:
    """A step's denominator for an objective with this aggregation unless an option names another one."""

    def weight(amounts: Amounts, options: Mapping[str, Any]) -> float | None:
        how = AGGREGATIONS[options.get("aggregation", default)].weight
        return None if how is None else how(amounts.tokens, amounts.answers, options.get("max_tokens") or 0)

    return weight


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers that tokens belong to. place: of each token's answer, [targets]. lengths: tokens of each, [answers]."""

    place: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, answer: Tensor) -> Answers:
        """From the number of each token's answer, [targets], which never falls."""
        _, place, lengths = torch.unique_consecutive(answer, return_inverse=True, return_counts=True)
        return cls(place, lengths)

    def sums(self, values: Tensor) -> Tensor:
        """Of the tokens of each answer, [answers]."""
        return values.new_zeros(len(self.lengths)).index_add(0, self.place, values)

    def means(self, values: Tensor) -> Tensor:
        """Likewise."""
        return self.sums(values) / self.lengths

    def total(self, values: Tensor, how: Aggregation) -> Tensor:
        """What `weight` divides, from a value a token: a scalar."""
        if how == "grpo":
            return self.means(values).sum()
        return values.sum() / max(1, len(values)) if how == "bnpo" else values.sum()

    def weight(self, how: Aggregation, longest: int) -> float:
        """These answers' share of the step's denominator."""
        weight = AGGREGATIONS[how].weight
        return 1.0 if weight is None else weight(len(self.place), len(self.lengths), longest)

    def logged(self, values: Tensor, how: Aggregation, longest: int) -> Tensor:
        """The sum that the denominator makes a mean over tokens, or, where it counts answers, over answers of their means."""
        by_answer = how in ("grpo", "luspo", "dr_grpo")
        mean = (self.means(values).sum() / max(1, len(self.lengths))) if by_answer else values.sum() / max(1, len(values))
        return self.weight(how, longest) * mean


def ratio_of(log_probs: Tensor, old: Tensor | None) -> Tensor:
    """How much likelier a token is than when it was sampled, [targets]: exactly 1, with a gradient, where old is None.

    Log-ratios end at +-20.
    """
    return _change(log_probs, old).clamp(-_FAR, _FAR).exp()


def ratio_by(kind: Ratio, log_probs: Tensor, old: Tensor | None, answers: Answers) -> Tensor:
    """The same with one ratio for all tokens of an answer, [targets]: "sequence", the geometric mean of theirs (Zheng et al. 2025,
    2507.18071, eq. 7), or "product", that of the whole answer. "token": each its own."""
    if kind == "token":
        return ratio_of(log_probs, old)
    change = _change(log_probs, old)
    whole = answers.means(change) if kind == "sequence" else answers.sums(change)
    return whole.clamp(-_FAR, _FAR).exp()[answers.place]


def _change(log_probs: Tensor, old: Tensor | None) -> Tensor:
    return log_probs - (log_probs.detach() if old is None else old)


def estimate(kind: Estimator, log_probs: Tensor, reference: Tensor) -> Tensor:
    """KL(policy || reference) from one token that the policy sampled, nats, in the shape of both (Schulman 2020).

    With x = log_probs - reference: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x, with x held within +-20.
    """
    x = log_probs - reference
    if kind == "k1":
        return x
    if kind == "k2":
        return x.square() / 2
    x = x.clamp(-_FAR, _FAR)
    return torch.expm1(-x) + x
