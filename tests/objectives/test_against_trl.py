"""Our losses and gradients beside TRL's own code, fed the same tensors. Its losses are branches of its trainers' methods: these are
called on stand-ins that have what the methods look at. Skipped where TRL is not installed (it is in the environment that
`make bench` makes)."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from tunesmith.core.loss import Loss
from tunesmith.objectives import OBJECTIVES, dpo, kto, orpo, reward
from tunesmith.objectives.advantage import overlong
from tunesmith.spec import objective_call

pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

SEEDS = range(3)


def trainer(**attributes: Any) -> Any:
    """Something that a method of a trainer takes for its own."""
    same = {"gather": lambda x: x, "gather_for_metrics": lambda x: x, "reduce": lambda x, **_: x}
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, **same)
    own = {
        "model": SimpleNamespace(training=True),
        "accelerator": accelerator,
        "aux_loss_enabled": False,
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return MagicMock(**own, _metrics=defaultdict(lambda: defaultdict(list)), **attributes)


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def agree(ours: Loss, theirs: Tensor, *leaves: Tensor, tolerance: float = 1e-9) -> None:
    """The same loss, and the same gradients."""
    mine = ours.total / ours.weight
    assert float(mine.detach()) == pytest.approx(float(theirs.detach()), rel=tolerance, abs=tolerance)
    for own, other in zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        assert torch.allclose(own, other, rtol=tolerance, atol=tolerance)


# Pairs


PAIRS = {
    "sigmoid": "dpo(beta=0.2)",
    "hinge": "hinge(beta=0.2)",
    "ipo": "ipo(beta=0.2)",
    "exo_pair": "exo(beta=0.2, label_smoothing=0.1)",
    "nca_pair": "nca(beta=0.2)",
    "robust": "robust_dpo(beta=0.2, label_smoothing=0.1)",
    "bco_pair": "bco(beta=0.2)",
    "sppo_hard": "sppo(beta=0.2)",
    "apo_zero": "apo_zero(beta=0.2)",
    "apo_down": "apo_down(beta=0.2)",
    "discopop": "discopop(beta=0.2, tau=0.3)",
}


def spoken(log_probs: Tensor, mask: Tensor) -> Any:
    """A model's outputs, whose log-probabilities are these; 0 where the mask is."""
    zeros = torch.zeros_like(log_probs)
    out = {"log_probs": log_probs * mask, "entropy": zeros, "mean_logits": zeros, "is_top1": mask.bool(), "aux_loss": None}
    return lambda **_: SimpleNamespace(**out)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("theirs", "ours"), PAIRS.items())
def test_losses_of_pairs_are_trls(theirs: str, ours: str, seed: int) -> None:
    from trl import DPOTrainer

    lengths = torch.tensor([5, 2, 6, 1, 4, 6])  # three chosen, then three rejected
    mask = (torch.arange(6) < lengths[:, None]).long()
    log_probs, reference = draw(seed, 6, 6).requires_grad_(), draw(seed + 50, 6, scale=3)
    inputs = {"input_ids": torch.ones(6, 7, dtype=torch.long), "attention_mask": torch.ones(6, 7), "ref_chosen_logps": reference[:3]}
    inputs |= {"completion_mask": torch.cat([torch.zeros(6, 1).long(), mask], 1), "ref_rejected_logps": reference[3:]}
    own = trainer(
        beta=0.2, label_smoothing=0.1, loss_types=[theirs], loss_weights=[1.0], f_divergence_type="reverse_kl", ld_alpha=None,
        precompute_ref_logps=True, use_weighting=False, args=SimpleNamespace(discopop_tau=0.3),
    )  # fmt: skip
    truth = DPOTrainer._compute_loss(own, spoken(log_probs, mask), inputs, False)
    call, sums = objective_call(ours), (log_probs * mask).sum(1)
    read = SimpleNamespace(
        chosen=sums[:3], rejected=sums[3:], chosen_reference=reference[:3], rejected_reference=reference[3:],
        chosen_length=lengths[:3], rejected_length=lengths[3:], soft=torch.ones(3, dtype=torch.float64),
    )  # fmt: skip
    loss = OBJECTIVES[call.name].loss(read, call.options)
    agree(loss, truth, log_probs, tolerance=1e-6 if theirs == "exo_pair" else 1e-9)  # whose epsilon is kept in fp32
    logged = own._metrics["train"]
    if theirs not in ("ipo", "sppo_hard"):
        assert float(loss.metrics["margin"]) / 3 == pytest.approx(logged["rewards/margins"][0])
        assert float(loss.metrics["accuracy"]) / 3 == pytest.approx(logged["rewards/accuracies"][0])


def test_trl_ignores_the_label_smoothing_of_plain_dpo_and_we_do_not() -> None:
    c, r, soft = draw(0, 4), draw(1, 4), torch.ones(4, dtype=torch.float64)
    zero = torch.zeros(4, dtype=torch.float64)
    plain, smooth = dpo(c, r, zero, zero, soft), dpo(c, r, zero, zero, soft, label_smoothing=0.2)
    turned = dpo(c, r, zero, zero, 0.8 * soft)
    assert float(smooth.total) == pytest.approx(float(turned.total)) and float(smooth.total) != pytest.approx(float(plain.total))


@pytest.mark.parametrize("seed", SEEDS)
def test_simpo_is_trls(seed: int) -> None:
    from trl.experimental.cpo import CPOTrainer

    chosen, rejected = draw(seed, 4).requires_grad_(), draw(seed + 9, 4).requires_grad_()
    own = trainer(loss_type="simpo", simpo_gamma=0.7, beta=2.0, label_smoothing=0.0, alpha=0.0)
    truth = CPOTrainer.cpo_loss(own, chosen, rejected)[0].mean()  # of mean log-probabilities
    soft, three = torch.ones(4, dtype=torch.float64), torch.full((4,), 3.0, dtype=torch.float64)
    read = SimpleNamespace(chosen=3 * chosen, rejected=3 * rejected, chosen_length=three, rejected_length=three, soft=soft)
    agree(OBJECTIVES["simpo"].loss(read, {"gamma": 0.7, "beta": 2.0}), truth, chosen, rejected)


@pytest.mark.parametrize("seed", SEEDS)
def test_orpo_is_trls(seed: int) -> None:
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = (-draw(seed + at, 4).abs() - 0.01 for at in (0, 9))
    chosen.requires_grad_(), rejected.requires_grad_()
    odds = ORPOTrainer.odds_ratio_loss(trainer(beta=0.3), chosen, rejected)[0]
    ones = torch.ones(4, dtype=torch.float64)
    agree(orpo(chosen, rejected, ones, ones, ones, weight=0.3), -chosen.mean() - odds.mean(), chosen, rejected, tolerance=1e-6)  # fp32


# Answers and reward models


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("drift", [2.0, -2.0])
def test_kto_is_trls(seed: int, drift: float) -> None:
    from trl import KTOTrainer

    mask, label = torch.ones(5, 4), torch.tensor([True, False, False, True, False])
    log_probs, reference = draw(seed, 5, 4).requires_grad_(), draw(seed + 50, 5, scale=3)
    others, others_reference = draw(seed + 60, 5) + drift, draw(seed + 70, 5)
    batch = {"label": label, "input_ids": torch.ones(5, 5).long(), "attention_mask": torch.ones(5, 5), "ref_logps": reference}
    batch |= {"completion_mask": torch.cat([torch.zeros(5, 1), mask], 1), "ref_KL_logps": others_reference}
    own = trainer(beta=0.2, desirable_weight=1.5, undesirable_weight=0.5, loss_type="kto", calculate_KL=True, precompute_ref_logps=True)
    own._compute_kl_logps = lambda *_: others
    truth = KTOTrainer._compute_loss(own, spoken(log_probs, mask), batch, False)
    kl = (others - others_reference).mean()
    loss = kto(log_probs.sum(1), reference, label.double(), kl, beta=0.2, desirable=1.5, undesirable=0.5)
    agree(loss, truth, log_probs)
    assert float(loss.metrics["kl"]) / 5 == pytest.approx(own._metrics["train"]["kl"][0])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_reward_models_loss_is_trls(seed: int) -> None:
    from trl import RewardTrainer

    values, margin = draw(seed, 4, 2).requires_grad_(), draw(seed + 9, 4).abs()  # [pairs, better and worse]
    own = trainer(args=SimpleNamespace(center_rewards_coefficient=0.1))
    inputs = {"margin": margin, "attention_mask": torch.ones(8, 3)}
    truth = RewardTrainer.compute_loss(own, lambda **_: SimpleNamespace(logits=values.T.reshape(8, 1)), inputs)
    ranks, soft = torch.tensor([0, 1] * 4), torch.ones(8, dtype=torch.float64)
    loss = reward(values.reshape(8, 1), ranks, margin.repeat_interleave(2), soft, centring=0.1)
    agree(loss, truth, values)
    assert float(loss.metrics["accuracy"]) / 4 == own._metrics["train"]["accuracy"][0]


# Sampled answers


LENGTHS = torch.tensor([4, 1, 3, 5])
POLICIES: list[tuple[str, dict[str, Any]]] = [
    ("grpo(beta=0.1)", {"loss_type": "grpo"}),
    ("grpo(aggregation=bnpo, beta=0.1)", {"loss_type": "bnpo"}),
    ("dr_grpo(max_tokens=8, beta=0.1)", {"loss_type": "dr_grpo"}),
    ("dapo(beta=0.1)", {"loss_type": "dapo", "epsilon_high": 0.28}),
    ("grpo(aggregation=luspo, ratio=sequence, beta=0.1)", {"loss_type": "luspo", "importance_sampling_level": "sequence"}),
    ("gspo(clip=0.1, clip_high=0.2, beta=0.1)", {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.2}),
    ("cispo(clip_high=0.3, beta=0.1)", {"loss_type": "cispo", "epsilon_high": 1.3}),  # TRL's is the bound itself
    ("grpo(dual_clip=1.5, beta=0.1)", {"args": SimpleNamespace(delta=1.5, use_bias_correction_kl=False, steps_per_generation=1)}),
]


def padded(flat: Tensor) -> Tensor:
    """Values of tokens as [answers, tokens], 0 beyond an answer's end."""
    return torch.stack([torch.cat([part, part.new_zeros(5 - len(part))]) for part in flat.split(LENGTHS.tolist())])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("ours", "theirs"), POLICIES, ids=[written for written, _ in POLICIES])
def test_losses_of_sampled_answers_and_what_is_logged_of_them_are_trls(ours: str, theirs: dict[str, Any], seed: int) -> None:
    from trl import GRPOTrainer

    count, mask = int(LENGTHS.sum()), (torch.arange(5) < LENGTHS[:, None]).long()
    log_probs = (draw(seed, count, scale=0.4) - 2).requires_grad_()
    old, reference, advantage, entropy = draw(seed + 5, count, scale=0.4) - 2, draw(seed + 6, count) - 2, draw(seed + 7, 4), draw(8, count)
    settings = {
        "loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2, "importance_sampling_level": "token",
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
    }  # fmt: skip
    own = trainer(
        **settings | theirs, beta=0.1, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False,
        _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1, max_completion_length=8,
    )  # fmt: skip
    own._get_per_token_logps_and_entropies = lambda *_, **__: (padded(log_probs), padded(entropy), None)
    words = torch.ones(4, 5, dtype=torch.long)
    inputs = {"prompt_ids": words, "prompt_mask": words, "completion_ids": words, "completion_mask": mask, "advantages": advantage}
    inputs |= {"old_per_token_logps": padded(old), "ref_per_token_logps": padded(reference), "num_items_in_batch": mask.sum()}
    truth = GRPOTrainer._compute_loss(own, None, inputs)
    place = torch.arange(4).repeat_interleave(LENGTHS)
    call = objective_call(ours)
    read = SimpleNamespace(log_probs=log_probs, old=old, advantage=advantage[place], reference=reference, answer=place, entropy=entropy)
    loss = OBJECTIVES[call.name].loss(read, call.options)
    agree(loss, truth, log_probs)
    if call.name == "dapo":  # which means over tokens, as TRL's figures are
        logged = own._metrics["train"]
        for mine, other in {
            "kl": "kl",
            "entropy": "entropy",
            "clip_low": "clip_ratio/low_mean",
            "clip_high": "clip_ratio/high_mean",
        }.items():
            assert float(loss.metrics[mine]) / count == pytest.approx(logged[other][0], rel=1e-6), mine


@pytest.mark.parametrize("seed", SEEDS)
def test_rloo_is_trls(seed: int) -> None:
    from trl import RLOOTrainer

    count, mask = int(LENGTHS.sum()), (torch.arange(5) < LENGTHS[:, None]).long()
    log_probs = (draw(seed, count, scale=0.2) - 2).requires_grad_()
    old, advantage = draw(seed + 5, count, scale=0.2) - 2, draw(seed + 7, 4)
    own = trainer(epsilon_low=0.2, epsilon_high=0.3)
    own._get_per_token_logps_and_entropies = lambda *_, **__: (padded(log_probs), padded(old), None)
    words = torch.ones(4, 5, dtype=torch.long)
    inputs = {"prompt_ids": words, "prompt_mask": words, "completion_ids": words, "completion_mask": mask, "advantages": advantage}
    truth = RLOOTrainer._compute_loss(own, None, inputs | {"old_logps": padded(old).sum(1)})
    place = torch.arange(4).repeat_interleave(LENGTHS)
    read = SimpleNamespace(log_probs=log_probs, old=old, advantage=advantage[place], reference=None, answer=place, entropy=None)
    agree(OBJECTIVES["rloo"].loss(read, {"clip_high": 0.3}), truth, log_probs)


def test_the_penalty_on_overlong_answers_is_trls() -> None:
    from trl.rewards import get_soft_overlong_punishment

    lengths = [1, 79, 80, 81, 95, 100, 101, 500]
    theirs = get_soft_overlong_punishment(100, 20)([[1] * length for length in lengths])
    assert overlong(torch.tensor(lengths), longest=100, cache=20).tolist() == pytest.approx(theirs)


# Distillation


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distillation_is_trls(beta: float, seed: int) -> None:
    from trl.experimental.gkd import GKDTrainer

    from tunesmith.engine.head import Projection, read_head

    hidden, teacher, words = draw(seed, 6, 5).requires_grad_(), draw(seed + 1, 6, 5), draw(seed + 2, 13, 5)
    entry, options = OBJECTIVES["distil"], {"beta": beta, "temperature": 1.5}
    target = torch.zeros(6, dtype=torch.long)
    read = read_head(Projection((hidden,), (words,)), target, entry.wanted(options), teacher=Projection((teacher,), (words,)))
    logits = [(x @ words.T)[None] for x in (hidden, teacher)]
    truth = GKDTrainer.generalized_jsd_loss(*logits, labels=target[None], beta=beta, temperature=1.5)
    agree(entry.loss(read, options), truth, hidden, tolerance=1e-8)
