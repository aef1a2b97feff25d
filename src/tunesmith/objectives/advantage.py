"""From rewards to advantages: what a policy gradient is told of each answer or token. Pure arithmetic, without gradients.

Tokens of answers stand as [answers, tokens] with a mask of the ones that the policy chose; a group is the answers to one prompt,
[groups, size]. An answer without a reward (NaN) takes no part in its group's mean and has the advantage 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tunesmith.objectives.actions import Estimator, estimate

_TINY = 1e-4
"""Added to a deviation before something is divided by it (Shao et al. 2024's code, and TRL's)."""


# Tokens: PPO


def token_rewards(
    score: Tensor,
    log_probs: Tensor,
    reference: Tensor,
    mask: Tensor,
    *,
    kl_coefficient: float = 0.05,
    kl: Estimator = "k1",
    ended: Tensor | None = None,
    missing_end: float = 0.0,
) -> Tensor:
    """Reward of each token, [answers, tokens]: -kl_coefficient KL, and the score at the answer's last token; 0 where masked.

    Ziegler et al. 2019 (1909.08593), eq. 2, token by token. score: [answers]. log_probs, reference: of each token under the
    policy that sampled it and under the reference, nats, [answers, tokens]. mask: True at tokens that the policy chose. ended: did
    the answer end by itself, [answers]; where not, missing_end is taken off its score.
    """
    if ended is not None:
        score = torch.where(ended, score, score - missing_end)
    rewards = torch.where(mask, -kl_coefficient * estimate(kl, log_probs, reference), 0.0)
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last = torch.where(mask, places, -1).amax(1, keepdim=True)
    return torch.where(mask & (places == last), rewards + score[:, None], rewards)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, both [answers, tokens]; 0 where masked.

    Schulman et al. 2016 (1506.02438), eq. 11 and 16: A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t, and
    R_t = A_t + V_t. After the last token V and A are 0. Tokens that the policy did not choose (a tool's result) are passed over:
    what follows them follows the token before them. rewards, values: [answers, tokens]. mask: True at tokens it chose.
    """
    advantages = torch.zeros_like(values)
    ahead = after = values.new_zeros(len(values))
    for at in reversed(range(values.shape[1])):
        chosen = mask[:, at]
        here = rewards[:, at] + gamma * ahead - values[:, at] + gamma * lam * after
        after, ahead = torch.where(chosen, here, after), torch.where(chosen, values[:, at], ahead)
        advantages[:, at] = torch.where(chosen, here, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whitened(values: Tensor, mask: Tensor, *, shift: bool = True) -> Tensor:
    """(values - mean) / sqrt(variance + 1e-8) over what is not masked, unbiased; 0 where masked. shift False: the mean is added again.

    One value alone has no variance and is only centred.
    """
    kept = values[mask]
    if not len(kept):
        return torch.zeros_like(values)
    mean = kept.mean()
    scale = torch.rsqrt(kept.var() + 1e-8) if len(kept) > 1 else 1.0
    return torch.where(mask, (values - mean) * scale + (0.0 if shift else mean), 0.0)


def adapted(coefficient: float, kl: float, *, target: float, horizon: int, count: int) -> float:
    """The next coefficient of a KL penalty: coefficient (1 + clip(kl / target - 1, +-0.2) count / horizon).

    Ziegler et al. 2019 (1909.08593), section 2.2. kl: measured over `count` answers, nats an answer, as target is.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * count / horizon)


# Groups: GRPO and its kin


def group_advantages(rewards: Tensor, scale: Literal["group", "batch", "none"] = "group") -> Tensor:
    """Rewards less their group's mean, over a deviation + 1e-4, [groups, size].

    Shao et al. 2024 (2402.03300), section 4.1.2. rewards: [groups, size]. scale: the unbiased deviation of the group, of all
    rewards at hand ("batch"), or none (Liu et al. 2025, 2503.20783).
    """
    gap = rewards - rewards.nanmean(1, keepdim=True)
    if scale == "group":
        gap = gap / (_deviation(rewards, 1) + _TINY)
    elif scale == "batch":
        gap = gap / (_deviation(rewards.reshape(1, -1), 1) + _TINY)
    return torch.where(gap.isnan(), 0.0, gap)


def leave_one_out(rewards: Tensor, *, normalise: bool = False) -> Tensor:
    """Each reward less the mean of the others of its group, [groups, size]; 0 where there are no others.

    Ahmadian et al. 2024 (2402.14740), eq. 3. normalise: advantages less their mean over all groups, over their deviation + 1e-4.
    """
    known = (~rewards.isnan()).sum(1, keepdim=True)
    others = (rewards.nansum(1, keepdim=True) - rewards) / (known - 1)
    gap = torch.where(known > 1, rewards - others, torch.nan)
    if normalise:
        gap = (gap - gap.nanmean()) / (_deviation(gap.reshape(1, -1), 1) + _TINY)
    return torch.where(gap.isnan(), 0.0, gap)


def _deviation(values: Tensor, dim: int) -> Tensor:
    """Unbiased, of what is no NaN, with the dimension kept; 0 where there are fewer than two."""
    count = (~values.isnan()).sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def carries_signal(rewards: Tensor, tolerance: float = 1e-8) -> Tensor:
    """Which groups have answers of different rewards, [groups]: the others' advantages are all 0, and dynamic sampling replaces
    them (Yu et al. 2025, 2503.14476, eq. 11).

    rewards: of the outcome, before lengths shape them, [groups, size].
    """
    most = torch.where(rewards.isnan(), -torch.inf, rewards).amax(1)
    least = torch.where(rewards.isnan(), torch.inf, rewards).amin(1)
    return most - least > tolerance


# Rewards that are not scores


def picked(index: Tensor, size: int) -> Tensor:
    """1 for the answer of each group that was picked and 0 for the others, [groups, size]. index: its place, [groups]."""
    return torch.nn.functional.one_hot(index.long(), size).to(torch.get_default_dtype())


def ranked(rank: Tensor) -> Tensor:
    """1 for the best of a group, 0 for the worst, and even steps between, [groups, size]. rank: 0 the best, [groups, size]."""
    size = rank.shape[1]
    if size < 2:
        raise ValueError("a ranking has two answers at least")
    return 1 - rank.to(torch.get_default_dtype()) / (size - 1)


def preferred(probability: Tensor) -> Tensor:
    """The mean probability of each answer to be preferred to another one of its group, [groups, size].

    probability: of the first to be preferred to the second, [groups, size, size]; the diagonal is not read.
    """
    size = probability.shape[1]
    if size < 2:
        raise ValueError("a comparison has two answers at least")
    itself = torch.eye(size, dtype=torch.bool, device=probability.device)
    return probability.masked_fill(itself, 0.0).sum(2) / (size - 1)


def overlong(lengths: Tensor, *, longest: int, cache: int) -> Tensor:
    """Penalty on long answers, [answers]: 0 up to longest - cache tokens, falling evenly to -1 at longest, and -1 beyond.

    Yu et al. 2025 (2503.14476), eq. 13. lengths: tokens, [answers]. cache: over how many tokens it falls; 0 for a step.
    """
    over = lengths.to(torch.get_default_dtype()) - (longest - cache)
    if cache == 0:
        return -(over > 0).to(over.dtype)
    return -(over / cache).clamp(0.0, 1.0)
