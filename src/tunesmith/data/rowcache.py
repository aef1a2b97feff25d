"""Rendered rows on disk: safetensors files named by the hash of what they were made from. Nothing in them is executable."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunesmith.core.row import Segment
from tunesmith.data.textrow import TextRow

_VERSION = "2"
_ARRAYS = ("ids", "supervised", "lengths", "sources", "spans", "span_counts", "asked", "labels", "asked_counts")

Made = Sequence[tuple[int, TextRow]]


class RowCache:
    """Rows by content hash in a folder. A damaged entry counts as absent and is written anew.

    problem: why entries are not written (a full disk, a folder that cannot be written to); None while all is well.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.problem: str | None = None
        self.hits = self.misses = 0

    def path(self, key: str) -> Path:
        return self.folder / f"{key[:40]}.safetensors"

    def load(self, key: str) -> list[tuple[int, TextRow]] | None:
        """The rows kept under a key, each with the index of its source; None if there are none, or none that are whole."""
        rows = _read(self.path(key), key)
        if rows is None:
            self.misses += 1
        else:
            self.hits += 1
        return rows

    def save(self, key: str, made: Made) -> None:
        """Keep rows; written beside and renamed, so that no reader sees half an entry. A failure is kept in `problem`."""
        from safetensors.numpy import save

        arrays = _pack(made)
        notes = json.dumps([row.notes for _, row in made], ensure_ascii=False)
        data = save(arrays, {"version": _VERSION, "key": key, "notes": notes, "sha256": _digest(arrays, notes)})
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".part")
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, self.path(key))
        except OSError as cause:  # the rows are there; only keeping them failed
            self.problem = f"rows are not kept in {self.folder}: {cause.strerror or cause}"
            if temporary:
                Path(temporary).unlink(missing_ok=True)


def _pack(made: Made) -> dict[str, NDArray[np.generic]]:
    segments = [row.segments[0] for _, row in made]
    spans = [span for _, row in made for span in row.cuttable]
    return {
        "ids": np.concatenate([s.ids for s in segments]) if segments else np.zeros(0, np.int32),
        "supervised": np.concatenate([s.supervised for s in segments]) if segments else np.zeros(0, np.bool_),
        "lengths": np.asarray([len(s) for s in segments], np.int64),
        "sources": np.asarray([index for index, _ in made], np.int64),
        "spans": np.asarray(spans, np.int64).reshape(-1, 2),
        "span_counts": np.asarray([len(row.cuttable) for _, row in made], np.int64),
        "asked": np.concatenate([s.asked for s in segments]) if segments else np.zeros(0, np.int64),
        "labels": np.concatenate([_given(s) for s in segments]) if segments else np.zeros(0, np.float32),
        "asked_counts": np.asarray([len(s.asked) for s in segments], np.int64),
    }


def _given(part: Segment) -> NDArray[np.float32]:
    return np.zeros(0, np.float32) if part.labels is None else part.labels[part.asked]


def _digest(arrays: dict[str, NDArray[np.generic]], notes: str) -> str:
    digest = hashlib.sha256(notes.encode())
    for name in _ARRAYS:
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _read(path: Path, key: str) -> list[tuple[int, TextRow]] | None:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            meta = file.metadata() or {}
            if meta.get("version") != _VERSION or meta.get("key") != key:
                return None
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    if meta.get("sha256") != _digest(arrays, meta.get("notes", "")):
        return None
    return _unpack(arrays, json.loads(meta["notes"]))


def _unpack(arrays: dict[str, NDArray[np.generic]], notes: Sequence[Sequence[str]]) -> list[tuple[int, TextRow]]:
    ends = [np.cumsum(arrays[name]) for name in ("lengths", "span_counts", "asked_counts")]
    made = []
    for number, (source, said) in enumerate(zip(arrays["sources"].tolist(), notes, strict=True)):
        tokens, cut, asked = (slice(int(end[number - 1]) if number else 0, int(end[number])) for end in ends)
        spans = tuple((int(a), int(b)) for a, b in arrays["spans"][cut].tolist())
        ids, supervised = arrays["ids"][tokens].astype(np.int32), arrays["supervised"][tokens].astype(np.bool_)
        labels = None
        if asked.stop > asked.start:
            labels = np.full(len(ids), np.nan, np.float32)
            labels[arrays["asked"][asked]] = arrays["labels"][asked]
        part = Segment(ids, supervised, labels=labels)
        made.append((source, TextRow((part,), cuttable=spans, notes=tuple(said))))
    return made
