"""A task: what is asked of a record and how the answer is judged. One task serves training, evaluation and reward."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.core.errors import DataError, SpecError
from tunesmith.core.record import Message, Record, called
from tunesmith.evaluation.metrics import metric
from tunesmith.evaluation.tags import Scheme
from tunesmith.evaluation.tagsets import own_tags, tag_set
from tunesmith.spec import TaskSpec

if TYPE_CHECKING:
    from tunesmith.evaluation.judging import Measure

Kind = Literal["label", "tags", "value", "choice", "generate"]

TEXT, PAIR, LABELS = "{text}", "{text_pair}", "{labels}"
_DEFAULT = "Classify the text. Answer with one of: {labels}.\n\nText: {text}"
_METRICS: Mapping[Kind, str] = {
    "label": "accuracy",
    "choice": "accuracy",
    "tags": "span_f1",
    "value": "closeness",
    "generate": "exact_match",
}
_SHAPES: Mapping[str, Kind] = {"tokens": "tags", "value": "value", "choices": "choice", "pair": "choice", "ranking": "choice"}
_PLAIN = ("label", "value", "tokens")  # shapes without turns


@dataclass(frozen=True, slots=True)
class Task:
    """kind: "label" a choice among `labels`, "tags" one of `labels` for each word, "value" a number, "choice" one of the record's
    own candidates, "generate" free text. instruction: "{text}" marks the record's text, "{text_pair}" the second of a pair.
    scoring: label tasks by the likelihood of each label ("mean": a token; "ratio": over that of the model without its last adapter,
    the implicit reward of preference learning), or by generation and parsing; "auto": by the task head of a model
    that has one, else by likelihood. metric: name or {name: options}; "accuracy" for labels, "exact_match" if none is named
    for text. history: whose turns a dialogue is continued from. scheme: that the records' tags are written in; repair: illegal
    ones are read as `tagsets.own_tags` says. subwords: pieces of a word that are asked ("auto": as the base reads). judge: scores
    answers in free words in place of the metric.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...] = ()
    system: str | None = None
    instruction: str = ""
    scoring: Literal["auto", "likelihood", "generation", "mean", "ratio"] = "auto"
    metric: str | Mapping[str, Any] = ""
    max_new_tokens: int = 128
    history: Literal["gold", "own"] = "gold"
    scheme: Scheme = "IOB2"
    repair: bool = False
    subwords: Literal["auto", "first", "last", "all"] = "auto"
    judge: Measure | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.metric:
            plain = self.kind == "tags" and self.scheme == "plain"
            object.__setattr__(self, "metric", "accuracy" if plain else _METRICS[self.kind])

    @property
    def measure(self) -> str:
        """The name of what an answer's score is."""
        if self.judge is not None:
            return self.judge.name
        return self.metric if isinstance(self.metric, str) else next(iter(self.metric))

    def among(self, record: Record) -> tuple[str, ...]:
        """What an answer is chosen from: the labels, or the record's own candidates."""
        return candidates_of(record) if self.kind == "choice" else self.labels

    def tags(self, record: Record) -> tuple[str, ...]:
        """The gold tag of each word, in the task's own scheme. Raises DataError for tags that it does not have."""
        return own_tags(record, self.labels, self.scheme, repair=self.repair)

    def ask(self, record: Record) -> list[Message]:
        """The messages that pose the question, without the answer.

        Raises DataError where the record is plain text, which asks nothing.
        """
        if record.shape in _PLAIN:
            instruction = self.instruction or (_DEFAULT if record.shape == "label" else TEXT)
            turns: list[Message] = [{"role": "user", "content": self._fill(instruction, record.text, record.pair)}]
        else:
            turns = list(record.asked())
            if self.instruction and record.apart and record.prompt_is_empty:  # answers that stand alone: this is what they answer
                return self.with_system([*turns, {"role": "user", "content": self.instruction}])
            if not turns:
                raise DataError("the row asks nothing: it has no turn before an answer.", where=record.where)
            if self.instruction and turns[-1].get("role") == "user":
                turns[-1] = {**turns[-1], "content": self._fill(self.instruction, str(turns[-1].get("content") or ""))}
        return self.with_system(turns)

    def with_system(self, turns: Sequence[Message]) -> list[Message]:
        """The turns with the task's system turn first, unless they bring their own."""
        if self.system is None or (turns and turns[0].get("role") in ("system", "developer")):
            return list(turns)
        return [{"role": "system", "content": self.system}, *turns]

    def _fill(self, instruction: str, text: str, pair: str = "") -> str:
        asked = instruction if TEXT in instruction else f"{instruction}\n\n{TEXT}"
        asked = asked if PAIR in asked or not pair else asked.replace(TEXT, f"{TEXT}\n{PAIR}")
        filled = {LABELS: ", ".join(self.labels), TEXT: text, PAIR: pair}
        return re.sub("|".join(map(re.escape, filled)), lambda found: filled[found[0]], asked)

    def gold(self, record: Record) -> str | None:
        """The gold answer as it is judged: a label without the spaces around it, tags one after another, a text as it stands."""
        if self.kind == "tags":
            return " ".join(self.tags(record)) if record.tags else None
        answer = record.answer()
        return answer.strip() if answer is not None and self.kind == "label" else answer

    def solved(self, record: Record) -> list[Message]:
        """The question with its gold answer: a training sample. Raises DataError where the record has none."""
        reply = record.reply()
        if reply is None:
            raise DataError("the row has no answer to learn from.", where=record.where)
        if record.apart:  # of several answers the best one
            return [*(self.ask(record) if self.instruction or not record.prompt_is_empty else record.messages), reply]
        if record.shape in _PLAIN or self.instruction:
            return [*self.ask(record), reply]
        return self.with_system(record.messages)

    def check(self, records: Sequence[Record], *, rated: bool = False) -> None:
        """Refuse questions that cannot be asked or judged: without a gold answer, with a label that training never shows.

        rated: a judge will rate the answers by themselves, so that none has to be there to hold them against.
        """
        rated = rated or (self.judge is not None and not self.judge.compares)
        rated = rated and self.kind == "generate" and not any(map(is_dialogue, records))  # of which gold turns are asked for
        for record in records:
            if rated:
                self.ask(record)
            else:
                self._check_gold(record)
            self._check_instruction(record)

    def _check_gold(self, record: Record) -> None:
        answer = self.gold(record)
        if answer is None:
            hints = ["Preferences are judged by pairs:  {prompt, chosen, rejected}"] if record.shape == "rated" else []
            hints += ["A file of pairs is read as such with:  data.shape=pair"] if record.shape == "question" else []
            raise DataError("the question has no gold answer to judge by.", where=record.where, hints=hints)
        if self.kind in _SHAPES.values() and _SHAPES.get(record.shape) != self.kind:
            raise DataError(f"the row reads as '{record.shape}', and the task asks for {_ASKS[self.kind]}.", where=record.where)
        if self.kind == "label" and answer not in self.labels:
            raise DataError(
                f"the label '{_short(answer)}' never occurs in the training samples (labels: {', '.join(self.labels)}).",
                where=record.where,
                hints=["Correct the label, add training samples of it, or list it:  task.labels=[...]"],
            )
        if self.kind == "generate" and not answer.strip():
            what = "calls a tool" if called(record.reply() or {}) else "is empty"
            raise DataError(f"the gold answer {what}, and only text is judged.", where=record.where)

    def _check_instruction(self, record: Record) -> None:
        if self.instruction and is_dialogue(record):
            what = "task.instruction cannot be put into dialogues of several turns."
            raise SpecError(what, where=record.where, hints=["Nearest that works here:  task.system=..."])


def make_task(spec: TaskSpec, records: Sequence[Record]) -> Task:
    """The task of a spec, with what it leaves open read from the training records (labels, kind).

    Raises SpecError for labels, an instruction or a metric that cannot work with these records.
    """
    kind, labels = _kind_of(spec, records)
    scheme: Scheme = "IOB2"
    if kind == "label":
        _check_labels(labels, records)
    elif kind == "tags":
        _check_shapes(kind, records)
        labels, scheme = tag_set(spec.labels, None if spec.scheme == "auto" else spec.scheme, records)
    elif kind in ("value", "choice"):
        _check_shapes(kind, records)
        labels = ()
    task = Task(
        name=spec.name or _NAMES[kind],
        kind=kind,
        labels=labels,
        system=spec.system,
        instruction=spec.instruction,
        scoring=spec.scoring,
        metric=_checked_metric(spec.metric, kind),
        max_new_tokens=spec.max_new_tokens,
        history=spec.history,
        scheme=scheme,
        repair=spec.illegal_tags == "repair",
        subwords=spec.subwords,
    )
    for record in records:
        task._check_instruction(record)
    return task


_NAMES: Mapping[Kind, str] = {
    "label": "classification",
    "tags": "tagging",
    "value": "regression",
    "choice": "multiple choice",
    "generate": "generation",
}
_ASKS: Mapping[Kind, str] = {"tags": "words with a tag each", "value": "a text with a number", "choice": "a question with candidates"}
_SHAPE_OF: Mapping[Kind, str] = {"tags": "tokens", "value": "value", "choice": "choices"}


def _kind_of(spec: TaskSpec, records: Sequence[Record]) -> tuple[Kind, tuple[str, ...]]:
    """The kind of a task, and its labels as written or found."""
    found = sorted({record.label for record in records if record.shape == "label" and record.label is not None})
    shapes = {record.shape for record in records}
    kind: Kind = "generate"
    if spec.kind != "auto":
        kind = spec.kind
    elif len(shapes) == 1 and (own := _SHAPES.get(min(shapes))) and not (own == "choice" and spec.metric):
        kind = own
    elif found or spec.labels:
        kind = "label"
    return kind, tuple(spec.labels or found)


def _check_shapes(kind: Kind, records: Sequence[Record]) -> None:
    for record in records:
        if _SHAPES.get(record.shape) != kind:
            what = f"task.kind={kind} needs {_ASKS[kind]}, and this row reads as '{record.shape}'."
            raise SpecError(what, where=record.where, hints=[f"Name the columns, or the shape:  data.shape={_SHAPE_OF[kind]}"])


def _checked_metric(wanted: str | Mapping[str, Any], kind: str) -> str | Mapping[str, Any]:
    if kind == "generate" and wanted:
        metric(wanted)
    elif kind in ("tags", "value", "choice") and wanted:
        told = {"tags": "the F1 of spans", "value": "closeness, with MSE, MAE and correlations beside it", "choice": "accuracy"}[kind]
        raise SpecError(f"tasks of kind {kind} are judged by {told}.", where="task.metric", hints=["Leave task.metric out."])
    elif kind == "label" and wanted not in ("", "accuracy"):
        hints = ["Macro F1 and each label's own scores stand in every report.", "To judge generated text by a metric:  task.kind=generate"]
        raise SpecError("label tasks are judged by accuracy.", where="task.metric", hints=hints)
    return wanted


def _check_labels(labels: tuple[str, ...], records: Sequence[Record]) -> None:
    if len(labels) < 2:
        raise SpecError(
            f"a label task needs at least two labels; found {list(labels)}.",
            hints=["Name them:  task.labels=[positive, negative]", "Or judge generated text:  task.kind=generate"],
        )
    if len({label.strip() for label in labels}) < len(labels) or any(label != label.strip() or not label for label in labels):
        raise SpecError(f"labels must be distinct, not empty, and without spaces around them: {list(labels)}.", where="task.labels")
    for record in records:
        answer = record.answer()
        if answer is not None and answer.strip() not in labels:
            raise DataError(
                f"'{_short(answer)}' is none of the task's labels ({', '.join(labels)}).",
                where=record.where,
                hints=["List it in task.labels, or leave such rows out:  data.filter.COLUMN=[...]"],
            )


def candidates_of(record: Record) -> tuple[str, ...]:
    """What a record lets choose among: its candidates, or its answers, the best first."""
    return record.choices or tuple(str(answer[-1].get("content") or "") for answer in record.answers)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def is_dialogue(record: Record) -> bool:
    """Does an assistant speak more than once?"""
    return [message.get("role") for message in record.messages].count("assistant") > 1
