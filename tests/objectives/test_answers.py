"""Losses of single answers, rankings, reward models and distillation: loops over the definitions, slopes, and what they equal."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slopes import slope
from tunesmith.core.errors import SpecError
from tunesmith.engine.head import Projection, read_head
from tunesmith.objectives import OBJECTIVES, Divergence, Wanted, distil, dpo, kto, plackett_luce, reward, sft
from tunesmith.spec import objective_call

sizes = st.lists(st.integers(2, 5), min_size=1, max_size=4)


def ranks(groups: list[int]) -> torch.Tensor:
    return torch.tensor([rank for size in groups for rank in range(size)])


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def leaf(values: np.ndarray) -> torch.Tensor:
    return torch.tensor(values, requires_grad=True)


def held(loss_total: torch.Tensor, of: torch.Tensor, truth: np.ndarray) -> bool:
    """Is its gradient this slope?"""
    (gradient,) = torch.autograd.grad(loss_total, of)
    return np.allclose(gradient.numpy(), truth, rtol=1e-6, atol=1e-6)


# Good or bad, each by itself


@settings(max_examples=25)
@given(count=st.integers(1, 6), kl=st.floats(-2, 4), seed=st.integers(0, 999))
def test_kto_is_its_equation_and_its_gradient_the_equations_slope(count: int, kl: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    sums, reference, good = random.normal(-9, 4, count), random.normal(-9, 4, count), random.integers(0, 2, count)

    def equation(policy: np.ndarray) -> float:
        total, anchor = 0.0, max(0.0, kl)
        for lp, ref, is_good in zip(policy, reference, good, strict=True):
            x = lp - ref
            total += 2.0 * (1 - sigmoid(0.3 * (x - anchor))) if is_good else 0.5 * (1 - sigmoid(0.3 * (anchor - x)))
        return total

    policy, anchor = leaf(sums), torch.tensor(kl, dtype=torch.float64, requires_grad=True)
    loss = kto(policy, torch.tensor(reference), torch.tensor(good).float(), anchor, beta=0.3, desirable=2.0, undesirable=0.5)
    assert float(loss.total.detach()) == pytest.approx(equation(sums)) and loss.weight == count
    assert held(loss.total, policy, slope(equation, sums))
    assert float(loss.metrics["kl"]) == pytest.approx(max(0, kl) * count)


def test_kto_holds_the_anchor_fixed_and_counts_answers_on_their_side_of_it() -> None:
    kl = torch.tensor(1.0, requires_grad=True)
    sums = torch.tensor([-1.0, -5.0, -2.0], requires_grad=True)
    loss = kto(sums, torch.tensor([-4.0, -5.5, -9.0]), torch.tensor([1.0, 1.0, 0.0]), kl)
    loss.total.backward()
    assert kl.grad is None and float(loss.metrics["accuracy"]) == 1
    assert float(loss.metrics["margin"]) == pytest.approx(0.1 * ((3 - 1) + (0.5 - 1) - (7 - 1)))
    nothing = kto(sums, torch.tensor([-4.0, -5.5, -9.0]), torch.tensor([1.0, 1.0, 0.0]), None)
    zero = kto(sums, torch.tensor([-4.0, -5.5, -9.0]), torch.tensor([1.0, 1.0, 0.0]), torch.tensor(-3.0))
    assert torch.equal(nothing.total, zero.total)


# Rankings


def in_turn(scores: np.ndarray, groups: list[int], margins: np.ndarray | None = None) -> float:
    """Plackett-Luce by loops: each in turn is the best of those left."""
    total, begin = 0.0, 0
    for size in groups:
        for k in range(begin, begin + size):
            m = 0.0 if margins is None else margins[k]
            total += math.log(math.exp(scores[k]) + sum(math.exp(scores[j] + m) for j in range(k + 1, begin + size))) - scores[k]
        begin += size
    return total


@settings(max_examples=25)
@given(groups=sizes, seed=st.integers(0, 999))
def test_a_ranking_is_the_best_of_those_left_in_turn(groups: list[int], seed: int) -> None:
    sums, reference = np.random.default_rng(seed).normal(size=(2, sum(groups)))

    def equation(policy: np.ndarray) -> float:
        return in_turn(0.7 * (policy - reference), groups)

    policy = leaf(sums)
    loss = plackett_luce(policy, torch.tensor(reference), ranks(groups), beta=0.7)
    assert float(loss.total.detach()) == pytest.approx(equation(sums)) and loss.weight == len(groups)
    assert held(loss.total, policy, slope(equation, sums))


@given(count=st.integers(1, 5), seed=st.integers(0, 999))
def test_a_ranking_of_two_is_dpo_with_its_gradient_and_its_metrics(count: int, seed: int) -> None:
    torch.manual_seed(seed)
    sums, reference = torch.randn(2, count, 2, dtype=torch.float64) * 20
    sums.requires_grad_()
    ranking = plackett_luce(sums.flatten(), reference.flatten(), ranks([2] * count), beta=0.2)
    pair = dpo(*sums.unbind(1), *reference.unbind(1), torch.ones(count, dtype=torch.float64), beta=0.2)
    assert float(ranking.total.detach()) == pytest.approx(float(pair.total.detach())) and ranking.weight == pair.weight
    assert torch.allclose(*(torch.autograd.grad(loss.total, sums)[0] for loss in (ranking, pair)))
    for name in ("accuracy", "margin"):
        assert float(ranking.metrics[name]) == pytest.approx(float(pair.metrics[name]))


def test_accuracy_of_rankings_is_the_share_of_pairs_in_order_averaged_over_rankings() -> None:
    loss = plackett_luce(torch.tensor([3.0, 1.0, 2.0, 5.0, 5.0]), torch.zeros(5), ranks([3, 2]), beta=1.0)
    assert float(loss.metrics["accuracy"]) == pytest.approx(2 / 3 + 1 / 2)
    assert float(loss.metrics["margin"]) == pytest.approx((2 + 1 - 1) / 3)


def test_nothing_to_rank_costs_nothing() -> None:
    assert float(plackett_luce(torch.zeros(0), torch.zeros(0), torch.zeros(0)).total) == 0
    assert float(reward(torch.zeros(0, 1), *torch.zeros(3, 0), centring=0.1).total) == 0


# Reward models


@settings(max_examples=25)
@given(groups=sizes, seed=st.integers(0, 999), centring=st.sampled_from([0.0, 0.3]))
def test_a_reward_model_learns_pairs_and_rankings_with_margins_soft_labels_and_centring(
    groups: list[int], seed: int, centring: float
) -> None:
    random = np.random.default_rng(seed)
    values, margin, soft = random.normal(size=sum(groups)), random.random(sum(groups)), random.random(sum(groups))
    begins = np.cumsum([0, *groups[:-1]])
    for begin, size in zip(begins, groups, strict=True):
        soft[begin : begin + size] = soft[begin] if size == 2 else 1.0

    def equation(r: np.ndarray) -> float:
        total = 0.0
        for begin, size in zip(begins, groups, strict=True):
            if size == 2:
                z, p = r[begin] - r[begin + 1] - margin[begin], soft[begin]
                total += -p * math.log(sigmoid(z)) - (1 - p) * math.log(sigmoid(-z))
            else:
                total += in_turn(r[begin : begin + size], [size], margin[begin : begin + size])
            total += centring * (2 * r[begin : begin + size].mean()) ** 2
        return total

    logits = leaf(values[:, None])
    loss = reward(logits, ranks(groups), torch.tensor(margin), torch.tensor(soft), centring=centring)
    assert float(loss.total.detach()) == pytest.approx(equation(values)) and loss.weight == len(groups)
    assert held(loss.total, logits, slope(equation, values)[:, None])


def test_a_reward_models_pairs_worked_by_hand() -> None:
    loss = reward(torch.tensor([[2.0], [1.0], [0.0], [3.0]]), ranks([2, 2]), torch.tensor([0.5, 0.5, 0, 0]), torch.ones(4), centring=0.1)
    truth = -math.log(sigmoid(0.5)) - math.log(sigmoid(-3.0)) + 0.1 * (9 + 9)
    assert float(loss.total) == pytest.approx(truth, rel=1e-6)
    assert float(loss.metrics["accuracy"]) == 1 and float(loss.metrics["margin"]) == pytest.approx(1 - 3)


@pytest.mark.parametrize(
    "written", ["kto(beta=0)", "kto(desirable=-1)", "plackett_luce(beta=none)", "reward(centring=-0.1)", "distil(sft=-1)"]
)
def test_options_out_of_range_are_refused_as_the_spec_is_read(written: str) -> None:
    with pytest.raises(SpecError, match="must be a number"):
        objective_call(written)


# Distillation


@pytest.mark.parametrize(("beta", "temperature", "weight"), [(0.0, 1.0, 0.0), (1.0, 2.0, 0.5), (0.4, 0.5, 0.0)])
def test_distillation_through_the_head_is_the_divergence_and_the_likelihood_it_says_it_is(
    beta: float, temperature: float, weight: float
) -> None:
    torch.manual_seed(0)
    hidden, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    hidden.requires_grad_()
    words, target = torch.randn(11, 5, dtype=torch.float64), torch.randint(0, 11, (4,))
    entry, options = OBJECTIVES["distil"], {"beta": beta, "temperature": temperature, "sft": weight}
    read = read_head(Projection((hidden,), (words,)), target, entry.wanted(options), teacher=Projection((teacher,), (words,)))
    loss = entry.loss(read, options)
    s, t = (torch.log_softmax(x @ words.T / temperature, -1) for x in (hidden, teacher))
    m = torch.log((1 - beta) * s.exp() + beta * t.exp())
    far = {0.0: t.exp() * (t - s), 1.0: s.exp() * (s - t)}.get(beta, beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum()
    plain = sft(torch.log_softmax(hidden @ words.T, -1).gather(1, target[:, None])[:, 0]).total
    truth = far + weight * plain
    assert float(loss.total.detach()) == pytest.approx(float(truth.detach()), rel=1e-7) and loss.weight == 4
    assert torch.allclose(*(torch.autograd.grad(each, hidden)[0] for each in (loss.total, truth)), atol=1e-8)
    assert float(loss.metrics["divergence"]) == pytest.approx(float(far.detach()))
    assert float(loss.metrics["surprise"]) == pytest.approx(float(plain.detach()))


def test_distillation_asks_for_the_likelihoods_gradient_only_where_it_is_weighed() -> None:
    wanted = OBJECTIVES["distil"].wanted
    assert wanted({}) == Wanted(divergence=Divergence(), detached=frozenset({"log_probs"}))
    assert wanted({"sft": 0.5, "beta": 1.0}, logging=True) == Wanted(divergence=Divergence(1.0), best=True)
    read = SimpleNamespace(divergence=torch.tensor([0.5, 1.0]), log_probs=torch.tensor([-1.0, -2.0]), best=torch.tensor([-1.0, -0.5]))
    loss = OBJECTIVES["distil"].loss(read, {})
    assert float(loss.total) == 1.5 and float(loss.metrics["token_accuracy"]) == 1
    assert "token_accuracy" not in distil(read.divergence, read.log_probs).metrics
