"""From the rewards of an iteration's answers to a number at each of their tokens: advantages, and for a critic values and returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tunesmith.objectives.actions import Estimator, estimate
from tunesmith.objectives.advantage import gae, group_advantages, leave_one_out, overlong, token_rewards, whitened
from tunesmith.rollout.answers import Answer, Held, Numbers
from tunesmith.rolloutspec import RolloutSpec, Settled


def shaped(outcome: float, answer: Answer, spec: RolloutSpec) -> float:
    """The reward of an answer after the penalties on its length and on a missing end; NaN stays NaN."""
    if spec.overlong:
        length = torch.tensor([answer.tokens])
        outcome += float(overlong(length, longest=spec.max_new_tokens, cache=spec.overlong)[0])
    return outcome if answer.ended else outcome - spec.missing_end


def divergence(held: Held, kind: Estimator) -> Numbers:
    """The policy's divergence from the reference at an answer's chosen tokens, nats, 0 at others."""
    apart = estimate(kind, torch.from_numpy(held.given["old"]), torch.from_numpy(held.given["reference"]))
    return np.asarray(np.where(held.chosen, apart.numpy(), 0.0), np.float32)


def give_group_advantages(held: Sequence[Held], rewards: Sequence[float], spec: RolloutSpec, settled: Settled, kl: float) -> None:
    """Write `advantage` at the tokens of answers whose groups stand one after another, all of one size.

    kl: coefficient of the divergence, summed over an answer, that is taken off its reward.
    """
    if not held:
        return
    if kl:
        rewards = [reward - kl * float(divergence(one, spec.kl_estimator).sum()) for one, reward in zip(held, rewards, strict=True)]
    table = torch.tensor(rewards, dtype=torch.float64).reshape(-1, spec.samples)
    how = settled.advantage
    found = leave_one_out(table) if how == "leave_one_out" else group_advantages(table, how)
    for one, advantage in zip(held, found.flatten().tolist(), strict=True):
        one.given["advantage"] = np.where(one.chosen, advantage, 0.0).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Judged:
    """What a critic was wrong by. explained: share of the returns' variance that its values explain. value: their mean."""

    explained: float
    value: float


def give_token_advantages(held: Sequence[Held], rewards: Sequence[float], spec: RolloutSpec, kl: float) -> Judged:
    """Write `advantage` and `return` at the tokens of answers that have `value`, `old` and, where kl is above 0, `reference`.

    kl: coefficient of the divergence that is taken off the reward of each token. Whitening is over all answers that count.
    """
    table = {name: _padded([one.given.get(name, one.given["old"]) for one in held]) for name in ("old", "reference", "value")}
    mask = _padded([one.chosen for one in held]) > 0
    counted = mask & torch.tensor([one.counted for one in held])[:, None]
    score = torch.tensor([0.0 if math.isnan(reward) else reward for reward in rewards], dtype=torch.float64)
    own = token_rewards(score, table["old"], table["reference"], mask, kl_coefficient=kl, kl=spec.kl_estimator)
    if spec.whiten_rewards:
        own = torch.where(counted, whitened(own, counted, shift=False), own)
    advantages, returns = gae(own, table["value"], mask, gamma=spec.gamma, lam=spec.gae_lambda)
    if spec.whiten:
        advantages = whitened(advantages, counted)
    for place, one in enumerate(held):
        one.given["advantage"] = advantages[place, : len(one.ids)].to(torch.float32).numpy()
        one.given["return"] = returns[place, : len(one.ids)].to(torch.float32).numpy()
    wanted, missed = returns[counted], (returns - table["value"])[counted]
    spread = float(wanted.var()) if len(wanted) > 1 else 0.0
    explained = 1 - float(missed.var()) / spread if spread else 0.0
    return Judged(explained, float(table["value"][counted].mean()) if len(wanted) else 0.0)


def _padded(parts: Sequence[np.ndarray]) -> Tensor:
    """[answers, longest], fp64, zeros behind each."""
    out = torch.zeros(len(parts), max((len(part) for part in parts), default=0), dtype=torch.float64)
    for place, part in enumerate(parts):
        out[place, : len(part)] = torch.from_numpy(np.asarray(part, np.float64))
    return out
