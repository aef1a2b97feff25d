"""Distillation on the policy's own answers: which steps have them, what is learned in these, and that the teacher is approached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.bases import Base, load_base
from tunesmith.core.record import Record
from tunesmith.core.row import Row, segment, single
from tunesmith.data.rows import to_rows
from tunesmith.engine.feed import rows_of_step
from tunesmith.engine.model import Model, attach_to
from tunesmith.engine.rundir import RunFolder, read_metrics
from tunesmith.engine.train import Trainer
from tunesmith.rollout.own import OwnAnswers, last_answer, own_answers
from tunesmith.spec import Spec, make_spec


@pytest.fixture
def rows(base: Base, records: list[Record]) -> list[Row]:
    """The questions with an answer each, and one dialogue of two turns."""
    said: dict[str, Any] = {"role": "assistant", "content": "The parcel arrived."}
    dialogues = [Record("messages", (*record.messages, said), where=record.where) for record in records]
    dialogues.append(Record("messages", (*records[0].messages, said, *records[1].messages, said)))
    return list(to_rows(base.tokenizer, dialogues))


def spec_of(own: float, **rollout: Any) -> Spec:
    train = {"steps": 12, "batch": 4, "lr": 1e-2, "schedule": "constant", "warmup": 0}
    return make_spec(
        {"base": "tiny", "objective": "distil", "teacher": "x", "train": train, "rollout": {"own": own, "max_new_tokens": 6, **rollout}}
    )


def test_a_share_of_the_steps_has_answers_of_the_policys_own_to_the_same_prompts(base: Base, rows: list[Row]) -> None:
    model = attach_to(base, "lora(rank=4)")
    feed = own_answers(model, spec_of(0.5), rows)
    assert isinstance(feed, OwnAnswers) and feed.memory() == ({}, {})
    flags = []
    for step in range(12):
        batch = feed.batch(step)
        flags.append(batch.figures["own"])
        for row, index in zip(batch.rows, rows_of_step(step, len(rows), 4, 0), strict=True):
            given, (part,) = rows[index].segments[0], row.segments
            start = last_answer(given)
            assert np.array_equal(part.ids[:start], given.ids[:start])
            if flags[-1]:
                assert not part.supervised[:start].any() and part.supervised[start:].all() and 1 <= len(part) - start <= 6
                assert row.where == rows[index].where
            else:
                assert row is rows[index]
    assert 2 <= sum(flags) <= 10
    assert [row.segments[0].ids.tolist() for row in feed.batch(3).rows] == [row.segments[0].ids.tolist() for row in feed.batch(3).rows]
    assert own_answers(model, make_spec({"base": "tiny", "objective": "distil"}), rows) is rows


def test_the_last_answer_begins_where_its_run_of_targets_does(rows: list[Row], base: Base) -> None:
    text = base.tokenizer.decode(rows[-1].segments[0].ids[: last_answer(rows[-1].segments[0])])
    assert text.count("<|im_start|>assistant") == 2 and text.endswith("<|im_start|>assistant\n")
    assert last_answer(segment([1, 2, 3], [False, True, True])) == 1
    assert last_answer(segment([1, 2, 3])) == 3


def test_an_answer_takes_the_room_there_is_and_a_row_that_leaves_none_keeps_its_own(base: Base) -> None:
    full = single([7] * 512, [False] * 511 + [True])
    feed = OwnAnswers(attach_to(base, "lora(rank=4)"), spec_of(1.0), [full])
    (row,) = feed.batch(0).rows
    assert len(row.segments[0]) == 512 and row.segments[0].supervised.sum() == 1  # there is room for an answer of one token
    feed.rows = [single([7] * 600, [False] * 599 + [True])]
    assert feed.batch(1).rows[0] is feed.rows[0]


def test_the_student_approaches_the_teacher_on_its_own_words(base: Base, rows: list[Row], tmp_path: Path) -> None:
    start = load_base(base.source, dtype="fp32", device="cpu")
    teacher = attach_to(start, "lora(rank=4)", seed=1)
    with torch.no_grad():
        for name, parameter in teacher.adapter.named_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    student = attach_to(Model(start), "lora(rank=8)", seed=2)
    spec = spec_of(1.0).model_copy(update={"train": spec_of(1.0).train.model_copy(update={"steps": 40})})
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir(exist_ok=True)
    made: Callable[..., Trainer] = Trainer
    made(student, own_answers(student, spec, rows), spec, folder, teacher=teacher).run()
    apart = [line["divergence"] for line in read_metrics(folder.path / "metrics.jsonl")]
    assert np.mean(apart[-5:]) < 0.5 * np.mean(apart[:5])
