"""A model in this process that answers questions, or says how likely given answers are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from tunesmith.core.errors import RunError, TunesmithError
from tunesmith.core.row import Row
from tunesmith.data.lengths import drop_oldest_turns
from tunesmith.data.sharing import share_prefix
from tunesmith.engine.asking import Answered, Answerer, OnText, Progress, Question, Reply, cut_note
from tunesmith.engine.mixing import mixed, route_of
from tunesmith.engine.model import Model
from tunesmith.engine.sampler import Sampling, generate
from tunesmith.engine.server import Server

PACK_TOKENS = 4096
"""Tokens of a pack of answers whose likelihood is asked. Without gradients little is kept, so packs may be larger than in training."""


@contextmanager
def located(where: str) -> Iterator[None]:
    """Errors within name the place, if they name none."""
    try:
        yield
    except TunesmithError as cause:
        raise type(cause)(cause.what, where=cause.where or where, hints=cause.hints) from cause.__cause__


def answerer(model: Model | Server, batch: int = 32, *, shorten: bool = True) -> Answerer:
    """Who answers for a model. batch, shorten: as of `InProcess`; a server bounds and shortens for itself."""
    return model if isinstance(model, Server) else InProcess(model, batch, shorten)


def score_options(model: Model, rows: Sequence[Row], progress: Progress | None = None) -> list[list[float]]:
    """Log-probability of each option of each row (root: prompt; children: options), nats; what prompts share runs once."""
    scores: list[list[float]] = [[] for _ in rows]
    if not rows:
        return scores
    shared = share_prefix(rows, max_tokens=PACK_TOKENS)
    members = {id(tree.row): tree.members for tree in shared}
    budget = max(PACK_TOKENS, max(tree.row.tokens for tree in shared))
    for pack in model.forward.packs([tree.row for tree in shared], budget):
        sums = model.forward(pack).by_segment().tolist()
        found = {(pack.segment_row[s], pack.segment_index[s]): value for s, value in enumerate(sums)}
        for at, tree in enumerate(pack.rows):
            for member in members[id(tree)]:
                scores[member.index] = [found[at, leaf] for leaf in member.leaves]
        if progress:
            progress(sum(len(members[id(tree)]) for tree in pack.rows))
    return scores


@dataclass(frozen=True, slots=True)
class InProcess:
    """A model in this process as an answerer. batch: rows generated at once. shorten: histories that leave no room in the
    context lose whole oldest turns. each: of each question the model on the same base that answers it, where that is not `model`."""

    model: Model
    batch: int = 32
    shorten: bool = True
    each: Sequence[Model] | None = None

    def session(self) -> AbstractContextManager[None]:
        """The model with exactly its adapters, or all models that answer at once."""
        return self.model.active() if self.each is None else mixed(self.model.base, self.each)

    @property
    def context_length(self) -> int | None:
        """Of whichever has the least room."""
        lengths = [model.context_length for model in self.each or [self.model]]
        return min([length for length in lengths if length is not None], default=None)

    def answer(
        self, asked: Sequence[Question], sampling: Sampling, *, progress: Progress | None = None, on_text: OnText | None = None
    ) -> Answered:
        """Raises RunError where an answer of `max_new_tokens` leaves no room at all, DataError where a last turn alone does."""
        model, context, room = self.model, self.context_length, sampling.max_new_tokens
        if self.shorten and context and room >= context:
            what = f"answers of {room:,} tokens leave no room for a question in a context of {context:,}."
            raise RunError(what, hints=["Lower it:  task.max_new_tokens=N"])
        tokenizer, renderer = model.base.tokenizer, model.renderer
        prompts: list[list[int]] = []
        shortened = 0
        for question in asked:
            tools = question.tools or None
            with located(question.where):
                ids = renderer.prompt(question.messages, tools=tools).ids
                if self.shorten and context and len(ids) + room > context:
                    kept, _ = drop_oldest_turns(tokenizer, question.messages, context - room, tools=tools, renderer=renderer)
                    ids = renderer.prompt(kept, tools=tools).ids
                    shortened += 1
            prompts.append(ids)
        routes = None if self.each is None else [route_of(one) for one in self.each]
        read = model.forward.prompts(prompts, routes)
        done = generate(
            model.forward,
            tokenizer,
            read,
            sampling,
            ends=renderer.stop_ids,
            batch=self.batch,
            routes=routes,
            progress=progress,
            on_text=on_text,
        )
        replies = [Reply(one.text, one.finished, len(ids), len(one.ids)) for one, ids in zip(done, prompts, strict=True)]
        lost = f"{shortened} of {len(prompts)} prompts left no room for an answer in {context:,} tokens and lost their oldest turns"
        notes = [*([lost] if shortened else []), *cut_note(replies, room)]
        return Answered(replies, tokenizer.decode(prompts[0]) if prompts else "", notes)
