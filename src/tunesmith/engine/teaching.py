"""What a teacher says of the rows of a student: another model of the same words, or the same base with other adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tunesmith.core.errors import BaseError
from tunesmith.core.row import Row
from tunesmith.engine.head import Teacher
from tunesmith.engine.model import Model


@torch.no_grad()
def taught(teacher: Model, rows: Sequence[Row]) -> Teacher:
    """What the teacher's logits at the rows' targets are made from, without gradient, in the order of one pack of these rows."""
    with teacher.active():
        return teacher.forward.logits(teacher.forward.pack(rows))


def check_teacher(teacher: Model, student: Model) -> None:
    """Raises BaseError unless the teacher speaks at all, and both in the same tokens."""
    teacher.forward.require_decoder()
    if teacher.head is not None:
        what = "the teacher was trained to answer by its task head, and says nothing in words."
        raise BaseError(what, where="teacher", hints=["A teacher is a model, or a run of an objective that learns from words."])
    if teacher.base is student.base:
        return
    theirs, ours = (dict(model.base.tokenizer.get_vocab()) for model in (teacher, student))
    if theirs != ours:
        odd = next(iter(theirs.items() ^ ours.items()))[0]
        what = f"{teacher.base.name} has another vocabulary than {student.base.name} (they differ in {odd!r}): no probabilities to compare."
        hints = ["Learn from its texts instead:  tunesmith generate TEACHER questions.jsonl --out texts.jsonl, then  objective: sft"]
        raise BaseError(what, where="teacher", hints=hints)
    sizes = [model.forward.model.get_output_embeddings().weight.shape[0] for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise BaseError(f"the teacher's head has {sizes[0]:,} words and the student's {sizes[1]:,}.", where="teacher")
