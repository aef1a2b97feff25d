"""How a system answers: by choosing the likeliest label, or by generating.

Choosing: the likelihood of each label's whole answer given the prompt, in packs whose shared prompts are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tunesmith.core.errors import DataError, RunError, TunesmithError
from tunesmith.core.record import Message, Record
from tunesmith.core.row import Row
from tunesmith.data.lengths import drop_oldest_turns, longest_path
from tunesmith.data.sharing import share_prefix
from tunesmith.engine.model import Model
from tunesmith.engine.pack import pack_rows
from tunesmith.engine.sampler import Completion, Sampling, generate
from tunesmith.evaluation.prompting import Ask
from tunesmith.evaluation.task import Task

PACK_TOKENS = 4096
"""Tokens of an evaluation pack. Without gradients little is kept, so packs may be larger than in training."""

Progress = Callable[[int], None]


@dataclass(slots=True)
class System:
    """A model and a way of asking it. reasons: answers are thought out in words, so they are generated and parsed."""

    name: str
    model: Model
    ask: Ask
    reasons: bool = False


@dataclass(slots=True)
class Answers:
    """What a system said, in the order of the records. prompt_tokens, completion_tokens: of all together.

    texts: what was said. labels: what was chosen, where the system chose. first_prompt: the exact text read first.
    turns: of dialogues, each assistant turn as said, with the dialogue cut there: its last message is the gold turn.
    """

    texts: list[str]
    labels: list[str] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_prompt: str = ""
    notes: list[str] = field(default_factory=list)
    turns: list[list[tuple[str, Record]]] = field(default_factory=list)


@contextmanager
def located(record: Record) -> Iterator[None]:
    """Errors within name the record's place, if they name none."""
    try:
        yield
    except TunesmithError as cause:
        raise type(cause)(cause.what, where=cause.where or record.where, hints=cause.hints) from cause.__cause__


# Choosing among labels


def score_options(model: Model, rows: Sequence[Row], progress: Progress | None = None) -> list[list[float]]:
    """Log-probability of each option of each row (root: prompt; children: options), nats; what prompts share runs once."""
    scores: list[list[float]] = [[] for _ in rows]
    if not rows:
        return scores
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


def by_likelihood(system: System, task: Task, records: Sequence[Record], progress: Progress) -> Answers:
    """The label of the highest likelihood for each record."""
    renderer = system.model.renderer
    rows = []
    for record in records:
        with located(record):
            rows.append(renderer.options(system.ask(record), task.labels, tools=record.tools or None, where=record.where))
    _check_context(system, rows)
    scores = score_options(system.model, rows, progress)
    best = [max(range(len(task.labels)), key=own.__getitem__) for own in scores]
    chosen = [task.labels[index] for index in best]
    return Answers(
        texts=chosen,
        labels=chosen,
        prompt_tokens=sum(len(row.segments[0]) for row in rows),
        completion_tokens=sum(int(row.segments[1 + index].supervised.sum()) for row, index in zip(rows, best, strict=True)),
        first_prompt=system.model.base.tokenizer.decode(rows[0].segments[0].ids.tolist()),
    )


def _check_context(system: System, rows: Sequence[Row]) -> None:
    context = system.model.base.context_length
    for row in rows:
        longest = longest_path(row)
        if context and longest > context:
            raise DataError(
                f"the question takes {longest:,} tokens with its demonstrations; {system.model.base.name} reads {context:,}.",
                where=row.where,
                hints=["Use fewer demonstrations (shots=...), or shorten the text."],
            )


# Generating


def by_generation(system: System, task: Task, records: Sequence[Record], batch: int, progress: Progress) -> Answers:
    """What the system says to each record."""
    asked = []
    for record in records:
        with located(record):
            asked.append((system.ask(record), record))
    done, prompts, notes = answer_all(system.model, asked, task.max_new_tokens, batch, progress)
    return Answers(
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
    progress: Progress | None = None,
) -> tuple[list[Completion], list[list[int]], list[str]]:
    """Greedy answers to message lists. Histories that leave no room in the context lose whole oldest turns.

    Returns completions, prompts as token ids, and notes about what was dropped. Raises RunError where an answer of
    `max_new_tokens` leaves no room at all, DataError where a last turn alone leaves too little for it.
    """
    renderer, context = model.renderer, model.base.context_length
    if context and max_new_tokens >= context:
        what = f"answers of {max_new_tokens:,} tokens leave no room for a question in a context of {context:,}."
        raise RunError(what, hints=["Lower it:  task.max_new_tokens=N"])
    prompts: list[list[int]] = []
    shortened = 0
    for messages, record in asked:
        tools = record.tools or None
        with located(record):
            ids = renderer.prompt(messages, tools=tools).ids
            if context and len(ids) + max_new_tokens > context:
                kept, _ = drop_oldest_turns(model.base.tokenizer, messages, context - max_new_tokens, tools=tools, renderer=renderer)
                ids = renderer.prompt(kept, tools=tools).ids
                shortened += 1
        prompts.append(ids)
    sampling = Sampling(max_new_tokens=max_new_tokens)
    done = generate(model.forward, model.base.tokenizer, prompts, sampling, ends=renderer.stop_ids, batch=batch, progress=progress)
    notes = []
    if shortened:
        notes.append(f"{shortened} of {len(prompts)} prompts left no room for an answer in {context:,} tokens and lost their oldest turns")
    cut = sum(one.finished == "length" for one in done)
    if cut:
        notes.append(f"{cut} of {len(done)} answers reached the limit of {max_new_tokens} tokens unfinished")
    return done, prompts, notes
