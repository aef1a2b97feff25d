"""Objectives of answers read in packs and trees what each answer is worth alone, and the reference is the run's start."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tunesmith.bases import Base, load_base
from tunesmith.core.errors import BaseError
from tunesmith.core.row import Row, Segment, segment
from tunesmith.data.sharing import share_prefix
from tunesmith.engine.feed import Batch, Fixed
from tunesmith.engine.losses import Beside, judge, loss_of, weight_of
from tunesmith.engine.model import Model, attach_to
from tunesmith.engine.pack import build_pack
from tunesmith.engine.probe import probe
from tunesmith.engine.reference import with_reference
from tunesmith.engine.teaching import check_teacher, taught
from tunesmith.engine.train import Trainer
from tunesmith.engine.units import Answers, drift_on, parted
from tunesmith.objectives import OBJECTIVES

Make = Callable[..., Trainer]
Alone = Callable[..., Tensor]


def answer(ids: list[int], name: str, **given: float) -> Segment:
    return segment(ids, True, 0, name).with_given(**given)


@pytest.fixture
def pairs() -> list[Row]:
    """Eight pairs; the prompts of every second one begin alike, and two are the same."""
    drawn = torch.randint(5, 90, (8, 60), generator=torch.Generator().manual_seed(4)).tolist()
    out = []
    for number, ids in enumerate(drawn):
        prompt = drawn[0][:30] if number in (0, 2) else (drawn[0][:20] if number % 2 == 0 else []) + ids[20:26]
        better = answer(ids[30 : 33 + number], "chosen", rank=0, soft=1.0 - 0.1 * (number % 3))
        worse = answer(ids[45 : 56 - number], "rejected", rank=1, soft=1.0 - 0.1 * (number % 3))
        out.append(Row((segment(prompt), better, worse), f"pairs.jsonl, line {number + 1}"))
    return out


def sums_alone(model: Any, rows: list[Row], alone: Alone) -> Tensor:
    """Summed log-probability of each answer, computed with nothing beside it, [rows, 2]."""
    return torch.stack([torch.stack([alone(model, [_only(row, which)]).sum() for which in (1, 2)]) for row in rows])


def _only(row: Row, which: int) -> Row:
    return Row((row.segments[0], row.segments[which].part(slice(None), 0)))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_answers_of_merged_trees_are_worth_what_they_are_worth_alone(
    family: str, build: Callable[..., Any], pairs: list[Row], alone: Alone
) -> None:
    model = build(family)
    forward = probe(model, speaks=True)
    trees = [tree.row for tree in share_prefix(pairs, min_tokens=8)]
    assert len(trees) < len(pairs)
    pack = forward.pack(trees)
    read = Answers(forward(pack))
    truth = sums_alone(model, pairs, alone)
    chosen = {tuple(row.segments[1].ids.tolist()): float(sums[0]) for row, sums in zip(pairs, truth, strict=True)}
    rejected = {tuple(row.segments[2].ids.tolist()): float(sums[1]) for row, sums in zip(pairs, truth, strict=True)}
    answers = [part for row in pack.laid for part in row.segments if part.supervised.any()]
    assert [chosen[tuple(part.ids.tolist())] for part in answers[::2]] == pytest.approx(read.chosen.tolist(), abs=2e-4)
    assert [rejected[tuple(part.ids.tolist())] for part in answers[1::2]] == pytest.approx(read.rejected.tolist(), abs=2e-4)
    assert read.chosen_length.tolist() == [len(part) for part in answers[::2]]
    assert read.soft.tolist() == pytest.approx([float(part.given["soft"][0]) for part in answers[::2]])
    assert weight_of(trees, OBJECTIVES["dpo"]) == len(pairs) == weight_of(pairs, OBJECTIVES["dpo"])


def test_dpo_of_a_pack_and_its_gradient_are_those_of_pairs_computed_apart(
    build: Callable[..., Any], pairs: list[Row], alone: Alone
) -> None:
    model = build("llama").requires_grad_(True)
    forward = probe(model, speaks=True)
    with torch.no_grad():
        reference = sums_alone(model, pairs, alone) + torch.linspace(-2, 2, 16).reshape(8, 2)
    told = [
        Row(
            (
                row.segments[0],
                *(part.with_given(reference=float(ref) / len(part)) for part, ref in zip(row.segments[1:], refs, strict=True)),
            )
        )
        for row, refs in zip(pairs, reference, strict=True)
    ]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trees = [tree.row for tree in share_prefix(told, min_tokens=8)]
    loss = loss_of(forward, None, forward.pack(trees), OBJECTIVES["dpo"], {"beta": 0.5})  # type: ignore[arg-type]
    ours = torch.autograd.grad(loss.total, weights)
    gaps = 0.5 * ((sums_alone(model, pairs, alone) - reference) @ torch.tensor([1.0, -1.0]))
    soft = torch.tensor([float(row.segments[1].given["soft"][0]) for row in pairs])
    truth = -(soft * torch.nn.functional.logsigmoid(gaps) + (1 - soft) * torch.nn.functional.logsigmoid(-gaps)).sum()
    assert float(loss.total.detach()) == pytest.approx(float(truth.detach()), abs=1e-3) and loss.weight == 8
    theirs = torch.autograd.grad(truth, weights)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=2e-4, rtol=1e-3)


def test_the_reference_is_the_base_and_is_read_from_the_cache_the_second_time(
    base: Base, pairs: list[Row], alone: Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach_to(base, "lora(rank=4)")
    with torch.no_grad():
        for _, parameter in model.adapter.named_parameters():
            parameter.normal_()
        told = with_reference(Model(base), pairs, cache=tmp_path)
        with model.adapter.switched(False):
            truth = sums_alone(base.model, pairs, alone)
    found = torch.tensor([[float(part.given["reference"].sum()) for part in row.segments[1:]] for row in told])
    assert torch.allclose(found, truth, atol=2e-4)
    [file] = tmp_path.glob("*.safetensors")
    monkeypatch.setattr("tunesmith.engine.reference.read", lambda *args, **kwargs: pytest.fail("it was read again"))
    again = with_reference(Model(base), pairs, cache=tmp_path)
    assert all(
        np.array_equal(one.given["reference"], other.given["reference"])
        for row, same in zip(told, again, strict=True)
        for one, other in zip(row.segments[1:], same.segments[1:], strict=True)
    )
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-100])
    with_reference(Model(base), pairs, cache=tmp_path)  # a damaged one counts as absent
    with_reference(model, pairs, cache=tmp_path)  # another model has another
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_the_policy_begins_at_its_reference_and_steps_do_not_depend_on_the_micro_batch(
    base: Base, pairs: list[Row], make_trainer: Make
) -> None:
    """At the first step of a LoRA no answer has moved: the loss is log 2 whatever the pairs."""
    told = with_reference(Model(base), pairs)
    hard = [Row((row.segments[0], *(part.with_given(soft=1.0) for part in row.segments[1:]))) for row in told]
    found = []
    for name, tokens in (("whole", 4096), ("parts", 60)):
        trainer = make_trainer(name, rows=hard, objective="dpo(beta=0.5)", pack_tokens=tokens, batch=8, steps=4)
        trainer.run()
        found.append((trainer.state.losses, trainer.adapter.state()))
    (losses, weights), (parts, others) = found
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < losses[0] - 0.01
    assert parts == pytest.approx(losses, abs=1e-4)
    for name, value in weights.items():
        assert torch.allclose(value, others[name], atol=1e-4), name


@pytest.mark.parametrize("objective", ["dpo", "ipo", "simpo", "orpo", "plackett_luce"])
def test_training_puts_the_better_answers_first(objective: str, base: Base, pairs: list[Row], make_trainer: Make) -> None:
    told = with_reference(Model(base), pairs)
    trainer = make_trainer("run", rows=told, objective=objective, batch=8, steps=12)
    before = judge(trainer.model, told, trainer.objective, trainer.options, 4096)
    trainer.run()
    after = judge(trainer.model, told, trainer.objective, trainer.options, 4096)
    assert after["accuracy"] >= 0.85 and after["loss"] < before["loss"] and after["margin"] > before["margin"]


def test_what_was_not_given_is_asked_for_by_name(base: Base, pairs: list[Row]) -> None:
    model = attach_to(base, "lora(rank=4)")
    with pytest.raises(ValueError, match="reference"):
        loss_of(model.forward, model.adapter, model.forward.pack(pairs), OBJECTIVES["dpo"], {})
    with pytest.raises(ValueError, match="given at some targets"):
        build_pack([*pairs[:1], *with_reference(Model(base), pairs[1:])]).given("reference")


# Answers by themselves


@pytest.fixture
def rated(pairs: list[Row]) -> list[Row]:
    """Prompts with a good or a bad answer, each beside one that belongs to another prompt."""
    out = []
    for number, row in enumerate(pairs):
        own = answer(row.segments[1].ids.tolist(), "answer", good=float(number % 2), other=0.0)
        other = answer(pairs[number - 1].segments[2].ids.tolist(), "answer", good=0.0, other=1.0)
        out.append(Row((row.segments[0], own, other), row.where))
    return out


def test_answers_of_other_prompts_say_how_far_the_policy_went_and_nothing_is_learned_from_them(
    base: Base, rated: list[Row], alone: Alone
) -> None:
    told = with_reference(Model(base), rated)
    model = attach_to(base, "lora(rank=4)")
    torch.manual_seed(2)
    with torch.no_grad():
        for _, parameter in model.adapter.named_parameters():
            parameter.normal_(std=0.2)
    own, others = parted(told)
    assert [len(row.segments) for row in own] == [2] * 8 == [len(row.segments) for row in others]
    with torch.no_grad():
        policy = sums_alone(base.model, rated, alone)
        with model.adapter.switched(False):
            reference = sums_alone(base.model, rated, alone)
    drift = float((policy - reference)[:, 1].mean())
    kl = drift_on(others, model, 64, _alone())
    assert float(kl) == pytest.approx(max(0.0, drift), abs=1e-3)
    loss = loss_of(model.forward, model.adapter, model.forward.pack(own), OBJECTIVES["kto"], {}, beside=Beside(kl=kl))
    gaps = 0.1 * ((policy - reference)[:, 0] - float(kl))
    good = torch.tensor([float(number % 2) for number in range(8)])
    truth = torch.where(good > 0, 1 - torch.sigmoid(gaps), 1 - torch.sigmoid(-gaps)).sum()
    assert float(loss.total.detach()) == pytest.approx(float(truth), abs=1e-3)
    assert weight_of(own, OBJECTIVES["kto"]) == 8


def test_kto_learns_which_answers_are_good(base: Base, rated: list[Row], make_trainer: Make) -> None:
    told = with_reference(Model(base), rated)
    trainer = make_trainer("run", rows=told, objective="kto", batch=8, steps=12)
    trainer.run()
    found = judge(trainer.model, told, trainer.objective, trainer.options, 4096)
    assert found["accuracy"] > 0.8 and trainer.state.losses[-1] < trainer.state.losses[0]


def _alone() -> Any:
    from tunesmith.engine.processes import ALONE

    return ALONE


# Feeds


def test_a_step_without_rows_is_counted_and_changes_nothing(samples: list[Row], make_trainer: Make) -> None:
    trainer = make_trainer("run", steps=4)

    class Gaps(Fixed):
        def batch(self, step: int) -> Batch:
            return Batch([], figures={"tries": 3.0}) if step == 1 else super().batch(step)

    trainer.feed = Gaps(samples, trainer.spec)
    state = trainer.run()
    seen = [line for line in (trainer.folder.path / "metrics.jsonl").read_text().splitlines() if '"tries"' in line]
    assert state.step == 4 and len(seen) == 1


def test_a_given_weight_divides_the_loss(samples: list[Row], make_trainer: Make) -> None:
    """What is not computed because nothing is learned from it still counts in the denominator."""
    plain, doubled = make_trainer("plain", steps=1), make_trainer("doubled", steps=1)

    class Weighed(Fixed):
        def batch(self, step: int) -> Batch:
            rows = super().batch(step).rows
            return Batch(rows, weight=2.0 * sum(row.supervised_tokens for row in rows))

    doubled.feed = Weighed(samples, doubled.spec)
    plain.run()
    doubled.run()
    assert doubled.state.losses[0] == pytest.approx(plain.state.losses[0] / 2)


# Mixes and teachers


def test_a_mix_adds_each_objective_over_its_own_denominator(base: Base, pairs: list[Row], make_trainer: Make) -> None:
    """The words of the better answers alone are learned beside the pairs."""
    told = with_reference(Model(base), pairs)
    found = {}
    for name, objective in (("dpo", "dpo"), ("mix", "dpo + 0.5 * sft")):
        for tokens in (4096, 60):
            trainer = make_trainer(f"{name}-{tokens}", rows=told, objective=objective, batch=8, steps=1, pack_tokens=tokens)
            trainer.run()
            found[name, tokens] = trainer.state.losses[0]
    model = attach_to(base, "lora(rank=4)")
    chosen = [Row((row.segments[0], row.segments[1])) for row in pairs]
    loss = loss_of(model.forward, model.adapter, model.forward.pack(chosen), OBJECTIVES["sft"], {})
    surprise = float(loss.total.detach()) / loss.weight
    assert found["mix", 4096] == pytest.approx(found["dpo", 4096] + 0.5 * surprise, abs=1e-4)
    assert found["mix", 60] == pytest.approx(found["mix", 4096], abs=1e-4)


def test_a_student_learns_what_its_teacher_says_of_the_same_rows(base: Base, samples: list[Row], make_trainer: Make) -> None:
    """Teacher and student are one base with two adapters; at the end the divergence is a part of what it was."""
    teacher = attach_to(base, "lora(rank=4)", name="teacher")
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in teacher.adapter.named_parameters():
            parameter.normal_(std=0.3)
    trainer = make_trainer("student", on=base, rows=samples, objective="distil(beta=0.5)", steps=30, batch=20)
    trainer.teacher = teacher
    trainer.run()
    assert trainer.state.losses[-1] < 0.5 * trainer.state.losses[0]


def test_the_teachers_divergence_is_that_of_both_distributions(base: Base, samples: list[Row]) -> None:
    teacher, student = attach_to(base, "lora(rank=4)", name="teacher"), attach_to(base, "lora(rank=4)", name="student")
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in teacher.adapter.named_parameters():
            parameter.normal_(std=0.3)
    row = samples[0].segments[0]
    ids, at = torch.from_numpy(row.ids.astype("int64")), torch.from_numpy(row.supervised.nonzero()[0])
    said = []
    for model in (teacher, student):
        with model.active(), torch.no_grad():
            said.append(torch.log_softmax(base.model(input_ids=ids[None]).logits[0].double(), -1)[at - 1])
    truth = float((said[0].exp() * (said[0] - said[1])).sum())
    with student.active():
        beside = Beside(teacher=taught(teacher, samples[:1]))
        loss = loss_of(student.forward, student.adapter, student.forward.pack(samples[:1]), OBJECTIVES["distil"], {}, beside=beside)
    assert float(loss.total.detach()) == pytest.approx(truth, rel=1e-3)


def test_a_teacher_of_another_vocabulary_is_refused(base: Base, tiny_base_folder: Path) -> None:
    other = load_base(tiny_base_folder, dtype="fp32", device="cpu", new_tokens=["<extra>"])
    check_teacher(Model(base), Model(base))
    with pytest.raises(BaseError, match="another vocabulary"):
        check_teacher(Model(other), Model(base))
