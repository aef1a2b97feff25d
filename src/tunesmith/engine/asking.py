"""One way to ask, whoever answers: a model in this process or a server at a URL."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from tunesmith.core.record import Message
from tunesmith.engine.sampler import Sampling

Progress = Callable[[int], None]
"""Told how many answers were just finished."""
OnText = Callable[[int, str], None]
"""Told (place of the question, next piece of its answer)."""


@dataclass(frozen=True, slots=True)
class Question:
    """A dialogue that waits for an answer. tools: what may be called. where: the place that errors name."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    where: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """finished: "end", "stop", "length", or a server's own word. prompt_tokens, completion_tokens: 0 where a server counts none."""

    text: str
    finished: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(slots=True)
class Answered:
    """replies: in the order of the questions. first_prompt: what was read first, as exactly as is known. notes: for the reader."""

    replies: list[Reply]
    first_prompt: str = ""
    notes: list[str] = field(default_factory=list)


class Answerer(Protocol):
    """Whoever answers questions."""

    def session(self) -> AbstractContextManager[None]:
        """Around a piece of work. What is answered within it outlives a failure where an answer is costly to repeat."""

    def answer(
        self, asked: Sequence[Question], sampling: Sampling, *, progress: Progress | None = None, on_text: OnText | None = None
    ) -> Answered:
        """Answers in the order asked; to be called within a session. Raises TunesmithError subclasses."""


def cut_note(replies: Sequence[Reply], limit: int) -> list[str]:
    """How many answers were cut off, if any."""
    cut = sum(reply.finished == "length" for reply in replies)
    return [f"{cut} of {len(replies)} answers reached the limit of {limit} tokens unfinished"] if cut else []
