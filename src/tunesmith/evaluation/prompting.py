"""Ways of asking: what stands before the question. Demonstrations come from training samples, never from questions.

A way of asking is a function from a record to messages. The same function serves every model, so that rungs differ in
exactly one thing.
"""

from __future__ import annotations

from collections import Counter
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
    """The same demonstrations before every question (fixed), or others drawn for each (random); labels in balance.

    A question is never among its own demonstrations. Raises DataError where fewer samples than `shots` have an answer.
    """
    samples = _usable(pool, shots)
    label = task.gold if task.kind == "label" else (lambda record: None)
    fixed = draw_balanced(samples, shots, np.random.default_rng(seed), label=label)

    def ask(record: Record) -> list[Message]:
        if choose == "random":
            rng = np.random.default_rng([seed, int(record.key(), 16)])
            drawn = draw_balanced(samples, shots, rng, besides=record, label=label)
        elif any(_same(example, record) for example in fixed):
            drawn = draw_balanced(samples, shots, np.random.default_rng(seed), besides=record, label=label)
        else:
            drawn = fixed
        return _with_demonstrations(task, record, drawn)

    return ask


def nearest_shots(task: Task, pool: Sequence[Record], *, shots: int = 6) -> Ask:
    """The training samples most like the question (BM25 over words), the most alike last, next to the question.

    Liu et al. 2022 (2101.06804): demonstrations near the question beat random ones. Raises as `few_shot`.
    """
    samples = _usable(pool, shots)
    questions = [record.question() for record in samples]
    index, copies = WordIndex(questions), Counter([*questions, *(record.where for record in samples)])

    def ask(record: Record) -> list[Message]:
        own = copies[record.question()] + copies[record.where]
        found = [samples[hit.index] for hit in index.search(record.question(), shots + own)]
        others = [example for example in found if not _same(example, record)]
        return _with_demonstrations(task, record, others[:shots][::-1])

    return ask


def chain_of_thought(task: Task, worked: Sequence[Record]) -> Ask:
    """Worked examples whose answers reason first and end with "Answer: ..." (Wei et al. 2022, 2201.11903).

    worked: records with `reasoning`; one that is the question itself is left out. Raises DataError where one has no
    reasoning, no answer, or a label that is none of the task's.
    """
    if not worked:
        raise DataError("chain of thought needs at least one worked example.", hints=["Name a file of them:  climb.demonstrations=FILE"])
    task.check(worked)
    for record in worked:
        if not record.reasoning:
            raise DataError("the worked example has no reasoning.", where=record.where, hints=["Give it a column 'reasoning'."])

    def ask(record: Record) -> list[Message]:
        turns: list[Message] = []
        for example in worked:
            if not _same(example, record):
                answer = f"{str(example.reasoning).strip()} {ANSWER} {task.gold(example)}"
                turns += [*_thinking(_parted(task.ask(example))[1]), {"role": "assistant", "content": answer}]
        head, asked = _parted(task.ask(record))
        return [*head, *turns, *_thinking(asked)]

    return ask


def final_answer(text: str) -> str:
    """What follows the last "Answer:", or the whole text where there is none."""
    return text.rsplit(ANSWER, 1)[-1].strip()


def _thinking(turns: Sequence[Message]) -> list[Message]:
    """The turns with the request to think in the last user turn, which is the one to be answered."""
    last = max((place for place, message in enumerate(turns) if message.get("role") == "user"), default=None)
    return [{**m, "content": f"{m['content']}\n{_THINK}"} if place == last else m for place, m in enumerate(turns)]


def _with_demonstrations(task: Task, record: Record, shown: Sequence[Record]) -> list[Message]:
    head, asked = _parted(task.ask(record))
    turns: list[Message] = []
    for example in shown:
        reply = example.reply()
        turns += [*_parted(task.ask(example))[1], *([] if reply is None else [reply])]
    return [*head, *turns, *asked]


def _parted(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """The system turns that a dialogue begins with, and the rest."""
    start = next((place for place, m in enumerate(messages) if m.get("role") not in ("system", "developer")), len(messages))
    return list(messages[:start]), list(messages[start:])


def _same(example: Record, record: Record) -> bool:
    """Is it the question itself (or the row it is a part of)?"""
    return example.question() == record.question() or (bool(record.where) and example.where == record.where)


def _usable(pool: Sequence[Record], shots: int) -> list[Record]:
    usable = [record for record in pool if record.answer() is not None]
    if shots < 1:
        raise DataError(f"demonstrations: shots must be at least 1, not {shots}.")
    if len(usable) < shots:
        what = f"{shots} demonstrations were asked for, but only {len(usable)} training samples have answers."
        raise DataError(what, hints=[f"Lower shots:  shots={len(usable)}"] if usable else [])
    return usable


def draw_balanced(
    pool: Sequence[Record],
    shots: int,
    rng: np.random.Generator,
    *,
    besides: Record | None = None,
    label: Callable[[Record], str | None] = lambda record: record.label,
) -> list[Record]:
    """Drawn so that labels come in turn, in an order of their own; without labels simply drawn. besides: never drawn."""
    groups: dict[str, list[Record]] = {}
    for place in rng.permutation(len(pool)):
        groups.setdefault(label(pool[place]) or "", []).append(pool[place])
    out: list[Record] = []
    while len(out) < shots and any(groups.values()):
        for name in sorted(groups):
            while groups[name] and len(out) < shots:
                record = groups[name].pop()
                if besides is None or not _same(record, besides):
                    out.append(record)
                    break
    return [out[place] for place in rng.permutation(len(out))]
