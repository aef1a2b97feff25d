"""What some methods have to see of the data before they are trained: gradients on a few samples, for masks of entries."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from torch import Tensor

from tunesmith.adapters import Adapter
from tunesmith.core.row import Row


def prepare(adapter: Adapter, rows: Sequence[Row], loss: Callable[[Row], Tensor]) -> int:
    """Show an adapter that waits for it the gradients of `loss` on some rows, evenly spread, one at a time; how many it saw.

    Which rows these are depends on their number alone, so that a run that begins again finds the same.
    """
    waiting = [form for form in adapter.forms.values() if form.waits]
    if not waiting:
        return 0
    count = min(len(rows), max(form.samples for form in waiting))
    for number in range(count):
        for form in waiting:
            form.watch(True)
        loss(rows[number * len(rows) // count]).backward()
    for form in waiting:
        form.watch(False)
    for _, parameter in adapter.named_parameters():
        parameter.grad = None
    return count


def digest(adapter: Adapter) -> str:
    """A fingerprint of what its forms decided."""
    found = hashlib.sha256()
    for name, value in sorted(adapter.memory().items()):
        found.update(name.encode() + value.detach().cpu().float().numpy().tobytes())
    return found.hexdigest()
