"""What a reward is given: an answer with its prompt, and the row that the prompt is from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tunesmith.core.record import Message

Finished = Literal["end", "stop", "length"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool in an answer. arguments: as written, JSON. failed: did the tool refuse it or raise?"""

    name: str
    arguments: str
    failed: bool = False
    result: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """An answer to be rewarded.

    prompt: messages. completion: the answer's words, ids: its tokens. answer: the right one, None where the row has none. fields: the
    row's columns. finished: by itself ("end"), at a stopping word ("stop"), or cut off ("length"). where: file and line of the row.
    group: the prompt's number in the batch; answers to one prompt stand one after another. calls: of tools, in order.
    """

    prompt: tuple[Message, ...]
    completion: str
    ids: tuple[int, ...] = ()
    answer: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    finished: Finished = "end"
    where: str = ""
    group: int = 0
    calls: tuple[ToolCall, ...] = ()

    @property
    def question(self) -> str:
        """Words of the last turn of the prompt that the user said, "" where there is none."""
        said = [message.get("content") for message in self.prompt if message.get("role") == "user"]
        return said[-1] if said and isinstance(said[-1], str) else ""


def groups_of_samples(samples: Sequence[Sample]) -> list[list[int]]:
    """Places of the answers to each prompt, prompts in order of their first answer."""
    out: dict[int, list[int]] = {}
    for place, sample in enumerate(samples):
        out.setdefault(sample.group, []).append(place)
    return list(out.values())
