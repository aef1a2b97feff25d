"""Train, dev and test: seeded, grouped, stratified; and the check that no question stands on both sides."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from tunesmith.core.errors import DataError, LeakError, SpecError, unknown
from tunesmith.core.joining import Joined
from tunesmith.core.record import Record

Size = float | int | str
Policy = Literal["error", "drop", "allow"]

TRAIN = "train"


@dataclass(frozen=True, slots=True)
class _Unit:
    """Records that stay together. name: what they share, the same in any order of the file."""

    name: str
    members: tuple[int, ...]
    stratum: str

    def __len__(self) -> int:
        return len(self.members)


def split(records: Sequence[Record], sizes: Mapping[str, Size], *, seed: int = 0, stratify: bool = True) -> dict[str, list[Record]]:
    """Divide records into named splits and "train", which gets the rest; records keep their order within each.

    sizes: {"dev": "10%", "test": 400}: a share ("10%" or 0.1, taken as near as groups allow) or an exact number.
    Records with the same group or the same question are never parted. Which unit goes where depends on a hash of seed,
    split and unit, not on the order of the records; adding records moves few others, and "test" is drawn first, so that
    another size of dev leaves it alone. stratify: each split has the labels in the same proportion (label shape only).

    Raises SpecError for a size that cannot be read, DataError if nothing would be left to train on, or if groups are
    too large for a split.
    """
    counts = counts_of(sizes, len(records))
    free = _units(records, stratify)
    chosen: dict[str, list[_Unit]] = {}
    for name in sorted(counts, key=lambda name: (name != "test", name)):
        exact = not is_share(sizes[name])
        taken = _take(free, counts[name], seed, name, exact=exact)
        if sum(map(len, taken)) != counts[name] and (exact or not taken):
            raise unreachable(name, counts[name], sum(map(len, taken)), min(map(len, free), default=0))
        names = {unit.name for unit in taken}
        chosen[name], free = taken, [unit for unit in free if unit.name not in names]
    chosen[TRAIN] = free
    if not free:
        raise nothing_left()
    return {name: [records[index] for index in sorted(i for unit in chosen[name] for i in unit.members)] for name in (TRAIN, *counts)}


def counts_of(sizes: Mapping[str, Size], total: int) -> dict[str, int]:
    """Records of each split. Raises SpecError for a size that cannot be read, DataError where none would be left for train."""
    counts = {name: _count(name, size, total) for name, size in sizes.items()}
    if TRAIN in counts:
        raise SpecError("train is the rest, and takes no size.", where="data.train", hints=["To use fewer records:  data.limit=N"])
    if not total:
        raise DataError("there are no records to split.")
    if sum(counts.values()) >= total:
        asked = ", ".join(f"{name} {sizes[name]}" for name in counts)
        what = f"{asked}: {sum(counts.values())} of {total} records leave none to train on."
        raise DataError(what, hints=["Ask for fewer, or bring more data."])
    return counts


def is_share(size: Size) -> bool:
    return isinstance(size, float) or (isinstance(size, str) and ("%" in size or "." in size))


def _count(name: str, size: Size, total: int) -> int:
    """Records asked for; a share is rounded, and is at least one record."""
    text = str(size).strip()
    share: float | None = None
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text):
        share = float(match[1]) / 100
    elif isinstance(size, bool) or not re.fullmatch(r"\d+|0?\.\d+", text):
        share = -1.0
    elif "." in text:
        share = float(text)
    if share is None:
        return int(text)
    if not 0 < share < 1:
        raise SpecError(f"'{size}' is no size of a split.", where=f"data.{name}", hints=["Form:  10%  ·  0.1  ·  400"])
    return max(round(share * total), 1)


def _units(records: Sequence[Record], stratify: bool) -> list[_Unit]:
    """Join records that share a group or a question (transitively: union-find over both)."""
    joined = Joined()
    keys = [f"question:{record.key()}" for record in records]
    for key, record in zip(keys, records, strict=True):
        if record.group is not None:
            joined.join(key, f"group:{record.group}")
    members: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        members[joined.root(key)].append(index)
    return [_unit(records, keys, indices, stratify) for indices in members.values()]


def _unit(records: Sequence[Record], keys: Sequence[str], indices: Sequence[int], stratify: bool) -> _Unit:
    # Named by its least member ("group:" sorts before "question:"), so a group keeps its name, and its split, as it grows.
    name = min((f"group:{records[i].group}" for i in indices if records[i].group is not None), default="") or min(keys[i] for i in indices)
    labels = Counter(records[i].label or "" for i in indices) if stratify else Counter({"": 1})
    return _Unit(name, tuple(indices), min(labels, key=lambda label: (-labels[label], label)))


def _take(free: Sequence[_Unit], count: int, seed: int, name: str, *, exact: bool) -> list[_Unit]:
    """Units of `count` records in all: first each stratum's share, then what fills the gap.

    Where large groups leave a gap, strata are given up for the exact number if that is asked for.
    """
    ranked = sorted(free, key=lambda unit: hashlib.sha256(f"{seed}:{name}:{unit.name}".encode()).digest())
    strata: Counter[str] = Counter()
    for unit in ranked:
        strata[unit.stratum] += len(unit)
    quotas = quotas_of(strata, count)
    taken: list[_Unit] = []
    for unit in ranked:
        if len(unit) <= quotas[unit.stratum]:
            quotas[unit.stratum] -= len(unit)
            taken.append(unit)
    gap = count - sum(map(len, taken))
    names = {unit.name for unit in taken}
    for unit in ranked:
        if 0 < len(unit) <= gap and unit.name not in names:
            gap -= len(unit)
            taken.append(unit)
    return [ranked[place] for place in exact_sum([len(unit) for unit in ranked], count)] if gap and exact else taken


def quotas_of(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Records for each stratum in proportion to its size, rounded by largest remainder, so that they add up."""
    total = sum(sizes.values())
    quotas = {stratum: count * size // total for stratum, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda stratum: (-(count * sizes[stratum] % total), stratum))
    for stratum in by_remainder[: count - sum(quotas.values())]:
        quotas[stratum] += 1
    return quotas


def exact_sum(sizes: Sequence[int], count: int) -> list[int]:
    """Places of sizes that sum to `count`, or to the largest reachable number below: subset sum over bits of one integer."""
    reach, last = 1, {}
    within = (1 << (count + 1)) - 1
    for place, size in enumerate(sizes):
        new = ((reach << size) & within) & ~reach
        reach |= new
        while new:
            lowest = new & -new
            last[lowest.bit_length() - 1] = place
            new ^= lowest
        if reach >> count & 1:
            break
    best = reach.bit_length() - 1
    taken = []
    while best:
        # A sum is first reached with places before those that reach it again, so no place is met twice on the way down.
        taken.append(last[best])
        best -= sizes[taken[-1]]
    return taken


def unreachable(name: str, count: int, found: int, smallest: int) -> DataError:
    """The error of a split that whole groups cannot fill. found: records that they can; smallest: of one group."""
    hints = [f"Nearest below:  data.{name}={found}"] if found else [f"The smallest group has {smallest} records:  data.{name}={smallest}"]
    what = f"{name} cannot have {count} records, since records of one group, or with the same question, stay together."
    return DataError(what, where=f"data.{name}", hints=hints)


def nothing_left() -> DataError:
    return DataError("the groups are too large: none is left to train on.", hints=["Ask for smaller splits, or finer groups."])


@dataclass(frozen=True, slots=True)
class LeakReport:
    """Questions that stand in two splits. pairs: how many records of the first have their question in the second."""

    pairs: Mapping[tuple[str, str], int] = field(default_factory=dict)
    dropped: int = 0

    def summary(self) -> str:
        """One line; "" if there is nothing to tell."""
        said = [f"{count:,} of {first} also in {second}" for (first, second), count in self.pairs.items()]
        if self.dropped:
            said.append(f"{self.dropped:,} dropped from train")
        return " · ".join(said)


def check_leaks(
    train: Sequence[Record], others: Mapping[str, Sequence[Record]], *, policy: Policy = "error"
) -> tuple[list[Record], LeakReport]:
    """See that no question stands in two splits (spaces folded, answers not looked at).

    policy: "error" refuses any; "drop" takes them out of train (what dev and test share is only reported, since both
    are somebody's choice); "allow" only reports. Returns the train records to use. Raises LeakError with the first
    three pairs, and SpecError for another policy.
    """
    if policy not in get_args(Policy):
        raise unknown("value of data.duplicates", policy, get_args(Policy))
    first: dict[str, tuple[str, Record]] = {}
    found: list[tuple[str, Record, str, Record]] = []
    for name, records in others.items():
        for record in records:
            other, known = first.setdefault(record.key(), (name, record))
            if other != name:
                found.append((name, record, other, known))
    kept = []
    leaked = []
    for record in train:
        hit = first.get(record.key())
        if hit is None:
            kept.append(record)
        else:
            leaked.append((TRAIN, record, *hit))
    found = leaked + found
    if found and policy == "error":
        raise _leak_error(found)
    pairs = dict(Counter((name, other) for name, _, other, _ in found))
    return (kept, LeakReport(pairs, len(leaked))) if policy == "drop" else (list(train), LeakReport(pairs))


def _leak_error(found: Sequence[tuple[str, Record, str, Record]]) -> LeakError:
    counts = Counter((name, other) for name, _, other, _ in found)
    told = ", ".join(f"{count} of {name} also in {other}" for (name, other), count in counts.items())
    hints = []
    for name, record, other, known in found[:3]:
        question = known.question()
        shown = question if len(question) <= 60 else question[:59] + "…"
        hints.append(f"{name}: {record.where}  =  {other}: {known.where}   '{shown}'".replace("\n", " "))
    hints += ["Drop them from train:   data.duplicates=drop", "Or keep them:           data.duplicates=allow"]
    return LeakError(f"the same questions stand in two splits ({told}).", where=found[0][1].where, hints=hints)
