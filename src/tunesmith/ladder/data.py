"""From a spec to records: read, selected, split, and held against leaks, each step with its line of report."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tunesmith.core.errors import DataError, SpecError
from tunesmith.core.progress import Quiet, Reporter
from tunesmith.core.record import COMPARED, Message, Record
from tunesmith.data import BadRows, check_leaks, read_records, select, split
from tunesmith.data.comparing import compared, shared_answers
from tunesmith.spec import DataSpec

Size = str | int | float


@dataclass(slots=True)
class Splits:
    """train, dev, test: records, possibly none. notes: what was left out and why, a line each. witnesses: where train is
    streamed, the records that show its labels and whether it has dialogues."""

    train: Sequence[Record] = field(default_factory=list)
    dev: list[Record] = field(default_factory=list)
    test: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    witnesses: list[Record] = field(default_factory=list)


def read(spec: DataSpec, source: str, bad_rows: BadRows | None = None) -> list[Record]:
    """All records of one source; see `iter_source`."""
    return list(iter_source(spec, source, bad_rows))


def iter_source(spec: DataSpec, source: str, bad_rows: BadRows | None = None) -> Iterator[Record]:
    """The records of one source, read as the spec says. bad_rows: where rows are counted that the spec lets be skipped."""
    counted = bad_rows or BadRows()
    return read_records(
        source,
        columns=spec.columns or None,
        shape=spec.shape,
        encoding=spec.encoding,
        decode_errors=spec.decode_errors,
        bad_rows=counted if spec.bad_rows == "skip" else None,
    )


def load_splits(spec: DataSpec, reporter: Reporter | None = None) -> Splits:
    """The records of a run; with data.stream those of train are not held. Raises DataError, LeakError or SpecError.

    In this order: dev and test from sources of their own are read; train is read and selected, and held against them;
    labels are balanced; dev and test that are parts of train are drawn from what is left; the limit is applied.
    """
    if spec.train is None:
        raise SpecError("there are no samples: data.train is missing.", hints=["Name a file:  data.train=FILE"])
    if spec.stream:
        from tunesmith.ladder.streaming import stream_splits  # which builds on this module

        return stream_splits(spec, reporter or Quiet())
    out = Splits()
    out.train = _train(spec, [spec.train] if isinstance(spec.train, str) else spec.train, out.notes)
    sizes: dict[str, Size] = {}
    for name, given in (("test", spec.test), ("dev", spec.dev)):
        if isinstance(given, str) and not is_size(given):
            setattr(out, name, outside(spec, name, given, out.notes))
        elif given is not None:
            sizes[name] = given
    _part_from_one_another(spec, out)
    if spec.balance:
        before = len(out.train)
        out.train, report = select(out.train, drop_conflicts=False, drop_duplicates=False, balance=True, seed=spec.seed)
        out.notes.append(f"balanced: {counts_line(report.labels)}, {before - len(out.train):,} left out")
    if sizes:
        parts = split(out.train, sizes, seed=spec.seed)
        out.train, out.dev, out.test = parts["train"], parts.get("dev", out.dev), parts.get("test", out.test)
    if spec.limit is not None and len(out.train) > spec.limit:
        before = len(out.train)
        out.train, _ = select(
            out.train, drop_conflicts=False, drop_duplicates=False, balance=spec.balance, limit=spec.limit, seed=spec.seed
        )
        out.notes.append(f"train: {before - len(out.train):,} over the limit of {spec.limit:,} left out")
    if any(record.shape in COMPARED for record in out.train):
        out.notes += [f"train: {line}" for line in compared(out.train).lines()]
        out.notes += shared_answers(out.train, {"dev": out.dev, "test": out.test})
    return out


def _train(spec: DataSpec, sources: Sequence[str], notes: list[str]) -> list[Record]:
    skipped = BadRows()
    records = [record for source in sources for record in read(spec, source, skipped)]
    note_skipped("train", skipped, notes)
    labelled = all(record.shape == "label" for record in records)
    drop = labelled if spec.conflicts is None else spec.conflicts == "drop"  # a text has one label, but many good answers
    chosen, report = select(records, filter=spec.filter or None, drop_conflicts=drop, seed=spec.seed)
    notes.append(report.summary())
    return chosen


def outside(spec: DataSpec, name: str, source: str, notes: list[str]) -> list[Record]:
    """A split from a source of its own: filtered like train, but nothing else is taken away, only counted."""
    skipped = BadRows()
    records = read(spec, source, skipped)
    note_skipped(name, skipped, notes)
    present = {column for column in spec.filter if any(column in record.fields for record in records)}
    for column in spec.filter:
        if column not in present:
            notes.append(f"{name}: not filtered by '{column}', a column that {source} does not have")
    wanted = {column: condition for column, condition in spec.filter.items() if column in present}
    try:
        kept, _ = select(records, filter=wanted or None, drop_duplicates=False, drop_conflicts=False, seed=spec.seed)
    except DataError as cause:
        raise DataError(cause.what, where=cause.where or source, hints=cause.hints) from None
    if len(kept) < len(records):
        notes.append(f"{name}: {len(records) - len(kept):,} of {len(records):,} filtered out")
    if repeated := len(kept) - len({record.key() for record in kept}):
        notes.append(f"{name}: {repeated:,} questions stand there more than once")
    return kept


def note_skipped(name: str, skipped: BadRows, notes: list[str]) -> None:
    if skipped.count:
        notes.append(f"{name}: {skipped.summary()}")


def dev_apart_from_test(spec: DataSpec, out: Splits) -> None:
    """With data.duplicates=drop, leave out of dev what is also in test. Raises DataError where nothing is left of dev."""
    if spec.duplicates != "drop":
        return
    asked = {record.key() for record in out.test}
    kept = [record for record in out.dev if record.key() not in asked]
    if len(kept) < len(out.dev):
        out.notes.append(f"dev: {len(out.dev) - len(kept):,} questions that are also in test left out")
    if out.dev and not kept:
        hints = ["Name other samples, or a share of train:  data.dev=10%"]
        raise DataError("every question of dev is also in test.", where="data.dev", hints=hints)
    out.dev = kept


def _part_from_one_another(spec: DataSpec, out: Splits) -> None:
    """See that no question stands on two sides, before anything is drawn from train: what is drawn then has none of the others'."""
    dev_apart_from_test(spec, out)
    out.train, leaks = check_leaks(out.train, {"dev": out.dev, "test": out.test}, policy=spec.duplicates)
    if leaks.summary():
        out.notes.append(leaks.summary())
    if not out.train:
        raise DataError("no training samples are left.", hints=out.notes)
    groups = {record.group for record in out.train} - {None}
    for name, records in (("dev", out.dev), ("test", out.test)):
        if shared := groups & {record.group for record in records}:
            out.notes.append(f"{name}: {len(shared):,} groups stand in train as well, since both are files of their own")


def counts_line(labels: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {label}" for label, count in labels.items())


def is_size(value: Size) -> bool:
    return not isinstance(value, str) or re.fullmatch(r"\s*(\d+(\.\d*)?\s*%|\d*\.?\d+)\s*", value) is not None


def take(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """A seeded sample of at most so many records, labels in proportion, in their old order.

    Each label's records are ranked by hash, and the places of a rank are spread evenly from 0 to 1; those nearest 0 are taken.
    """
    drawn = [hashlib.sha256(f"{seed}:{record.key()}:{place}".encode()).digest() for place, record in enumerate(records)]
    sizes = Counter(record.label for record in records)
    ranked: dict[str | None, int] = defaultdict(int)
    share: dict[int, float] = {}
    for place in sorted(range(len(records)), key=drawn.__getitem__):
        label = records[place].label
        share[place] = (ranked[label] + 0.5) / sizes[label]
        ranked[label] += 1
    chosen = sorted(share, key=lambda place: (share[place], drawn[place]))[:count]
    return [records[place] for place in sorted(chosen)]


def as_messages(record: Record, messages: Sequence[Message]) -> Record:
    """The record as a dialogue with these messages."""
    return replace(record, shape="messages", messages=tuple(messages))
