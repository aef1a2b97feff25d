"""Files larger than memory: the same records are chosen, split and trained on, but only their hashes and dev and test are held.

The sources are read a few times over: to decide, which takes 25 bytes a record; to look at records that leak; to fetch what
dev and test hold, if they are parts of train; and to make rows, which go to disk as they come.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.errors import DataError, SpecError
from tunesmith.core.progress import Reporter
from tunesmith.core.record import Record
from tunesmith.core.registry import parse_calls
from tunesmith.core.row import Row
from tunesmith.data import BadRows, SelectionReport, check_leaks
from tunesmith.data.lengths import Limit
from tunesmith.data.rendering import Renderer
from tunesmith.data.rows import CHUNK, notes_of
from tunesmith.data.rowstore import RowStore, write_store
from tunesmith.data.select import Sieve
from tunesmith.data.survey import Places, Survey
from tunesmith.ladder.data import Splits, counts_line, dev_apart_from_test, is_size, iter_source, note_skipped, outside
from tunesmith.spec import DataSpec, Overlong, Spec

_SILENT = 15.0  # seconds of reading without a word


class RecordStream(Sequence[Record]):
    """Training records that are read anew from their sources each time they are gone through; nothing of them is held.

    digest: content hash of all records that pass the filter. chosen: which of them these are.
    """

    def __init__(self, spec: DataSpec, digest: str, chosen: NDArray[np.bool_]) -> None:
        self.spec, self.digest, self.chosen = spec, digest, chosen
        self._count = int(chosen.sum())

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        raise TypeError("streamed records are gone through in order; none can be picked out")

    def __iter__(self) -> Iterator[Record]:
        """Raises DataError at the end if the sources are no longer what they were."""
        digest = hashlib.sha256()
        for place, record in enumerate(filtered(self.spec)):
            digest.update(_content(record))
            if place < len(self.chosen) and self.chosen[place]:
                yield record
        if digest.hexdigest() != self.digest:
            raise DataError(
                "the data changed while it was being read.", where="data.train", hints=["Run again once the files are at rest."]
            )

    def key(self) -> str:
        """Content hash of these records and their order."""
        return hashlib.sha256(self.digest.encode() + np.packbits(self.chosen).tobytes()).hexdigest()


def stream_splits(spec: DataSpec, reporter: Reporter) -> Splits:
    """What `load_splits` gives, record for record, with a stream for train. Raises what it raises."""
    out = Splits()
    survey, digest = _surveyed(spec, reporter, out.notes)
    places = _selected(spec, survey, out.notes)
    sizes: dict[str, str | int | float] = {}
    for name, given in (("test", spec.test), ("dev", spec.dev)):
        if isinstance(given, str) and not is_size(given):
            setattr(out, name, outside(spec, name, given, out.notes))
        elif given is not None:
            sizes[name] = given
    places = _apart(spec, survey, places, out)
    if spec.balance:
        before, places = len(places), survey.balanced(places, None, spec.seed)
        out.notes.append(f"balanced: {counts_line(survey.label_counts(places))}, {before - len(places):,} left out")
    parts = survey.split(places, sizes, spec.seed) if sizes else {"train": places}
    places = parts["train"]
    if spec.limit is not None and len(places) > spec.limit:
        before = len(places)
        places = survey.balanced(places, spec.limit, spec.seed) if spec.balance else survey.drawn(places, spec.limit, spec.seed)
        out.notes.append(f"train: {before - len(places):,} over the limit of {spec.limit:,} left out")
    _fetch(spec, survey, places, parts, out)
    chosen = np.zeros(len(survey), np.bool_)
    chosen[places] = True
    out.train = RecordStream(spec, digest, chosen)
    return out


def filtered(spec: DataSpec, skipped: BadRows | None = None, sieve: Sieve | None = None) -> Iterator[Record]:
    """The records of data.train that pass data.filter, one at a time."""
    sources = [spec.train] if isinstance(spec.train, str) else spec.train or []
    counted = skipped or BadRows()
    records = (record for source in sources for record in iter_source(spec, source, counted))
    return (sieve or Sieve(spec.filter)).through(records)


def _surveyed(spec: DataSpec, reporter: Reporter, notes: list[str]) -> tuple[Survey, str]:
    """What is to be known of each record, and the content hash of all; with a word now and then while it takes long."""
    survey, digest = Survey(), hashlib.sha256()
    skipped, sieve = BadRows(), Sieve(spec.filter)
    said = time.monotonic()
    for record in filtered(spec, skipped, sieve):
        survey.add(record)
        digest.update(_content(record))
        if time.monotonic() - said > _SILENT:
            said = time.monotonic()
            reporter.line("reading", f"{sieve.read:,} records so far ({record.where})")
    note_skipped("train", skipped, notes)
    survey.read = sieve.read
    return survey, digest.hexdigest()


def _content(record: Record) -> bytes:
    """All of a record that a row may be made from, and its place, which rows name."""
    parts: list[object] = [record.shape, record.messages, record.text, record.label, record.tools, record.where]
    parts += [record.pair, record.value, record.tokens, record.tags, record.choices]
    return json.dumps(parts, sort_keys=True, default=str).encode()


def _selected(spec: DataSpec, survey: Survey, notes: list[str]) -> Places:
    """The records without conflicts and duplicates. Raises DataError where none is left."""
    everything = survey.everything()
    drop = survey.all_labelled() if spec.conflicts is None else spec.conflicts == "drop"
    agreeing = survey.without_conflicts(everything) if drop else everything
    places = survey.without_duplicates(agreeing)
    report = SelectionReport(
        survey.read,
        len(places),
        filtered=survey.read - len(everything),
        duplicates=len(agreeing) - len(places),
        conflicts=len(everything) - len(agreeing),
        labels=survey.label_counts(places),
    )
    if not len(places):
        raise DataError(
            f"no record is left: {report.summary()}.", hints=["Loosen data.filter, or look at the rows:  tunesmith data show FILE"]
        )
    notes.append(report.summary())
    return places


def _apart(spec: DataSpec, survey: Survey, places: Places, out: Splits) -> Places:
    """Train's records, held against dev and test that are files of their own. Only those found there are read again."""
    dev_apart_from_test(spec, out)
    asked = np.asarray([int(record.key(), 16) for record in [*out.dev, *out.test]], np.uint64)
    hit = np.isin(survey.questions[places], asked)
    _, leaks = check_leaks(_at(spec, places[hit]), {"dev": out.dev, "test": out.test}, policy=spec.duplicates)
    if leaks.summary():
        out.notes.append(leaks.summary())
    if spec.duplicates == "drop":
        places = places[~hit]
    if not len(places):
        raise DataError("no training samples are left.", hints=out.notes)
    groups = survey.group_names(places)
    for name, records in (("dev", out.dev), ("test", out.test)):
        if shared := groups & {record.group for record in records}:
            out.notes.append(f"{name}: {len(shared):,} groups stand in train as well, since both are files of their own")
    return places


def _fetch(spec: DataSpec, survey: Survey, train: Places, parts: dict[str, Places], out: Splits) -> None:
    """Read what is held: dev and test where they are parts of train, and the records that show what the task is."""
    wanted = {"witnesses": survey.of_each_kind(train), **{name: places for name, places in parts.items() if name != "train"}}
    union = np.unique(np.concatenate(list(wanted.values())))
    found = dict(zip(union.tolist(), _at(spec, union), strict=True))
    for name, places in wanted.items():
        setattr(out, name, [found[place] for place in places.tolist()])


def _at(spec: DataSpec, places: Places) -> list[Record]:
    """The records at these places, in order; reads no further than the last."""
    if not len(places):
        return []
    wanted = set(places.tolist())
    return [record for place, record in enumerate(islice(filtered(spec), int(places[-1]) + 1)) if place in wanted]


# Rows


@dataclass(frozen=True, slots=True)
class Making:
    """How rows are made. make: records to rows; mark: all that `make` depends on besides them and the renderer."""

    tokenizer: Any
    renderer: Renderer
    make: Callable[[Iterable[Record]], Iterator[Row]]
    mark: str
    max_tokens: int
    overlong: Overlong

    def key(self, stream: RecordStream) -> str:
        """Content hash of all that the rows depend on."""
        parts = [stream.key(), self.renderer.fingerprint(), self.mark, self.max_tokens, self.overlong]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


def stored_rows(stream: RecordStream, making: Making, parent: Path, reporter: Reporter) -> RowStore:
    """The rows of a stream on disk, under `parent`: made now, or found as an earlier run left them.

    facts of the store: "lengths", what the length limit did ("" for nothing), and "notes", decisions with their number of
    rows. Raises DataError as the length policy says, RunError where the disk is full.
    """
    key = making.key(stream)
    store = RowStore.find(parent, key)
    if store is not None:
        reporter.line("", f"{len(store):,} rows were made before and are taken from {store.folder}")
        return store
    with write_store(parent, key) as writer:
        limit, notes, done = Limit(making.max_tokens, making.overlong, making.tokenizer), Counter[str](), 0
        given = _Counted(stream)
        rows = making.make(given)
        with reporter.work("rows", len(stream)) as work:
            while chunk := list(islice(rows, CHUNK)):
                kept = limit.part(chunk)
                notes.update(notes_of(kept))
                writer.extend(kept)
                work.advance(given.count - done, f"{writer.tokens:,} tokens" + (f" · {limit.over:,} rows too long" if limit.over else ""))
                done = given.count
        report = limit.report()
        writer.facts = {"lengths": str(report) if report.dropped or report.truncated else "", "notes": dict(notes.most_common())}
    store = RowStore.find(parent, key)
    assert store is not None
    return store


class _Counted:
    """Records as they are taken. count: how many have been."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._records, self.count = iter(records), 0

    def __iter__(self) -> Iterator[Record]:
        return self

    def __next__(self) -> Record:
        record = next(self._records)
        self.count += 1
        return record


# What needs all records at once


def check_rungs(spec: Spec) -> None:
    """Refuse rungs that look for demonstrations among all training samples, before anything heavy starts."""
    if not spec.data.stream:
        return
    needing = {"few_shot", "nearest"} | (set() if spec.climb.demonstrations else {"chain_of_thought"})
    names = [parse_calls(rung, kind="rung")[0].name for rung in spec.climb.rungs]
    refused = [name for name in names if name in needing]
    if refused:
        left = [rung for rung, name in zip(spec.climb.rungs, names, strict=True) if name not in needing]
        hints = [f"Nearest that works here:  climb.rungs=[{', '.join(left) or 'zero_shot, sft'}]"]
        if "chain_of_thought" in refused:
            hints.append("chain_of_thought works with examples of its own:  climb.demonstrations=FILE")
        what = f"{', '.join(refused)}: demonstrations are chosen among all training samples, and data.stream holds none of them."
        raise SpecError(what, where="climb.rungs", hints=hints)
