"""A step of learning from one's own answers: what is computed, what is left out, and what the loss is divided by."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.core.errors import SpecError
from tunesmith.core.progress import Quiet
from tunesmith.engine.feed import Batch
from tunesmith.engine.optimizer import Optimizer
from tunesmith.engine.rundir import read_metrics
from tunesmith.engine.train import Trainer
from tunesmith.objectives.advantage import group_advantages
from tunesmith.rollout.answers import Answer, Held, Prompt, as_tensors, from_tensors
from tunesmith.rollout.feed import Rollouts
from tunesmith.rollout.order import Place, drawn, groups_of, place_of
from tunesmith.rollout.recording import log_probs
from tunesmith.rollout.scoring import Rewarded, Score
from tunesmith.spec import Spec

Make = Callable[..., Trainer]
SpecOf = Callable[..., Spec]


class Lines(Quiet):
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def line(self, topic: str, text: str) -> None:
        self.lines.append((topic, text))


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Gradients by name of each update."""
    seen: list[dict[str, Tensor]] = []
    original = Optimizer.step

    def noted(self: Optimizer, lr: float, scale: float) -> None:
        seen.append({name: master.grad.clone() for name, master in self.masters.items() if master.grad is not None})
        original(self, lr, scale)

    monkeypatch.setattr(Optimizer, "step", noted)
    return seen


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """What each step was given."""
    seen: list[Batch] = []
    original = Rollouts.batch

    def noted(self: Rollouts, step: int) -> Batch:
        seen.append(original(self, step))
        return seen[-1]

    monkeypatch.setattr(Rollouts, "batch", noted)
    return seen


def of_prompt(place: int, *others: int) -> Score:
    """Rewards that differ for some prompts alone, by their first token."""

    def score(prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> Rewarded:
        ours = [int(prompt.record.where.split()[-1]) - 1 in (place, *others) for prompt in prompts]
        return Rewarded([float(own and index % 2) for own, group in zip(ours, answers, strict=True) for index in range(len(group))])

    return score


def answers_in(batch: Batch) -> list[tuple[bytes, float]]:
    """Ids of each answer, and its advantage."""
    return [(row.segments[1].ids.tobytes(), float(row.segments[1].given["advantage"][0])) for row in batch.rows]


def given_in(batch: Batch) -> set[str]:
    return {name for row in batch.rows for name in row.segments[1].given}


# On the policy, and off it


@pytest.mark.parametrize("objective", ["grpo", "rloo", "gspo", "dapo(beta=0.1)", "ppo"])
def test_the_first_step_of_an_iteration_has_a_ratio_of_exactly_one_and_the_later_ones_hold_to_what_was_recorded(
    objective: str, make_run: Make, spec_of: SpecOf, batches: list[Batch]
) -> None:
    trainer = make_run(spec_of(objective, adapter="lora(rank=4, dropout=0.1)", epochs=2, minibatches=2, truncated="keep"))
    trainer.run()
    lines = read_metrics(trainer.folder.path / "metrics.jsonl")
    assert [line["ratio"] == 1.0 for line in lines] == [True, False, False, False, True, False]
    assert ["old" in given_in(batch) for batch in batches] == [False, True, True, True, False, True]


def test_what_is_recorded_is_the_trainers_own_log_probability_at_the_temperature_of_sampling(
    make_run: Make, spec_of: SpecOf, batches: list[Batch]
) -> None:
    spec = spec_of("grpo", minibatches=2, temperature=0.5, train={"steps": 2, "lr": 1e-12})
    trainer = make_run(spec)
    trainer.run()
    rows = list(batches[1].rows)
    assert rows
    for row, now in zip(rows, log_probs(trainer.model, rows, 0.5), strict=True):
        answer = row.segments[1]
        assert np.allclose(answer.given["old"][answer.supervised], now, atol=1e-5)
    line = read_metrics(trainer.folder.path / "metrics.jsonl")[0]
    assert 0 < line["sampler_gap"] < 1e-5 and line["sampler_gap_most"] < 1e-4
    assert read_metrics(trainer.folder.path / "metrics.jsonl")[1]["ratio"] == pytest.approx(1.0, abs=1e-5)


def test_rows_are_a_prompt_and_an_answer_supervised_at_each_token_that_was_sampled(
    make_run: Make, spec_of: SpecOf, batches: list[Batch]
) -> None:
    trainer = make_run(spec_of(train={"steps": 1}))
    trainer.run()
    assert len(batches[0].rows) == 16
    for row in batches[0].rows:
        prompt, answer = row.segments
        assert (prompt.name, answer.name, answer.parent) == ("prompt", "answer", 0)
        assert not prompt.supervised.any() and answer.supervised.all() and 1 <= len(answer) <= 10
        text = trainer.model.base.tokenizer.decode(prompt.ids)
        assert text.endswith("<|im_start|>assistant\n") and "Say something about" in text
    ends = trainer.model.renderer.stop_ids
    short = [row.segments[1].ids for row in batches[0].rows if len(row.segments[1]) < 10]
    assert all(ids[-1] in ends for ids in short)


# What is left out


@pytest.mark.parametrize("objective", ["grpo", "dapo", "dr_grpo(max_tokens=10)", "rloo"])
def test_answers_without_advantage_are_not_computed_and_the_gradient_is_the_one_with_them(
    objective: str,
    make_run: Make,
    spec_of: SpecOf,
    gradients: list[dict[str, Tensor]],
    batches: list[Batch],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = spec_of(objective, train={"steps": 1}, dynamic=False, truncated="keep", prompts=12)
    trainer = make_run(spec, "less", score=of_prompt(0, 3, 7))
    trainer.run()
    monkeypatch.setattr(Rollouts, "_leave_out", lambda self, held: None)
    make_run(spec, "all", score=of_prompt(0, 3, 7)).run()
    assert [len(batch.rows) for batch in batches] == [12, 48]
    assert batches[0].weight == batches[1].weight
    first = read_metrics(trainer.folder.path / "metrics.jsonl")[0]
    assert first["ratio"] == 1.0 and first["entropy"] == pytest.approx(first["sampled_entropy"], rel=0.05)
    assert any(bool(value.any()) for value in gradients[0].values())
    for name, value in gradients[1].items():
        assert torch.allclose(gradients[0][name], value, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("objective", ["grpo(beta=0.1)", "grpo(aggregation=bnpo)"])
def test_they_are_computed_where_the_divergence_is_learned_from_or_a_micro_batch_is_divided_by_what_it_holds(
    objective: str, make_run: Make, spec_of: SpecOf, batches: list[Batch]
) -> None:
    make_run(spec_of(objective, train={"steps": 1}), score=of_prompt(0)).run()
    assert len(batches[0].rows) == 16
    assert ("reference" in given_in(batches[0])) == ("beta" in objective)


def test_the_weight_of_a_step_is_that_of_all_its_answers_and_minibatches_share_the_groups_out(
    make_run: Make, spec_of: SpecOf, batches: list[Batch]
) -> None:
    trainer = make_run(spec_of("dapo", dynamic=False, truncated="keep", minibatches=2, epochs=2, train={"steps": 4}))
    trainer.run()
    held = trainer.feed._held  # type: ignore[attr-defined]
    tokens = {group: sum(int(one.chosen.sum()) for one in held if one.group == group) for group in range(4)}
    for first, second in (batches[0:2], batches[2:4]):
        assert {row.where for row in first.rows}.isdisjoint({row.where for row in second.rows})
        assert (first.weight or 0) + (second.weight or 0) == sum(tokens.values())


def test_truncated_answers_are_masked_out_of_rows_and_of_what_the_loss_is_divided_by(
    make_run: Make, spec_of: SpecOf, batches: list[Batch], base: Any
) -> None:
    kept = make_run(spec_of("grpo", truncated="mask", max_new_tokens=200, samples=8, train={"steps": 1}))
    kept.run()
    ends = kept.model.renderer.stop_ids
    held = kept.feed._held  # type: ignore[attr-defined]
    ended = [one for one in held if one.ids[-1] in ends]
    assert 0 < len(ended) < len(held)
    assert len(batches[0].rows) == len(ended) == batches[0].weight
    assert all(row.segments[1].ids[-1] in ends for row in batches[0].rows)


def test_answers_without_a_reward_have_no_part_in_a_step(make_run: Make, spec_of: SpecOf, batches: list[Batch]) -> None:
    def half(prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> Rewarded:
        return Rewarded([[0.0, 1.0, float("nan"), float("nan")][index] for group in answers for index in range(len(group))])

    for number, objective in enumerate(("grpo", "ppo")):
        trainer = make_run(spec_of(objective, train={"steps": 1}), objective, score=half)
        trainer.run()
        assert len(batches[number].rows) == 8
        line = read_metrics(trainer.folder.path / "metrics.jsonl")[0]
        assert line["unscored"] == 0.5 and line["reward"] == 0.5 and np.isfinite(line["loss"])


# Dynamic sampling


def test_groups_that_are_rewarded_alike_are_replaced_by_further_prompts(make_run: Make, spec_of: SpecOf, batches: list[Batch]) -> None:
    good = (0, 2, 4, 6, 8, 10)
    trainer = make_run(spec_of("grpo", dynamic=True, train={"steps": 2}, tries=9), score=of_prompt(*good))
    trainer.run()
    for batch in batches:
        assert len(batch.rows) == 4 * 4
        assert all(int(row.where.split()[-1]) - 1 in good for row in batch.rows)
    lines = read_metrics(trainer.folder.path / "metrics.jsonl")
    assert lines[0]["rounds"] > 1 and lines[0]["groups"] > 4 and lines[0]["degenerate"] == pytest.approx(1 - 4 / lines[0]["groups"])
    assert trainer.feed.memory()[1]["position"] == lines[0]["groups"] + lines[1]["groups"]


def test_a_prompt_that_nothing_can_be_learned_from_is_reported_and_skipped_and_a_step_without_any_is_counted(
    make_run: Make, spec_of: SpecOf, batches: list[Batch], gradients: list[dict[str, Tensor]]
) -> None:
    said = Lines()
    trainer = make_run(spec_of("grpo", dynamic=True, tries=2, train={"steps": 3}), score=of_prompt(-1), reporter=said)
    before = {name: value.clone() for name, value in trainer.adapter.named_parameters()}
    assert trainer.run().step == 3
    assert [len(batch.rows) for batch in batches] == [0, 0, 0] and not gradients
    assert all(torch.equal(before[name], value) for name, value in trainer.adapter.named_parameters())
    assert said.lines[0] == (
        "rollout",
        "iteration 1: 8 of 8 prompts had answers that were all rewarded alike in 2 rounds of sampling; nothing is learned in it",
    )
    line = read_metrics(trainer.folder.path / "metrics.jsonl")[0]
    assert (line["degenerate"], line["rounds"], line["loss"]) == (1.0, 2.0, 0.0)


def test_an_iteration_that_teaches_nothing_is_told_without_dynamic_sampling_too(make_run: Make, spec_of: SpecOf) -> None:
    said = Lines()
    make_run(spec_of("grpo", train={"steps": 2}), score=of_prompt(-1), reporter=said).run()
    told = [text for topic, text in said.lines if topic == "rollout"]
    assert told == ["iteration 1: the answers to each prompt were rewarded alike, or not at all; nothing is learned in it"]


def test_answers_that_are_cut_off_and_not_learned_from_are_told_where_they_are_most(make_run: Make, spec_of: SpecOf) -> None:
    for longest, truncated in ((2, "mask"), (2, "keep"), (400, "mask")):
        said = Lines()
        make_run(spec_of("grpo", truncated=truncated, max_new_tokens=longest, train={"steps": 2}), reporter=said).run()
        told = [text for topic, text in said.lines if topic == "rollout" and "cut off" in text]
        assert len(told) == (1 if (longest, truncated) == (2, "mask") else 0)
        for text in told:
            assert "answers were cut off at 2 tokens" in text and "rollout.truncated=keep" in text


# Rewards and penalties


def test_penalties_on_long_and_endless_answers_shape_the_reward_and_leave_the_outcome_alone(
    make_run: Make, spec_of: SpecOf, batches: list[Batch]
) -> None:
    def alike(prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer]]) -> Rewarded:
        return Rewarded([1.0 for group in answers for _ in group])

    spec = spec_of(max_new_tokens=200, samples=8, overlong=100, missing_end=0.5, dynamic=False, train={"steps": 1})
    trainer = make_run(spec, score=alike)
    trainer.run()
    held = trainer.feed._held  # type: ignore[attr-defined]
    lengths = torch.tensor([len(one.ids) for one in held], dtype=torch.float64)
    ended = torch.tensor([bool(one.ids[-1] in trainer.model.renderer.stop_ids) for one in held])
    rewards = 1 - ((lengths - 100) / 100).clamp(0, 1) - 0.5 * (~ended).double()
    wanted = group_advantages(rewards.reshape(-1, 8)).flatten()
    assert [float(one.given["advantage"][0]) for one in held] == pytest.approx(wanted.tolist(), abs=1e-6)
    assert read_metrics(trainer.folder.path / "metrics.jsonl")[0]["degenerate"] == 1.0


# Order


@given(steps=st.integers(1, 60), epochs=st.integers(1, 4), parts=st.integers(1, 4), groups=st.integers(1, 9), seed=st.integers(0, 3))
def test_a_step_is_an_iteration_an_epoch_and_a_part_and_each_epoch_deals_every_group_out_once(
    steps: int, epochs: int, parts: int, groups: int, seed: int
) -> None:
    places = [place_of(step, epochs, parts) for step in range(steps)]
    assert [(p.iteration * epochs + p.epoch) * parts + p.part for p in places] == list(range(steps))
    for epoch in range(epochs):
        dealt = [groups_of(Place(2, epoch, part), range(groups), parts, seed) for part in range(parts)]
        assert sorted(group for some in dealt for group in some) == list(range(groups))


@given(prompts=st.integers(1, 20), counts=st.lists(st.integers(1, 15), min_size=1, max_size=6), seed=st.integers(0, 3))
def test_prompts_are_drawn_in_permutations_laid_end_to_end_however_many_at_a_time(prompts: int, counts: list[int], seed: int) -> None:
    at, found = 0, list[int]()
    for count in counts:
        found += drawn(at, count, prompts, seed)
        at += count
    assert found == drawn(0, at, prompts, seed)
    for start in range(0, at - prompts + 1, prompts):
        assert sorted(found[start : start + prompts]) == list(range(prompts))


@given(st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.booleans()), max_size=5))
def test_what_a_checkpoint_holds_of_answers_is_what_they_were(shapes: list[tuple[int, bool, bool]]) -> None:
    made = []
    for n, (size, counted, used) in enumerate(shapes):
        given = {"advantage": np.full(size, n, np.float32)}
        made.append(Held(n, n // 2, np.arange(size, dtype=np.int32), np.arange(size) % 2 == 0, counted, used, given))
    back = from_tensors(as_tensors(made))
    assert len(back) == len(made)
    for one, other in zip(made, back, strict=True):
        assert (one.prompt, one.group, one.counted, one.used) == (other.prompt, other.group, other.counted, other.used)
        assert np.array_equal(one.ids, other.ids) and np.array_equal(one.chosen, other.chosen)
        assert one.chosen.dtype == other.chosen.dtype and np.array_equal(one.given["advantage"], other.given["advantage"])


# What is told


def test_answers_are_written_with_their_rewards_and_some_are_shown(make_run: Make, spec_of: SpecOf) -> None:
    said = Lines()
    trainer = make_run(spec_of(show=2, train={"steps": 3}), reporter=said)
    trainer.run()
    lines = [json.loads(line) for line in (trainer.folder.path / "samples.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0] * 4 + [1] * 4 + [2] * 4
    first = lines[0]
    assert first["prompt"].startswith("Say something about") and first["where"].startswith("questions.jsonl, line ")
    assert len(first["answers"]) == 4
    assert {"reward", "reward_liking", "tokens", "ended", "text"} == first["answers"][0].keys()
    mean = np.mean([answer["reward"] for line in lines[:4] for answer in line["answers"]])
    assert read_metrics(trainer.folder.path / "metrics.jsonl")[0]["reward"] == pytest.approx(mean)
    assert [text.split(" · ")[0] for topic, text in said.lines if topic == "sample"] == ["iteration 1", "iteration 3"]


def test_steps_follow_from_epochs_over_the_prompts(make_run: Make, spec_of: SpecOf) -> None:
    spec = spec_of("ppo", prompts=5, minibatches=2, train={"steps": None, "epochs": 2.0})
    assert make_run(spec).total == 5 * 4 * 2  # 24 questions of 5 an iteration, 4 epochs of 2 mini-batches


# Specs


@pytest.mark.parametrize(
    ("objective", "rollout", "train", "said"),
    [
        ("sft", {"samples": 4}, {}, r"rollout.samples(.|\n)*objective: grpo"),
        ("grpo", {}, {"batch": 8}, r"train.batch(.|\n)*rollout.prompts"),
        ("grpo", {"gamma": 0.9}, {}, r"rollout.gamma is of a critic(.|\n)*objective: ppo"),
        ("grpo", {"samples": 1}, {}, r"against one another"),
        ("ppo", {"dynamic": True}, {}, r"rollout.dynamic(.|\n)*dapo"),
        ("ppo", {"critic": "full"}, {}, r"rollout.critic.*beside the policy"),
        ("grpo", {"tries": 2}, {}, r"rollout.tries(.|\n)*rollout.dynamic=true"),
        ("grpo", {"kl_target": 6.0}, {}, r"rollout.kl_target(.|\n)*rollout.kl=0.05"),
        ("grpo", {"turns": 2}, {}, r"rollout.turns(.|\n)*rollout.tools"),
        ("grpo", {"tool_seconds": 2}, {}, r"rollout.tool_seconds(.|\n)*rollout.tools"),
        ("grpo", {"overlong": 128}, {}, r"rollout.overlong"),
        ("grpo", {"kl_estimator": "k3"}, {}, r"rollout.kl_estimator(.|\n)*rollout.kl=0.05"),
        ("ppo", {"kl_horizon": 100}, {}, r"rollout.kl_horizon(.|\n)*rollout.kl_target=6"),
        ("grpo", {"stop_kl": 0.1}, {}, r"rollout.stop_kl(.|\n)*rollout.epochs=2"),
        ("grpo", {"prompts": 4, "minibatches": 5}, {}, r"rollout.minibatches <= rollout.prompts"),
        ("grpo", {}, {"sharding": "fsdp"}, r"train.sharding=none"),
        ("distil", {"temperature": 0.7}, {}, r"rollout.own is 0(.|\n)*rollout.own=0.5"),
        ("distil", {"own": 0.5, "samples": 4}, {}, r"rollout.samples"),
        ("grpo", {"own": 0.5}, {}, r"rollout.own is of distillation"),
        ("grpo + 0.1 * sft", {}, {}, r"nothing to learn from(.|\n)*objective: grpo"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_does(
    objective: str, rollout: dict[str, Any], train: dict[str, Any], said: str
) -> None:
    from tunesmith.spec import make_spec

    with pytest.raises(SpecError, match=said):
        make_spec({"base": "tiny", "objective": objective, "rollout": rollout, "train": train})


def test_turns_of_the_data_are_no_turns_of_the_policy(spec_of: SpecOf) -> None:
    from tunesmith.spec import make_spec

    keys = {"base": "tiny", "data": {"supervise": "last"}}
    with pytest.raises(SpecError, match=r"data.supervise(.|\n)*data.supervise=all"):
        make_spec({**keys, "objective": "grpo"})
    assert make_spec({**keys, "objective": "sft"}).data.supervise == "last"


def test_the_note_of_a_step_tells_the_reward_and_the_metrics_keep_the_loss(make_run: Make, spec_of: SpecOf) -> None:
    notes: list[str] = []

    class Noting(Quiet):
        @contextmanager
        def work(self, topic: str, total: int, done: int = 0) -> Iterator[Any]:
            yield SimpleNamespace(advance=lambda steps=1, note=None: notes.append(note))

    trainer = make_run(spec_of("grpo", minibatches=2, train={"steps": 4}))
    trainer.reporter = Noting()
    trainer.run()
    lines = read_metrics(trainer.folder.path / "metrics.jsonl")
    told = [float(note.split()[1]) for note in notes]
    assert all(note.startswith("reward ") for note in notes) and all("loss" in line for line in lines)
    assert told == pytest.approx([lines[0]["reward"]] * 2 + [lines[2]["reward"]] * 2, abs=6e-4)


@pytest.mark.parametrize(
    ("objective", "epochs", "advantage", "dynamic", "truncated", "kl"),
    [
        ("grpo", 1, "group", False, "keep", 0.0),
        ("dr_grpo", 1, "none", False, "keep", 0.0),
        ("rloo", 1, "leave_one_out", False, "keep", 0.0),
        ("dapo", 1, "group", True, "mask", 0.0),
        ("ppo", 4, "group", False, "keep", 0.05),
    ],
)
def test_what_is_left_open_follows_from_the_objective(
    objective: str, epochs: int, advantage: str, dynamic: bool, truncated: str, kl: float
) -> None:
    from tunesmith.rolloutspec import RolloutSpec, settled

    found = settled(RolloutSpec(), objective, {})
    assert (found.epochs, found.advantage, found.dynamic, found.truncated, found.kl) == (epochs, advantage, dynamic, truncated, kl)
    told = settled(RolloutSpec(dynamic=not dynamic, kl=1.0), objective, {})
    assert (told.dynamic, told.kl) == (not dynamic, 1.0)


def test_the_divergence_of_a_whole_answer_is_taken_off_the_rewards_of_a_group() -> None:
    import numpy as np

    from tunesmith.rollout.answers import Held
    from tunesmith.rollout.credit import give_group_advantages
    from tunesmith.rolloutspec import RolloutSpec, settled

    rollout = RolloutSpec(samples=2, kl=0.5, advantage="none")
    held = [Held(0, 0, np.arange(3, dtype=np.int32), np.array([True, True, False])) for _ in range(2)]
    for one, gap in zip(held, (1.0, 0.0), strict=True):
        one.given = {"old": np.full(3, -1.0, np.float32), "reference": np.full(3, -1.0 - gap, np.float32)}
    give_group_advantages(held, [2.0, 0.0], rollout, settled(rollout, "grpo", {}), 0.5)
    assert held[0].given["advantage"].tolist() == pytest.approx([0.5, 0.5, 0.0])  # 2 - 0.5 * 2 nats, less the mean of 1 and 0
    assert held[1].given["advantage"].tolist() == pytest.approx([-0.5, -0.5, 0.0])
