"""One forward for training, scoring and probing: rows in, log-probabilities of their supervised tokens out.

Two paths with the same result. Packed: rows side by side without padding, shared prompts once, attention from
`attention.py`. Padded: every root-to-leaf path its own padded row, under the model's own attention, for models that
cannot be packed. Which one a model gets is found by trying (`probe.py`), not from a list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.adapters import head_weight
from tunesmith.core.row import Row
from tunesmith.engine import attention
from tunesmith.engine.head import target_log_probs
from tunesmith.engine.pack import Pack, build_pack


@dataclass(slots=True)
class Scored:
    """log_probs: log p of each supervised token, nats, fp32, [targets], in the pack's order. pack: what was scored."""

    log_probs: Tensor
    pack: Pack

    def by_segment(self) -> Tensor:
        """Summed log-probability of each segment of the pack, [segments]."""
        out = self.log_probs.new_zeros(self.pack.segments)
        return out.index_add(0, self.pack.segment.to(out.device), self.log_probs)


class Forward:
    """The model seen as a function from packs to log-probabilities.

    packed, direct_head: the two findings of the probe; why: the reason if it is not packed, for the user.
    """

    def __init__(self, model: PreTrainedModel, *, packed: bool, direct_head: bool, why: str = "") -> None:
        self.model, self.packed, self.direct_head, self.why = model, packed, direct_head, why
        self.own_attention: str = model.config._attn_implementation
        self.noise: float | None = None
        self.noise_kind = "uniform"
        self._lengths: Tensor | None = None
        attention.register()

    def __call__(self, pack: Pack) -> Scored:
        """Log-probabilities of the pack's targets under the model with whatever adapters are active."""
        pack = pack.to(self.model.device)
        hidden = self._packed(pack) if self.packed else self._padded(pack)
        if self.direct_head:
            head = self.model.get_output_embeddings()
            log_probs = target_log_probs(hidden, head_weight(head), pack.target, getattr(head, "bias", None))
        else:
            log_probs = torch.log_softmax(hidden.float(), -1).gather(1, pack.target[:, None])[:, 0]
        return Scored(log_probs, pack)

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

    def _packed(self, pack: Pack) -> Tensor:
        ids, positions = pack.ids[None], pack.positions[None]
        with self.attention(attention.NAME), self._noisy(pack.lengths[None]):
            if self.direct_head:
                out = self.model.base_model(input_ids=ids, position_ids=positions, pack=pack, use_cache=False)
                hidden: Tensor = out.last_hidden_state[0]
                return hidden.index_select(0, pack.source)
            out = self.model(input_ids=ids, position_ids=positions, pack=pack, use_cache=False, logits_to_keep=pack.source)
            logits: Tensor = out.logits[0]
            return logits

    def _padded(self, pack: Pack) -> Tensor:
        batch = unroll(pack).to(pack.ids.device)
        with self._noisy(batch.lengths[:, None]):
            inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
            states: Tensor = self.model.base_model(**inputs).last_hidden_state if self.direct_head else self.model(**inputs).logits
        return states[batch.source_row, batch.source_at]

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
        return out + (noise * size).to(out.dtype)


@dataclass(slots=True)
class Unrolled:
    """Paths of a pack as a padded batch. ids, mask: [paths, longest]. source_row, source_at: where each target's
    predecessor stands, [targets]. lengths: tokens of each path, [paths]."""

    ids: Tensor
    mask: Tensor
    source_row: Tensor
    source_at: Tensor
    lengths: Tensor

    def to(self, device: torch.device) -> Unrolled:
        """The same on a device."""
        return Unrolled(*(x.to(device) for x in (self.ids, self.mask, self.source_row, self.source_at, self.lengths)))


def unroll(pack: Pack) -> Unrolled:
    """One padded row a root-to-leaf path. A target on a shared segment is read from the first path that holds it."""
    paths: list[Tensor] = []
    place: dict[tuple[int, int], tuple[int, int]] = {}  # (row, segment) -> (path, offset of the segment on it)
    for number, row in enumerate(pack.rows):
        for leaf in row.leaves():
            offset, pieces = 0, []
            for index in row.path(leaf):
                place.setdefault((number, index), (len(paths), offset))
                pieces.append(torch.from_numpy(row.segments[index].ids.astype("int64")))
                offset += len(row.segments[index])
            paths.append(torch.cat(pieces))
    lengths = torch.tensor([len(path) for path in paths])
    ids = nn.utils.rnn.pad_sequence(paths, batch_first=True)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    rows, at = [], []
    for number, index in zip(pack.segment_row, pack.segment_index, strict=True):
        path, offset = place[number, index]
        targets = pack.rows[number].segments[index].supervised.nonzero()[0] + offset - 1
        rows += [path] * len(targets)
        at += targets.tolist()
    return Unrolled(ids, mask, torch.tensor(rows, dtype=torch.long), torch.tensor(at, dtype=torch.long), lengths)


def log_probs_of(forward: Forward, rows: Sequence[Row]) -> list[float]:
    """Summed log-probability of all supervised tokens of each row, nats. For tests and small jobs: one pack."""
    with torch.no_grad():
        scored = forward(build_pack(rows))
    per_segment = scored.by_segment().tolist()
    out = [0.0] * len(rows)
    for row, value in zip(scored.pack.segment_row, per_segment, strict=True):
        out[row] += value
    return out
