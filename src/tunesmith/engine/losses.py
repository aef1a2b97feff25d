"""What an objective reads of a pack, and what its sum over a step is divided by.

Objectives of words read the vocabulary head at supervised tokens; objectives of labels read the task head at labelled ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.adapters import Adapter
from tunesmith.core.errors import AdapterError
from tunesmith.core.loss import Loss
from tunesmith.core.row import Row
from tunesmith.engine.forward import Forward
from tunesmith.engine.heads import read_task_head
from tunesmith.engine.pack import Pack
from tunesmith.objectives import Objective


def loss_of(
    forward: Forward, adapter: Adapter, pack: Pack, objective: Objective, options: Mapping[str, Any], *, logging: bool = False
) -> Loss:
    """The objective's loss on a pack, with gradient. logging: with its metrics as well.

    Raises AdapterError where the objective reads a task head and the adapter has none.
    """
    if not objective.reads_labels:
        return objective.loss(forward(pack, objective.wanted(options, logging=logging)), options)
    if adapter.head is None:
        raise AdapterError(f"objective {objective.name} reads a task head, and '{adapter.expression}' has none.")
    return objective.loss(read_task_head(forward, pack, adapter.head), options)


def weight_of(rows: Sequence[Row], objective: Objective) -> float:
    """What the objective's sum over a step of these rows is divided by."""
    if not objective.reads_labels:
        return float(sum(row.supervised_tokens for row in rows))
    asked = [part.labels[part.asked] for row in rows for part in row.segments if part.labels is not None]
    return float(sum(objective.counts(labels) for labels in asked))
