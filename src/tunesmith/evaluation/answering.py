"""How a system answers: by its task head, by choosing the likeliest label, or by generating.

Choosing: the likelihood of each label's whole answer given the prompt, in packs whose shared prompts are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from tunesmith.core.errors import DataError, SpecError
from tunesmith.core.record import Record
from tunesmith.core.row import Row
from tunesmith.data.lengths import longest_path
from tunesmith.data.rows import notes_of
from tunesmith.engine.asking import Answerer, Progress, Question
from tunesmith.engine.local import answerer, located, score_options
from tunesmith.engine.model import Model
from tunesmith.engine.sampler import Sampling
from tunesmith.engine.server import Server
from tunesmith.evaluation.choosing import choice_scores
from tunesmith.evaluation.classifying import check_head, label_logits
from tunesmith.evaluation.prompting import Ask
from tunesmith.evaluation.tagging import said_tags
from tunesmith.evaluation.task import Task

Way = Literal["head", "likelihood", "generation"]


@dataclass(slots=True)
class System:
    """A model, here or at a server, and a way of asking it. reasons: answers are thought out in words, generated and parsed."""

    name: str
    model: Model | Server
    ask: Ask
    reasons: bool = False

    @property
    def source(self) -> str:
        """What stands behind it: the base, or the server's model."""
        return self.model.name if isinstance(self.model, Server) else self.model.base.name

    def answerer(self, batch: int = 32) -> Answerer:
        """Who answers. batch: rows generated at once in this process; a server has its own `concurrency`."""
        return answerer(self.model, batch)

    def way(self, task: Task) -> Way:
        """How it answers: with its task head, with the likeliest label or candidate, or in words.

        Raises SpecError where likelihoods would be needed from a server, which tells none, words from an encoder, and tags or
        numbers from anything but a head that was trained for them.
        """
        choose = task.kind in ("label", "choice") and not self.reasons
        if task.kind in ("tags", "value"):
            self._require_head(task)
            return "head"
        if isinstance(self.model, Server):
            if choose and task.scoring != "generation":
                raise SpecError(
                    "labels cannot be scored by likelihood through a server: it says answers, not the probabilities of given ones.",
                    where=self.name,
                    hints=["Nearest that works here:  task.scoring=generation"],
                )
            return "generation"
        if choose and task.scoring == "auto" and self.model.head is not None:
            return "head"
        refuse_prompts(self.model, self.name)
        return "likelihood" if choose and task.scoring != "generation" else "generation"

    def _require_head(self, task: Task) -> None:
        if task.scoring != "auto":
            what = f"task.scoring={task.scoring} asks for labels in words, and the task is of kind {task.kind}."
            raise SpecError(what, where="task.scoring", hints=["Leave task.scoring out."])
        if isinstance(self.model, Server):
            told = "tags of words are" if task.kind == "tags" else "a number is"
            raise SpecError(f"{told} said by a task head, and a server has none.", where=self.name, hints=["Ask a run:  runs/NAME"])
        check_head(self.model, task)


def refuse_prompts(model: Model, where: str = "") -> None:
    """Raise SpecError for an encoder, which answers no prompt."""
    if model.base.kind == "encoder":
        raise SpecError(
            f"{model.base.name} is an encoder: it reads texts and answers no prompt.",
            where=where,
            hints=["Nearest that works here:  train a task head on it:  objective: classify"],
        )


@dataclass(slots=True)
class Answers:
    """What a system said, in the order of the records. prompt_tokens, completion_tokens: of all together.

    texts: what was said (tags of words parted by spaces). labels: what was chosen, where it was. first_prompt: the exact text read first.
    turns: of dialogues, each assistant turn as said, with the dialogue cut there: its last message is the gold turn.
    """

    texts: list[str]
    labels: list[str] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_prompt: str = ""
    notes: list[str] = field(default_factory=list)
    turns: list[list[tuple[str, Record]]] = field(default_factory=list)


# Choosing among labels


def _measure(model: Model, task: Task, records: Sequence[Record]) -> str:
    """Likelihood, its mean a token, or its ratio to the reference's: what a model that was taught preferences was taught to raise.

    Raises SpecError for a ratio where there is no adapter to leave out.
    """
    if task.scoring == "auto" and model.adapters and any(record.answers for record in records):
        return "ratio"
    if task.scoring == "ratio" and not model.adapters:
        hints = ["Nearest that works here:  task.scoring=likelihood"]
        raise SpecError(f"{model.name or model.base.name} has no adapter that could be left out.", where="task.scoring", hints=hints)
    return task.scoring


def _weighed(model: Model, rows: Sequence[Row], measure: str, progress: Progress) -> list[list[float]]:
    scores = score_options(model, rows, progress)
    if measure == "mean":
        lengths = [[int(part.supervised.sum()) for part in row.segments[1:]] for row in rows]
        return [[score / max(1, n) for score, n in zip(*both, strict=True)] for both in zip(scores, lengths, strict=True)]
    if measure == "ratio":
        beneath = Model(model.base, model.adapters[:-1])
        with beneath.active():
            before = score_options(beneath, rows)
        return [[now - then for now, then in zip(*both, strict=True)] for both in zip(scores, before, strict=True)]
    return scores


def by_likelihood(system: System, model: Model, task: Task, records: Sequence[Record], progress: Progress) -> Answers:
    """The label, or the candidate, of the highest likelihood for each record."""
    renderer = model.renderer
    rows = []
    for record in records:
        with located(record.where):
            rows.append(renderer.options(system.ask(record), task.among(record), tools=record.tools or None, where=record.where))
    _check_context(model, rows)
    scores = _weighed(model, rows, _measure(model, task, records), progress)
    best = [max(range(len(own)), key=own.__getitem__) for own in scores]
    chosen = [task.among(record)[index] for record, index in zip(records, best, strict=True)]
    return Answers(
        texts=chosen,
        labels=chosen,
        prompt_tokens=sum(len(row.segments[0]) for row in rows),
        completion_tokens=sum(int(row.segments[1 + index].supervised.sum()) for row, index in zip(rows, best, strict=True)),
        first_prompt=model.base.tokenizer.decode(rows[0].segments[0].ids.tolist()),
    )


def _check_context(model: Model, rows: Sequence[Row]) -> None:
    context = model.context_length
    for row in rows:
        longest = longest_path(row)
        if context and longest > context:
            raise DataError(
                f"the question takes {longest:,} tokens with its demonstrations; {model.base.name} reads {context:,}.",
                where=row.where,
                hints=["Use fewer demonstrations (shots=...), or shorten the text."],
            )


def by_head(model: Model, task: Task, records: Sequence[Record], progress: Progress) -> Answers:
    """What the model's task head says of each record: a label, a tag of each word, a number, or the best candidate."""
    check_head(model, task)
    assert model.head is not None
    chosen: list[str] | None = None
    missed = 0
    if task.kind == "tags":
        rows, tags, missed = said_tags(model, task, records, progress)
        texts = [" ".join(each) for each in tags]
    elif task.kind == "choice":
        rows, scores = choice_scores(model, task, records, progress)
        chosen = [task.among(record)[own.index(max(own))] for record, own in zip(records, scores, strict=True)]
        texts = chosen
    else:
        rows, logits = label_logits(model, task, records, progress)
        if task.kind == "value":
            texts = [f"{value:.6g}" for value in (logits[:, 0] * model.head.way.deviation + model.head.way.mean).tolist()]
        else:
            chosen = texts = [model.head.labels[index] for index in logits.argmax(-1).tolist()]
    notes = [f"{note} ({count} rows)" for note, count in notes_of(rows).items()]
    if missed:
        notes.append(f"{missed:,} words were not read; what they are part of counts as missed")
    return Answers(
        texts=texts,
        labels=chosen,
        prompt_tokens=sum(row.tokens for row in rows),
        first_prompt=model.base.tokenizer.decode([int(token) for part in rows[0].segments[:2] for token in part.ids]),
        notes=notes,
    )


# Generating


def by_generation(system: System, answerer: Answerer, task: Task, records: Sequence[Record], progress: Progress) -> Answers:
    """What the system says to each record."""
    done = answerer.answer(questions(system, records), Sampling(max_new_tokens=task.max_new_tokens), progress=progress)
    return Answers(
        texts=[reply.text.strip() for reply in done.replies],
        prompt_tokens=sum(reply.prompt_tokens for reply in done.replies),
        completion_tokens=sum(reply.completion_tokens for reply in done.replies),
        first_prompt=done.first_prompt,
        notes=done.notes,
    )


def questions(system: System, records: Sequence[Record]) -> list[Question]:
    """The records as the system asks them."""
    asked = []
    for record in records:
        with located(record.where):
            asked.append(Question(system.ask(record), record.tools, record.where))
    return asked
