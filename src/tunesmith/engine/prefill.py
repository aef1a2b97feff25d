"""Reading prompts: their keys and values, and the logits of the token that follows.

Several prompts are read in one line of tokens, each after keys that were computed before (a shared beginning, a kept
prefix). Lengths are rounded up within the attention so that a prompt's numbers do not depend on what is read beside it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.adapters import Route

_QUERIES, _KEYS = 16, 32
"""Attention is computed for multiples of so many queries and keys."""

_ENDS = 8
"""The head computes multiples of so many tokens."""

_BLOCK = 256
"""Queries at a time."""


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys and values of a stretch of tokens, a layer each: [tokens, kv heads, dim]."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def tokens(self) -> int:
        return int(self.keys[0].shape[0])

    def part(self, start: int, end: int) -> Keys:
        """Tokens from start to end, as views."""
        return Keys([x[start:end] for x in self.keys], [x[start:end] for x in self.values])

    def kept(self) -> Keys:
        """A copy that holds no larger tensor alive."""
        return Keys([x.clone() for x in self.keys], [x.clone() for x in self.values])

    def then(self, other: Keys) -> Keys:
        """This stretch and the one after it."""
        pairs = ((self.keys, other.keys), (self.values, other.values))
        keys, values = ([torch.cat(two) for two in zip(*pair, strict=True)] for pair in pairs)
        return Keys(keys, values)


@dataclass(frozen=True, slots=True)
class _Group:
    """Prompts of equal rounded size. query, key: indices of their tokens, [prompts, queries] and [prompts, keys], padded with
    0; query_at, key_at: their positions, a padded key's beyond every query."""

    query: Tensor
    key: Tensor
    query_at: Tensor
    key_at: Tensor

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None) -> Tensor:
        """Scaled queries [tokens, heads, dim] -> [prompts * queries, heads, dim], a block of queries at a time."""
        prompts, count = self.query.shape
        kv = key.shape[1]
        q = query[self.query].view(prompts, count, kv, -1, query.shape[2]).permute(0, 2, 3, 1, 4)
        k, v = (x[self.key].transpose(1, 2) for x in (key, value))
        out = value.new_empty(prompts, count, query.shape[1], value.shape[2])
        for first in range(0, count, _BLOCK):
            at = self.query_at[:, first : first + _BLOCK, None]
            end = min(self.key.shape[1], _up(int(at.max()) + 1, _KEYS))
            distance = at - self.key_at[:, None, :end]
            hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
            scores = q[:, :, :, first : first + _BLOCK].flatten(2, 3) @ k[:, :, :end].transpose(-1, -2)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            stacked = scores.unflatten(2, (-1, at.shape[1]))
            stacked.masked_fill_(hidden[:, None, None], -torch.inf)
            read = (torch.softmax(scores, -1) @ v[:, :, :end]).unflatten(2, (-1, at.shape[1]))
            out[:, first : first + _BLOCK] = read.permute(0, 3, 1, 2, 4).flatten(2, 3)
        return out.flatten(0, 1)


class Prefill:
    """The attention of one reading. prompts: what is new of each, and the keys before it.

    ids, positions: the line of tokens, [tokens]. last: where each prompt ends in it, the last one repeated for a round number.
    parts: (route, tokens) of what lies in it, where the prompts have `routes`.
    """

    def __init__(
        self, prompts: Sequence[tuple[Sequence[int], Keys | None]], device: torch.device, routes: Sequence[Route] | None = None
    ) -> None:
        flat = [token for ids, _ in prompts for token in ids]
        lengths = [len(ids) for ids, _ in prompts]
        if len(flat) % _QUERIES:  # matrix products of few rows, or of odd numbers, may round in another way
            lengths.append(_up(len(flat), _QUERIES) - len(flat))
            flat += [0] * lengths[-1]
        self.parts = [] if routes is None else list(zip([*routes, routes[-1]], lengths, strict=False))  # padding goes along
        self.starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        self.count = len(prompts)
        self._above = list({id(held): held for _, held in prompts if held is not None}.values())
        begins = np.cumsum([len(flat), *(held.tokens for held in self._above)])
        offsets = {id(held): int(begin) for held, begin in zip(self._above, begins, strict=False)}
        spans = []
        for number, length in enumerate(lengths):
            held = prompts[number][1] if number < self.count else None
            above = np.arange(held.tokens) + offsets[id(held)] if held is not None else np.zeros(0, np.int64)
            spans.append((np.arange(self.starts[number], self.starts[number] + length), above))
        self._groups, self._back = _groups(spans, len(flat), device)
        self.ids = torch.tensor(flat, device=device)
        self.positions = torch.from_numpy(np.concatenate([np.arange(len(own)) + len(above) for own, above in spans])).to(device)
        ends = [start - 1 for start in self.starts[1 : self.count + 1]]
        self.last = torch.tensor(ends + ends[-1:] * (_up(self.count, _ENDS) - self.count), device=device)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
        """query [tokens, heads, dim], key and value [tokens, kv heads, dim] -> [tokens, heads, dim]; once a layer, in order."""
        layer = len(self._keys)
        self._keys.append(key)
        self._values.append(value)
        if self._above:
            key = torch.cat([key, *(held.keys[layer] for held in self._above)])
            value = torch.cat([value, *(held.values[layer] for held in self._above)])
        query = query * scale
        return torch.cat([group.attend(query, key, value, window, softcap) for group in self._groups])[self._back]

    def read(self) -> list[Keys]:
        """The new keys and values of each prompt, as views."""
        whole = Keys(self._keys, self._values)
        return [whole.part(self.starts[at], self.starts[at + 1]) for at in range(self.count)]


def _groups(spans: Sequence[tuple[np.ndarray, np.ndarray]], tokens: int, device: torch.device) -> tuple[list[_Group], Tensor]:
    """Spans (own tokens, tokens above) by their rounded sizes; where the answer of each token then lies, [tokens]."""
    found: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    for own, above in spans:
        sizes = (_up(len(own), _QUERIES), _up(len(own) + len(above), _KEYS))
        found.setdefault(sizes, []).append((own, above))
    back = np.zeros(tokens, dtype=np.int64)
    groups, offset = [], 0
    for (queries, keys), members in found.items():
        query, key = np.zeros((len(members), queries), np.int64), np.zeros((len(members), keys), np.int64)
        query_at, key_at = np.zeros_like(query), np.full_like(key, np.iinfo(np.int64).max // 2)
        for at, (own, above) in enumerate(members):
            n, m = len(own), len(above)
            query[at, :n], key[at, :m], key[at, m : m + n] = own, above, own
            query_at[at, :n], query_at[at, n:], key_at[at, : m + n] = np.arange(m, m + n), m + n - 1, np.arange(m + n)
            back[own] = offset + at * queries + np.arange(n)
        offset += query.size
        groups.append(_Group(*(torch.from_numpy(x).to(device) for x in (query, key, query_at, key_at))))
    return groups, torch.from_numpy(back).to(device)


def _up(count: int, to: int) -> int:
    return -(-count // to) * to


class PrefixCache:
    """Prompts read before, for calls to come: the longest kept beginning of a new prompt is not read again.

    Entries count only as long as the model is as it was when they were made: the same weights and adapters, none changed in
    place since, the same ones switched on. Changes that torch does not count (through `.data`) are not seen: call `clear`
    after such. tokens: how many are kept; the least recently used prompt goes first.
    """

    def __init__(self, tokens: int = 8192) -> None:
        self.tokens = tokens
        self._held: OrderedDict[tuple[Route, tuple[int, ...]], Keys] = OrderedDict()
        self._model: list[Any] = []

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()

    def longest(self, model: nn.Module, prompt: Sequence[int], route: Route = ()) -> Keys | None:
        """Keys of the longest kept beginning that leaves at least one token of the prompt to read. route: the prompt's, in a mix."""
        self._renew(model)
        best, found = 0, None
        for held in self._held:
            same = _common(held[1], prompt[:-1]) if held[0] == route else 0
            if same > best:
                best, found = same, held
        if found is None:
            return None
        self._held.move_to_end(found)
        return self._held[found].part(0, best)

    def keep(self, model: nn.Module, prompt: Sequence[int], held: Keys, route: Route = ()) -> None:
        """Remember a prompt, unless it is longer than the whole cache."""
        self._renew(model)
        name = (route, tuple(prompt))
        if held.tokens > self.tokens or name in self._held:
            return
        self._held[name] = held.kept()
        while sum(len(ids) for _, ids in self._held) > self.tokens:
            self._held.popitem(last=False)

    def _renew(self, model: nn.Module) -> None:
        state = _state(model)
        if len(state) != len(self._model) or any(a is not b and a != b for a, b in zip(state, self._model, strict=True)):
            self.clear()
            self._model = state


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    limit = min(len(a), len(b))
    return next((at for at in range(limit) if a[at] != b[at]), limit)


def _state(model: nn.Module) -> list[Any]:
    """What a model's numbers depend on: its tensors, how often each was changed, and what is switched on where."""
    out: list[Any] = [model]
    for tensor in [*model.parameters(), *model.buffers()]:
        out.append((tensor.data_ptr(), tensor._version, tuple(tensor.shape), tensor.dtype))
    for module in model.modules():
        own = module.__dict__
        out.extend(id(hook) for hook in (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()))
        for name in sorted(own):
            if name.startswith("ts_"):
                out.append(tuple(own[name]) if isinstance(own[name], list) else own[name])
    return out
