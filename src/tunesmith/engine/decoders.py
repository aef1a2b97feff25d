"""Two ways to decode behind one interface: with keys of our own, or with the model's own cache.

The first is for models whose attention goes through transformers' interface: rows come and go, prompts are held once. The
second is for all others: a left-padded batch that is filled only when it is empty; recurrent models run a row at a time.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from tunesmith.adapters import Route
from tunesmith.engine import decoding
from tunesmith.engine.decoding import Decoding, run, size_for
from tunesmith.engine.forward import Forward
from tunesmith.engine.prefill import Keys, Prefill, PrefixCache

_log = logging.getLogger(__name__)

SHARE = 24
"""Tokens from which a beginning that all prompts share is read for itself."""

_FOLDED = 1024
"""Tokens that copies of a shared beginning may take, one for each group of rows: a level of its own costs two products a layer."""

_READ = 4096
"""Tokens of prompts that are read at once."""

_REFILL = 8
"""A batch is refilled when one in so many of its places is free: reading prompts costs a step or more."""

_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}
_LOOSE = 0.25
"""Nats by which two exact orders of computation differ at most, on average over the words; in half precision."""


class Decoder(Protocol):
    """Rows are numbers; each knows its prompt."""

    attention: str
    """The attention to run under."""

    def room(self, waiting: int) -> int:
        """Rows to let in now, of so many that wait. Never 0 while nothing runs."""

    def enter(self, rows: Sequence[int]) -> Tensor:
        """Let rows in; the logits of their first token, [rows, vocab]."""

    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """The logits after a token of each row, [rows, vocab]. All rows that are in, in any order."""

    def leave(self, row: int) -> None:
        """A row has finished."""


def decoder_for(
    forward: Forward,
    prompts: Sequence[list[int]],
    prompt_of: Sequence[int],
    batch: int,
    cache: PrefixCache | None,
    routes: Sequence[Route] | None = None,
) -> Decoder:
    """The way to decode this model. prompts: distinct ones; prompt_of: the prompt of each row; batch: rows at once; routes: of the
    prompts, in a mix."""
    if keeps_keys(forward):
        return Shared(forward, prompts, prompt_of, batch, cache, routes)
    return Own(forward, prompts, prompt_of, batch, routes)


def keeps_keys(forward: Forward) -> bool:
    """Does the model decode with keys of our own, to the numbers of its own attention? Tried once a model, not looked up."""
    known: dict[str, bool] = forward.model.__dict__.setdefault("_decodes_with_keys", {})
    if forward.own_attention not in known:
        known[forward.own_attention] = forward.packed and forward.causal and _agrees(forward)
    return known[forward.own_attention]


@torch.no_grad()
def _agrees(forward: Forward) -> bool:
    """Two rows of a prompt of 12 tokens and its beginning of 6, then 4 tokens, against the model over all 16."""
    table: Any = forward.model.get_input_embeddings()
    ids = np.random.default_rng(1).integers(5, max(6, min(int(table.weight.shape[0]), 30_000) - 1), 16).tolist()
    decoding.register()
    try:
        with forward.attention(forward.own_attention):
            truth = forward.model(input_ids=torch.tensor([ids], device=forward.model.device), use_cache=False).logits[0, 11:]
        with forward.attention(decoding.NAME):
            root, _ = read_prompts(forward, [(ids[:6], None)])
            held, first = read_prompts(forward, [(ids[6:12], root[0])])
            state = Decoding(forward, 8, 2, root[0])
            group = state.open(held)[0]
            places = state.sit([group, group])
            got = [first[0]]
            for token in ids[12:]:
                tokens = [0] * 8
                for place in places:
                    tokens[place] = token
                got.append(state.step(tokens)[places[1]])
    except Exception as cause:  # any failure here only means: the model's own cache
        _log.debug("no decoding with own keys: %s", cause)
        return False
    truth = torch.log_softmax(truth.float(), -1)
    apart = (torch.log_softmax(torch.stack(got).float(), -1) - truth).abs()
    return bool((apart * truth.exp()).sum(-1).max() <= _CLOSE.get(forward.model.dtype, _LOOSE))


def read_prompts(
    forward: Forward, prompts: Sequence[tuple[Sequence[int], Keys | None]], routes: Sequence[Route] | None = None
) -> tuple[list[Keys], Tensor]:
    """Keys of what is new of each prompt, and the logits of the token after it, [prompts, vocab]; in parts of `_READ` tokens."""
    held: list[Keys] = []
    logits: list[Tensor] = []
    at = 0
    while at < len(prompts):
        end, tokens = at + 1, len(prompts[at][0])
        while end < len(prompts) and tokens + len(prompts[end][0]) <= _READ:
            tokens += len(prompts[end][0])
            end += 1
        line = Prefill(prompts[at:end], forward.model.device, None if routes is None else routes[at:end])
        logits.append(run(forward, line.ids, line.positions, line, line.last)[: end - at])
        held += line.read()
        at = end
    return held, torch.cat(logits)


class Shared:
    """Decoding with keys of our own: each prompt is read once, and its rows sit down as places become free."""

    attention = decoding.NAME

    def __init__(
        self,
        forward: Forward,
        prompts: Sequence[list[int]],
        prompt_of: Sequence[int],
        batch: int,
        cache: PrefixCache | None,
        routes: Sequence[Route] | None = None,
    ) -> None:
        decoding.register()
        self.forward, self.prompts, self.prompt_of, self.cache, self.routes = forward, prompts, prompt_of, cache, routes
        self.batch = min(batch, len(prompt_of))
        self.left = np.bincount(prompt_of, minlength=len(prompts)).tolist()  # rows of each prompt that have not finished
        places = size_for(self.batch)
        self._share = min(max(self.left), places)
        self._places = places
        self._beginning = common_prefix(prompts) if one_route(routes) else []
        self._state: Decoding | None = None
        self._root: Keys | None = None
        self._group: dict[int, int] = {}  # of a prompt; with share 1, of a row
        self._held: dict[int, tuple[Keys, Tensor]] = {}  # prompts whose rows have not all come in
        self._outside = list(self.left)
        self._place: dict[int, int] = {}
        self._waiting = 0

    def room(self, waiting: int) -> int:
        """Many rows at once, because prompts are read together."""
        self._waiting = waiting
        free = min(self.batch - len(self._place), waiting)
        return free if not self._place or free >= min(waiting, max(1, self.batch // _REFILL)) else 0

    def enter(self, rows: Sequence[int]) -> Tensor:
        """Read the prompts that are new, then seat the rows."""
        new = list(dict.fromkeys(self.prompt_of[row] for row in rows if self.prompt_of[row] not in self._held))
        if self.routes is not None:
            new.sort(key=self.routes.__getitem__)
        state = self._begin()
        for prompt, held, first in zip(new, *self._read(new), strict=True):
            self._held[prompt] = (held, first)
        logits = torch.stack([self._held[self.prompt_of[row]][1] for row in rows])
        if state.share == 1:
            groups = state.open([self._held[self.prompt_of[row]][0] for row in rows])
            self._group.update(zip(rows, groups, strict=True))
        else:
            if new:
                self._group.update(zip(new, state.open([self._held[prompt][0] for prompt in new]), strict=True))
            groups = [self._group[self.prompt_of[row]] for row in rows]
        routes = self._routes([self.prompt_of[row] for row in rows])
        self._place.update(zip(rows, state.sit(groups, routes), strict=True))
        for row in rows:
            prompt = self.prompt_of[row]
            self._outside[prompt] -= 1
            if not self._outside[prompt]:
                del self._held[prompt]
        return logits

    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """One step of all places; fewer of them once nobody waits and half would idle."""
        state = self._begin()
        fewer = size_for(max(len(rows), 2))
        if not self._waiting and 2 * fewer <= state.places:
            places, groups = state.shrink(fewer)
            self._place = {row: places[place] for row, place in self._place.items()}
            self._group = {who: groups[group] for who, group in self._group.items()}
        ids = [0] * state.places
        seats = [self._place[row] for row in rows]
        for seat, token in zip(seats, tokens, strict=True):
            ids[seat] = token
        logits = state.step(ids)
        return logits if seats == list(range(state.places)) else logits[seats]

    def leave(self, row: int) -> None:
        """A place is free again; the prompt's keys go with its last row."""
        state, prompt = self._begin(), self.prompt_of[row]
        state.leave(self._place.pop(row))
        self.left[prompt] -= 1
        if state.share == 1:
            state.close(self._group.pop(row))
        elif not self.left[prompt]:
            state.close(self._group.pop(prompt))

    def _begin(self) -> Decoding:
        if self._state is None:
            root = None
            if self._beginning:
                ids = self._beginning
                before = self.cache.longest(self.forward.model, [*ids, 0], self._route(0)) if self.cache else None
                root = self._through(ids, before)
            self._root = root
            self._state = Decoding(self.forward, self._places, self._share, None if self._folds() else root)
        return self._state

    def _folds(self) -> bool:
        """Is what all prompts share short enough to lie with each of them?"""
        groups = -(-self._places // self._share)
        return self._root is not None and self._root.tokens * groups <= _FOLDED

    def _through(self, ids: list[int], before: Keys | None) -> Keys:
        """Keys of a beginning, of which some may be known."""
        known = before.tokens if before else 0
        if before is not None and known == len(ids):
            return before
        new = read_prompts(self.forward, [(ids[known:], before)], self._routes([0]))[0][0]
        whole = before.then(new) if before is not None else new.kept()
        if self.cache:
            self.cache.keep(self.forward.model, ids, whole, self._route(0))
        return whole

    def _routes(self, prompts: Sequence[int]) -> list[Route] | None:
        return None if self.routes is None else [self.routes[prompt] for prompt in prompts]

    def _route(self, prompt: int) -> Route:
        return () if self.routes is None else self.routes[prompt]

    def _read(self, prompts: Sequence[int]) -> tuple[list[Keys], Tensor]:
        """Keys after the root, or with it where it is folded, and first logits."""
        state, root = self._begin(), self._root
        if not prompts:
            return [], torch.zeros(0)
        asked, routes = [self.prompts[prompt] for prompt in prompts], self._routes(prompts)
        if root is not None or self.cache is None:
            held, logits = read_prompts(self.forward, [(ids[root.tokens if root else 0 :], root) for ids in asked], routes)
            return held if root is None or state.root is not None else [root.then(own) for own in held], logits
        model = self.forward.model
        known = [self.cache.longest(model, ids, self._route(prompt)) for prompt, ids in zip(prompts, asked, strict=True)]
        new = [(ids[before.tokens if before else 0 :], before) for ids, before in zip(asked, known, strict=True)]
        held, logits = read_prompts(self.forward, new, routes)
        whole = [before.then(new) if before else new for before, new in zip(known, held, strict=True)]
        for prompt, ids, keys in zip(prompts, asked, whole, strict=True):
            self.cache.keep(model, ids, keys, self._route(prompt))
        return whole, logits


def common_prefix(prompts: Sequence[list[int]]) -> list[int]:
    """Tokens that all prompts start with, leaving each at least one of its own; empty where sharing them would not pay."""
    if len(prompts) < 2:
        return []
    first, last = min(prompts), max(prompts)
    limit = min(len(prompt) for prompt in prompts) - 1
    n = next((at for at in range(limit) if first[at] != last[at]), limit)
    return first[:n] if n >= SHARE else []


def one_route(routes: Sequence[Route] | None) -> bool:
    """Do all prompts go through the same adapters, so that what they begin with is the same to the model?"""
    return routes is None or len(set(routes)) == 1


class Own:
    """Decoding with the model's own attention and cache, in left-padded batches."""

    def __init__(
        self,
        forward: Forward,
        prompts: Sequence[list[int]],
        prompt_of: Sequence[int],
        batch: int,
        routes: Sequence[Route] | None = None,
    ) -> None:
        self.attention = forward.own_attention
        self.model, self.prompts, self.prompt_of, self.routes, self.router = forward.model, prompts, prompt_of, routes, forward.router
        self.device = forward.model.device
        alone = getattr(forward.model, "_is_stateful", False)  # recurrent state bears neither padding nor selection
        self.batch = 1 if alone else batch
        parameters = inspect.signature(forward.model.forward).parameters
        self.cache_name = "cache_params" if "cache_params" in parameters else "past_key_values"
        self._beginning = [] if alone or _slides(forward, prompts) or not one_route(routes) else common_prefix(prompts)
        self._shared: Any = None
        self._cache: Any = None
        self._rows: list[int] = []
        self._gone: set[int] = set()
        self._mask = self._positions = torch.zeros(0)
        self._padded = False

    def room(self, waiting: int) -> int:
        """A whole batch, when the last one is done."""
        return 0 if set(self._rows) - self._gone else min(self.batch, waiting)

    def enter(self, rows: Sequence[int]) -> Tensor:
        """Read each prompt once and copy its cache for its rows."""
        new = list(dict.fromkeys(self.prompt_of[row] for row in rows))
        cut = len(self._beginning)
        if cut and self._shared is None:
            self._shared = DynamicCache(config=self.model.config)
            ids = torch.tensor([self._beginning], device=self.device)
            self._send([0], ids)
            self.model(input_ids=ids, past_key_values=self._shared, use_cache=True, logits_to_keep=1)
        parts = [self.prompts[prompt][cut:] for prompt in new]
        longest = max(map(len, parts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in parts], device=self.device)
        self._mask = torch.tensor([[1] * cut + [0] * (longest - len(p)) + [1] * len(p) for p in parts], device=self.device)
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)[:, cut:]
        self._cache = copy.deepcopy(self._shared)
        if self._cache is not None:
            self._cache.batch_repeat_interleave(len(new))
        self._rows, self._gone = list(rows), set()
        self._padded = len(new) > 1
        self._send(new, ids)
        logits = self._run(ids)
        if len(rows) > len(new):
            index = torch.tensor([new.index(self.prompt_of[row]) for row in rows], device=self.device)
            self._select(index)
            logits = logits[index]
        return logits

    def step(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """The rows that are left, one token further."""
        if list(rows) != self._rows:
            self._select(torch.tensor([self._rows.index(row) for row in rows], device=self.device))
            self._rows, self._gone = list(rows), set()
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(rows), 1)], -1)
        self._positions = self._positions[:, -1:] + 1
        ids = torch.tensor(tokens, device=self.device)[:, None]
        self._send([self.prompt_of[row] for row in rows], ids)
        return self._run(ids)

    def leave(self, row: int) -> None:
        """Noted; the batch is made smaller at the next step."""
        self._gone.add(row)

    def _send(self, prompts: Sequence[int], ids: Tensor) -> None:
        """Say which way each row of ids goes. prompts: of the rows."""
        if self.router is not None and self.routes is not None:
            self.router.send([(self.routes[prompt], ids.shape[1]) for prompt in prompts], (ids.shape[0], ids.shape[1]), ids.device)

    def _run(self, ids: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids, self.cache_name: self._cache, "use_cache": True, "logits_to_keep": 1}
        if self._padded:
            inputs |= {"attention_mask": self._mask, "position_ids": self._positions}
        out = self.model(**inputs)
        self._cache = out[self.cache_name]
        logits: Tensor = out.logits[:, -1]
        return logits

    def _select(self, index: Tensor) -> None:
        self._cache.batch_select_indices(index)
        self._mask, self._positions = self._mask[index], self._positions[index]


def _slides(forward: Forward, prompts: Sequence[Sequence[int]]) -> bool:
    """Is there a sliding window? Padding between a shared beginning and a prompt would narrow it."""
    config = forward.model.config.get_text_config()
    return bool(getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None))
