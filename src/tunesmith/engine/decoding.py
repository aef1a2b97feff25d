"""Decoding with keys and values of our own: a prompt's are kept once, whoever continues it.

The model runs over a flat line of tokens, one a row, through transformers' attention interface, under a name that has no
mask function. Each query meets the keys of up to three levels: the beginning that all prompts share, its prompt, its own
answer. The scores of all levels go into one softmax. Lengths of key buffers are multiples of a fixed size and end in
zeros, so that what a row computes does not depend on its company. (Rounding may differ between decoding sizes: a matrix
product of 8 rows need not add up in the order of one of 64.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tunesmith.adapters import Route
from tunesmith.engine.forward import Forward, uncached
from tunesmith.engine.prefill import Keys, Prefill

NAME = "tunesmith-decode"

STEP = 32
"""Tokens by which the buffers of answers grow."""

ROUND = 16
"""Columns of a buffer are a multiple of it: sums over keys then add up in the same order whatever zeros follow."""

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
"""Rows of a decoding step; idle ones compute along, unread."""


def register() -> None:
    """Make `model.set_attn_implementation(NAME)` possible. Idempotent."""
    AttentionInterface.register(NAME, decoding_attention)


def decoding_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    decoding: Prefill | Decoding | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function. query [1, heads, tokens, dim], key and value [1, kv heads, tokens, dim].

    Returns [1, tokens, heads, dim]. What would change the result and is not handled here raises, so that the check sends
    such a model to its own cache.
    """
    if decoding is None:
        raise RuntimeError("decoding attention needs its state; call the model through the engine")
    given = extra.get("is_causal")
    if dropout or not (getattr(module, "is_causal", True) if given is None else given):
        raise NotImplementedError("decoding attention is causal and without dropout")
    for name in ("s_aux", "position_bias"):
        if extra.get(name) is not None:
            raise NotImplementedError(f"decoding attention has no {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return decoding.attend(q, k, v, scale, sliding_window, softcap)[None], None


def run(forward: Forward, ids: Tensor, positions: Tensor, state: Prefill | Decoding, keep: Tensor | int = 0) -> Tensor:
    """The model over a flat line of tokens; logits at `keep` (0: everywhere), [kept, vocab]. Under `forward.attention(NAME)`."""
    at = positions[None] + forward.first_position
    if forward.router is not None:
        forward.router.send(state.parts, (1, len(ids)), ids.device)
    out = uncached(forward.model, input_ids=ids[None], position_ids=at, decoding=state, logits_to_keep=keep)
    logits: Tensor = out.logits[0]
    return logits


def size_for(rows: int) -> int:
    """The decoding size that holds so many rows. A row that is asked alone is computed alone."""
    return 1 if rows == 1 else next((size for size in SIZES if size >= rows), rows)


def rounded(tokens: int, to: int = ROUND) -> int:
    """Columns of a buffer for so many tokens."""
    return -(-tokens // to) * to


class Level:
    """Keys and values that groups of `share` rows read together.

    keys, values: a layer each, [groups, kv heads, columns, dim], zero where nothing is. member: row of each place of each
    group, [groups * share], padded with any row; back: the place of each row, [rows]; both None where places are rows.
    """

    def __init__(self, like: Keys, groups: int, share: int, columns: int) -> None:
        self.groups, self.share, self.columns = groups, share, rounded(columns)
        self.keys, self.values = (
            [x.new_zeros(groups, x.shape[1], self.columns, x.shape[2]) for x in side] for side in (like.keys, like.values)
        )
        self.member: Tensor | None = None
        self.back: Tensor | None = None

    def put(self, group: int, held: Keys) -> None:
        """The whole content of a group."""
        for mine, theirs in ((self.keys, held.keys), (self.values, held.values)):
            for to, x in zip(mine, theirs, strict=True):
                to[group, :, : held.tokens] = x.transpose(0, 1)
                to[group, :, held.tokens :] = 0

    def resize(self, columns: int, keep: Sequence[int] | None = None, groups: int | None = None) -> None:
        """Other lengths; `keep`: which groups remain, in order; groups: how many there are then, the new ones empty."""
        columns = rounded(columns)
        chosen = list(range(self.groups)) if keep is None else list(keep)
        groups = len(chosen) if groups is None else groups
        if (columns, groups, chosen) == (self.columns, self.groups, list(range(self.groups))):
            return
        shared = min(columns, self.columns)
        for side in (self.keys, self.values):
            for layer, x in enumerate(side):
                side[layer] = x.new_zeros(groups, x.shape[1], columns, x.shape[3])
                side[layer][: len(chosen), :, :shared] = x[chosen, :, :shared]
        self.columns, self.groups = columns, groups

    def scores(self, query: Tensor, layer: int) -> Tensor:
        """query [rows, heads, dim] -> [rows, heads, columns]."""
        keys = self.keys[layer]
        return self._rows(torch.bmm(self._grouped(query, keys.shape[1]), keys.flatten(0, 1).transpose(1, 2)), keys.shape[1])

    def read(self, p: Tensor, layer: int) -> Tensor:
        """p [rows, heads, columns] -> [rows, heads, dim]."""
        values = self.values[layer]
        return self._rows(torch.bmm(self._grouped(p, values.shape[1]), values.flatten(0, 1)), values.shape[1])

    def _grouped(self, x: Tensor, kv: int) -> Tensor:
        """[rows, heads, n] -> [groups * kv heads, share * heads of a kv head, n]."""
        if self.share == 1:
            return x.reshape(self.groups * kv, -1, x.shape[-1])
        if self.member is not None:
            x = x.index_select(0, self.member)
        return x.view(self.groups, self.share, kv, -1, x.shape[-1]).transpose(1, 2).reshape(self.groups * kv, -1, x.shape[-1])

    def _rows(self, x: Tensor, kv: int) -> Tensor:
        """The way back."""
        n = x.shape[-1]
        if self.share == 1:
            return x.view(self.groups, -1, n)
        x = x.view(self.groups, kv, self.share, -1, n).transpose(1, 2).reshape(self.groups * self.share, -1, n)
        return x if self.back is None else x.index_select(0, self.back)


class Decoding:
    """One decoding step after another for a fixed number of places, each of which holds a row or idles.

    Rows of one prompt sit in one group of at most `share` places; with share 1 a place is its own group. root: keys of the
    beginning that all prompts have.
    """

    def __init__(self, forward: Forward, places: int, share: int, root: Keys | None) -> None:
        self.forward, self.places, self.share, self.root = forward, places, share, root
        self.device = forward.model.device
        self.group: list[int | None] = [None] * places  # of the row in each place
        self.route: list[Route] = [()] * places  # of the last row in each place, in a mix
        self.said = [0] * places  # tokens of each answer that have keys
        self.tokens: dict[int, int] = {}  # of the prompt of each open group, the root's included
        self.levels: list[Level] = []
        self._start = root.tokens if root else 0
        self._used: set[int] = set()
        self._layer = 0
        self._even: int | None = None  # length of all answers, where they are equally long
        self._write: dict[int, Tensor] = {}
        self._bias: dict[tuple[int | None, torch.dtype], Tensor] = {}
        self._prompt = self._said = torch.zeros(places, dtype=torch.long)

    @property
    def parts(self) -> list[tuple[Route, int]]:
        """The route of each place's token."""
        return [(route, 1) for route in self.route]

    @property
    def free(self) -> list[int]:
        """Places that hold no row."""
        return [place for place, group in enumerate(self.group) if group is None]

    def open(self, prompts: Sequence[Keys]) -> list[int]:
        """Take the keys of prompts, what follows the root; the group of each. With share 1: for rows that sit down next."""
        unused = self.free if self.share == 1 else [n for n in range(len(self.tokens) + len(prompts)) if n not in self.tokens]
        groups = unused[: len(prompts)]
        longest = max(rounded(max([held.tokens for held in prompts])), rounded(max([*self.tokens.values(), 1]) - self._start))
        if not self.levels:
            shared = [Level(self.root, 1, self.places, self._start)] if self.root else []
            count = self.places if self.share == 1 else -(-self.places // self.share)
            self.levels = [*shared, Level(prompts[0], count, self.share, longest), Level(prompts[0], self.places, 1, STEP)]
            if self.root:
                shared[0].put(0, self.root)
        level = self.levels[-2]
        level.resize(longest, groups=max(level.groups, max(groups) + 1))
        for group, held in zip(groups, prompts, strict=True):
            level.put(group, held)
            self.tokens[group] = self._start + held.tokens
        return groups

    def close(self, group: int) -> None:
        """A prompt has no rows left."""
        del self.tokens[group]

    def sit(self, groups: Sequence[int], routes: Sequence[Route] | None = None) -> list[int]:
        """A place for one more row of each prompt. routes: of the rows, in a mix."""
        places = list(groups) if self.share == 1 else self.free[: len(groups)]
        again = [place for place in places if place in self._used]
        if again:
            for x in (*self.levels[-1].keys, *self.levels[-1].values):
                x[again] = 0
        for place, group in zip(places, groups, strict=True):
            self.group[place], self.said[place] = group, 0
        for place, route in zip(places, routes or (), strict=routes is not None):
            self.route[place] = route
        self._used.update(places)
        self._arrange()
        return places

    def leave(self, place: int) -> None:
        """A row has finished."""
        self.group[place], self.said[place] = None, 0

    def shrink(self, places: int) -> tuple[dict[int, int], dict[int, int]]:
        """Move all rows into fewer places; the new place by the old, and the new group by the old."""
        rows = [place for place, group in enumerate(self.group) if group is not None]
        kept = [*rows, *self.free[: places - len(rows)]]
        groups = kept if self.share == 1 else sorted(self.tokens)
        renamed = {old: new for new, old in enumerate(groups)}
        self.levels[-1].resize(self.levels[-1].columns, kept)
        self.levels[-2].resize(self.levels[-2].columns, groups)
        self.group = [None if (group := self.group[place]) is None else renamed[group] for place in kept]
        self.said = [self.said[place] for place in kept]
        self.route = [self.route[place] for place in kept]
        self.tokens = {renamed[old]: tokens for old, tokens in self.tokens.items()}
        self._used = {new for new, old in enumerate(kept) if old in self._used}
        self.places = places
        if self.root:
            self.levels[0].share = places
        self._arrange()
        return {old: new for new, old in enumerate(rows)}, renamed

    def step(self, ids: Sequence[int]) -> Tensor:
        """The next token's logits of every place, [places, vocab]. ids: the last token of each; any where none sits."""
        prompt = torch.tensor([0 if group is None else self.tokens[group] for group in self.group])
        said = torch.tensor(self.said)
        own = self.levels[-1]
        need = rounded(max(self.said) + 1, STEP)
        if need > own.columns or 2 * need <= own.columns:
            own.resize(need)
        self._write, self._bias, self._layer = {}, {}, 0
        lengths = {said for said, group in zip(self.said, self.group, strict=True) if group is not None}
        self._even = lengths.pop() if len(lengths) == 1 else None
        self._prompt, self._said = prompt.to(self.device), said.to(self.device)
        logits = run(self.forward, torch.tensor(ids, device=self.device), self._prompt + self._said, self)
        self.said = [said if group is None else said + 1 for said, group in zip(self.said, self.group, strict=True)]
        return logits

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
        """query [places, heads, dim], key and value [places, kv heads, dim] -> [places, heads, dim]; once a layer, in order."""
        layer, own = self._layer, self.levels[-1]
        self._layer += 1
        for buffer, x in ((own.keys[layer], key), (own.values[layer], value)):
            if self._even is not None:
                buffer[:, :, self._even] = x
            else:
                buffer.view(-1, x.shape[2]).index_copy_(0, self._written(x.shape[1]), x.reshape(-1, x.shape[2]))
        query = (query * scale).contiguous()
        scores = torch.cat([level.scores(query, layer) for level in self.levels], -1)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        p = torch.softmax(scores.add_(self._hides(window, scores.dtype)), -1)
        out, at = None, 0
        for level in self.levels:
            read = level.read(p[..., at : at + level.columns], layer)
            out = read if out is None else out.add_(read)
            at += level.columns
        assert out is not None
        return out

    def _arrange(self) -> None:
        """Who reads with whom."""
        if self.share == 1:
            return
        level = self.levels[-2]
        seated: dict[int, int] = {}
        member, back = [0] * (level.groups * self.share), [0] * self.places
        for place, group in enumerate(self.group):
            if group is not None:
                at = group * self.share + seated.get(group, 0)
                seated[group] = seated.get(group, 0) + 1
                member[at], back[place] = place, at
        regular = member == back == list(range(self.places))
        level.member = None if regular else torch.tensor(member, device=self.device)
        level.back = None if regular else torch.tensor(back, device=self.device)

    def _written(self, kv: int) -> Tensor:
        """Where each place's new key goes in a flat buffer, [places * kv heads]."""
        if kv not in self._write:
            heads = torch.arange(self.places * kv, device=self.device).view(-1, kv)
            self._write[kv] = (heads * self.levels[-1].columns + self._said[:, None]).flatten()
        return self._write[kv]

    def _hides(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """0 where a row sees a column, -inf where not, [places, 1, columns of all levels]."""
        if (window, dtype) not in self._bias:
            prompt, said = self._prompt[:, None], self._said[:, None]
            parts = []
            for number, level in enumerate(self.levels):
                at = torch.arange(level.columns, device=self.device)
                if level is self.levels[-1]:
                    at, end = at + prompt, prompt + said + 1
                elif number == len(self.levels) - 2:
                    at, end = (at + self._start)[None], prompt
                else:
                    at, end = at[None], torch.full_like(prompt, self._start)
                seen = at < end
                parts.append(seen if window is None else seen & (prompt + said - at < window))
            hidden = ~torch.cat(parts, -1)
            self._bias[window, dtype] = torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, -torch.inf)[:, None]
        return self._bias[window, dtype]
