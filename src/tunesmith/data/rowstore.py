"""Rows on disk, for more of them than memory holds: flat memory-mapped arrays in a folder. Nothing in them is executable.

A store is written once, by appending, in a folder beside its own, and renamed when it is whole; so whoever finds a store finds
all of it. Its name is a key that its maker derives from all that the rows depend on, so a second run and a resume find it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.errors import RunError
from tunesmith.core.row import Row, Segment

_VERSION = 2
_META = "store.json"
_ABANDONED = 24 * 3600  # seconds without a write after which a half-written store is somebody's who was killed

_ARRAYS: Mapping[str, str] = {
    "ids": "<i4",  # [tokens] of all rows, segment after segment
    "supervised": "|b1",  # [tokens]
    "segment_ends": "<i8",  # [segments] tokens up to and with each segment
    "parents": "<i4",  # [segments] within the row, -1 for a root
    "names": "<i2",  # [segments] places in the list of names
    "asked_ends": "<i8",  # [segments] labels up to and with each segment
    "asked": "<i4",  # [labels] the token of each, within its segment
    "labels": "<f4",  # [labels]
    "row_ends": "<i8",  # [rows] segments up to and with each row
    "where": "|u1",  # [bytes] of all places, UTF-8
    "where_ends": "<i8",  # [rows] bytes up to and with each row
}


class RowStore(Sequence[Row]):
    """Rows of a store, each read from the disk when it is asked for. What a TextRow knows beyond a Row is not kept.

    tokens, supervised_tokens: of all rows. facts: what the writer left beside the rows, as JSON.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        self.folder = folder
        self.tokens, self.supervised_tokens = int(meta["sizes"]["ids"]), int(meta["supervised_tokens"])
        self.facts: dict[str, Any] = dict(meta["facts"])
        self._rows, self._names = int(meta["sizes"]["row_ends"]), list(meta["names"])
        self._arrays = {name: _mapped(folder / f"{name}.bin", kind, meta["sizes"][name]) for name, kind in _ARRAYS.items()}

    @staticmethod
    def find(parent: Path, key: str) -> RowStore | None:
        """The store kept under a key; None where there is none, or none that is whole."""
        folder = parent / key
        try:
            meta = json.loads((folder / _META).read_text(encoding="utf-8"))
            if meta["version"] != _VERSION or meta["key"] != key:
                return None
            return RowStore(folder, meta)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def __len__(self) -> int:
        return self._rows

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        """One row, built anew from the disk. Slices would hold many at once and are refused."""
        if isinstance(index, slice):
            raise TypeError("rows on disk are taken one at a time, not in slices")
        place = index + self._rows if index < 0 else index
        if not 0 <= place < self._rows:
            raise IndexError(f"row {index} of {self._rows}")
        first, last = _span(self._arrays["row_ends"], place)
        start, end = _span(self._arrays["where_ends"], place)
        where = self._arrays["where"][start:end].tobytes().decode("utf-8", "surrogatepass")
        return Row(tuple(self._segment(number) for number in range(first, last)), where)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(self._rows))

    def _segment(self, number: int) -> Segment:
        start, end = _span(self._arrays["segment_ends"], number)
        ids = np.array(self._arrays["ids"][start:end], np.int32)  # copies: a row outlives the mapping
        supervised = np.array(self._arrays["supervised"][start:end], np.bool_)
        first, last = _span(self._arrays["asked_ends"], number)
        labels = None
        if last > first:
            labels = np.full(end - start, np.nan, np.float32)
            labels[self._arrays["asked"][first:last]] = self._arrays["labels"][first:last]
        return Segment(ids, supervised, int(self._arrays["parents"][number]), self._names[int(self._arrays["names"][number])], labels)


class RowWriter:
    """Appends rows to a store that does not exist yet; see `write_store`. facts: what is kept beside the rows, as JSON."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {}
        self.rows = self.tokens = self.supervised_tokens = 0
        self._segments = self._where = self._labels = 0
        self._names: dict[str, int] = {}
        self._files: dict[str, IO[bytes]] = {name: (folder / f"{name}.bin").open("xb") for name in _ARRAYS}

    def append(self, row: Row) -> None:
        """Write one row after those before it."""
        where = row.where.encode("utf-8", "surrogatepass")
        for segment in row.segments:
            self.tokens += len(segment)
            self.supervised_tokens += int(segment.supervised.sum())
            self._put("ids", segment.ids)
            self._put("supervised", segment.supervised)
            self._put("segment_ends", self.tokens)
            self._put("parents", segment.parent)
            self._put("names", self._names.setdefault(segment.name, len(self._names)))
            self._labels += len(segment.asked)
            self._put("asked_ends", self._labels)
            if segment.labels is not None:
                self._put("asked", segment.asked)
                self._put("labels", segment.labels[segment.asked])
        self.rows += 1
        self._segments += len(row.segments)
        self._where += len(where)
        self._put("row_ends", self._segments)
        self._files["where"].write(where)
        self._put("where_ends", self._where)

    def extend(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.append(row)

    def _put(self, name: str, value: int | NDArray[Any]) -> None:
        self._files[name].write(np.asarray(value, _ARRAYS[name]).tobytes())

    def finish(self, key: str) -> None:
        """Everything to the disk, and last what says how much of it there is."""
        self.close(sync=True)
        sizes = {name: (self.folder / f"{name}.bin").stat().st_size // np.dtype(kind).itemsize for name, kind in _ARRAYS.items()}
        meta = {
            "version": _VERSION,
            "key": key,
            "sizes": sizes,
            "supervised_tokens": self.supervised_tokens,
            "names": list(self._names),
            "facts": self.facts,
        }
        with (self.folder / _META).open("x", encoding="utf-8") as file:
            json.dump(meta, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def close(self, *, sync: bool = False) -> None:
        for file in self._files.values():
            if sync and not file.closed:
                file.flush()
                os.fsync(file.fileno())
            file.close()


@contextmanager
def write_store(parent: Path, key: str) -> Iterator[RowWriter]:
    """Write the store `parent/key`: whole when the block ends well, not at all otherwise.

    Where another process finished the same store first, its one stays. Raises RunError where the disk is full or the folder
    cannot be written to.
    """
    beside: Path | None = None
    writer: RowWriter | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(parent)
        beside = Path(tempfile.mkdtemp(dir=parent, prefix=f".{key}-", suffix=".writing"))
        writer = RowWriter(beside)
        yield writer
        writer.finish(key)
        _put_in_place(beside, parent / key, key)
    except OSError as cause:
        raise _unwritable(cause, parent) from None
    finally:
        if writer is not None:
            with suppress(OSError):  # closed already, or what is left to write finds no space
                writer.close()
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _put_in_place(beside: Path, final: Path, key: str) -> None:
    if final.exists():
        if RowStore.find(final.parent, key) is not None:
            return
        shutil.rmtree(final)  # damaged
    try:
        beside.rename(final)
    except OSError:
        if RowStore.find(final.parent, key) is None:
            raise


def _clear_abandoned(parent: Path) -> None:
    """Remove what processes that were killed left half-written."""
    for folder in parent.glob(".*.writing"):
        try:
            touched = max((file.stat().st_mtime for file in folder.iterdir()), default=folder.stat().st_mtime)
        except OSError:  # another process is just renaming or removing it
            continue
        if time.time() - touched > _ABANDONED:
            shutil.rmtree(folder, ignore_errors=True)


def _unwritable(cause: OSError, parent: Path) -> RunError:
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        hints = ["Make room, or keep the cache on another disk:  export TUNESMITH_CACHE=FOLDER"]
        return RunError("there is no space left for the rows.", where=str(parent), hints=hints)
    hints = ["Keep the cache elsewhere:  export TUNESMITH_CACHE=FOLDER"]
    return RunError(f"the rows cannot be kept: {cause.strerror or cause}.", where=str(parent), hints=hints)


def _mapped(path: Path, kind: str, size: int) -> NDArray[Any]:
    """The array of a file, [size]. Raises ValueError where the file is not as long as that."""
    if path.stat().st_size != size * np.dtype(kind).itemsize:
        raise ValueError(f"{path.name} is cut short")
    return np.memmap(path, kind, "r", shape=(size,)) if size else np.zeros(0, kind)


def _span(ends: NDArray[Any], place: int) -> tuple[int, int]:
    return (int(ends[place - 1]) if place else 0), int(ends[place])
