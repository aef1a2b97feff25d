"""A step's rows as micro-batches, dealt out to the processes so that each has about as many tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tunesmith.core.row import Row
from tunesmith.engine.pack import best_fit

UNEVEN = 0.87
"""Below this share of the busiest process's tokens, on average, the step is cut into finer micro-batches."""


@dataclass(frozen=True, slots=True)
class Deal:
    """batches: the rows of each micro-batch of the step, over all processes. tokens: how many each has. owner: the process
    that computes each.

    A micro-batch is known by its place in `batches`, whoever computes it: its random numbers follow from that.
    """

    batches: list[list[Row]]
    tokens: list[int]
    owner: list[int]

    def of(self, rank: int) -> Iterator[tuple[int, list[Row]]]:
        """A process's micro-batches, each with its place in the step."""
        return ((number, rows) for number, rows in enumerate(self.batches) if self.owner[number] == rank)

    @property
    def passes(self) -> int:
        """Micro-batches of the process that has most of them."""
        return max(self.owner.count(rank) for rank in set(self.owner))

    @property
    def smallest(self) -> list[Row]:
        """Rows of the micro-batch with the fewest tokens."""
        return self.batches[self.tokens.index(min(self.tokens))]

    def evenness(self, count: int) -> float:
        """Tokens of a process on average, as a share of the busiest one's."""
        load = [sum(tokens for tokens, owner in zip(self.tokens, self.owner, strict=True) if owner == rank) for rank in range(count)]
        return sum(load) / (count * max(load))


def deal(trees: Callable[[int], list[Row]], size: Callable[[Row], int], budget: int, longest: int, count: int) -> Deal:
    """Micro-batches of at most `budget` tokens for `count` processes.

    trees: the step's rows, those with a common beginning merged up to so many tokens. size: tokens of a row in a pack.
    longest: tokens of the longest row. What it gives depends on its arguments alone, so every process deals the same. Where
    there are too few micro-batches for the processes they are made smaller; otherwise they are those of one process.
    """
    dealt = _deal(trees(budget), size, budget, count)
    if count == 1 or dealt.evenness(count) >= UNEVEN:
        return dealt
    finer = max(longest, math.ceil(sum(dealt.tokens) / (count * math.ceil(len(dealt.batches) / count))))
    again = _deal(trees(finer), size, finer, count)
    return again if again.evenness(count) > dealt.evenness(count) else dealt


def _deal(rows: Sequence[Row], size: Callable[[Row], int], budget: int, count: int) -> Deal:
    sizes = [size(row) for row in rows]
    bins = best_fit(sizes, budget)
    tokens = [sum(sizes[index] for index in items) for items in bins]
    load = [0] * count
    owner = [0] * len(bins)
    for number in sorted(range(len(bins)), key=lambda number: -tokens[number]):
        owner[number] = load.index(min(load))
        load[owner[number]] += tokens[number]
    return Deal([[rows[index] for index in items] for items in bins], tokens, owner)
