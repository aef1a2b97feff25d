"""Reward models: a task head's one value learns to put answers in the order that people put them in."""

from __future__ import annotations

from torch import Tensor

from tunesmith.core.loss import Loss
from tunesmith.objectives.options import NOT_BELOW_0, checked
from tunesmith.objectives.ranking import compared, group_of, surprise
from tunesmith.objectives.registry import objective


@objective(
    "reward",
    unit="scores",
    reads=("logits", "rank", "margin", "soft"),
    denominator="pairs and rankings of the step",
    wants=checked("reward", centring=NOT_BELOW_0),
)
def reward(logits: Tensor, rank: Tensor, margin: Tensor, soft: Tensor, *, centring: float = 0.0) -> Loss:
    """Bradley-Terry on pairs, Plackett-Luce on rankings: -s(r_c - r_r - margin), s the log-sigmoid.

    Ouyang et al. 2022 (2203.02155), eq. 1; the margin as in Touvron et al. 2023 (2307.09288), eq. 2. Of more than two answers each
    in turn is the best of those that are left, as in plackett_luce. logits: the head's value r, [answers, 1]. rank: 0 the best of
    its group, [answers]; a group's answers stand one after another. margin: by how much an answer shall beat those after it, 0 for
    none, [answers]. soft: probability p that the better-ranked answer of a pair is the better one, 1 in longer rankings, [answers]:
    -p s(z) - (1 - p) s(-z), z = r_c - r_r - margin. centring c: + c (r_c + r_r)^2 a pair (Eisenstein et al. 2023, 2312.09244), and
    c (2 mean r)^2 a ranking, which keeps rewards near 0.

    Metrics, sums over groups: `accuracy`, share of its pairs in the right order, a tie half; `margin`, mean difference of r.
    """
    r, group, best = logits[:, 0], group_of(rank), rank == 0
    total = surprise(r, rank, margin).sum()
    z = r[best] - r[rank == 1] - margin[best]  # of the two best
    total = total + ((1 - soft[best]) * z).sum()  # -s(-z) = -s(z) + z
    if centring:
        sums, count = (r.new_zeros(len(z)).index_add(0, group, each) for each in (r, r.new_ones(len(r))))
        total = total + centring * (2 * sums / count).square().sum()
    return Loss(total, weight=float(len(z)), metrics=compared(r, rank))
