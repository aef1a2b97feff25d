"""Log-probabilities under the reference: the policy as the run began, the base with the adapters that it started with.

They are read once, before the first step, and kept under the hash of what they depend on; the rows then carry them along.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.core.progress import Quiet, Reporter
from tunesmith.core.row import Row, Segment
from tunesmith.data.sharing import share_prefix
from tunesmith.engine.memory import in_mode
from tunesmith.engine.model import Model
from tunesmith.engine.prepacked import prepacked, repays

Numbers = NDArray[np.float32]

PACK_TOKENS = 4096
"""Tokens of a pack that is read without gradients."""


def with_reference(reference: Model, rows: Sequence[Row], *, cache: Path | None = None, reporter: Reporter | None = None) -> list[Row]:
    """The rows, each supervised token with its log-probability under the reference as `given["reference"]`.

    reference: the base with the adapters that the run started with, as they were then. cache: a folder that what was read is kept
    in, and taken from.
    """
    if not rows:
        return []
    file = None if cache is None else cache / f"{_key(reference, rows)}.safetensors"
    found = _kept(file, rows) if file is not None else None
    if found is None:
        found = read(reference, rows, reporter=reporter)
        if file is not None:
            _keep(file, found)
    return [_given(row, numbers) for row, numbers in zip(rows, found, strict=True)]


@torch.no_grad()
def read(model: Model, rows: Sequence[Row], *, reporter: Reporter | None = None) -> list[Numbers]:
    """Log-probabilities of each row's supervised tokens under a model, segment by segment, nats, [targets] a row."""
    forward = model.forward
    out: list[Numbers] = [np.zeros(0, np.float32)] * len(rows)
    with ExitStack() as stack:
        stack.enter_context(model.active())
        stack.enter_context(in_mode(model.base.model, training=False))
        work = stack.enter_context((reporter or Quiet()).work("reference", len(rows)))
        merge = forward.packed and forward.causal
        trees = [(tree.row, tree.members) for tree in share_prefix(rows, max_tokens=PACK_TOKENS)] if merge else []
        plain = [row for row, _ in trees] if merge else list(rows)
        place = {id(row): index for index, row in enumerate(plain)}
        budget = max(PACK_TOKENS, *map(forward.size, plain))
        laid = repays(forward.model, sum(map(forward.size, plain)) // 64)
        stack.enter_context(prepacked(forward.model, PACK_TOKENS, laid, forms=False))  # the bits of a forward in training
        for pack in forward.packs(plain, budget):
            values = forward(pack).log_probs.float().cpu().numpy()
            owner = pack.segment.cpu().numpy()
            ends = np.searchsorted(owner, np.arange(pack.segments + 1))
            of = {
                (row, index): values[ends[number] : ends[number + 1]]
                for number, (row, index) in enumerate(zip(pack.segment_row, pack.segment_index, strict=True))
            }
            for at, row in enumerate(pack.rows):
                if merge:
                    for member in trees[place[id(row)]][1]:
                        out[member.index] = np.concatenate([of[at, leaf] for leaf in member.leaves])
                else:
                    out[place[id(row)]] = np.concatenate([of[at, index] for index in range(len(row.segments))])
            work.advance(sum(len(trees[place[id(row)]][1]) for row in pack.rows) if merge else len(pack.rows))
    return out


def _given(row: Row, numbers: Numbers) -> Row:
    """The row with a number at each supervised token, and 0 at the others."""
    segments, start = list[Segment](), 0
    for part in row.segments:
        count = int(part.supervised.sum())
        values = np.zeros(len(part), np.float32)
        values[part.supervised] = numbers[start : start + count]
        segments.append(part.with_given(reference=values) if count else part)
        start += count
    return replace(row, segments=tuple(segments))


def _key(model: Model, rows: Sequence[Row]) -> str:
    """A digest of everything that the numbers depend on."""
    found = hashlib.sha256(f"1 {model.base.fingerprint} {model.base.dtype} {model.base.device.type}".encode())
    for adapter in model.adapters:
        found.update(adapter.expression.encode())
        for name, value in sorted(adapter.state().items()):
            found.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    for row in rows:
        for part in row.segments:
            found.update(part.parent.to_bytes(4, "little", signed=True) + part.ids.tobytes() + part.supervised.tobytes())
        found.update(b"|")
    return found.hexdigest()[:40]


def _kept(file: Path, rows: Sequence[Row]) -> list[Numbers] | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        numbers = load_file(file)["reference"]
    except (OSError, KeyError, SafetensorError):
        return None
    counts = [row.supervised_tokens for row in rows]
    if len(numbers) != sum(counts):
        return None
    return [np.asarray(part) for part in np.split(numbers, np.cumsum(counts)[:-1])]


def _keep(file: Path, found: Sequence[Numbers]) -> None:
    """Written beside and renamed; what cannot be kept is read again another time."""
    from safetensors.numpy import save

    beside = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=file.parent, suffix=".part")
        with os.fdopen(handle, "wb") as opened:
            opened.write(save({"reference": np.concatenate(found)}))
        os.replace(beside, file)
    except OSError:
        if beside:
            Path(beside).unlink(missing_ok=True)
