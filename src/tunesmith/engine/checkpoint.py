"""Checkpoints: safetensors and JSON, written beside and renamed, so that a kill at any moment leaves the last whole one.

Each holds fingerprints of its own files; a damaged one is told apart from a whole one before anything is loaded.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.core.errors import RunError

_STATE = "state.json"


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

    def save(self, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], *, best: int | None) -> None:
        """Write a checkpoint whole or not at all, then drop old ones (never the best). Raises RunError when the disk is full."""
        for left_over in self.folder.glob(".step-*.writing"):  # of a process that was killed; the run's lock is ours
            shutil.rmtree(left_over, ignore_errors=True)
        with new_folder(self.path(step)) as folder:
            sums = {}
            for name, values in tensors.items():
                file = folder / f"{name}.safetensors"
                save_file(values, file)
                sums[file.name] = _digest(file)
            whole = {**state, "step": step, "files": sums}
            (folder / _STATE).write_text(json.dumps({**whole, "digest": _digest_of(whole)}, indent=2) + "\n")
        for old in self.steps()[: -self.keep]:
            if old != best:
                shutil.rmtree(self.path(old), ignore_errors=True)

    def load(self, step: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """(tensors by file, state). Raises RunError for a damaged checkpoint, saying which others there are."""
        folder = self.path(step)
        try:
            state = json.loads((folder / _STATE).read_text())
            if state.pop("digest") != _digest_of(state):
                raise ValueError(f"{_STATE} is not what was written")
            tensors = {}
            for name, digest in state["files"].items():
                if _digest(folder / name) != digest:
                    raise ValueError(f"{name} is not what was written")
                tensors[name.removesuffix(".safetensors")] = load_file(folder / name)
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


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder that appears under its name only once everything in it is on the disk; replaces an older one of that name."""
    beside = final.with_name(f".{final.name}.writing")
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
