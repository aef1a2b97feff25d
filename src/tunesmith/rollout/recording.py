"""What models say of answers that were sampled: log-probabilities under the policy and its reference, values of the critic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.row import Row
from tunesmith.data.sharing import share_prefix
from tunesmith.engine.critic import Critic
from tunesmith.engine.forward import Forward
from tunesmith.engine.memory import in_mode
from tunesmith.engine.model import Model
from tunesmith.engine.pack import best_fit
from tunesmith.engine.processes import ALONE, Processes
from tunesmith.objectives import Wanted
from tunesmith.rollout.answers import Numbers

PACK_TOKENS = 4096
"""Tokens of a pack that is read without gradients."""


def log_probs(model: Model, rows: Sequence[Row], temperature: float = 1.0, processes: Processes = ALONE) -> list[Numbers]:
    """Log-probabilities of each row's supervised tokens, under softmax(logits / temperature), nats, [targets] a row.

    processes: that call this together with the same rows; each reads a share, and each is given all.
    """
    forward, wanted = model.forward, Wanted(temperature=temperature)
    with model.active(), in_mode(model.base.model, training=False):
        return _shared_out(forward, rows, lambda some: forward(forward.pack(some), wanted).log_probs, processes)


def values(critic: Critic, rows: Sequence[Row], processes: Processes = ALONE) -> list[Numbers]:
    """The critic's value before each supervised token of the rows, [targets] a row. processes: as of `log_probs`."""
    with in_mode(critic.model.base.model, training=False), critic.model.active():
        return _shared_out(critic.model.forward, rows, critic.numbers, processes)


def _shared_out(forward: Forward, rows: Sequence[Row], read: Callable[[Sequence[Row]], Tensor], processes: Processes) -> list[Numbers]:
    own = _by_row(forward, rows[processes.rank :: processes.count], read)
    out: list[Numbers] = [np.zeros(0, np.float32)] * len(rows)
    for rank, part in enumerate(processes.gathered([numbers.tolist() for numbers in own]) if processes.several else [own]):
        for place, numbers in zip(range(rank, len(rows), processes.count), part, strict=True):
            out[place] = np.asarray(numbers, np.float32)
    return out


@torch.no_grad()
def _by_row(forward: Forward, rows: Sequence[Row], read: Callable[[Sequence[Row]], Tensor]) -> list[Numbers]:
    """Numbers of the rows' targets, read in packs in which equal prompts are computed once. read: of a pack of rows, [targets]."""
    out: list[Numbers] = [np.zeros(0, np.float32)] * len(rows)
    if not rows:
        return out
    merge = forward.packed and forward.causal
    trees = share_prefix(rows, max_tokens=PACK_TOKENS) if merge else []
    plain = [tree.row for tree in trees] if merge else list(rows)
    sizes = [forward.size(row) for row in plain]
    for places in best_fit(sizes, max(PACK_TOKENS, *sizes)):
        found = read([plain[place] for place in places]).float().cpu().numpy()
        counts = [int(part.supervised.sum()) for place in places for part in plain[place].segments]
        pieces = iter(np.split(found, np.cumsum(counts)[:-1]))
        for place in places:
            of_segments = [next(pieces) for _ in plain[place].segments]
            for index, leaves in [(m.index, m.leaves) for m in trees[place].members] if merge else [(place, None)]:
                out[index] = np.concatenate(of_segments if leaves is None else [of_segments[leaf] for leaf in leaves])
    return out


class Reference:
    """The policy as the run began: the base with the adapters that it started with, as they were then.

    start: what the run began with. Where the policy trains one of these adapters further, or the base's own weights, what they were is
    kept, so this is to be made before the first step and before a checkpoint is loaded.
    """

    def __init__(self, start: Model, policy: Model) -> None:
        adapter = policy.adapter
        self._kept: dict[str, Tensor] | None = None
        self.model = start
        if adapter in start.adapters or adapter.in_place:
            self.model, self._kept = policy, {name: value.detach().clone() for name, value in _changing(policy)}

    def log_probs(self, rows: Sequence[Row], temperature: float = 1.0, processes: Processes = ALONE) -> list[Numbers]:
        """As of `recording.log_probs`, under the reference."""
        with self._as_begun():
            return log_probs(self.model, rows, temperature, processes)

    @contextmanager
    def _as_begun(self) -> Iterator[None]:
        """The weights that are trained as they were, for a while."""
        if self._kept is None:
            yield
            return
        with self.model.active():
            now = {name: value.detach().clone() for name, value in _changing(self.model)}
            self._write(self._kept)
            try:
                yield
            finally:
                self._write(now)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, value in _changing(self.model):
            value.data.copy_(values[name])
        self.model.adapter.settle()


def _changing(model: Model) -> Iterator[tuple[str, Tensor]]:
    """What training changes of a model: weights, and what its forms remember beside them."""
    yield from model.adapter.named_parameters()
    yield from ((f"memory.{name}", value) for name, value in model.adapter.memory().items())
