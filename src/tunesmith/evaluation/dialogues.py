"""Dialogues: every assistant turn is asked for, under the gold history or under the system's own.

A turn that calls tools without saying anything is not asked for: it stays in the history as the data has it, since the
result that follows answers that call and no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from tunesmith.core.record import Message, Record
from tunesmith.engine.asking import Answerer, Progress
from tunesmith.engine.sampler import Sampling
from tunesmith.evaluation.answering import Answers, System, questions
from tunesmith.evaluation.metrics import metric, score_all
from tunesmith.evaluation.prompting import final_answer
from tunesmith.evaluation.task import Task


def by_turns(system: System, answerer: Answerer, task: Task, records: Sequence[Record], progress: Progress) -> Answers:
    """What the system says in each assistant turn; `task.history` says whose earlier turns stand before it."""
    places = [_spoken(record) for record in records]
    out = Answers(texts=[], turns=[[] for _ in records])
    for turn in range(max(map(len, places))):
        members = [index for index, own in enumerate(places) if len(own) > turn]
        cuts = [_cut(records[i], places[i], turn, [said for said, _ in out.turns[i]], task.history) for i in members]
        done = answerer.answer(questions(system, cuts), Sampling(max_new_tokens=task.max_new_tokens))
        for index, cut, one in zip(members, cuts, done.replies, strict=True):
            out.turns[index].append((final_answer(one.text) if system.reasons else one.text.strip(), cut))
        out.prompt_tokens += sum(one.prompt_tokens for one in done.replies)
        out.completion_tokens += sum(one.completion_tokens for one in done.replies)
        out.notes += [f"turn {turn + 1}: {note}" for note in done.notes]
        out.first_prompt = out.first_prompt or done.first_prompt
        progress(sum(len(places[i]) == turn + 1 for i in members))
    out.texts = ["\n".join(said for said, _ in turns) for turns in out.turns]
    if silent := sum(_silent(record) for record in records):
        out.notes.append(f"{silent} assistant turns only call tools; they were not asked for and stand in the histories as they are")
    return out


def turn_scores(task: Task, turns: Sequence[Sequence[tuple[str, Record]]]) -> list[float]:
    """The score of each dialogue: the mean of the task's metric over its turns."""
    judge = metric(task.metric)
    scores = []
    for dialogue in turns:
        each = score_all(judge, [said for said, _ in dialogue], [cut for _, cut in dialogue])
        scores.append(sum(each) / len(each))
    return scores


def _says(message: Message) -> bool:
    return message.get("role") == "assistant" and bool(str(message.get("content") or "").strip())


def _spoken(record: Record) -> list[int]:
    """Places of the assistant turns that say something; a label stands for one."""
    if record.shape == "label":
        return [0]
    return [place for place, message in enumerate(record.messages) if _says(message)]


def _silent(record: Record) -> int:
    return sum(message.get("role") == "assistant" and not _says(message) for message in record.messages)


def _cut(record: Record, places: Sequence[int], turn: int, own: Sequence[str], whose: Literal["gold", "own"]) -> Record:
    """The dialogue up to one of its turns, which stays as the answer, with gold or own turns before it."""
    if record.shape == "label":
        return record
    said = dict(zip(places[:turn], own, strict=True)) if whose == "own" else {}
    messages = [
        {"role": "assistant", "content": said[place]} if place in said else message
        for place, message in enumerate(record.messages[: places[turn] + 1])
    ]
    return replace(record, messages=tuple(messages))
