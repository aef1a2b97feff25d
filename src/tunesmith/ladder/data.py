"""From a spec to records: read, selected, split, and held against leaks, each step with its line of report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tunesmith.core.errors import DataError, SpecError
from tunesmith.core.record import Record
from tunesmith.data import check_leaks, read_records, select, split
from tunesmith.spec import DataSpec


@dataclass(slots=True)
class Splits:
    """train, dev, test: records, possibly none. notes: what was left out and why, a line each."""

    train: list[Record] = field(default_factory=list)
    dev: list[Record] = field(default_factory=list)
    test: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(spec: DataSpec, source: str) -> list[Record]:
    """All records of one source, read as the spec says."""
    return list(
        read_records(source, columns=spec.columns or None, shape=spec.shape, encoding=spec.encoding, decode_errors=spec.decode_errors)
    )


def load_splits(spec: DataSpec) -> Splits:
    """The records of a run. Raises DataError, LeakError or SpecError."""
    if spec.train is None:
        raise SpecError("there are no samples: data.train is missing.", hints=["Name a file:  data.train=FILE"])
    sources = [spec.train] if isinstance(spec.train, str) else spec.train
    records = [record for source in sources for record in read(spec, source)]
    chosen, report = select(
        records,
        filter=spec.filter or None,
        drop_duplicates=True,
        drop_conflicts=spec.conflicts == "drop",
        balance=spec.balance,
        seed=spec.seed,
    )
    out = Splits(notes=[report.summary()])
    sizes = {name: given for name, given in (("test", spec.test), ("dev", spec.dev)) if _is_size(given)}
    parts = split(chosen, {name: _size(value) for name, value in sizes.items()}, seed=spec.seed) if sizes else {"train": chosen}
    out.train, out.dev, out.test = parts["train"], parts.get("dev", []), parts.get("test", [])
    for name, given in (("dev", spec.dev), ("test", spec.test)):
        if isinstance(given, str) and name not in sizes:
            setattr(out, name, _outside(spec, name, given, out.notes))
    out.train, leaks = check_leaks(out.train, {"dev": out.dev, "test": out.test}, policy=spec.duplicates)
    if leaks.summary():
        out.notes.append(leaks.summary())
    if spec.limit is not None and len(out.train) > spec.limit:
        out.train, _ = select(out.train, drop_conflicts=False, drop_duplicates=False, balance=spec.balance, limit=spec.limit, seed=spec.seed)
    if not out.train:
        raise DataError("no training samples are left.", hints=out.notes)
    return out


def _outside(spec: DataSpec, name: str, source: str, notes: list[str]) -> list[Record]:
    """A split from a source of its own: filtered like train, but nothing else is taken away, only counted."""
    records, report = select(read(spec, source), filter=spec.filter or None, drop_duplicates=False, drop_conflicts=False, seed=spec.seed)
    if not records:
        raise DataError(f"no {name} samples are left.", where=source, hints=[report.summary()])
    if repeated := len(records) - len({record.key() for record in records}):
        notes.append(f"{name}: {repeated} questions stand there more than once")
    return records


def _is_size(value: str | int | None) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and (value.strip().endswith("%") or value.strip().isdigit()))


def _size(value: str | int | None) -> str | int:
    assert value is not None
    return int(value) if isinstance(value, str) and value.strip().isdigit() else value


def take(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """A seeded sample of at most so many records, labels in proportion."""
    if len(records) <= count:
        return list(records)
    return split(records, {"part": count}, seed=seed)["part"]


def as_messages(record: Record, messages: Sequence[object]) -> Record:
    """The record as a dialogue with these messages."""
    return replace(record, shape="messages", messages=tuple(messages))  # type: ignore[arg-type]
