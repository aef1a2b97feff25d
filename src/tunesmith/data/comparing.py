"""What answers that are held against one another have in common with what should not be learned from them: lengths, repetition, leaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.core.record import COMPARED, Record, said
from tunesmith.core.words import pieces

Spread = tuple[float, float, float]
"""Least, median and most."""

_NAMED = {"pair": ("pair", "pairs"), "ranking": ("ranking", "rankings"), "rated": ("rated answer", "rated answers")}


@dataclass(frozen=True, slots=True)
class Comparisons:
    """Counts over records of answers.

    records, questions: how many, and how many different ones. shapes: records of each. ties: soft is 0.5. unsure: it is between
    0.5 and 1. margins: sizes of those given. chosen, rejected: words of the best answer and of each worse one (of rated ones: of
    good and of bad ones). longer: of the comparisons with answers of different length the share in which the best is the longer
    one, with how many these are; a model that only counts words is right that often. repeated: records with the same
    question and answers as an earlier one; turned: those of them that rank or mark them otherwise.
    """

    records: int
    questions: int
    shapes: Mapping[str, int]
    ties: int = 0
    unsure: int = 0
    margins: Spread | None = None
    chosen: Spread | None = None
    rejected: Spread | None = None
    longer: tuple[float, int] | None = None
    repeated: int = 0
    turned: int = 0

    def lines(self) -> list[str]:
        """One line a finding."""
        kinds = ", ".join(f"{count:,} {_NAMED[name][count != 1]}" for name, count in self.shapes.items())
        out = [f"{kinds} · different questions: {self.questions:,}"]
        if self.ties or self.unsure:
            out.append(f"ties: {self.ties:,} · with a probability below 1: {self.unsure:,}")
        if self.margins:
            out.append(f"margins: {_shown(self.margins)}")
        if self.chosen and self.rejected:
            better, worse = ("good", "bad") if set(self.shapes) == {"rated"} else ("chosen", "rejected")
            out.append(f"words: {better} {_shown(self.chosen)} · {worse} {_shown(self.rejected)}")
        if self.longer:
            out.append(f"the chosen answer is the longer one in {self.longer[0]:.1%} of {self.longer[1]:,} that differ in length")
        if self.repeated:
            out.append(f"repeats of a question with its answers: {self.repeated:,}, of them otherwise ranked or marked: {self.turned:,}")
        return out


def compared(records: Sequence[Record]) -> Comparisons:
    """Count over the records that hold answers."""
    held = [record for record in records if record.shape in COMPARED]
    better = [record.answers[0] for record in held if record.good is not False]
    worse = [answer for record in held for answer in (record.answers if record.good is False else record.answers[1:])]
    decided = [record for record in held if record.soft != 0.5]
    lengths = [(_length(said(record.answers[0])), _length(said(answer))) for record in decided for answer in record.answers[1:]]
    differing = [(a, b) for a, b in lengths if a != b]
    margins = [abs(record.margin) for record in held if record.margin is not None]
    repeated, turned = _repeated(held)
    return Comparisons(
        records=len(held),
        questions=len({record.key() for record in held}),
        shapes=dict(Counter(record.shape for record in held)),
        ties=sum(record.soft == 0.5 for record in held),
        unsure=sum(record.soft is not None and 0.5 < record.soft < 1 for record in held),
        margins=_spread(margins),
        chosen=_spread([_length(said(answer)) for answer in better]),
        rejected=_spread([_length(said(answer)) for answer in worse]),
        longer=(sum(a > b for a, b in differing) / len(differing), len(differing)) if differing else None,
        repeated=repeated,
        turned=turned,
    )


def shared_answers(train: Sequence[Record], others: Mapping[str, Sequence[Record]]) -> list[str]:
    """A line for each split with answers that stand in train as well, without a prompt: texts that were seen, in pairs that were not.

    The questions of such pairs are both answers together, so splits keep pairs apart, and texts only where `group` says so.
    """
    seen = _alone(train)
    counts = {name: len(seen & _alone(records)) for name, records in others.items()} if seen else {}
    return [f"{name}: {count:,} answers without a prompt stand in train as well, in other pairs" for name, count in counts.items() if count]


def _alone(records: Sequence[Record]) -> set[str]:
    return {said(answer) for record in records if record.shape in COMPARED and record.prompt_is_empty for answer in record.answers}


def _repeated(records: Sequence[Record]) -> tuple[int, int]:
    first: dict[tuple[str, ...], tuple[object, ...]] = {}
    repeated = turned = 0
    for record in records:
        words = list(map(said, record.answers))
        order = (*words, record.good)
        key = (record.key(), *sorted(words))
        if key in first:
            repeated += 1
            turned += first[key] != order
        else:
            first[key] = order
    return repeated, turned


def _length(text: str) -> int:
    return len(pieces(text))


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    least, median, most = np.quantile(np.asarray(values, np.float64), [0, 0.5, 1]).tolist()
    return least, median, most


def _shown(spread: Spread) -> str:
    least, median, most = spread
    return f"{median:,.4g} ({least:,.4g} to {most:,.4g})"
