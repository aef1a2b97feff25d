"""Record: one sample of the user's data in the one shape that the rest of the house reads, still in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Message = Mapping[str, Any]
"""OpenAI's form: role ("system", "user", "assistant", "tool"), content, and for tools `tool_calls`, `tool_call_id`, `name`."""

Shape = Literal["messages", "prompt", "label", "text", "value", "tokens", "choices"]


@dataclass(frozen=True, slots=True)
class Record:
    """One sample.

    shape: "messages" a dialogue; "prompt" one prompt and its completion (held as a user and an assistant message);
    "label" a text and its label; "text" plain text; "value" a text and a number; "tokens" words, each with a tag; "choices"
    a question with candidates, of which the answer is one.
    messages: the dialogue, answers included. text: what is read where there is no dialogue, label: what it is. pair: a second
    text beside it. value: the number. tokens, tags: the words and their tags as written. choices: the candidates, all
    different. reasoning: how the answer is reached, if the data says so. tools: JSON schemas of the tools the model may call.
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

    def asked(self) -> tuple[Message, ...]:
        """The messages before the answer, which is the last assistant message; all where there is none."""
        last = self._last()
        return self.messages if last is None else self.messages[:last]

    def reply(self) -> Message | None:
        """The message that answers: the last assistant message, with whatever it calls; for a label, a value or tags one that says it."""
        if self.shape in ("label", "value", "tokens"):
            said = self._said()
            return None if said is None else {"role": "assistant", "content": said}
        last = self._last()
        return None if last is None else self.messages[last]

    def question(self) -> str:
        """What identifies the sample as a question: everything but the answer, spaces folded. Used for duplicates."""
        if self.shape in ("label", "text", "value", "tokens"):
            return "\n".join(" ".join(text.split()) for text in (self.text, self.pair) if text)
        turns = [f"{m.get('role')}: {' '.join(_words(m.get('content')).split())}{called(m)}" for m in self.asked()]
        return "\n".join([*turns, *(f"- {' '.join(choice.split())}" for choice in self.choices)])

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
