"""Which records are used: a declarative filter, duplicates, conflicts, balance, a limit. Every drop is counted."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.core.errors import DataError, SpecError, unknown
from tunesmith.core.record import COMPARED, Record, called, said

Condition = Callable[[Any, Record], bool]
Filter = Mapping[str, Any]

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
}
_CONDITION = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*(\S.*?)\s*")


@dataclass(frozen=True, slots=True)
class SelectionReport:
    """How many records were read and kept, and why the others were not. labels: the kept ones by label."""

    read: int
    kept: int
    filtered: int = 0
    duplicates: int = 0
    conflicts: int = 0
    unbalanced: int = 0
    over_limit: int = 0
    labels: Mapping[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """One line, as in "38,158 read · 900 kept · 12,000 filtered out · 46 in conflict"."""
        reasons = (
            ("filtered out", self.filtered),
            ("in conflict (same question, different answers)", self.conflicts),
            ("duplicates", self.duplicates),
            ("left out for balance", self.unbalanced),
            ("over the limit", self.over_limit),
        )
        return " · ".join([f"{self.read:,} read", f"{self.kept:,} kept", *(f"{count:,} {why}" for why, count in reasons if count)])


def select(
    records: Iterable[Record],
    *,
    filter: Filter | None = None,
    drop_duplicates: bool = True,
    drop_conflicts: bool = True,
    balance: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[list[Record], SelectionReport]:
    """Choose records; the kept ones stay in their order.

    filter: over the rows' own columns, all must hold: {"confidence": ">= 0.8", "lang": "en", "source": ["a", "b"]}
    (>=, <=, >, < compare numbers; ==, !=, plain values and lists compare as written; an absent value never holds).
    drop_conflicts: drop every record whose question has different answers; of answers held against one another, those that are
    ranked or marked otherwise elsewhere. drop_duplicates: of records with the same
    question and answer (spaces folded) keep the first. balance: as many records of each label. limit: at most so many,
    still balanced if balance is set. Balance and limit draw by a hash of seed and record, not by the order of the file.

    Raises SpecError for a condition that cannot be read, DataError for a column no record has, a value that is no
    number where numbers are compared, balance without labels, and if nothing is left.
    """
    if limit is not None and limit < 1:
        raise SpecError(f"a limit is at least 1, and {limit} is not.", where="data.limit")
    sieve = Sieve(filter or {})
    kept = list(sieve.through(records))
    read, filtered = sieve.read, sieve.read - sieve.kept
    before = len(kept)
    kept = _without_conflicts(kept) if drop_conflicts else kept
    conflicts, before = before - len(kept), len(kept)
    kept = _without_duplicates(kept) if drop_duplicates else kept
    duplicates, before = before - len(kept), len(kept)
    kept = _balanced(kept, None, seed) if balance else kept
    unbalanced, before = before - len(kept), len(kept)
    if limit is not None:
        kept = _balanced(kept, limit, seed) if balance else _drawn(kept, limit, seed)
    labels = Counter(record.label for record in kept if record.label is not None)
    report = SelectionReport(read, len(kept), filtered, duplicates, conflicts, unbalanced, before - len(kept), dict(sorted(labels.items())))
    if not kept:
        raise DataError(
            f"no record is left: {report.summary()}.", hints=["Loosen data.filter, or look at the rows:  tunesmith data show FILE"]
        )
    return kept, report


class Sieve:
    """A declarative filter that lets records through one at a time. read: how many it was given; kept: how many passed."""

    def __init__(self, wanted: Filter) -> None:
        self._conditions = {column: _condition(column, value) for column, value in wanted.items()}
        self.read = self.kept = 0

    def through(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records for which all conditions hold, in order. At the end raises DataError for a column that no record had."""
        seen: set[str] = set()
        columns: dict[str, None] = {}
        for record in records:
            self.read += 1
            present = [column for column in self._conditions if record.fields.get(column) not in (None, "")]  # an empty cell is absent
            if len(seen) < len(self._conditions):
                seen.update(column for column in self._conditions if column in record.fields)
                columns.update(dict.fromkeys(record.fields))
            if len(present) == len(self._conditions) and all(test(record.fields[name], record) for name, test in self._conditions.items()):
                self.kept += 1
                yield record
        for column in self._conditions:
            if self.read and column not in seen:
                raise unknown("column", column, columns, where="data.filter", error=DataError)


def _condition(column: str, wanted: Any) -> Condition:
    """Compile one condition. Text is matched against a fixed grammar; nothing is evaluated."""
    if isinstance(wanted, list | tuple):
        tests = [_condition(column, item) for item in wanted]
        if not tests:
            raise SpecError("an empty list lets nothing through.", where=f"data.filter.{column}")
        return lambda value, record: any(test(value, record) for test in tests)
    if not isinstance(wanted, str | bool | int | float):
        raise _malformed(column, wanted)
    match = _CONDITION.fullmatch(wanted) if isinstance(wanted, str) else None
    if match is None:
        if isinstance(wanted, str) and wanted.lstrip().startswith(("=", "<", ">", "!", "~")):
            raise _malformed(column, wanted)
        return lambda value, _: _equal(value, wanted)
    sign, literal = match.groups()
    if sign in ("==", "!="):
        return lambda value, _: _equal(value, literal) == (sign == "==")
    bound = _number(literal)
    if bound is None:
        raise _malformed(column, wanted)
    return lambda value, record: _OPERATORS[sign](_comparable(column, value, record), bound)


def _malformed(column: str, wanted: Any) -> SpecError:
    hints = ['Form:  ">= 0.8"  (also <= > < with a number, == != with a value)  ·  en  ·  [a, b]']
    return SpecError(f"the condition '{wanted}' cannot be read.", where=f"data.filter.{column}", hints=hints)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _comparable(column: str, value: Any, record: Record) -> float:
    number = _number(value)
    if number is None:
        raise DataError(f"'{value}' in column '{column}' is no number, and data.filter compares it with one.", where=record.where)
    return number


def _equal(value: Any, wanted: Any) -> bool:
    """Equal as written: 1, 1.0 and "1" are one value, true and "True" are one, a word is itself."""
    left, right = str(value).strip(), str(wanted).strip()
    if isinstance(value, bool) or isinstance(wanted, bool):
        return left.casefold() == right.casefold()
    a, b = _number(left), _number(right)
    return left == right or (a is not None and a == b)


def answer_of(record: Record) -> str:
    """The answer as an identity: what the assistant says and calls, spaces folded; of several answers all, in their order."""
    if record.shape == "label":
        return record.label or ""
    if record.apart:
        return "\n".join([*map(said, record.answers), *([] if record.good is None else [str(record.good)])])
    return " ".join((record.answer() or "").split()) + called(record.reply() or {})


def _disputed(record: Record) -> str:
    """What two answers may contradict each other about: the question, and of answers held against one another these answers."""
    return "\n".join([record.key(), *(sorted(map(said, record.answers)) if record.shape in COMPARED else ())])


def _without_conflicts(records: Sequence[Record]) -> list[Record]:
    answers: dict[str, str] = {}
    conflicting = set()
    keys = [_disputed(record) for record in records]
    for key, record in zip(keys, records, strict=True):
        if answers.setdefault(key, answer_of(record)) != answer_of(record):
            conflicting.add(key)
    return [record for key, record in zip(keys, records, strict=True) if key not in conflicting]


def _without_duplicates(records: Sequence[Record]) -> list[Record]:
    seen: set[tuple[str, str]] = set()
    kept = []
    for record in records:
        identity = (record.key(), answer_of(record))
        if identity not in seen:
            seen.add(identity)
            kept.append(record)
    return kept


def _drawn(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """So many records, drawn by hash, in their old order."""
    return [records[index] for index in _draw(records, range(len(records)), count, seed)]


def _draw(records: Sequence[Record], among: Sequence[int], count: int, seed: int) -> list[int]:
    """Of these indices the `count` whose records rank first by hash; equal ones rank by place."""
    if len(among) <= count:
        return list(among)
    ranks = {index: hashlib.sha256(f"{seed}:{records[index].key()}".encode()).digest() for index in among}
    return sorted(sorted(among, key=ranks.__getitem__)[:count])


def _balanced(records: Sequence[Record], limit: int | None, seed: int) -> list[Record]:
    by_label: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        if record.label is None:
            hints = ["Read the answers as labels:  data.columns.text=NAME data.columns.label=NAME", "Or leave balance out."]
            raise DataError("balance needs a label in every record.", where=record.where, hints=hints)
        by_label[record.label].append(index)
    each = min(map(len, by_label.values()), default=0)
    if limit is not None and by_label:
        each = min(each, limit // len(by_label))
        if each == 0:
            raise SpecError(
                f"a limit of {limit} leaves none for each of {len(by_label)} labels.",
                where="data.limit",
                hints=[f"Least:  {len(by_label)}"],
            )
    chosen = sorted(index for among in by_label.values() for index in _draw(records, among, each, seed))
    return [records[index] for index in chosen]
