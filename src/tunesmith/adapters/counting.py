"""What an adapter amounts to, counted three ways: what is trained, what of the base changed, and at which rank; and what it costs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.adapters.arithmetic import Change, change_of
from tunesmith.adapters.attach import Adapter
from tunesmith.adapters.files import save_adapter
from tunesmith.adapters.heads import states_width
from tunesmith.adapters.merging import merge, unmerge
from tunesmith.adapters.sites import blocks
from tunesmith.core.errors import AdapterError


@dataclass(frozen=True, slots=True)
class Counts:
    """of: values of the base. trainable: values that training moves. changed: values of the base that are others now, where the
    adapter is a change of weights, else 0. ranks: module path -> numerical rank of its weight's change. stored: bytes of its
    files. flops: operations that it adds to a token's forward while it is not merged. merges: empty, or why it does not merge.
    """

    of: int
    trainable: int
    changed: int
    ranks: Mapping[str, int]
    stored: int
    flops: int
    merges: str


def counts(adapter: Adapter, *, ranks: bool = True) -> Counts:
    """Count an adapter as it is now. ranks: decompose each changed matrix, which takes seconds on a large base.

    Merges it and takes it out again, to see whether it can be, unless it is merged already.
    """
    changed, found = 0, dict[str, int]()
    try:
        change = change_of(adapter)
    except AdapterError:  # tokens, gates, bottlenecks: nothing of the base changes
        change = None
    if change is not None:
        for path in change.paths():
            matrix = _change_at(adapter, change, path)
            changed += int(matrix.count_nonzero())
            if ranks:
                found[path] = rank_of(matrix)
        changed += sum(int(value.count_nonzero()) for value in change.other.values())
    own = (p for path, p in adapter.model.named_parameters() if not any(part.startswith("ts_") for part in path.split(".")))
    base = sum(p.numel() * (1 if p.is_floating_point() else 2) for p in own)  # a byte of a 4-bit map holds two values
    return Counts(base, adapter.trainable(), changed, found, stored_bytes(adapter), flops_of(adapter), why_not_merged(adapter))


def _change_at(adapter: Adapter, change: Change, path: str) -> Tensor:
    """The change of a module's weight: as its one form knows it, since the difference of two weights is rounded."""
    form = adapter.forms.get(path)
    alone = sum(other.split("~")[0] == path for other in adapter.forms) == 1
    own = form.delta() if form is not None and alone else None
    return change.matrix(path) if own is None else own.detach()


def rank_of(matrix: Tensor) -> int:
    """Numerical rank: singular values above the largest one times the longer side times the precision of fp32."""
    return int(torch.linalg.matrix_rank(matrix.float()))


def stored_bytes(adapter: Adapter) -> int:
    """Size of the files that it is saved to."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapter, Path(folder), base="", fingerprint="")
        return sum(file.stat().st_size for file in Path(folder).iterdir())


def flops_of(adapter: Adapter) -> int:
    """Operations that forms, a task head left aside, add to a token's forward; of virtual tokens, what attending to them costs."""
    virtual = sum(tokens.count for tokens in adapter.virtual.values())
    attention = 4 * virtual * states_width(adapter.model) * len(blocks(adapter.model)[1]) if virtual else 0
    return sum(form.flops() for form in adapter.forms.values()) + attention


def why_not_merged(adapter: Adapter) -> str:
    """Empty where it merges, or is the base's own weights already; else the refusal's reason."""
    if adapter.merged or (adapter.in_place and all(form.writes for form in adapter.forms.values())):
        return ""
    if not adapter.forms and not adapter.virtual:
        return "a task head stays beside the base."
    try:
        merge(adapter)
    except AdapterError as refusal:
        return refusal.what
    unmerge(adapter)
    return ""
