"""Policy gradients of the GRPO family against loops over answers and tokens, and their gradients by finite differences."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slopes import slope
from tunesmith.core.errors import SpecError
from tunesmith.core.loss import Loss
from tunesmith.objectives import OBJECTIVES, Wanted, grpo, rloo
from tunesmith.objectives.actions import Answers, estimate, ratio_by
from tunesmith.objectives.registry import Amounts
from tunesmith.spec import objective_call

NAMES = ("log_probs", "old", "advantage", "reference")
LONGEST = 9

WRITTEN = [
    "grpo",
    "grpo(beta=0.04)",
    "grpo(beta=0.1, kl=k1, aggregation=dapo)",
    "grpo(beta=0.1, kl=k2, aggregation=bnpo)",
    "grpo(clip_high=0.4, dual_clip=1.3, aggregation=luspo)",
    "grpo(ratio=sequence, aggregation=luspo)",
    f"dr_grpo(max_tokens={LONGEST})",
    f"grpo(aggregation=dr_grpo, max_tokens={LONGEST}, beta=0.2)",
    "gspo",
    "gspo(clip=0.2, clip_high=0.3, beta=0.1)",
    "cispo",
    "cispo(clip_high=0.1, beta=0.1, aggregation=grpo)",
    "dapo",
    "dapo(dual_clip=1.1)",
    "rloo",
    "rloo(beta=0.05, clip_high=0.3)",
]
DEFAULTS: dict[str, dict[str, Any]] = {
    "grpo": {"clip": 0.2, "aggregation": "grpo"},
    "dr_grpo": {"clip": 0.2, "aggregation": "dr_grpo"},
    "gspo": {"clip": 3e-4, "clip_high": 4e-4, "aggregation": "grpo", "ratio": "sequence"},
    "cispo": {"clip_high": 4.0, "aggregation": "dapo"},
    "dapo": {"clip": 0.2, "clip_high": 0.28, "aggregation": "dapo"},
    "rloo": {"clip": 0.2, "aggregation": "grpo", "ratio": "product"},
}


def token_loss(w: float, a: float, lp: float, ref: float, options: dict[str, Any], cap: float | None) -> float:
    """One token's, from its ratio and advantage."""
    if cap is not None:
        loss = -cap * a * lp
    else:
        low, high = 1 - options["clip"], 1 + (options.get("clip_high") or options["clip"])
        loss = -min(w * a, min(max(w, low), high) * a)
        if options.get("dual_clip") and a < 0:
            loss = min(loss, -options["dual_clip"] * a)
    gap = lp - ref
    kl = {"k1": gap, "k2": gap * gap / 2, "k3": math.exp(-gap) - 1 + gap}[options.get("kl", "k3")]
    return loss + options.get("beta", 0.0) * kl


def written_out(written: str, answers: list[np.ndarray], fixed: list[np.ndarray] | None = None) -> tuple[float, float]:
    """(sum, weight) by loops over answers [tokens, 4]. fixed: where weights that are held fixed are computed, for slopes."""
    call = objective_call(written)
    options = DEFAULTS[call.name] | call.options
    per_answer = []
    for answer, held in zip(answers, fixed or answers, strict=True):
        changes = [lp - old for lp, old, _, _ in answer]
        kind = options.get("ratio", "token")
        whole = math.exp(sum(changes) / (len(changes) if kind == "sequence" else 1))
        losses = []
        for change, (lp, _, a, ref), (lp0, old0, _, _) in zip(changes, answer, held, strict=True):
            cap = min(math.exp(lp0 - old0), 1 + options["clip_high"]) if call.name == "cispo" else None
            losses.append(token_loss(math.exp(change) if kind == "token" else whole, a, lp, ref, options, cap))
        per_answer.append(losses)
    tokens, sums = sum(map(len, per_answer)), [sum(losses) for losses in per_answer]
    means = [total / len(losses) for total, losses in zip(sums, per_answer, strict=True)]
    return {
        "grpo": (sum(means), len(answers)),
        "luspo": (sum(sums), len(answers)),
        "dapo": (sum(sums), tokens),
        "dr_grpo": (sum(sums), len(answers) * LONGEST),
        "bnpo": (sum(sums) / tokens, 1),
    }[options["aggregation"]]


def readings(answers: list[np.ndarray], begins: int = 0) -> SimpleNamespace:
    flat = torch.tensor(np.concatenate(answers))
    tensors = {name: flat[:, at].clone() for at, name in enumerate(NAMES)}
    tensors["log_probs"].requires_grad_()
    place = torch.tensor([begins + 2 * number for number, answer in enumerate(answers) for _ in answer])
    return SimpleNamespace(**tensors, answer=place, entropy=None)


def loss_of(written: str, read: SimpleNamespace) -> Loss:
    call = objective_call(written)
    return OBJECTIVES[call.name].loss(read, call.options)


def sampled(lengths: list[int], seed: int) -> list[np.ndarray]:
    """Answers of these lengths: log-probabilities now and as sampled, an advantage an answer, the reference."""
    random = np.random.default_rng(seed)
    out = []
    for length in lengths:
        old = -random.exponential(2, length)
        lp, ref = old + random.normal(0, 0.3, length), old + random.normal(0, 0.5, length)
        out.append(np.stack([lp, old, np.full(length, random.normal()), ref], 1))
    return out


some = st.tuples(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 10_000))


@pytest.mark.parametrize("written", WRITTEN)
@settings(max_examples=15)
@given(drawn=some)
def test_a_loss_is_its_equation_and_its_gradient_the_equations_slope(written: str, drawn: tuple[list[int], int]) -> None:
    answers = sampled(*drawn)
    read = readings(answers)
    loss = loss_of(written, read)
    total, weight = written_out(written, answers)
    assert float(loss.total.detach()) == pytest.approx(total, rel=1e-9, abs=1e-9) and loss.weight == weight
    loss.total.backward()
    lengths = np.cumsum([len(each) for each in answers])[:-1]

    def again(log_probs: np.ndarray) -> float:
        moved = [np.column_stack([lp, each[:, 1:]]) for lp, each in zip(np.split(log_probs, lengths), answers, strict=True)]
        return written_out(written, moved, answers)[0]

    truth = slope(again, np.concatenate(answers)[:, 0], 1e-7)
    assert np.allclose(read.log_probs.grad.numpy(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("written", [each for each in WRITTEN if "bnpo" not in each])
@given(lengths=st.lists(st.integers(1, 5), min_size=2, max_size=6), cut=st.integers(1, 5), seed=st.integers(0, 99))
def test_parts_of_a_step_add_up_to_the_step(written: str, lengths: list[int], cut: int, seed: int) -> None:
    answers = sampled(lengths, seed)
    cut = min(cut, len(answers) - 1)
    whole, parts = loss_of(written, readings(answers)), [loss_of(written, readings(each, 5)) for each in (answers[:cut], answers[cut:])]
    assert whole.weight == sum(part.weight for part in parts)
    assert float(whole.total.detach()) == pytest.approx(sum(float(part.total.detach()) for part in parts))
    for name, value in whole.metrics.items():
        assert float(value) == pytest.approx(sum(float(part.metrics[name]) for part in parts)), name
    call = objective_call(written)
    held = Amounts(sum(lengths), len(lengths), 1)
    assert OBJECTIVES[call.name].weigh(held, call.options) == whole.weight


def test_a_mean_of_the_micro_batch_has_no_denominator_over_the_step() -> None:
    assert OBJECTIVES["grpo"].weigh(Amounts(9, 2, 1), {"aggregation": "bnpo"}) is None
    assert loss_of("grpo(aggregation=bnpo)", readings(sampled([2, 3], 0))).weight == 1


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "dapo", "rloo"])
def test_without_recorded_log_probabilities_the_ratio_is_one_and_the_gradient_is_reinforce(name: str) -> None:
    answers = sampled([3, 2], 1)
    read = readings(answers)
    read.old = None
    loss = loss_of(name, read)
    loss.total.backward()
    each = 1 / len(np.concatenate(answers)) if name in ("cispo", "dapo") else 0
    shares = [each or (1 if name == "rloo" else 1 / len(answer)) / 2 for answer in answers for _ in answer]
    assert np.allclose(read.log_probs.grad.numpy() / loss.weight, [-a * share for a, share in zip(read.advantage, shares, strict=True)])
    assert float(loss.metrics["ratio"]) / loss.weight == pytest.approx(1.0) and "old_kl" not in loss.metrics


def test_what_is_logged_are_means_over_tokens_or_over_answers_of_their_means() -> None:
    lp, old = [math.log(p) for p in (0.5, 0.2, 0.9)], [math.log(p) for p in (0.4, 0.4, 0.9)]
    answers = [np.array([[lp[0], old[0], 1.0, lp[0]], [lp[1], old[1], 1.0, lp[1]]]), np.array([[lp[2], old[2], -1.0, math.log(0.3)]])]
    read = readings(answers)
    read.entropy = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    by_answer, by_token = loss_of("grpo(beta=0.1)", read), loss_of("dapo(beta=0.1)", read)
    far = 0.3 / 0.9 - 1 - math.log(0.3 / 0.9)
    logged = {name: float(value) / by_answer.weight for name, value in by_answer.metrics.items()}
    assert logged["ratio"] == pytest.approx(((1.25 + 0.5) / 2 + 1) / 2) and logged["kl"] == pytest.approx(far / 2)
    assert logged["clip_high"] == pytest.approx(0.25) and logged["clip_low"] == 0 and logged["entropy"] == pytest.approx((1.5 + 3) / 2)
    logged = {name: float(value) / by_token.weight for name, value in by_token.metrics.items()}
    assert logged["ratio"] == pytest.approx((1.25 + 0.5 + 1) / 3) and logged["kl"] == pytest.approx(far / 3)
    assert logged["clip_high"] == 0 and logged["entropy"] == pytest.approx(2)
    assert logged["old_kl"] == pytest.approx(sum(w - 1 - math.log(w) for w in (1.25, 0.5, 1)) / 3)


def test_clipping_down_is_counted_where_a_bad_answer_is_already_less_likely() -> None:
    answers = [np.array([[math.log(0.1), math.log(0.4), -1.0, 0.0]])]
    read = readings(answers)
    loss = loss_of("grpo", read)
    loss.total.backward()
    assert float(loss.metrics["clip_low"]) == 1 and float(loss.metrics["clip_high"]) == 0 and float(read.log_probs.grad) == 0


@given(st.lists(st.floats(0.02, 1), min_size=2, max_size=6), st.integers(0, 99))
def test_estimators_of_the_divergence_agree_on_average_over_what_the_policy_samples(weights: list[float], seed: int) -> None:
    p = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    q = torch.softmax(torch.from_numpy(np.random.default_rng(seed).normal(size=len(weights))), 0)
    truth = float((p * (p / q).log()).sum())
    for kind in ("k1", "k3"):
        assert float((p * estimate(kind, p.log(), q.log())).sum()) == pytest.approx(truth, abs=1e-9)
    assert bool((estimate("k3", p.log(), q.log()) >= 0).all()) and bool((estimate("k2", p.log(), q.log()) >= 0).all())


def test_ratios_beyond_reach_of_exp_stay_numbers_even_where_the_advantage_is_nothing() -> None:
    for kind in ("token", "sequence", "product"):
        w = ratio_by(kind, torch.tensor([0.0, -1.0]), torch.tensor([-500.0, -900.0]), Answers.of(torch.tensor([0, 1])))  # type: ignore[arg-type]
        assert torch.isfinite(w * torch.zeros(2)).all()
    lp = torch.tensor([-1.0], requires_grad=True)
    loss = grpo(lp, torch.tensor([-900.0]), torch.zeros(1), torch.tensor([-1e4]), torch.zeros(1), beta=0.1)
    loss.total.backward()
    assert torch.isfinite(loss.total) and lp.grad is not None and torch.isfinite(lp.grad).all()


def test_no_token_at_all_costs_nothing() -> None:
    empty = torch.zeros(0, requires_grad=True)
    loss = grpo(empty, None, torch.zeros(0), None, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    loss.total.backward()
    assert float(loss.total.detach()) == 0 and loss.weight == 0 and all(float(value) == 0 for value in loss.metrics.values())


def test_entropy_is_asked_for_as_a_number_and_on_logging_steps_alone() -> None:
    for name in DEFAULTS:
        options = {"max_tokens": 5} if name == "dr_grpo" else {}
        assert OBJECTIVES[name].wanted(options) == Wanted()
        assert OBJECTIVES[name].wanted(options, logging=True) == Wanted(entropy=True, detached=frozenset({"entropy"}))


def test_a_penalty_without_a_reference_is_no_silent_zero() -> None:
    read = readings(sampled([2], 0))
    read.reference = None
    with pytest.raises(ValueError, match="reference"):
        loss_of("grpo(beta=0.1)", read)
    assert float(rloo(read.log_probs, read.old, read.advantage, None, read.answer).weight) == 1


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("dr_grpo", "max_tokens has to be given"),
        ("grpo(aggregation=dr_grpo)", "max_tokens has to be given"),
        ("grpo(aggregation=mean)", "aggregation must be grpo or luspo or dapo or dr_grpo or bnpo, not 'mean'"),
        ("grpo(ratio=word)", "ratio must be token or sequence or product"),
        ("grpo(kl=k4, beta=0.1)", "kl must be k1 or k2 or k3"),
        ("dapo(clip=1.5)", r"clip must be a number in \(0, 1\)"),
        ("dapo(clip_high=0)", "clip_high must be a number above 0 or none"),
        ("grpo(dual_clip=1)", "dual_clip must be a number above 1 or none"),
        ("rloo(beta=-1)", "beta must be a number of at least 0"),
        ("gspo(ratio=token)", "unknown option"),
        ("dr_grpo(max_tokens=0)", "max_tokens must be a whole number of at least 1"),
    ],
)
def test_options_out_of_range_are_refused_as_the_spec_is_read(written: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        objective_call(written)
