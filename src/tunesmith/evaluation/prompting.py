"""Ways of asking: what stands before the question. Demonstrations come from training samples, never from questions.

A way of asking is a function from a record to messages. The same function serves every model, so that rungs differ in
exactly one thing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from tunesmith.core.errors import DataError
from tunesmith.core.record import Message, Record
from tunesmith.evaluation.task import Task
from tunesmith.retrieval.words import WordIndex

Ask = Callable[[Record], list[Message]]

ANSWER = "Answer:"
_THINK = "Think step by step in one or two sentences, then end with '" + ANSWER + " ' and your answer."


def zero_shot(task: Task) -> Ask:
    """The bare question."""
    return task.ask


def few_shot(task: Task, pool: Sequence[Record], *, shots: int = 6, choose: Literal["fixed", "random"] = "fixed", seed: int = 0) -> Ask:
    """The same demonstrations before every question (fixed), or others drawn for each (random); labels in balance."""
    pool = _usable(pool, shots)
    fixed = draw_balanced(pool, shots, np.random.default_rng(seed))

    def ask(record: Record) -> list[Message]:
        drawn = fixed if choose == "fixed" else draw_balanced(_others(pool, record), shots, np.random.default_rng([seed, int(record.key(), 16)]))
        return _with_demonstrations(task, record, drawn)

    return ask


def nearest_shots(task: Task, pool: Sequence[Record], *, shots: int = 6) -> Ask:
    """The training samples most like the question (BM25 over words), the most alike last, next to the question.

    Liu et al. 2022 (2101.06804): demonstrations near the question beat random ones.
    """
    pool = _usable(pool, shots)
    index = WordIndex([record.question() for record in pool])

    def ask(record: Record) -> list[Message]:
        own = record.key()
        found = [pool[hit.index] for hit in index.search(record.question(), shots + 1) if pool[hit.index].key() != own]
        return _with_demonstrations(task, record, found[:shots][::-1])

    return ask


def chain_of_thought(task: Task, worked: Sequence[Record]) -> Ask:
    """Worked examples whose answers reason first and end with "Answer: ..." (Wei et al. 2022, 2201.11903).

    worked: records with `reasoning`. Raises DataError where one has none.
    """
    if not worked:
        raise DataError("chain of thought needs at least one worked example.", hints=["Name a file of them:  climb.demonstrations=FILE"])
    for record in worked:
        if not record.reasoning:
            raise DataError("the worked example has no reasoning.", where=record.where, hints=["Give it a column 'reasoning'."])

    def ask(record: Record) -> list[Message]:
        turns: list[Message] = []
        for example in worked:
            answer = f"{str(example.reasoning).strip()} {ANSWER} {example.answer()}"
            turns += [_thinking(_last_user(task.ask(example))), {"role": "assistant", "content": answer}]
        asked = task.ask(record)
        return [*_system(asked), *turns, *[m if m.get("role") == "system" else _thinking(m) for m in asked if m.get("role") != "system"]]

    return ask


def final_answer(text: str) -> str:
    """What follows the last "Answer:", or the whole text where there is none."""
    return text.rsplit(ANSWER, 1)[-1].strip()


def _thinking(message: Message) -> Message:
    return {**message, "content": f"{message['content']}\n{_THINK}"} if message.get("role") == "user" else message


def _with_demonstrations(task: Task, record: Record, shown: Sequence[Record]) -> list[Message]:
    asked = task.ask(record)
    turns: list[Message] = []
    for example in shown:
        turns += [_last_user(task.ask(example)), {"role": "assistant", "content": example.answer()}]
    return [*_system(asked), *turns, *[m for m in asked if m.get("role") != "system"]]


def _system(messages: Sequence[Message]) -> list[Message]:
    return [m for m in messages[:1] if m.get("role") == "system"]


def _last_user(messages: Sequence[Message]) -> Message:
    return next(m for m in reversed(messages) if m.get("role") == "user")


def _usable(pool: Sequence[Record], shots: int) -> list[Record]:
    usable = [record for record in pool if record.answer() is not None]
    if shots < 1:
        raise DataError(f"demonstrations: shots must be at least 1, not {shots}.")
    if len(usable) < shots:
        raise DataError(f"{shots} demonstrations were asked for, but only {len(usable)} training samples have answers.", hints=["Lower shots."])
    return usable


def _others(pool: Sequence[Record], record: Record) -> list[Record]:
    own = record.key()
    return [other for other in pool if other.key() != own]


def draw_balanced(pool: Sequence[Record], shots: int, rng: np.random.Generator) -> list[Record]:
    """Drawn so that labels come in turn, in an order of their own; without labels simply drawn."""
    shuffled = [pool[i] for i in rng.permutation(len(pool))]
    groups: dict[str, list[Record]] = {}
    for record in shuffled:
        groups.setdefault(record.label or "", []).append(record)
    out: list[Record] = []
    while len(out) < shots and any(groups.values()):
        for name in sorted(groups):
            if groups[name] and len(out) < shots:
                out.append(groups[name].pop())
    return [out[i] for i in rng.permutation(len(out))]
