"""Asking a system questions and judging its answers.

Label tasks: the likelihood of each label's whole answer given the prompt, in packs whose shared prompts are computed
once; or generation and parsing. Generative tasks: generation and a metric. Dialogues: every assistant turn is asked for,
under the gold history or under the model's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tunesmith.bases.memory import PeakMemory
from tunesmith.core.errors import DataError
from tunesmith.core.progress import Quiet, Reporter
from tunesmith.core.record import Message, Record
from tunesmith.core.row import Row
from tunesmith.data.lengths import drop_oldest_turns
from tunesmith.data.sharing import share_prefix
from tunesmith.engine.model import Model
from tunesmith.engine.pack import pack_rows
from tunesmith.engine.sampler import Completion, Sampling, generate
from tunesmith.evaluation.labels import parse_label
from tunesmith.evaluation.metrics import metric, score_all
from tunesmith.evaluation.prompting import Ask, final_answer
from tunesmith.evaluation.results import Evaluation, Judged
from tunesmith.evaluation.task import Task

PACK_TOKENS = 4096
"""Tokens of an evaluation pack. Without gradients little is kept, so packs may be larger than in training."""


@dataclass(slots=True)
class System:
    """A model and a way of asking it. reasons: answers are thought out in words, so they are generated and parsed."""

    name: str
    model: Model
    ask: Ask
    reasons: bool = False


@dataclass(slots=True)
class _Answers:
    """What a way of answering gives back, in the order of the records."""

    texts: list[str]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_prompt: str = ""
    notes: list[str] = field(default_factory=list)
    turns: list[list[str]] = field(default_factory=list)


def evaluate(system: System, task: Task, records: Sequence[Record], *, reporter: Reporter | None = None, batch: int = 32) -> Evaluation:
    """Ask every record and judge every answer; nothing is dropped. Raises DataError where a record cannot be judged."""
    if not records:
        raise DataError("there are no questions to evaluate on.")
    task.check(records)
    reporter = reporter or Quiet()
    choose = task.kind == "label" and task.scoring == "likelihood" and not system.reasons
    with torch.no_grad(), system.model.active(), PeakMemory() as memory, reporter.work(system.name, len(records)) as work:
        began = time.perf_counter()
        if choose:
            answers = _by_likelihood(system, task, records, work.advance)
        elif any(_turns(record) > 1 for record in records):
            answers = _dialogues(system, task, records, batch, work.advance)
        else:
            answers = _by_generation(system, task, records, batch, work.advance)
        seconds = time.perf_counter() - began
    return Evaluation(
        system=system.name,
        task=task,
        judged=_judge(system, task, records, answers),
        prompt_tokens=answers.prompt_tokens / len(records),
        completion_tokens=answers.completion_tokens / len(records),
        seconds=seconds / len(records),
        peak_memory_mb=memory.gpu_mb or memory.mb,
        prompt=answers.first_prompt,
        notes=answers.notes,
    )


def _judge(system: System, task: Task, records: Sequence[Record], answers: _Answers) -> list[Judged]:
    texts = answers.texts
    labels: list[str | None] = [None] * len(texts)
    if task.kind == "label":
        labels = [parse_label(final_answer(text) if system.reasons else text, task.labels) for text in texts]
        scores = [float(label == record.answer()) for label, record in zip(labels, records, strict=True)]
    elif answers.turns:
        scores = _dialogue_scores(task, records, answers.turns)
    else:
        said = [final_answer(text) for text in texts] if system.reasons else texts
        scores = score_all(metric(task.metric), said, records)
    return [
        Judged(record.key(), record.where, record.question(), record.answer() or "", text, label, score)
        for record, text, label, score in zip(records, texts, labels, scores, strict=True)
    ]


# Choosing among labels


def score_options(model: Model, rows: Sequence[Row], progress: Callable[[int], None] | None = None) -> list[list[float]]:
    """Log-probability of each option of each row (root: prompt; children: options), nats; what prompts share runs once."""
    scores: list[list[float]] = [[] for _ in rows]
    shared = share_prefix(rows, max_tokens=PACK_TOKENS)
    members = {id(tree.row): tree.members for tree in shared}
    budget = max(PACK_TOKENS, max(tree.row.tokens for tree in shared))
    for pack in pack_rows([tree.row for tree in shared], budget):
        sums = model.forward(pack).by_segment().tolist()
        found = {(pack.segment_row[s], pack.segment_index[s]): value for s, value in enumerate(sums)}
        for at, tree in enumerate(pack.rows):
            for member in members[id(tree)]:
                scores[member.index] = [found[at, leaf] for leaf in member.leaves]
        if progress:
            progress(sum(len(members[id(tree)]) for tree in pack.rows))
    return scores


def _by_likelihood(system: System, task: Task, records: Sequence[Record], progress: Callable[[int], None]) -> _Answers:
    renderer = system.model.renderer
    rows = [renderer.options(system.ask(record), task.labels, tools=record.tools or None, where=record.where) for record in records]
    _check_context(system, rows)
    scores = score_options(system.model, rows, progress)
    best = [max(range(len(task.labels)), key=own.__getitem__) for own in scores]
    return _Answers(
        texts=[task.labels[index] for index in best],
        prompt_tokens=sum(len(row.segments[0]) for row in rows),
        completion_tokens=sum(int(row.segments[1 + index].supervised.sum()) for row, index in zip(rows, best, strict=True)),
        first_prompt=system.model.base.tokenizer.decode(rows[0].segments[0].ids.tolist()),
    )


def _check_context(system: System, rows: Sequence[Row]) -> None:
    context = system.model.base.context_length
    for row in rows:
        longest = max(sum(len(row.segments[i]) for i in row.path(leaf)) for leaf in row.leaves())
        if context and longest > context:
            raise DataError(
                f"the question takes {longest:,} tokens with its demonstrations; {system.model.base.name} reads {context:,}.",
                where=row.where,
                hints=["Use fewer demonstrations (shots=...), or shorten the text."],
            )


# Generating


def _by_generation(system: System, task: Task, records: Sequence[Record], batch: int, progress: Callable[[int], None]) -> _Answers:
    asked = [(system.ask(record), record) for record in records]
    done, prompts, notes = answer_all(system.model, asked, task.max_new_tokens, batch, progress)
    return _Answers(
        texts=[one.text.strip() for one in done],
        prompt_tokens=sum(map(len, prompts)),
        completion_tokens=sum(len(one.ids) for one in done),
        first_prompt=system.model.base.tokenizer.decode(prompts[0]),
        notes=notes,
    )


def answer_all(
    model: Model,
    asked: Sequence[tuple[Sequence[Message], Record]],
    max_new_tokens: int,
    batch: int = 32,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Completion], list[list[int]], list[str]]:
    """Greedy answers to message lists. Histories that leave no room in the context lose whole oldest turns.

    Returns completions, prompts as token ids, and notes about what was dropped.
    """
    renderer, context = model.renderer, model.base.context_length
    prompts: list[list[int]] = []
    shortened = 0
    for messages, record in asked:
        tools = record.tools or None
        ids = renderer.prompt(messages, tools=tools).ids
        if context and len(ids) + max_new_tokens > context:
            kept, _ = drop_oldest_turns(model.base.tokenizer, messages, context - max_new_tokens, tools=tools, renderer=renderer)
            ids = renderer.prompt(kept, tools=tools).ids
            shortened += 1
        prompts.append(ids)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    done = generate(model.forward, model.base.tokenizer, prompts, sampling, ends=renderer.stop_ids, batch=batch, progress=progress)
    notes = [f"{shortened} histories were over the context of {context:,} tokens and lost their oldest turns"] if shortened else []
    cut = sum(one.finished == "length" for one in done)
    if cut:
        notes.append(f"{cut} answers reached the limit of {max_new_tokens} tokens unfinished")
    return done, prompts, notes


# Dialogues


def _turns(record: Record) -> int:
    return sum(message.get("role") == "assistant" for message in record.messages)


def _dialogues(system: System, task: Task, records: Sequence[Record], batch: int, progress: Callable[[int], None]) -> _Answers:
    """Every assistant turn is asked for, turn by turn; `task.history` says whose earlier turns stand before it."""
    out = _Answers(texts=[""] * len(records), turns=[[] for _ in records])
    for turn in range(max(_turns(record) for record in records)):
        members = [i for i, record in enumerate(records) if _turns(record) > turn]
        asked = [(task.with_system(_history(records[i], turn, out.turns[i], task.history)), records[i]) for i in members]
        done, prompts, notes = answer_all(system.model, asked, task.max_new_tokens, batch)
        for index, one in zip(members, done, strict=True):
            out.turns[index].append(one.text.strip())
        out.prompt_tokens += sum(map(len, prompts))
        out.completion_tokens += sum(len(one.ids) for one in done)
        out.notes += [f"turn {turn + 1}: {note}" for note in notes]
        if turn == 0:
            out.first_prompt = system.model.base.tokenizer.decode(prompts[0])
        progress(sum(_turns(records[i]) == turn + 1 for i in members))
    out.texts = ["\n".join(said) for said in out.turns]
    return out


def _history(record: Record, turn: int, own: Sequence[str], whose: str) -> list[Message]:
    """Messages before the assistant turn number `turn` (from 0), with gold or own earlier answers."""
    out: list[Message] = []
    seen = 0
    for message in record.messages:
        if message.get("role") == "assistant":
            if seen == turn:
                break
            out.append(message if whose == "gold" else {"role": "assistant", "content": own[seen]})
            seen += 1
        else:
            out.append(message)
    return out


def _dialogue_scores(task: Task, records: Sequence[Record], said: Sequence[Sequence[str]]) -> list[float]:
    """A dialogue's score is the mean over its assistant turns."""
    judge = metric(task.metric)
    out = []
    for record, turns in zip(records, said, strict=True):
        gold = [str(m.get("content") or "") for m in record.messages if m.get("role") == "assistant"]
        out.append(sum(judge(mine, theirs, record.fields) for mine, theirs in zip(turns, gold, strict=True)) / len(gold))
    return out
