"""A task: what is asked of a record and how the answer is judged. One task serves training, evaluation and reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.core.errors import DataError, SpecError
from tunesmith.core.record import Message, Record, called
from tunesmith.evaluation.metrics import metric
from tunesmith.spec import TaskSpec

TEXT, LABELS = "{text}", "{labels}"
_DEFAULT = "Classify the text. Answer with one of: {labels}.\n\nText: {text}"


@dataclass(frozen=True, slots=True)
class Task:
    """kind: "label" a choice among `labels`, "generate" free text. instruction: "{text}" marks the record's text.
    scoring: label tasks by the likelihood of each label, or by generation and parsing; "auto": by the task head of a model
    that has one, else by likelihood. metric: name or {name: options}; "accuracy" for labels, "exact_match" if none is named
    for text. history: whose turns a dialogue is continued from.
    """

    name: str
    kind: Literal["label", "generate"]
    labels: tuple[str, ...] = ()
    system: str | None = None
    instruction: str = ""
    scoring: Literal["auto", "likelihood", "generation"] = "auto"
    metric: str | Mapping[str, Any] = ""
    max_new_tokens: int = 128
    history: Literal["gold", "own"] = "gold"

    def __post_init__(self) -> None:
        if not self.metric:
            object.__setattr__(self, "metric", "accuracy" if self.kind == "label" else "exact_match")

    def ask(self, record: Record) -> list[Message]:
        """The messages that pose the question, without the answer.

        Raises DataError where the record is plain text, which asks nothing.
        """
        if record.shape == "label":
            turns: list[Message] = [{"role": "user", "content": self._fill(self.instruction or _DEFAULT, record.text)}]
        else:
            turns = list(record.asked())
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

    def _fill(self, instruction: str, text: str) -> str:
        asked = instruction if TEXT in instruction else f"{instruction}\n\n{TEXT}"
        return asked.replace(LABELS, ", ".join(self.labels)).replace(TEXT, text)

    def gold(self, record: Record) -> str | None:
        """The gold answer as it is judged: a label without the spaces around it, a text as it stands."""
        answer = record.answer()
        return answer.strip() if answer is not None and self.kind == "label" else answer

    def solved(self, record: Record) -> list[Message]:
        """The question with its gold answer: a training sample. Raises DataError where the record has none."""
        reply = record.reply()
        if reply is None:
            raise DataError("the row has no answer to learn from.", where=record.where)
        if record.shape == "label" or self.instruction:
            return [*self.ask(record), reply]
        return self.with_system(record.messages)

    def check(self, records: Sequence[Record]) -> None:
        """Refuse questions that cannot be asked or judged: without a gold answer, with a label that training never shows."""
        for record in records:
            answer = self.gold(record)
            if answer is None:
                raise DataError("the question has no gold answer to judge by.", where=record.where)
            if self.kind == "label" and answer not in self.labels:
                raise DataError(
                    f"the label '{_short(answer)}' never occurs in the training samples (labels: {', '.join(self.labels)}).",
                    where=record.where,
                    hints=["Correct the label, add training samples of it, or list it:  task.labels=[...]"],
                )
            if self.kind == "generate" and not answer.strip():
                what = "calls a tool" if called(record.reply() or {}) else "is empty"
                raise DataError(f"the gold answer {what}, and only text is judged.", where=record.where)
            self._check_instruction(record)

    def _check_instruction(self, record: Record) -> None:
        if self.instruction and is_dialogue(record):
            what = "task.instruction cannot be put into dialogues of several turns."
            raise SpecError(what, where=record.where, hints=["Nearest that works here:  task.system=..."])


def make_task(spec: TaskSpec, records: Sequence[Record]) -> Task:
    """The task of a spec, with what it leaves open read from the training records (labels, kind).

    Raises SpecError for labels, an instruction or a metric that cannot work with these records.
    """
    found = sorted({record.label for record in records if record.shape == "label" and record.label is not None})
    kind = spec.kind
    if kind == "auto":
        kind = "label" if found or spec.labels else "generate"
    labels = tuple(spec.labels or found)
    if kind == "label":
        _check_labels(labels, records)
    task = Task(
        name=spec.name or ("classification" if kind == "label" else "generation"),
        kind=kind,
        labels=labels,
        system=spec.system,
        instruction=spec.instruction,
        scoring=spec.scoring,
        metric=_checked_metric(spec.metric, kind),
        max_new_tokens=spec.max_new_tokens,
        history=spec.history,
    )
    for record in records:
        task._check_instruction(record)
    return task


def _checked_metric(wanted: str | Mapping[str, Any], kind: str) -> str | Mapping[str, Any]:
    if kind != "label" and wanted:
        metric(wanted)
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


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def is_dialogue(record: Record) -> bool:
    """Does an assistant speak more than once?"""
    return [message.get("role") for message in record.messages].count("assistant") > 1
