"""Prompts, the policy's answers to them, and what is held of an answer while it is learned from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.core.errors import DataError
from tunesmith.core.record import Message, Record
from tunesmith.core.row import Row, Segment, segment
from tunesmith.engine.local import located
from tunesmith.engine.model import Model
from tunesmith.rollout.sample import ToolCall

Numbers = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy is asked. record: where it is from, for the rewards. messages: with the task's frame. ids: as tokens, up to the
    header of the answer."""

    record: Record
    messages: tuple[Message, ...]
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Answer:
    """ids: of the answer, the token that ends it included. chosen: did the policy choose the token (or did a tool's result bring it)?
    log_probs: of chosen tokens as they were sampled, nats, 0 at others. text: without special tokens. ended: by itself, not by its
    length. turns: of the policy. messages: of an answer in several turns, all of them, results included."""

    ids: list[int]
    chosen: list[bool]
    log_probs: list[float]
    text: str
    ended: bool
    turns: int = 1
    messages: list[Message] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens that the policy chose."""
        return sum(self.chosen)


def prompts_of(
    model: Model,
    records: Sequence[Record],
    ask: Callable[[Record], Sequence[Message]],
    room: int,
    *,
    limit: int | None = None,
    drop: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[Prompt]:
    """Records as prompts. ask: what is asked of a record. room: tokens that an answer may take. tools: schemas of those that may be
    called, in place of the record's own. limit: tokens of a prompt with its answer, where that is less than the context.

    drop: leave out prompts after which there is no room. Raises DataError for them otherwise, and where none is left.
    """
    found: list[Prompt] = []
    context, renderer = min(filter(None, (model.context_length, limit)), default=None), model.renderer
    bound = "data.max_tokens" if context is not None and context == limit else "the context"
    longest = 0
    for record in records:
        messages = tuple(ask(record))
        with located(record.where):
            ids = renderer.prompt(messages, tools=tools or record.tools or None).ids
        longest = max(longest, len(ids))
        if context and len(ids) + room > context:
            if drop:
                continue
            what = f"the prompt takes {len(ids):,} tokens; with an answer of {room:,} it exceeds {bound} of {context:,}."
            shorter = f"Sample shorter answers:  rollout.max_new_tokens={max(1, context - len(ids))}"
            raise DataError(what, where=record.where, hints=[shorter, "Or leave it out:  data.overlong=drop"])
        found.append(Prompt(record, messages, ids))
    if not found:
        what = f"no prompt leaves room for an answer of {room:,} tokens." if records else "there are no prompts to answer."
        raise DataError(what, hints=[f"The longest has {longest:,} tokens, and {bound} holds {context:,}."] if longest else [])
    return found


@dataclass(slots=True)
class Held:
    """An answer while it is learned from. prompt: its place among the run's prompts. group: number of its group within the iteration.
    ids, chosen: as of `Answer`, [tokens]. counted: is it part of the loss's denominator (not masked)? used: is it computed? given:
    numbers at its tokens, [tokens] each; 0 where the policy did not choose."""

    prompt: int
    group: int
    ids: NDArray[np.int32]
    chosen: NDArray[np.bool_]
    counted: bool = True
    used: bool = True
    given: dict[str, Numbers] = field(default_factory=dict)

    def row(self, prompt: Sequence[int], names: Sequence[str] | None = None, where: str = "") -> Row:
        """The prompt and this answer, supervised where the policy chose. names: of the numbers to give; None: all."""
        given = {name: values for name, values in self.given.items() if names is None or name in names}
        return Row((segment(prompt, name="prompt"), Segment(self.ids, self.chosen, 0, "answer", given=given)), where)

    def at_chosen(self, values: Numbers) -> Numbers:
        """Numbers of the chosen tokens as numbers of all, 0 at the others."""
        out = np.zeros(len(self.ids), np.float32)
        out[self.chosen] = values
        return out


def as_tensors(held: Sequence[Held]) -> dict[str, Tensor]:
    """Answers laid end to end, for a checkpoint."""
    of_answers = {
        name: torch.tensor([int(getattr(one, name)) for one in held], dtype=torch.int32) for name in ("prompt", "group", "counted", "used")
    }
    lengths = torch.tensor([len(one.ids) for one in held], dtype=torch.int32)
    out = {**of_answers, "length": lengths, "ids": _joined([one.ids for one in held], np.int32)}
    out["chosen"] = _joined([one.chosen for one in held], np.bool_)
    for name in dict.fromkeys(name for one in held for name in one.given):  # those that are not computed lack some
        out[f"given.{name}"] = _joined([one.given.get(name, np.zeros(len(one.ids), np.float32)) for one in held], np.float32)
    return out


def from_tensors(tensors: Mapping[str, Tensor]) -> list[Held]:
    """The answers that `as_tensors` laid end to end."""
    ends = np.cumsum(tensors["length"].numpy())[:-1]
    parts = {name: np.split(tensors[name].numpy(), ends) for name in tensors if name in ("ids", "chosen") or name.startswith("given.")}
    out = []
    for place in range(len(tensors["length"])):
        given = {name.removeprefix("given."): values[place] for name, values in parts.items() if name.startswith("given.")}
        prompt, group, counted, used = (int(tensors[name][place]) for name in ("prompt", "group", "counted", "used"))
        out.append(Held(prompt, group, parts["ids"][place], parts["chosen"][place], bool(counted), bool(used), given))
    return out


def _joined(parts: Sequence[NDArray[np.generic]], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype))
