"""Advantages, rewards of tokens and of groups: numbers worked by hand, and plain loops over the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.objectives.advantage import (
    adapted,
    carries_signal,
    gae,
    group_advantages,
    leave_one_out,
    overlong,
    picked,
    preferred,
    ranked,
    token_rewards,
    whitened,
)

NAN = float("nan")


def table(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def masks(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def test_gae_of_three_tokens_worked_by_hand() -> None:
    # gamma 0.9, lam 0.5; values 1, 2, 3; rewards 0, 0, 10.
    # delta = 10 - 3 = 7; 0 + 0.9 * 3 - 2 = 0.7; 0 + 0.9 * 2 - 1 = 0.8. A = 7; 0.7 + 0.45 * 7 = 3.85; 0.8 + 0.45 * 3.85 = 2.5325.
    advantages, returns = gae(table([0, 0, 10]), table([1, 2, 3]), masks([1, 1, 1]), gamma=0.9, lam=0.5)
    assert advantages[0].tolist() == pytest.approx([2.5325, 3.85, 7]) and returns[0].tolist() == pytest.approx([3.5325, 5.85, 10])


def test_gae_passes_over_tokens_that_the_policy_did_not_choose() -> None:
    holes = gae(table([1, 99, 99, 2, 99]), table([4, -50, 70, 5, 80]), masks([1, 0, 0, 1, 0]), gamma=0.9, lam=0.5)
    tight = gae(table([1, 2]), table([4, 5]), masks([1, 1]), gamma=0.9, lam=0.5)
    for with_holes, without in zip(holes, tight, strict=True):
        assert torch.equal(with_holes[0, [0, 3]], without[0]) and not with_holes[0, [1, 2, 4]].any()


@given(st.integers(1, 4), st.integers(1, 7), st.floats(0, 1), st.floats(0, 1), st.integers(0, 999))
def test_gae_is_the_weighted_sum_of_later_surprises(count: int, tokens: int, gamma: float, lam: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    rewards, values = random.normal(size=(2, count, tokens))
    lengths = random.integers(0, tokens + 1, count)
    mask = np.arange(tokens) < lengths[:, None]
    advantages, returns = gae(torch.from_numpy(rewards), torch.from_numpy(values), torch.from_numpy(mask), gamma=gamma, lam=lam)
    for row, length in enumerate(lengths):
        nexts = [*values[row, 1:length], 0.0]
        deltas = [rewards[row, t] + gamma * nexts[t] - values[row, t] for t in range(length)]
        truth = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]
        assert advantages[row, :length].tolist() == pytest.approx(truth) and not advantages[row, length:].any()
        assert returns[row, :length].tolist() == pytest.approx([a + v for a, v in zip(truth, values[row], strict=False)])


def test_with_lambda_one_returns_are_the_discounted_rewards_whatever_the_critic_says() -> None:
    _, returns = gae(table([1, 2, 4]), torch.randn(1, 3, dtype=torch.float64), masks([1, 1, 1]), gamma=0.5, lam=1.0)
    assert returns[0].tolist() == pytest.approx([1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4])


def test_the_score_stands_at_the_last_chosen_token_and_the_penalty_at_each() -> None:
    lp, ref = table([-1, -2, -3, 0], [-1, -1, -1, -1]), table([-1.5, -1, -3, 0], [-1, -1, -1, -1])
    mask = masks([1, 1, 1, 0], [1, 0, 1, 0])
    rewards = token_rewards(torch.tensor([2.0, 5.0], dtype=torch.float64), lp, ref, mask, kl_coefficient=0.1)
    assert rewards.tolist() == [pytest.approx([-0.05, 0.1, 2.0, 0]), pytest.approx([0, 0, 5, 0])]
    ended = torch.tensor([True, False])
    rewards = token_rewards(torch.tensor([2.0, 5.0], dtype=torch.float64), lp, ref, mask, kl_coefficient=0, ended=ended, missing_end=1.5)
    assert rewards.tolist() == [[0, 0, 2, 0], [0, 0, 3.5, 0]]


@pytest.mark.parametrize(("kind", "wanted"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 1 + 0.5)])
def test_the_penalty_takes_any_estimator(kind: str, wanted: float) -> None:
    rewards = token_rewards(table([0])[0], table([-1.0]), table([-1.5]), masks([1]), kl_coefficient=2.0, kl=kind)  # type: ignore[arg-type]
    assert float(rewards) == pytest.approx(-2 * wanted)


def test_an_answer_of_no_token_has_no_reward() -> None:
    assert not token_rewards(torch.ones(1), torch.zeros(1, 3), torch.zeros(1, 3), masks([0, 0, 0])).any()


def test_whitening_is_over_what_is_not_masked_with_the_unbiased_variance() -> None:
    values, mask = table([1, 2, 100], [6, 100, 100]), masks([1, 1, 0], [1, 0, 0])
    out = whitened(values, mask)
    assert out[mask].tolist() == pytest.approx([(v - 3) / math.sqrt(7 + 1e-8) for v in (1, 2, 6)]) and not out[~mask].any()
    assert whitened(values, mask, shift=False)[mask].tolist() == pytest.approx([(v - 3) / math.sqrt(7) + 3 for v in (1, 2, 6)])
    assert whitened(table([4.0]), masks([1])).tolist() == [[0.0]] and whitened(table([4.0]), masks([0])).tolist() == [[0.0]]


@pytest.mark.parametrize(("kl", "wanted"), [(6.0, 1.0), (12.0, 1 + 0.2 * 0.5), (0.0, 1 - 0.2 * 0.5), (6.6, 1 + 0.1 * 0.5)])
def test_the_penalty_grows_where_the_policy_strays_and_by_a_fifth_at_most(kl: float, wanted: float) -> None:
    assert adapted(1.0, kl, target=6.0, horizon=100, count=50) == pytest.approx(wanted)


groups = st.tuples(st.integers(1, 4), st.integers(2, 6), st.integers(0, 999))


@given(groups)
def test_group_advantages_are_rewards_less_the_mean_over_the_deviation(drawn: tuple[int, int, int]) -> None:
    count, size, seed = drawn
    rewards = np.random.default_rng(seed).normal(size=(count, size))
    gap = rewards - rewards.mean(1, keepdims=True)
    out = {scale: group_advantages(torch.from_numpy(rewards), scale).numpy() for scale in ("group", "batch", "none")}  # type: ignore[arg-type]
    assert np.allclose(out["group"], gap / (rewards.std(1, ddof=1, keepdims=True) + 1e-4))
    assert np.allclose(out["batch"], gap / (rewards.std(ddof=1) + 1e-4)) and np.allclose(out["none"], gap)


@given(groups)
def test_leaving_one_out_compares_each_with_the_mean_of_the_others(drawn: tuple[int, int, int]) -> None:
    count, size, seed = drawn
    rewards = np.random.default_rng(seed).normal(size=(count, size))
    truth = np.array([[row[i] - np.delete(row, i).mean() for i in range(size)] for row in rewards])
    assert np.allclose(leave_one_out(torch.from_numpy(rewards)).numpy(), truth)
    scaled = leave_one_out(torch.from_numpy(rewards), normalise=True).numpy()
    assert np.allclose(scaled, (truth - truth.mean()) / (truth.std(ddof=1) + 1e-4))


def test_an_answer_without_a_reward_moves_nobody() -> None:
    rewards = table([1, NAN, 3], [NAN, NAN, 7], [NAN, NAN, NAN])
    assert group_advantages(rewards, "none").tolist() == [[-1, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert group_advantages(rewards)[0].tolist() == pytest.approx([-1 / (math.sqrt(2) + 1e-4), 0, 1 / (math.sqrt(2) + 1e-4)])
    assert leave_one_out(rewards).tolist() == [[-2, 0, 2], [0, 0, 0], [0, 0, 0]]
    assert carries_signal(rewards).tolist() == [True, False, False]


def test_groups_of_equal_rewards_carry_no_signal() -> None:
    assert carries_signal(table([1, 1, 1], [0, 0, 1], [0.3, 0.3, 0.3])).tolist() == [False, True, False]


def test_picks_rankings_and_soft_preferences_are_rewards_from_nothing_to_one() -> None:
    assert picked(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert ranked(torch.tensor([[2, 0, 1]])).tolist() == [[0, 1, 0.5]]
    p = torch.tensor([[[NAN, 0.9, 0.6], [0.1, NAN, 0.2], [0.4, 0.8, NAN]]])
    assert preferred(p)[0].tolist() == pytest.approx([0.75, 0.15, 0.6])
    for alone in (lambda: ranked(torch.zeros(1, 1)), lambda: preferred(torch.zeros(1, 1, 1))):
        with pytest.raises(ValueError, match="two answers"):
            alone()


def test_overlong_answers_are_punished_softly() -> None:
    assert overlong(torch.tensor([10, 80, 85, 90, 100, 140]), longest=100, cache=20).tolist() == [0, 0, -0.25, -0.5, -1, -1]
    assert overlong(torch.tensor([100, 101]), longest=100, cache=0).tolist() == [0, -1]
