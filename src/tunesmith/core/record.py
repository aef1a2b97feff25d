"""Record: one sample of the user's data in the one shape that the rest of the house reads, still in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Message = Mapping[str, Any]
"""OpenAI's form: role ("system", "user", "assistant", "tool"), content, and for tools `tool_calls`, `tool_call_id`, `name`."""

Shape = Literal["messages", "prompt", "label", "text", "value", "tokens", "choices", "pair", "ranking", "rated", "question"]

COMPARED = ("pair", "ranking", "rated")
"""Shapes whose answers are held against one another, or against a mark."""


@dataclass(frozen=True, slots=True)
class Record:
    """One sample.

    shape: "messages" a dialogue; "prompt" one prompt and its completion (held as a user and an assistant message);
    "label" a text and its label; "text" plain text; "value" a text and a number; "tokens" words, each with a tag; "choices"
    a question with candidates, of which the answer is one; "pair" a prompt with a better and a worse answer, "ranking" with
    several, the best first, "rated" with one that is good or bad; "question" a prompt, with its answer if that is known.
    messages: the dialogue, answers included; of the last four shapes the prompt alone, none where answers stand alone. text: what
    is read where there is no dialogue, label: what it is. pair: a second text beside it. value: the number. tokens, tags: the
    words and their tags as written. choices: the candidates, all different. answers: each answer's messages, the best first;
    scores: of each, none where nothing scores them. soft: probability that the first of two answers is the better one; margin: by
    how much; None where nothing says it. good: whether a rated answer is. reasoning: how the answer is reached, if the data says
    so. tools: JSON schemas of the tools the model may call.
    fields: the row as it was read. where: file and line. group: records of one group never straddle a split.
    """

    shape: Shape
    messages: tuple[Message, ...] = ()
    text: str = ""
    label: str | None = None
    reasoning: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    group: str | None = None
    pair: str = ""
    value: float | None = None
    tokens: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    answers: tuple[tuple[Message, ...], ...] = ()
    scores: tuple[float, ...] = ()
    soft: float | None = None
    margin: float | None = None
    good: bool | None = None

    @property
    def apart(self) -> bool:
        """Do the answers stand beside the dialogue, which is the prompt alone?"""
        return self.shape in COMPARED or self.shape == "question"

    @property
    def prompt_is_empty(self) -> bool:
        """Is nothing asked, but for a system turn?"""
        return all(message.get("role") in ("system", "developer") for message in self.asked())

    def asked(self) -> tuple[Message, ...]:
        """The messages before the answer, which is the last assistant message; all where there is none."""
        last = None if self.apart else self._last()
        return self.messages if last is None else self.messages[:last]

    def reply(self) -> Message | None:
        """The message that answers: the last assistant message, with whatever it calls; for a label, a value or tags one that says it.

        Of several answers it ends the best one; an answer that is marked as bad is none.
        """
        if self.shape in ("label", "value", "tokens"):
            said = self._said()
            return None if said is None else {"role": "assistant", "content": said}
        if self.apart:
            return self.answers[0][-1] if self.answers and self.good is not False else None
        last = self._last()
        return None if last is None else self.messages[last]

    def question(self) -> str:
        """What identifies the sample as a question: everything but the answer, spaces folded. Used for duplicates.

        Answers without a prompt are their own question, in any order.
        """
        if self.shape in ("label", "text", "value", "tokens"):
            return "\n".join(" ".join(text.split()) for text in (self.text, self.pair) if text)
        turns = [_turn(message) for message in self.asked()]
        among = sorted(map(said, self.answers)) if self.apart and self.prompt_is_empty else self.choices
        return "\n".join([*turns, *(f"- {' '.join(choice.split())}" for choice in among)])

    def texts(self) -> tuple[str, ...]:
        """The answers that are held against one another, as texts."""
        return tuple("\n".join(_words(message.get("content")) for message in answer) for answer in self.answers)

    def answer(self) -> str | None:
        """The gold answer: the label, value or tags, or the last assistant message's content; None where there is none."""
        reply = self.reply()
        return None if reply is None else _words(reply.get("content"))

    def key(self) -> str:
        """Content hash of the question, stable between runs and machines."""
        return hashlib.sha256(self.question().encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def _said(self) -> str | None:
        if self.shape == "tokens":
            return " ".join(self.tags) or None
        if self.shape == "value":
            return None if self.value is None else f"{self.value:.10g}"
        return self.label

    def _last(self) -> int | None:
        places = [index for index, message in enumerate(self.messages) if message.get("role") == "assistant"]
        return places[-1] if places else None


def as_messages(prompt: str | Iterable[Message]) -> list[Message]:
    """A prompt as a dialogue: a text is what a user says, messages are themselves."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def said(answer: Iterable[Message]) -> str:
    """An answer as an identity: what its messages say and call, spaces folded."""
    turns = list(answer)
    return f"{' '.join(_words(turns[0].get('content')).split())}{called(turns[0])}" if len(turns) == 1 else "\n".join(map(_turn, turns))


def _turn(message: Message) -> str:
    return f"{message.get('role')}: {' '.join(_words(message.get('content')).split())}{called(message)}"


def called(message: Message) -> str:
    """The tools that a message calls, in one spelling: names and arguments, without the calls' ids, which say nothing."""
    return "".join(f" -> {_call(call)}" for call in message.get("tool_calls") or ())


def _call(call: Mapping[str, Any]) -> str:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):  # OpenAI writes them as JSON text, others as an object
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            arguments = " ".join(arguments.split())
    return f"{function.get('name')}({json.dumps(arguments, ensure_ascii=False, sort_keys=True)})"


def _words(content: Any) -> str:
    if content is None:
        return ""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, sort_keys=True)
