"""What identifies a base: the content of its weights and its configuration, not where it lies or what it is called."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from tunesmith.core.packages import cache_dir, sha256_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read from a folder: one, or the shards that the index names."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    return []


def fingerprint(folder: Path, *, extra: Iterable[str] = ()) -> str:
    """Content hash of a base folder, 64 hexadecimal digits: every weight file and config.json, and `extra` in order.

    Weights are read once; later calls trust a digest remembered for the same path, size and modification time.
    """
    parts = [f"{file.name} {remembered_sha256(file)}" for file in weight_files(folder)]
    parts.append(f"config.json {sha256_of(folder / 'config.json')}")
    parts += [f"extra {item}" for item in extra]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def remembered_sha256(file: Path) -> str:
    """sha256 of a large file, remembered in the cache by (real path, size, modification time in ns)."""
    real = file.resolve()
    status = real.stat()
    key = [str(real), status.st_size, status.st_mtime_ns]
    memory = cache_dir() / "digests" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(memory.read_text("utf-8"))
        if known["file"] == key:
            return str(known["sha256"])
    digest = sha256_of(real)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a second reading, nothing else
        memory.parent.mkdir(parents=True, exist_ok=True)
        beside = memory.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps({"file": key, "sha256": digest}), "utf-8")
        os.replace(beside, memory)
    return digest
