"""Choosing and splitting records that are not held: what has to be known of each is kept in 25 bytes.

The choices are those of `select` and `split`, record for record; only what they are computed from is smaller: hashes of the
question and of the answer, and numbers for label and group, in flat arrays.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.errors import DataError, SpecError
from tunesmith.core.record import Record
from tunesmith.data.select import answer_of
from tunesmith.data.splits import TRAIN, Size, counts_of, exact_sum, is_share, nothing_left, quotas_of, unreachable

Places = NDArray[np.int64]
"""Indices of records, counted in the order in which they were added, ascending."""

_LABEL, _DIALOGUE, _OTHER = 1, 2, 0


@dataclass(slots=True)
class Survey:
    """What has been seen of the records. read: how many there were before the filter. labels, groups: names by number; every
    record holds a number or -1."""

    read: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    _questions: array[int] = field(default_factory=lambda: array("Q"))
    _answers: array[int] = field(default_factory=lambda: array("Q"))
    _label: array[int] = field(default_factory=lambda: array("i"))
    _group: array[int] = field(default_factory=lambda: array("i"))
    _kind: array[int] = field(default_factory=lambda: array("b"))

    def add(self, record: Record) -> None:
        """Take down one record. Raises SpecError for shapes of which a run needs all records at hand."""
        if record.apart:
            what = f"data.stream reads texts, dialogues and labels, and this row reads as '{record.shape}'."
            hints = ["Such rows are held against one another, or drawn from, all together.", "Leave it out:  data.stream=false"]
            raise SpecError(what, where=record.where, hints=hints)
        self._questions.append(int(record.key(), 16))
        self._answers.append(_hash(answer_of(record)))
        self._label.append(-1 if record.label is None else self.labels.setdefault(record.label, len(self.labels)))
        self._group.append(-1 if record.group is None else self.groups.setdefault(record.group, len(self.groups)))
        turns = sum(message.get("role") == "assistant" for message in record.messages)
        self._kind.append(_LABEL if record.shape == "label" else _DIALOGUE if turns > 1 else _OTHER)

    def __len__(self) -> int:
        return len(self._questions)

    @property
    def questions(self) -> NDArray[np.uint64]:
        """`Record.key()` of each record, as a number."""
        return np.frombuffer(self._questions, np.uint64) if self._questions else np.zeros(0, np.uint64)

    @property
    def label(self) -> NDArray[np.int32]:
        return np.frombuffer(self._label, np.int32) if self._label else np.zeros(0, np.int32)

    def everything(self) -> Places:
        return np.arange(len(self), dtype=np.int64)

    def label_counts(self, places: Places) -> dict[str, int]:
        """Records of each label, labels in order."""
        numbers, counts = np.unique(self.label[places], return_counts=True)
        names = list(self.labels)
        return dict(sorted((names[number], count) for number, count in zip(numbers.tolist(), counts.tolist(), strict=True) if number >= 0))

    def group_names(self, places: Places) -> set[str]:
        """The groups that these records belong to."""
        names = list(self.groups)
        return {names[number] for number in np.unique(np.frombuffer(self._group, np.int32)[places]).tolist() if number >= 0}

    def all_labelled(self) -> bool:
        """Whether every record is a text with a label."""
        return not len(self) or bool((np.frombuffer(self._kind, np.int8) == _LABEL).all())

    # Choosing, as `select` does

    def without_conflicts(self, places: Places) -> Places:
        """Without the questions that have different answers."""
        questions, answers = self.questions[places], np.frombuffer(self._answers, np.uint64)[places]
        order = np.lexsort((answers, questions))
        first, second = order[:-1], order[1:]
        differ = (questions[first] == questions[second]) & (answers[first] != answers[second])
        return places[~np.isin(questions, questions[second][differ])]

    def without_duplicates(self, places: Places) -> Places:
        """Of the same question and answer the first."""
        questions, answers = self.questions[places], np.frombuffer(self._answers, np.uint64)[places]
        order = np.lexsort((answers, questions))  # stable: the first stays the first
        first, second = order[:-1], order[1:]
        keep = np.ones(len(places), np.bool_)
        keep[second[(questions[first] == questions[second]) & (answers[first] == answers[second])]] = False
        return places[keep]

    def drawn(self, places: Places, count: int, seed: int) -> Places:
        """At most so many, drawn by a hash of seed and question; equal ones by place."""
        if len(places) <= count:
            return places
        ranks = _ranks((f"{seed}:{int(question):016x}" for question in self.questions[places]), len(places))
        return np.sort(places[np.argsort(ranks, kind="stable")[:count]])

    def balanced(self, places: Places, limit: int | None, seed: int) -> Places:
        """As many of every label, together at most `limit`. Raises DataError where a record has none, SpecError for too low a limit."""
        label = self.label[places]
        if (label < 0).any():
            hints = ["Read the answers as labels:  data.columns.text=NAME data.columns.label=NAME", "Or leave balance out."]
            raise DataError("balance needs a label in every record.", where="data.balance", hints=hints)
        by_label = [places[label == number] for number in np.unique(label)]
        each = min(map(len, by_label), default=0)
        if limit is not None and by_label:
            each = min(each, limit // len(by_label))
            if each == 0:
                what = f"a limit of {limit} leaves none for each of {len(by_label)} labels."
                raise SpecError(what, where="data.limit", hints=[f"Least:  {len(by_label)}"])
        return np.sort(np.concatenate([self.drawn(among, each, seed) for among in by_label])) if by_label else places

    def of_each_kind(self, places: Places) -> Places:
        """The first record of every label, and the first dialogue of several turns: what a task is made from."""
        _, first = np.unique(self.label[places], return_index=True)
        dialogues = np.flatnonzero(np.frombuffer(self._kind, np.int8)[places] == _DIALOGUE)[:1]
        chosen: Places = places[np.unique(np.concatenate([first, dialogues]))]
        return chosen

    # Splitting, as `split` does

    def split(self, places: Places, sizes: Mapping[str, Size], seed: int) -> dict[str, Places]:
        """Divide into named splits and "train". Raises what `split` raises."""
        counts = counts_of(sizes, len(places))
        units = self._units(places)
        free = np.ones(len(units.sizes), np.bool_)
        out: dict[str, Places] = {}
        for name in sorted(counts, key=lambda name: (name != "test", name)):
            exact = not is_share(sizes[name])
            taken = units.take(free, counts[name], f"{seed}:{name}", exact=exact)
            found = int(units.sizes[taken].sum())
            if found != counts[name] and (exact or not len(taken)):
                raise unreachable(name, counts[name], found, int(units.sizes[free].min(initial=len(places))))
            free[taken] = False
            out[name] = places[np.isin(units.of_record, taken)]
        if not free.any():
            raise nothing_left()
        return {TRAIN: places[free[units.of_record]], **out}

    def _units(self, places: Places) -> _Units:
        """Join records that share a group or a question, transitively."""
        questions, of_record = np.unique(self.questions[places], return_inverse=True)
        group = np.frombuffer(self._group, np.int32)[places]
        names = [f"group:{name}" for name in self.groups]
        if (group >= 0).any():
            of_record, least = _joined(of_record, len(questions), group, np.argsort(np.argsort(np.asarray(names))))
        else:
            least = np.full(len(questions), -1)
        question = np.full(len(least), np.iinfo(np.uint64).max, np.uint64)
        np.minimum.at(question, of_record, self.questions[places])
        order = {name: place for place, name in enumerate(sorted({"", *self.labels}))}
        code = np.asarray([order[name] for name in [*self.labels, ""]])[self.label[places]]  # -1, no label, is the last
        by_rank = sorted(range(len(names)), key=names.__getitem__)
        group_names = {unit: names[by_rank[rank]] for unit, rank in enumerate(least) if rank >= 0}
        return _Units(of_record, np.bincount(of_record), _majority(of_record, code), list(order), question, group_names)


@dataclass(slots=True)
class _Units:
    """Records that stay together. of_record: the unit of each, [records]. sizes: records, [units]. strata: places in
    `labels`, [units]. question: the least one of each, [units]. group_names: the least name of units with groups."""

    of_record: NDArray[np.int64]
    sizes: NDArray[np.int64]
    strata: NDArray[np.int64]
    labels: list[str]
    question: NDArray[np.uint64]
    group_names: dict[int, str]

    def take(self, free: NDArray[np.bool_], count: int, mark: str, *, exact: bool) -> Places:
        """Units of `count` records in all: first each stratum's share, then what fills the gap; see `splits._take`."""
        among = np.flatnonzero(free)
        names = (self.group_names.get(int(unit)) or f"question:{int(self.question[unit]):016x}" for unit in among)
        ranked = among[np.argsort(_ranks((f"{mark}:{name}" for name in names), len(among)), kind="stable")]
        totals = np.bincount(self.strata[ranked], self.sizes[ranked], len(self.labels)).astype(int).tolist()
        quotas = quotas_of({name: total for name, total in zip(self.labels, totals, strict=True) if total}, count)
        left = [quotas.get(name, 0) for name in self.labels]
        taken: list[int] = []
        gap = count
        for unit in ranked:
            size, stratum = int(self.sizes[unit]), int(self.strata[unit])
            if size <= left[stratum]:
                left[stratum] -= size
                gap -= size
                taken.append(int(unit))
            if not any(left):
                break
        known = set(taken)
        for unit in ranked if gap else ():
            if self.sizes[unit] <= gap and int(unit) not in known:
                gap -= int(self.sizes[unit])
                taken.append(int(unit))
        if gap and exact:
            return np.sort(ranked[exact_sum(self.sizes[ranked].tolist(), count)])
        return np.sort(np.asarray(taken, np.int64))


def _joined(
    question: NDArray[np.int64], questions: int, group: NDArray[np.int32], rank: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(unit of each record, [records]; least rank among the names of each unit's groups or -1, [units])."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    has = group >= 0
    size = questions + len(rank)
    edges = coo_matrix((np.ones(int(has.sum()), np.int8), (question[has], questions + group[has])), shape=(size, size))
    component = connected_components(edges, directed=False)[1]
    used, of_record = np.unique(component[question], return_inverse=True)
    least = np.full(len(used), len(rank))
    np.minimum.at(least, of_record[has], rank[group[has]])
    return of_record, np.where(least == len(rank), -1, least)


def _majority(unit: NDArray[np.int64], code: NDArray[np.int64]) -> NDArray[np.int64]:
    """The most frequent code in each unit, the least of equally frequent ones, [units]."""
    if int(unit.max(initial=-1)) + 1 == len(unit):  # one record a unit: nothing to sort
        out = np.empty_like(unit)
        out[unit] = code
        return out
    width = int(code.max(initial=0)) + 1
    pairs, counts = np.unique(unit * width + code, return_counts=True)
    order = np.lexsort((pairs % width, -counts, pairs // width))
    first: NDArray[np.int64] = np.unique(pairs[order] // width, return_index=True)[1]
    most: NDArray[np.int64] = pairs[order][first] % width
    return most


def _ranks(texts: Iterable[str], count: int) -> NDArray[np.uint64]:
    return np.fromiter((_hash(text) for text in texts), np.uint64, count)


def _hash(text: str) -> int:
    """The first 8 bytes of SHA-256; orders as the whole of it does."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")
