"""Generation: prompts are read once however many answers they get, rows that finish make room for those that wait.

Each row draws from its own counter-based random numbers, so what it says does not depend on its neighbours' seeds, and
decoding runs in fixed sizes, so that it does not depend on their number either.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tunesmith.adapters import Route
from tunesmith.core.errors import RunError, SpecError
from tunesmith.engine.choosing import Choices, Sampling, choices_of, choose
from tunesmith.engine.decoders import Decoder, decoder_for
from tunesmith.engine.forward import Forward
from tunesmith.engine.prefill import PrefixCache
from tunesmith.engine.prepacked import prepacked, repays

__all__ = ["Completion", "PrefixCache", "Sampling", "choose", "generate"]


@dataclass(frozen=True, slots=True)
class Completion:
    """ids: generated tokens, the end-of-turn token included if there was one. text: decoded, special tokens left out.
    finished: "end", "stop" or "length". log_probs: of each token as it was sampled, nats, under softmax(logits / temperature)
    over all words, before top-k, top-p, min-p and choices (at temperature 0 as at 1)."""

    ids: list[int]
    text: str
    finished: str
    log_probs: list[float] = field(default_factory=list)


@torch.no_grad()
def generate(
    forward: Forward,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    *,
    samples: int = 1,
    ends: Sequence[int] = (),
    batch: int = 32,
    budgets: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    choices: Sequence[Sequence[int]] | None = None,
    prefixes: PrefixCache | None = None,
    routes: Sequence[Route] | None = None,
    on_text: Callable[[int, str], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Answers to prompts (token ids, each ending in the answer's header), in order: all samples of the first prompt first.

    samples: answers to each prompt; the first is what one sample alone would be. ends: ids that end an answer, beside the
    tokenizer's and the model's own. batch: rows decoded at once. budgets: most new tokens for each prompt, instead of the
    sampling's. seeds: what each prompt's random numbers start from, beside the sampling's seed; its place, if not given.
    choices: answers (token ids) of which each answer is one, chosen token by token among those that go on like it; which
    one it is, its ids say. prefixes: prompts read in earlier calls. routes: which adapters each prompt goes through, within
    `mixed`. on_text: called with (place of the answer, piece) as
    text appears, for chat. progress: called with the number of answers just finished.

    A row's numbers do not depend on the rows beside it, at the same decoding size to the last bit: the batch is padded to
    one of `decoding.SIZES`, and to a smaller one when few rows are left and none wait. What all prompts share is read for
    itself, which may round otherwise than a prompt as a whole.

    Raises RunError for an empty prompt or one that leaves no room in the context, SpecError for options that do not fit,
    BaseError for an encoder.
    """
    sampling = sampling or Sampling()
    asked = [[int(token) for token in prompt] for prompt in prompts]
    room = [sampling.max_new_tokens] * len(asked) if budgets is None else [int(budget) for budget in budgets]
    if (routes is None) != (forward.router is None):
        raise ValueError("routes go with `mixed`, and it with them")
    _check(forward, asked, room, samples, len(asked) if seeds is None else len(seeds))
    if not asked:
        return []
    stops = list(dict.fromkeys([*ends, *_own_ends(forward, tokenizer)]))
    tree = None if choices is None else choices_of(choices, stops, min(room))
    asking = _Asking(tokenizer, sampling, frozenset(stops), on_text, tree)
    answers = [
        _Answer(asking, at * samples + number, _seed(sampling.seed, at if seeds is None else seeds[at], number), room[at])
        for at in range(len(asked))
        for number in range(samples)
    ]
    named = list(zip([()] * len(asked) if routes is None else routes, map(tuple, asked), strict=True))
    distinct = list(dict.fromkeys(named))
    place = {name: number for number, name in enumerate(distinct)}
    prompt_of = [place[named[answer.index // samples]] for answer in answers]
    waiting = sorted(range(len(answers)), key=lambda row: (len(distinct[prompt_of[row]][1]), prompt_of[row]))
    ways = None if routes is None else [route for route, _ in distinct]
    decoder = decoder_for(forward, [list(ids) for _, ids in distinct], prompt_of, max(1, batch), prefixes, ways)
    steps = sum(answer.budget for answer in answers) // min(max(1, batch), len(answers))
    with forward.attention(decoder.attention), prepacked(forward.model, min(batch, len(answers)), repays(forward.model, steps)):
        _run(decoder, answers, deque(waiting), sampling, progress)
    return [answer.done() for answer in answers]


def _run(
    decoder: Decoder, answers: Sequence[_Answer], waiting: deque[int], sampling: Sampling, progress: Callable[[int], None] | None
) -> None:
    """Until every answer is complete: let rows in, or take a step."""
    last: dict[int, int] = {}  # token of each row that is in
    while waiting or last:
        count = decoder.room(len(waiting))
        if count:
            rows = [waiting.popleft() for _ in range(count)]
            logits = decoder.enter(rows)
        else:
            rows = list(last)
            logits = decoder.step(rows, list(last.values()))
        tokens, log_probs = _next(logits, [answers[row] for row in rows], sampling)
        finished = 0
        for row, token, log_prob in zip(rows, tokens.tolist(), log_probs.tolist(), strict=True):
            if answers[row].take(token, log_prob):
                last[row] = token
            else:
                last.pop(row, None)
                decoder.leave(row)
                finished += 1
        if progress and finished:
            progress(finished)


def _next(logits: Tensor, answers: Sequence[_Answer], sampling: Sampling) -> tuple[Tensor, Tensor]:
    draws = [(answer.seed, len(answer.ids)) for answer in answers]
    return choose(logits, sampling, draws, [answer.allowed() for answer in answers] if answers[0].asking.tree else None)


def _check(forward: Forward, prompts: Sequence[Sequence[int]], room: Sequence[int], samples: int, seeds: int) -> None:
    forward.require_decoder()
    if samples < 1 or len(room) != len(prompts) or seeds != len(prompts) or any(budget < 1 for budget in room):
        raise SpecError(
            f"{samples} samples, {len(room)} budgets and {seeds} seeds do not fit {len(prompts)} prompts.",
            hints=["At least one sample; one budget, at least 1, and one seed a prompt, where they are given."],
        )
    context = getattr(forward.model.config.get_text_config(), "max_position_embeddings", None)
    for number, (prompt, budget) in enumerate(zip(prompts, room, strict=True)):
        if not len(prompt):
            raise RunError(f"prompt {number + 1} is empty.")
        if context and len(prompt) + budget > context:
            raise RunError(
                f"prompt {number + 1} has {len(prompt):,} tokens; with {budget} to come it exceeds the context of {context:,}.",
                hints=["Shorten the prompt, use fewer demonstrations, or lower task.max_new_tokens."],
            )


def _own_ends(forward: Forward, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = getattr(forward.model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return [end for end in [*ends, tokenizer.eos_token_id] if end is not None]


def _seed(seed: int, prompt: int, sample: int) -> int:
    words = [seed, prompt] if not sample else [seed, prompt, sample]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


@dataclass(frozen=True, slots=True)
class _Asking:
    """What all answers of one call have in common. tree: the answers to choose among."""

    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    ends: frozenset[int]
    on_text: Callable[[int, str], None] | None
    tree: Choices | None


class _Answer:
    """One answer in the making."""

    def __init__(self, asking: _Asking, index: int, seed: int, budget: int) -> None:
        self.asking, self.index, self.seed, self.budget = asking, index, seed, budget
        self.ids: list[int] = []
        self.log_probs: list[float] = []
        self.finished = ""
        self.text: str | None = None
        self._said = ""
        self._node = asking.tree

    def allowed(self) -> list[int] | None:
        """Ids to choose the next token among, if the answer is one of several given."""
        return None if self._node is None else self._node.next_ids(sorted(self.asking.ends))

    def take(self, token: int, log_prob: float) -> bool:
        """Add a token; False when the answer is complete."""
        self.ids.append(token)
        self.log_probs.append(log_prob)
        if self._node is not None:
            self._node = self._node.follows.get(token)
            if self._node is None or not self._node.follows:
                self.finished = "end"
        elif token in self.asking.ends:
            self.finished = "end"
        if not self.finished and (self.asking.sampling.stop or self.asking.on_text):
            text = self._decode()
            hits = [text.index(word) for word in self.asking.sampling.stop if word in text]
            if hits:
                self.finished, self.text = "stop", text[: min(hits)]
            self._say(self.text if self.text is not None else text[: self._settled(text)])
        if not self.finished and len(self.ids) >= self.budget:
            self.finished = "length"
        return not self.finished

    def done(self) -> Completion:
        text = self._decode() if self.text is None else self.text
        self._say(text)
        return Completion(self.ids, text, self.finished, self.log_probs)

    def _decode(self) -> str:
        ids = self.ids[:-1] if self.ids and self.ids[-1] in self.asking.ends else self.ids
        return str(self.asking.tokenizer.decode(ids, skip_special_tokens=True))

    def _settled(self, text: str) -> int:
        """Characters that the next tokens cannot take back: no half character and no beginning of a stop string at the end."""
        end = len(text.rstrip("\ufffd"))
        longest = max((len(word) for word in self.asking.sampling.stop), default=0)
        for at in range(max(0, end - longest + 1), end):
            if any(word.startswith(text[at:end]) for word in self.asking.sampling.stop):
                return at
        return end

    def _say(self, text: str) -> None:
        if self.asking.on_text and len(text) > len(self._said):
            self.asking.on_text(self.index, text[len(self._said) :])
            self._said = text
