"""What a task head says of a pack: the states of the base, pooled as the head reads them, through the head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.adapters import TaskHead
from tunesmith.core.row import Row
from tunesmith.engine.forward import Forward
from tunesmith.engine.pack import Pack


@dataclass(slots=True)
class Said:
    """logits: what the head says wherever it is asked, [reads, outputs], in the pack's order: row by row, and within a row segment
    by segment. labels: what it shall say, [reads]. rows: the row of the pack that each belongs to, [reads]. rank, margin, soft:
    of an answer that is scored, as they were given, [reads]; the best and nothing doubted where they were not."""

    logits: Tensor
    labels: Tensor
    rows: list[int]
    rank: Tensor
    margin: Tensor
    soft: Tensor


def read_task_head(forward: Forward, pack: Pack, head: TaskHead) -> Said:
    """The head's answers at every labelled token of a pack, with gradient to the head and to what the base trains.

    Where nothing of the base is trained, no graph of it is kept and no backward enters it.
    """
    places, labels = _asked(pack)
    logits = head(_pooled(forward, pack, places, head.way.pool))

    def given(name: str, otherwise: float) -> Tensor:
        return torch.tensor([place.given.get(name, otherwise) for place in places], dtype=logits.dtype, device=logits.device)

    labelled = torch.from_numpy(labels).to(logits.device)
    rows = [place.row for place in places]
    return Said(logits, labelled, rows, given("rank", 0.0).long(), given("margin", 0.0), given("soft", 1.0))


@dataclass(frozen=True, slots=True)
class _Place:
    """A labelled token: its row in the pack, its flat index there, those of all words on the path of its segment, and what else
    is given there."""

    row: int
    at: int
    path: np.ndarray
    given: Mapping[str, float]


def _asked(pack: Pack) -> tuple[list[_Place], np.ndarray]:
    """Every labelled token of the pack, and its label, [reads]."""
    places, labels = [], []
    for row, index, own, above in zip(pack.segment_row, pack.segment_index, pack.own, pack.above, strict=True):
        part = pack.laid[row].segments[index]
        if part.labels is None:
            continue
        path = pack.words(np.concatenate([above, own]))
        for at in part.asked:
            places.append(_Place(row, int(own[at]), path, {name: float(values[at]) for name, values in part.given.items()}))
            labels.append(part.labels[at])
    return places, np.asarray(labels, np.float32)


def _pooled(forward: Forward, pack: Pack, places: Sequence[_Place], pool: str) -> Tensor:
    """What the head reads at each place, [reads, width]."""
    if pool == "mean":
        return _means(forward, pack, [place.path for place in places])
    at = torch.tensor([place.at if pool == "last" else place.path[0] for place in places], dtype=torch.long)
    states = forward.states(pack, at)
    if pool == "pooler":
        body: Any = forward.model.base_model
        alone = isinstance(body.pooler, torch.nn.Linear)  # ALBERT keeps its activation beside it; others take the first of a row's tokens
        pooled: Tensor = body.pooler_activation(body.pooler(states)) if alone else body.pooler(states[:, None])
        return pooled
    return states


def _means(forward: Forward, pack: Pack, paths: Sequence[np.ndarray]) -> Tensor:
    """The mean state of each path, summed in fp32 at least, [paths, width]."""
    lengths = torch.tensor([len(path) for path in paths])
    at = torch.from_numpy(np.concatenate(paths) if paths else np.zeros(0, np.int64))
    states = forward.states(pack, at)
    owner = torch.repeat_interleave(torch.arange(len(paths)), lengths).to(states.device)
    wide = states if states.dtype == torch.float64 else states.float()
    sums = wide.new_zeros(len(paths), wide.shape[1]).index_add(0, owner, wide)
    return sums / lengths.to(states.device)[:, None]


def task_answers(forward: Forward, head: TaskHead, rows: Sequence[Row], budget: int) -> Iterator[tuple[list[int], Said]]:
    """The head's answers to many rows without gradient, pack by pack: places of the rows, in the pack's order, and what is said.

    Rows of one length lie together, so that little is padded within a pack.
    """
    order = sorted(range(len(rows)), key=lambda index: rows[index].tokens)
    for chosen in _filled([forward.size(rows[index]) for index in order], budget):
        places = [order[at] for at in chosen]
        with torch.no_grad():
            yield places, read_task_head(forward, forward.pack([rows[index] for index in places]), head)


def task_logits(forward: Forward, head: TaskHead, rows: Sequence[Row], budget: int) -> Iterator[tuple[list[int], Tensor]]:
    """The same of rows that are asked once each, at the end: places of the rows, and logits [rows, outputs]."""
    for places, said in task_answers(forward, head, rows, budget):
        yield places, said.logits


def _filled(sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Consecutive places whose sizes come to at most the budget together; one alone may be more."""
    chosen: list[int] = []
    total = 0
    for place, size in enumerate(sizes):
        if chosen and total + size > budget:
            yield chosen
            chosen, total = [], 0
        chosen.append(place)
        total += size
    if chosen:
        yield chosen
