"""Checkpoints: safetensors and JSON, written beside and renamed, so that a kill at any moment leaves the last whole one.

Each holds fingerprints of its own files; a damaged one is told apart from a whole one before anything is loaded. Several
processes write a file each, `NAME-00001-of-00002.safetensors`; whole tensors are read back from them by any number.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.core.errors import RunError
from tunesmith.engine.processes import ALONE, Processes

_STATE = "state.json"
_SHARD = re.compile(r"(?P<name>.+?)(?:-\d{5}-of-\d{5})?\.safetensors")


class Checkpoints:
    """The checkpoints of one run, `folder/step-N/`."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        found = [p.name.removeprefix("step-") for p in self.folder.glob("step-*")] if self.folder.is_dir() else []
        return sorted(int(name) for name in found if name.isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def save(
        self,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        *,
        best: int | None,
        processes: Processes = ALONE,
        spread: Collection[str] = (),
    ) -> None:
        """Write a checkpoint whole or not at all, then drop old ones (never the best). Raises RunError when the disk is full.

        processes: that call this together; each writes its part, the first the state and the name. spread: tensors of
        which each process holds a piece along the first dimension.
        """
        if processes.first:
            for left_over in self.folder.glob(".step-*.writing"):  # of a process that was killed; the run's lock is ours
                shutil.rmtree(left_over, ignore_errors=True)
        with (new_folder if processes.first else _folder_of_the_first)(self.path(step)) as folder:
            processes.meet()  # the folder is there
            parts = {_part(name, processes): _own(values, spread, processes) for name, values in tensors.items()}
            every = processes.gathered({file: _written(values, folder / file, sync=processes.several) for file, values in parts.items()})
            if processes.first:
                whole = {**state, "step": step, "files": {file: digest for sums in every for file, digest in sums.items()}}
                (folder / _STATE).write_text(json.dumps({**whole, "digest": _digest_of(whole)}, indent=2) + "\n")
        if processes.first:
            for old in self.steps()[: -self.keep]:
                if old != best:
                    shutil.rmtree(self.path(old), ignore_errors=True)
        processes.meet()  # it has its name

    def load(self, step: int) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any]]:
        """(whole tensors by name of their files, state). Raises RunError for a damaged checkpoint, saying which others there are."""
        folder = self.path(step)
        try:
            state = json.loads((folder / _STATE).read_text())
            if state.pop("digest") != _digest_of(state):
                raise ValueError(f"{_STATE} is not what was written")
            files: dict[str, list[Path]] = {}
            for name, digest in sorted(state["files"].items()):
                if _digest(folder / name) != digest:
                    raise ValueError(f"{name} is not what was written")
                if shard := _SHARD.fullmatch(name):
                    files.setdefault(shard["name"], []).append(folder / name)
            tensors: dict[str, Mapping[str, Tensor]] = {
                name: load_file(parts[0]) if len(parts) == 1 else Pieces(parts) for name, parts in files.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as cause:
            raise self._damaged(step, cause) from None
        return tensors, state

    def _damaged(self, step: int, cause: Exception) -> RunError:
        others = [other for other in self.steps() if other != step]
        go_on = f"resume then goes on from step {max(others)}" if others else "resume then starts from the beginning"
        detail = str(cause)
        if isinstance(cause, KeyError):
            detail = f"{_STATE} lacks {cause}"
        elif isinstance(cause, OSError):
            detail = f"{cause.strerror} ({Path(str(cause.filename)).name})"
        return RunError(f"the checkpoint is damaged: {detail}.", where=str(self.path(step)), hints=[f"Remove that folder; {go_on}."])


class Pieces(Mapping[str, Tensor]):
    """Tensors of several files, read when they are asked for. One that lies in several files is laid end to end."""

    def __init__(self, files: list[Path]) -> None:
        self._files: dict[str, list[Any]] = {}
        for file in files:
            opened: Any = safe_open(file, framework="pt")
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                self._files.setdefault(name, []).append(opened)

    def __getitem__(self, name: str) -> Tensor:
        parts = [file.get_tensor(name) for file in self._files[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _part(name: str, processes: Processes) -> str:
    """The file that this process writes."""
    return f"{name}-{processes.rank + 1:05d}-of-{processes.count:05d}.safetensors" if processes.several else f"{name}.safetensors"


def _own(values: dict[str, Tensor], spread: Collection[str], processes: Processes) -> dict[str, Tensor]:
    """What this process writes: its pieces of what is spread, and a share of what every process holds."""
    if not processes.several:
        return values
    out: dict[str, Tensor] = {}
    load = [0] * processes.count
    for name, value in values.items():
        if name in spread or name.rpartition(".")[0] in spread:  # moments are named after their weights
            if value.numel() and (value.ndim or processes.first):
                out[name] = value
            continue
        least = load.index(min(load))
        load[least] += value.numel()
        if least == processes.rank:
            out[name] = value
    return out


def _written(values: dict[str, Tensor], file: Path, *, sync: bool) -> str:
    """Write a file, and its fingerprint. sync: onto the disk, since others wait to hear that it is there."""
    save_file(values, file)
    if sync:
        _sync(file)
    return _digest(file)


@contextlib.contextmanager
def _folder_of_the_first(final: Path) -> Iterator[Path]:
    """The folder that the first process makes and names, for another one to write into."""
    try:
        yield _beside(final)
    except (OSError, SafetensorError) as cause:
        raise unwritable(cause, final) from None


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder that appears under its name only once everything in it is on the disk; replaces an older one of that name."""
    beside = _beside(final)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        yield beside
        for file in beside.iterdir():
            _sync(file)
        _sync(beside)
        if final.exists():
            aside = final.with_name(f".{final.name}.old")
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
            beside.rename(final)
            shutil.rmtree(aside)
        else:
            beside.rename(final)
        _sync(final.parent)
    except BaseException as cause:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(cause, OSError | SafetensorError):
            raise unwritable(cause, final) from None
        raise


def _beside(final: Path) -> Path:
    """Where a folder is written until it has its name."""
    return final.with_name(f".{final.name}.writing")


def unwritable(cause: OSError | SafetensorError, path: Path) -> RunError:
    """The error of a file or folder that could not be written, with what to do."""
    if isinstance(cause, OSError):
        full, reason = cause.errno in (errno.ENOSPC, errno.EDQUOT), cause.strerror or str(cause)
    else:
        full, reason = "No space left" in str(cause), str(cause)
    if not full:
        return RunError(f"cannot be written: {reason}.", where=str(path))
    return RunError(
        "no space left on the device; nothing was half-written.",
        where=str(path),
        hints=["Free some space, then go on with --resume from the last whole checkpoint."],
    )


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, and onto the disk. Raises RunError when the disk is full."""
    beside = path.with_name(f".{path.name}.writing")
    try:
        beside.write_text(text, encoding="utf-8")
        _sync(beside)
        beside.rename(path)
    except OSError as cause:
        beside.unlink(missing_ok=True)
        raise unwritable(cause, path) from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
