"""Asking a system questions and judging its answers.

Label tasks: a task head, the likeliest label, or generation and parsing. Tags and numbers: a task head. Generative tasks:
generation and a metric. Dialogues: every assistant turn is asked for, under the gold history or under the system's own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from tunesmith.bases.memory import PeakMemory
from tunesmith.core.errors import DataError
from tunesmith.core.progress import Quiet, Reporter
from tunesmith.core.record import Record
from tunesmith.engine.local import score_options
from tunesmith.engine.model import Model
from tunesmith.engine.server import Server
from tunesmith.evaluation.answering import Answers, System, by_generation, by_head, by_likelihood
from tunesmith.evaluation.dialogues import by_turns, turn_scores
from tunesmith.evaluation.judging import mean_over_turns, refuse_silence
from tunesmith.evaluation.labels import parse_label
from tunesmith.evaluation.metrics import metric, score_all
from tunesmith.evaluation.prompting import final_answer
from tunesmith.evaluation.rating import closeness
from tunesmith.evaluation.results import Evaluation, Judged
from tunesmith.evaluation.tagging import sentence_score
from tunesmith.evaluation.task import Task, is_dialogue

__all__ = ["System", "evaluate", "evaluate_histories", "score_options"]


def evaluate(system: System, task: Task, records: Sequence[Record], *, reporter: Reporter | None = None, batch: int = 32) -> Evaluation:
    """Ask every record and judge every answer; nothing is dropped but questions that a judge says no verdict on, where it may.

    Raises DataError where a record cannot be asked or judged, RunError where answers leave no room in the context or a
    server fails, SpecError where labels are to be scored by likelihood through a server, or words asked of an encoder.
    """
    if not records:
        raise DataError("there are no questions to evaluate on.")
    task.check(records)
    reporter = reporter or Quiet()
    way, model, answerer = system.way(task), system.model, system.answerer(batch)
    with torch.no_grad(), answerer.session():
        with PeakMemory() as memory, reporter.work(system.name, len(records)) as work:
            began = time.perf_counter()
            if way == "head" and isinstance(model, Model):
                answers = by_head(model, task, records, work.advance)
            elif way == "likelihood" and isinstance(model, Model):
                answers = by_likelihood(system, model, task, records, work.advance)
            elif task.kind == "generate" and any(is_dialogue(record) for record in records):
                answers = by_turns(system, answerer, task, records, work.advance)
            else:
                answers = by_generation(system, answerer, task, records, work.advance)
            seconds = time.perf_counter() - began
        judged = _judge(system, task, records, answers)  # within the session: a metric that fails costs no answers
    if silent := len(records) - len(judged):
        answers.notes.append(f"the judge gave no verdict on {silent:,} of {len(records):,} answers; these questions are left out")
    return Evaluation(
        system=system.name,
        task=task,
        judged=judged,
        prompt_tokens=answers.prompt_tokens / len(records),
        completion_tokens=answers.completion_tokens / len(records),
        seconds=seconds / len(records),
        peak_memory_mb=0.0 if isinstance(model, Server) else memory.gpu_mb or memory.mb,
        prompt=answers.first_prompt,
        notes=answers.notes,
    )


def evaluate_histories(
    system: System, task: Task, records: Sequence[Record], *, reporter: Reporter | None = None, batch: int = 32
) -> dict[Literal["gold", "own"], Evaluation]:
    """The same questions under the gold history and under the system's own, each evaluation knowing both scores.

    Without dialogues of several turns both are the same, and asked once. Raises as `evaluate`.
    """
    gold = evaluate(system, replace(task, history="gold"), records, reporter=reporter, batch=batch)
    alone = replace(task, history="own")
    if task.kind == "generate" and any(is_dialogue(record) for record in records):
        own = evaluate(system, alone, records, reporter=reporter, batch=batch)
    else:
        own = replace(gold, task=alone)
    gold.histories = own.histories = {"gold": gold.score, "own": own.score}
    return {"gold": gold, "own": own}


def _judge(system: System, task: Task, records: Sequence[Record], answers: Answers) -> list[Judged]:
    golds = [task.gold(record) or "" for record in records]
    labels: list[str | None] = [None] * len(records)
    scores: Sequence[float | None]
    if task.kind in ("label", "choice"):
        said = zip(records, answers.texts, strict=True)
        labels = list(answers.labels) if answers.labels is not None else [_parsed(system, task, record, text) for record, text in said]
        scores = [float(label == gold) for label, gold in zip(labels, golds, strict=True)]
    elif task.kind == "tags":
        both = zip(golds, answers.texts, strict=True)
        scores = [sentence_score(gold, text, task.labels, task.scheme) for gold, text in both]
    elif task.kind == "value":
        scores = closeness([float(gold) for gold in golds], [float(text) for text in answers.texts])
    elif answers.turns:
        golds = ["\n".join(task.gold(cut) or "" for _, cut in turns) for turns in answers.turns]
        scores = _by_judge(task, answers) if task.judge is not None else turn_scores(task, answers.turns)
    else:
        spoken = [final_answer(text) for text in answers.texts] if system.reasons else answers.texts
        scores = task.judge.scores(task, spoken, records) if task.judge is not None else score_all(metric(task.metric), spoken, records)
    if task.judge is not None:
        refuse_silence(scores, task.judge)
    return [
        Judged(record.key(), record.where, record.question(), gold, text, label, score)
        for record, gold, text, label, score in zip(records, golds, answers.texts, labels, scores, strict=True)
        if score is not None
    ]


def _by_judge(task: Task, answers: Answers) -> list[float | None]:
    """The judge's scores of dialogues, each turn judged with what stands before it."""
    assert task.judge is not None
    said = [turn for turns in answers.turns for turn in turns]
    scores = task.judge.scores(task, [text for text, _ in said], [cut for _, cut in said])
    return mean_over_turns(scores, [len(turns) for turns in answers.turns])


def _parsed(system: System, task: Task, record: Record, text: str) -> str | None:
    return parse_label(final_answer(text) if system.reasons else text, task.among(record))
