"""Answers in several turns: the policy calls tools, their results are put after its words, and it goes on.

What the policy said stands in the answer as it was sampled, token by token; results stand between as the template writes them, and
nothing is learned at them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from tunesmith.core.errors import RenderError
from tunesmith.core.record import Message
from tunesmith.engine.local import located
from tunesmith.engine.memory import in_mode
from tunesmith.engine.model import Model
from tunesmith.engine.sampler import Completion, Sampling, generate
from tunesmith.rollout.answers import Answer, Prompt
from tunesmith.rollout.sample import ToolCall
from tunesmith.rollout.sampling import seed_of
from tunesmith.rollout.tools import Tool, calls_in, carried_out
from tunesmith.rolloutspec import RolloutSpec

_STUB: Message = {"role": "assistant", "content": "."}


@dataclass(slots=True)
class _Said:
    """An answer in the making. seed: what its random numbers start from. open: does it go on?"""

    prompt: Prompt
    seed: tuple[int, ...]
    ids: list[int] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    text: str = ""
    turns: int = 0
    ended: bool = False
    open: bool = True

    def append(self, ids: Sequence[int], log_probs: Sequence[float] | None) -> None:
        """More tokens. log_probs: of those that the policy chose; None for a result's."""
        self.ids += ids
        self.chosen += [log_probs is not None] * len(ids)
        self.log_probs += log_probs if log_probs is not None else [0.0] * len(ids)

    def done(self) -> Answer:
        return Answer(self.ids, self.chosen, self.log_probs, self.text, self.ended, self.turns, self.messages, self.calls)


@dataclass(slots=True)
class Player:
    """Plays answers with tools. Budgets: `rollout.turns` of the policy, `rollout.max_new_tokens` that it chooses in all of them,
    `rollout.result_tokens` of each result, `rollout.tool_seconds` of each call, and the context."""

    model: Model
    tools: Mapping[str, Tool]
    spec: RolloutSpec
    _after: dict[str, list[int]] = field(default_factory=dict)

    @torch.no_grad()
    def play(self, prompts: Sequence[Prompt], sampling: Sampling, *, samples: int, seeds: Sequence[int], batch: int) -> list[list[Answer]]:
        """`samples` answers to each prompt, as of `sampling.answer_prompts`. An answer that a budget ends has not ended by itself."""
        self._after = {}
        said = [_Said(prompt, (seed, number)) for prompt, seed in zip(prompts, seeds, strict=True) for number in range(samples)]
        with self.model.active(), in_mode(self.model.base.model, training=False):
            for turn in range(self.spec.turns):
                if not (going := [one for one in said if one.open]):
                    break
                if turn == 0:
                    done = self._sampled([prompt.ids for prompt in prompts], sampling, seeds, batch, samples=samples)
                else:
                    paths = [[*one.prompt.ids, *one.ids] for one in going]
                    rooms = [self._room(one) for one in going]
                    own = [seed_of(*one.seed, turn) for one in going]
                    done = self._sampled(paths, replace(sampling, seed=seed_of(sampling.seed, turn)), own, batch, rooms=rooms)
                for one, what in zip(going, done, strict=True):
                    self._take(one, what)
        answers = [one.done() for one in said]
        return [answers[at : at + samples] for at in range(0, len(answers), samples)]

    def _sampled(
        self,
        paths: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        batch: int,
        *,
        samples: int = 1,
        rooms: Sequence[int] | None = None,
    ) -> list[Completion]:
        model = self.model
        return generate(
            model.forward,
            model.base.tokenizer,
            model.forward.prompts(paths),
            sampling,
            samples=samples,
            ends=model.renderer.stop_ids,
            batch=batch,
            budgets=rooms,
            seeds=seeds,
        )

    def _room(self, one: _Said) -> int:
        """Tokens that the policy may still choose."""
        left = self.spec.max_new_tokens - sum(one.chosen)
        context = self.model.context_length
        return left if context is None else min(left, context - len(one.prompt.ids) - len(one.ids))

    def _take(self, one: _Said, said: Completion) -> None:
        """A turn of the policy, and what its calls bring; closes the answer where it calls nothing, or a budget is spent."""
        ids = [token for token in said.ids if token not in self.model.renderer.stop_ids]
        one.append(said.ids, said.log_probs)
        one.turns, one.text = one.turns + 1, said.text
        one.messages.append({"role": "assistant", "content": said.text})
        calls = calls_in(self.model.base.tokenizer.decode(ids)) if said.finished == "end" else []
        if not calls:
            one.ended, one.open = said.finished == "end", False
            return
        calls = [self._cut(carried_out(call, self.tools, self.spec.tool_seconds)) for call in calls]
        one.calls += calls
        results: list[Message] = [{"role": "tool", "name": call.name, "content": call.result} for call in calls]
        one.messages += results
        after = self._written(one.prompt, results)
        if one.turns >= self.spec.turns or self._room(one) - len(after) < 1:
            one.open = False
            return
        one.append(after, None)

    def _cut(self, call: ToolCall) -> ToolCall:
        """The call with a result of so many tokens at most."""
        tokenizer = self.model.base.tokenizer
        ids = tokenizer(call.result, add_special_tokens=False)["input_ids"]
        if len(ids) <= self.spec.result_tokens:
            return call
        return replace(call, result=f"{tokenizer.decode(ids[: self.spec.result_tokens])}…")

    def _written(self, prompt: Prompt, results: Sequence[Message]) -> list[int]:
        """The tokens between a turn's end and the header of the next one: results as the template writes them.

        They are what follows a stand-in for the turn, for its own tokens stay as they were sampled. Raises RenderError where the
        template writes the turn otherwise once results follow it.
        """
        key = repr(results)
        if key not in self._after:
            with located(prompt.record.where):
                try:
                    self._after[key] = self._following([_STUB], results)
                except RenderError:  # a template that shows results after calls alone
                    calls = [{"type": "function", "function": {"name": str(r["name"]), "arguments": {}}} for r in results]
                    self._after[key] = self._following([{"role": "assistant", "content": "", "tool_calls": calls}], results)
        return self._after[key]

    def _following(self, turn: Sequence[Message], results: Sequence[Message]) -> list[int]:
        renderer, schemas = self.model.renderer, [tool.schema for tool in self.tools.values()]
        asked: list[Message] = [{"role": "user", "content": "."}, *turn]
        before = renderer.render(asked, tools=schemas, supervise="last")
        end = max(place for place, target in enumerate(before.supervised) if target) + 1
        whole = renderer.prompt([*asked, *results], tools=schemas).ids
        if whole[:end] != before.ids[:end]:
            raise RenderError("the template writes a turn otherwise once a tool's result follows it, so its tokens cannot stay.")
        return whole[end:]
