"""What objectives of answers read of a pack: sums over answers, pairs of them, and the numbers that were given with their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.row import ROOT, Row, Segment
from tunesmith.engine.dealing import deal
from tunesmith.engine.forward import Scored
from tunesmith.engine.model import Model
from tunesmith.engine.processes import Processes
from tunesmith.objectives.registry import Amounts

READINGS = ("log_probs", "mean", "best", "entropy", "divergence")
"""What the head says at each target."""


class Answers:
    """The answers of a pack as their tokens were read, under the names that objectives use.

    An answer is a segment with targets; answers stand in the pack's order, those of one group one after another, the best first.
    log_probs, mean, best, entropy, divergence, and what was given with tokens (old, reference, advantage, value, return): [targets].
    answer: the place of each target's answer. sums, lengths, rank, good, sums_reference: [answers]. chosen, rejected and what
    stands with them: [pairs]. kl, values: set by the engine, where an objective reads them.
    """

    def __init__(self, scored: Scored, *, values: Tensor | None = None, kl: Tensor | None = None) -> None:
        self.scored, self.values, self.kl = scored, values, kl
        place = scored.pack.segment.to(scored.log_probs.device)
        self.answer = torch.unique_consecutive(place, return_inverse=True)[1] if len(place) else place
        self.count = int(self.answer[-1]) + 1 if len(place) else 0

    def __getattr__(self, name: str) -> Tensor | None:
        if name in READINGS:
            value: Tensor | None = getattr(self.scored, name)
            return value
        if name in ("old", "advantage", "reference", "value", "return"):
            return self._given(name)
        raise AttributeError(name)

    def best_ones(self) -> BestOnes:
        """The words of the best answer of each group, for objectives that read words."""
        return BestOnes(self, self._required("rank") == 0)

    # Of each answer

    @property
    def sums(self) -> Tensor:
        """Summed log-probability, nats."""
        return self._summed(self.scored.log_probs)

    @property
    def sums_reference(self) -> Tensor:
        """The same under the reference."""
        return self._summed(self._required("reference"))

    @property
    def lengths(self) -> Tensor:
        """Targets."""
        return self._summed(torch.ones_like(self.scored.log_probs.detach()))

    @property
    def rank(self) -> Tensor:
        """0 the best of its group, 1 the next."""
        return self._of_answers("rank", None).long()

    @property
    def good(self) -> Tensor:
        """1 desirable, 0 undesirable."""
        return self._of_answers("good", None)

    # Of each pair

    @property
    def chosen(self) -> Tensor:
        """Summed log-probability of the better one."""
        return self._side(self.sums, 0)

    @property
    def rejected(self) -> Tensor:
        """Summed log-probability of the worse one."""
        return self._side(self.sums, 1)

    @property
    def chosen_reference(self) -> Tensor:
        """The better one's under the reference."""
        return self._side(self.sums_reference, 0)

    @property
    def rejected_reference(self) -> Tensor:
        """The worse one's under the reference."""
        return self._side(self.sums_reference, 1)

    @property
    def chosen_length(self) -> Tensor:
        """Targets of the better one."""
        return self._side(self.lengths, 0)

    @property
    def rejected_length(self) -> Tensor:
        """Targets of the worse one."""
        return self._side(self.lengths, 1)

    @property
    def soft(self) -> Tensor:
        """Probability that the better one is the better one."""
        return self._side(self._of_answers("soft", 1.0), 0)

    @property
    def margin(self) -> Tensor:
        """By how much it is said to be."""
        return self._side(self._of_answers("margin", 0.0), 0)

    def _given(self, name: str) -> Tensor | None:
        found = self.scored.pack.given(name)
        return None if found is None else found.to(self.scored.log_probs)

    def _required(self, name: str) -> Tensor:
        found = self._given(name)
        if found is None:
            raise ValueError(f"the rows give no '{name}'")
        return found

    def _summed(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.count).index_add(0, self.answer, values)

    def _of_answers(self, name: str, otherwise: float | None) -> Tensor:
        """A number of each answer, which stands at each of its tokens."""
        found = self._given(name) if otherwise is not None else self._required(name)
        if found is None:
            return self.scored.log_probs.new_full((self.count,), otherwise or 0.0)
        return found.new_zeros(self.count).index_copy(0, self.answer, found)

    def _side(self, values: Tensor, rank: int) -> Tensor:
        ranks = self.rank
        if self.count % 2 or not bool((ranks[0::2] == 0).all() and (ranks[1::2] == 1).all()):
            raise ValueError("pairs are two answers, the better one first")
        return values[rank::2]


class BestOnes:
    """The readings of some targets alone, [chosen targets] each. mask: which."""

    def __init__(self, answers: Answers, mask: Tensor) -> None:
        self.answers, self.mask = answers, mask

    def __getattr__(self, name: str) -> Tensor | None:
        if name not in READINGS:
            raise AttributeError(name)
        value: Tensor | None = getattr(self.answers.scored, name)
        return None if value is None else value[self.mask]


def answers_of(row: Row) -> list[Segment]:
    """The answers of a row: its segments with targets, or at which a task head is asked."""
    return [part for part in row.segments if part.supervised.any() or len(part.asked)]


def amounts_of(rows: Sequence[Row], *, best: bool = False) -> Amounts:
    """What the rows of a step hold. best: their best answers alone."""
    answers = [part for row in rows for part in answers_of(row) if not best or part.given["rank"][-1] == 0]
    firsts = sum("rank" not in part.given or part.given["rank"][-1] == 0 for part in answers)
    return Amounts(sum(int(part.supervised.sum()) for part in answers), len(answers), firsts)


def parted(rows: Sequence[Row]) -> tuple[Sequence[Row], list[Row]]:
    """Rows with the answers that belong to their prompts, and rows with those that belong to others, which are marked as such."""
    if not any("other" in part.given for row in rows for part in row.segments):
        return rows, []
    return _kept(rows, False), _kept(rows, True)


def _kept(rows: Sequence[Row], other: bool) -> list[Row]:
    """The rows with one kind of their answers; those that have none of it are left out."""
    out = []
    for row in rows:
        place: dict[int, int] = {}
        segments: list[Segment] = []
        for index, part in enumerate(row.segments):
            if part.supervised.any() and bool(part.given.get("other", np.zeros(1))[-1]) != other:
                continue
            place[index] = len(segments)
            segments.append(part.part(slice(None), place[part.parent] if part.parent != ROOT else ROOT))
        if any(part.supervised.any() for part in segments):
            out.append(Row(tuple(segments), row.where))
    return out


@torch.no_grad()
def drift_on(others: Sequence[Row], model: Model, pack_tokens: int, processes: Processes) -> Tensor:
    """How much likelier the policy finds answers that belong to other prompts than the reference does: the mean over all of a step's,
    at least 0, nats, a scalar. Ethayarajh et al. 2024 (2402.01306), sec. 4.1."""
    forward = model.forward
    budget = max(pack_tokens, *map(forward.size, others))
    dealt = deal(lambda tokens: list(others), forward.size, budget, budget, processes.count)
    gap, count = 0.0, 0
    for _, rows in dealt.of(processes.rank):
        read = Answers(forward(forward.pack(rows)))
        gap += float((read.sums - read.sums_reference).sum())
        count += read.count
    gap, every = processes.sum([gap, count])
    return torch.tensor(max(0.0, gap / max(1.0, every)), device=model.base.device)
