"""A task: what is asked of a record and how the answer is judged. One task serves training, evaluation and reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.core.errors import DataError, SpecError
from tunesmith.core.record import Message, Record
from tunesmith.spec import TaskSpec

TEXT, LABELS = "{text}", "{labels}"
_DEFAULT = "Classify the text. Answer with one of: {labels}.\n\nText: {text}"


@dataclass(frozen=True, slots=True)
class Task:
    """kind: "label" a choice among `labels`, "generate" free text. instruction: "{text}" marks the record's text.
    scoring: label tasks by the likelihood of each label, or by generation and parsing. metric: name or {name: options}.
    history: whose turns a dialogue is continued from.
    """

    name: str
    kind: Literal["label", "generate"]
    labels: tuple[str, ...] = ()
    system: str | None = None
    instruction: str = ""
    scoring: Literal["likelihood", "generation"] = "likelihood"
    metric: str | Mapping[str, Any] = "accuracy"
    max_new_tokens: int = 128
    history: Literal["gold", "own"] = "gold"

    def ask(self, record: Record) -> list[Message]:
        """The messages that pose the question, without the answer."""
        if record.shape == "label":
            turns: list[Message] = [{"role": "user", "content": self._fill(self.instruction or _DEFAULT, record.text)}]
        else:
            turns = list(record.messages)
            while turns and turns[-1].get("role") == "assistant":
                turns.pop()
            if self.instruction and turns and turns[-1].get("role") == "user":
                turns[-1] = {**turns[-1], "content": self._fill(self.instruction, str(turns[-1]["content"]))}
        return self.with_system(turns)

    def with_system(self, turns: Sequence[Message]) -> list[Message]:
        """The turns with the task's system turn first, unless they bring their own."""
        if self.system is None or (turns and turns[0].get("role") == "system"):
            return list(turns)
        return [{"role": "system", "content": self.system}, *turns]

    def _fill(self, instruction: str, text: str) -> str:
        asked = instruction if TEXT in instruction else f"{instruction}\n\n{TEXT}"
        return asked.replace(LABELS, ", ".join(self.labels)).replace(TEXT, text)

    def solved(self, record: Record) -> list[Message]:
        """The question with its gold answer: a training sample. Raises DataError where the record has none."""
        answer = record.answer()
        if answer is None:
            raise DataError("the row has no answer to learn from.", where=record.where)
        if record.shape == "label":
            return [*self.ask(record), {"role": "assistant", "content": answer}]
        if not self.instruction:
            return self.with_system(record.messages)
        return [*self.ask(record), {"role": "assistant", "content": answer}]

    def check(self, records: Sequence[Record]) -> None:
        """Refuse questions whose gold answer is missing or is a label that training never shows."""
        for record in records:
            answer = record.answer()
            if answer is None:
                raise DataError("the question has no gold answer to judge by.", where=record.where)
            if self.kind == "label" and answer not in self.labels:
                raise DataError(
                    f"the label '{answer}' never occurs in the training samples (labels: {', '.join(self.labels)}).",
                    where=record.where,
                    hints=["Correct the label, add training samples of it, or list it:  task.labels=[...]"],
                )


def make_task(spec: TaskSpec, records: Sequence[Record]) -> Task:
    """The task of a spec, with what it leaves open read from the training records (labels, kind)."""
    found = sorted({record.label for record in records if record.shape == "label" and record.label is not None})
    kind = spec.kind
    if kind == "auto":
        kind = "label" if found or spec.labels else "generate"
    labels = tuple(spec.labels or found)
    if kind == "label":
        _check_labels(labels)
    if spec.instruction and kind == "generate" and any(_is_dialogue(record) for record in records):
        raise SpecError("task.instruction cannot be put into dialogues of several turns.", hints=["Nearest that works here:  task.system=..."])
    default = "accuracy" if kind == "label" else "exact_match"
    return Task(
        name=spec.name or ("classification" if kind == "label" else "generation"),
        kind=kind,
        labels=labels,
        system=spec.system,
        instruction=spec.instruction,
        scoring=spec.scoring,
        metric=spec.metric or default,
        max_new_tokens=spec.max_new_tokens,
        history=spec.history,
    )


def _check_labels(labels: tuple[str, ...]) -> None:
    if len(labels) < 2:
        raise SpecError(
            f"a label task needs at least two labels; found {list(labels)}.",
            hints=["Name them:  task.labels=[positive, negative]", "Or judge generated text:  task.kind=generate"],
        )
    if len(set(labels)) < len(labels) or any(not label.strip() for label in labels):
        raise SpecError(f"labels must be distinct and not empty: {list(labels)}.", where="task.labels")


def _is_dialogue(record: Record) -> bool:
    return sum(message.get("role") == "assistant" for message in record.messages) > 1
