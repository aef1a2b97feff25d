"""Whole runs that learn from their own answers: rewards rise, and a run that was stopped goes on as if it had not been."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_ind
from torch import Tensor

from tunesmith.adapters import load_adapter
from tunesmith.bases import Base, load_base
from tunesmith.core.errors import DataError, RunError, SpecError
from tunesmith.core.record import Record
from tunesmith.core.row import Row, segment
from tunesmith.engine.critic import Critic
from tunesmith.engine.model import Model, attach_to
from tunesmith.engine.rundir import read_metrics
from tunesmith.engine.train import Trainer
from tunesmith.objectives.advantage import gae, token_rewards, whitened
from tunesmith.rollout.answers import Answer, Prompt
from tunesmith.rollout.begin import dev_reward, rollouts, save_critic
from tunesmith.rollout.recording import Reference, log_probs
from tunesmith.rollout.scoring import Rewarded, Score
from tunesmith.spec import Spec

Make = Callable[..., Trainer]
SpecOf = Callable[..., Spec]


def choosy(prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> Rewarded:
    """1 where more than two tokens are below 150: often equal within a group."""
    return Rewarded([float(sum(token < 150 for token in answer.ids) > 2) for group in answers for answer in group])


def column(trainer: Trainer, key: str) -> list[float]:
    return [line[key] for line in read_metrics(trainer.folder.path / "metrics.jsonl") if key in line]


# Learning


@pytest.mark.parametrize(
    ("objective", "rollout", "steps"),
    [
        ("grpo", {}, 24),
        ("dapo", {"truncated": "keep", "minibatches": 2}, 48),
        ("rloo(beta=0.01)", {}, 24),
        ("ppo", {"epochs": 2, "minibatches": 2, "kl": 0.001}, 80),
    ],
)
def test_the_share_of_what_is_rewarded_grows(
    objective: str, rollout: dict[str, Any], steps: int, make_run: Make, spec_of: SpecOf, liking: Score
) -> None:
    spec = spec_of(objective, prompts=6, samples=8, train={"steps": steps, "lr": 2e-2, "save_every": steps}, **rollout)
    trainer = make_run(spec, louder=15.0)
    trainer.run()
    rewards = column(trainer, "reward")
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2
    assert ttest_ind(rewards[-8:], rewards[:8]).pvalue < 1e-3
    assert max(column(trainer, "reference_kl")) > 0.1
    judged = dev_reward(trainer.model, spec, [prompt.record for prompt in trainer.feed.prompts], liking)()  # type: ignore[attr-defined]
    assert judged["reward"] == judged["reward_liking"] > np.mean(rewards[:5]) + 0.2


def test_dev_prompts_that_no_reward_speaks_of_are_an_error_and_no_zero(make_run: Make, spec_of: SpecOf) -> None:
    def silent(prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> Rewarded:
        return Rewarded([float("nan") for own in answers for _ in own])

    spec = spec_of("grpo", train={"steps": 1})
    trainer = make_run(spec)
    judge = dev_reward(trainer.model, spec, [prompt.record for prompt in trainer.feed.prompts], silent)  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="12 dev prompts"):
        judge()


# Going on


@pytest.mark.parametrize(
    ("objective", "rollout"),
    [
        ("dapo", {"tries": 3, "truncated": "keep"}),
        ("grpo(beta=0.1)", {"epochs": 2, "minibatches": 2, "overlong": 4}),
        ("ppo", {"epochs": 2, "minibatches": 2, "kl_target": 0.01, "kl_horizon": 10, "stop_kl": 1e-4}),
    ],
)
def test_a_run_that_goes_on_from_any_step_is_the_uninterrupted_one_to_the_last_bit(
    objective: str, rollout: dict[str, Any], make_run: Make, spec_of: SpecOf
) -> None:
    spec = spec_of(objective, adapter="lora(rank=4, dropout=0.1)", train={"steps": 9, "lr": 2e-2}, **rollout)
    whole = make_run(spec, "whole", score=choosy)
    whole.run()
    wanted, told = end_of(whole), (whole.folder.path / "samples.jsonl").read_text()
    for step in (1, 2, 4, 6, 7):
        again = make_run(spec, f"from{step}", score=choosy)
        shutil.rmtree(again.folder.path)
        shutil.copytree(whole.folder.path, again.folder.path)
        for later in range(step + 1, 10):
            shutil.rmtree(again.folder.checkpoints.path(later))
        again.run(resume=True)
        found = end_of(again)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], value) for name, value in wanted.items()), step
        assert (again.folder.path / "samples.jsonl").read_text() == told
        for name in ("loss", "reward", "grad_norm", "kl_coefficient", "stopped", "rounds", "ratio"):
            assert column(again, name) == column(whole, name), (step, name)
    if objective == "ppo":
        assert len(set(column(whole, "kl_coefficient"))) == 3 and any(column(whole, "stopped"))
    if objective == "dapo":
        assert max(column(whole, "rounds")) > 1


def end_of(trainer: Trainer) -> dict[str, Tensor]:
    weights, moments = trainer.optimizer.state()
    return {**weights, **moments}


# PPO


def test_advantages_of_ppo_are_those_of_the_formula_from_what_was_recorded(make_run: Make, spec_of: SpecOf) -> None:
    trainer = make_run(spec_of("ppo", kl=0.2, kl_estimator="k3", gamma=0.97, gae_lambda=0.8, train={"steps": 2, "save_every": 2}))
    trainer.run()
    held = trainer.feed._held  # type: ignore[attr-defined]
    longest = max(len(one.ids) for one in held)

    def table(name: str) -> Tensor:
        rows = [np.pad(one.chosen if name == "chosen" else one.given[name], (0, longest - len(one.ids))) for one in held]
        return torch.tensor(np.stack(rows), dtype=torch.float64)

    mask, score = table("chosen") > 0, torch.tensor([np.mean([100 <= t < 160 for t in one.ids]) for one in held], dtype=torch.float64)
    own = token_rewards(score, table("old"), table("reference"), mask, kl_coefficient=0.2, kl="k3")
    advantages, returns = gae(own, table("value"), mask, gamma=0.97, lam=0.8)
    assert torch.allclose(table("return"), returns, atol=1e-6)
    assert torch.allclose(table("advantage"), whitened(advantages, mask), atol=1e-5)
    assert float(table("advantage")[mask].mean()) == pytest.approx(0, abs=1e-6)


def test_the_value_recorded_is_the_critics_and_the_critic_learns_what_answers_are_worth(make_run: Make, spec_of: SpecOf) -> None:
    trainer = make_run(spec_of("ppo", prompts=6, samples=8, epochs=4, train={"steps": 40, "lr": 1e-2, "save_every": 40}))
    trainer.run()
    assert trainer.critic is not None
    feed: Any = trainer.feed
    now = feed._values(feed._held)
    assert [len(numbers) for numbers in now] == [len(one.ids) for one in feed._held]
    assert column(trainer, "value_loss")[0] > 2 * column(trainer, "value_loss")[-1]
    reward = column(trainer, "reward")[-1]
    assert np.mean(np.concatenate(now)) == pytest.approx(reward, abs=0.1)


def test_the_critic_is_saved_beside_the_adapter_and_read_back(make_run: Make, spec_of: SpecOf, base: Base) -> None:
    trainer = make_run(spec_of("ppo", train={"steps": 4}))
    trainer.run()
    assert trainer.critic is not None
    save_critic(trainer.critic.model, trainer.folder.path)
    feed: Any = trainer.feed
    rows = [feed._row(one, ()) for one in feed._held]
    wanted = trainer.critic.numbers(rows[:3])
    fresh = load_base(base.source, dtype="fp32", device="cpu")
    adapter = load_adapter(fresh.model, trainer.folder.path / "critic", fingerprint=fresh.fingerprint, name="critic")
    assert torch.allclose(Critic(Model(fresh, [adapter])).numbers(rows[:3]), wanted, atol=1e-6)


@pytest.mark.parametrize("adapter", ["lora(rank=4)", "full", "layers(last=1)"])
def test_policy_and_critic_learn_from_one_loss_and_neither_from_the_others(adapter: str, make_run: Make, spec_of: SpecOf) -> None:
    values: dict[str, Tensor] = {}
    for name, weight in (("both", 0.5), ("policy", 0.0)):
        trainer = make_run(spec_of(f"ppo(value_weight={weight})", adapter=adapter, train={"steps": 1, "lr": 1e-3}), name)
        trainer.run()
        values |= {f"{name} {key}": value.clone() for key, value in trainer.optimizer.state()[1].items() if key.endswith("exp_avg")}
    names = {key.partition(" ")[2] for key in values}
    own = {name for name in names if not name.startswith("critic.")}
    assert own and all(torch.allclose(values[f"both {name}"], values[f"policy {name}"], atol=1e-7) for name in own)
    assert any(bool(values[f"both {name}"].any()) for name in names - own)
    assert not any(bool(values[f"policy {name}"].any()) for name in names - own if f"policy {name}" in values)


# The reference


@pytest.mark.parametrize("adapter", ["lora(rank=4)", "layers(last=1)", "prompt(tokens=3)", "continue"])
def test_the_reference_is_the_policy_as_the_run_began_whatever_is_trained(adapter: str, base: Base, records: list[Record]) -> None:
    start = Model(load_base(base.source, dtype="fp32", device="cpu"))
    if adapter == "continue":
        start = attach_to(start, "lora(rank=4)", seed=3)
    rows = _rows_of(start, records)
    wanted = log_probs(start, rows)
    model = start if adapter == "continue" else attach_to(start, adapter, keep_original=False)
    reference = Reference(start, model)
    with torch.no_grad():
        for _, parameter in model.adapter.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    moved = {name: value.clone() for name, value in model.adapter.named_parameters()}
    changed = log_probs(model, rows)
    assert not np.allclose(changed[0], wanted[0], atol=1e-3)
    for found, own in zip(reference.log_probs(rows), wanted, strict=True):
        assert np.array_equal(found, own)
    assert all(torch.equal(moved[name], value) for name, value in model.adapter.named_parameters())
    for found, own in zip(log_probs(model, rows), changed, strict=True):
        assert np.array_equal(found, own)


def _rows_of(model: Model, records: list[Record]) -> list[Row]:
    ids = [model.renderer.prompt(record.messages).ids for record in records]
    return [Row((segment(prompt, name="prompt"), segment([40 + n, 50, 60 + n], True, 0, "answer"))) for n, prompt in enumerate(ids)]


# Prompts


def test_prompts_that_leave_no_room_for_an_answer_are_refused_or_left_out(make_run: Make, spec_of: SpecOf, base: Base) -> None:
    start = Model(load_base(base.source, dtype="fp32", device="cpu"))
    model = attach_to(start, "lora(rank=4)")
    long = [Record("messages", ({"role": "user", "content": "word " * n},), where=f"line {n}") for n in (3, 400)]
    with pytest.raises(DataError, match=r"line 400: the prompt takes(.|\n)*rollout.max_new_tokens(.|\n)*overlong=drop"):
        rollouts(model, spec_of(), long, choosy, None, start=start)
    spec = spec_of()
    spec.data.overlong = "drop"
    assert [prompt.record.where for prompt in rollouts(model, spec, long, choosy, None, start=start).prompts] == ["line 3"]
    with pytest.raises(DataError, match="no prompt leaves room"):
        rollouts(model, spec, long[1:], choosy, None, start=start)
    spec.data.max_tokens = 10
    with pytest.raises(DataError, match=r"no prompt leaves room(.|\n)*data.max_tokens holds 10"):
        rollouts(model, spec, long, choosy, None, start=start)
    spec.data.overlong = "truncate-left-of-prompt"
    with pytest.raises(SpecError, match="are not cut"):
        rollouts(model, spec, long, choosy, None, start=start)
