"""What an objective reads of a pack, and what its sum over a step is divided by.

Objectives of words read the vocabulary head at supervised tokens, those of answers sum what they read over each; objectives of
labels read the task head at labelled tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tunesmith.adapters import Adapter
from tunesmith.core.errors import AdapterError, SpecError
from tunesmith.core.loss import Loss
from tunesmith.core.row import Row
from tunesmith.engine.dealing import deal
from tunesmith.engine.forward import Forward, Scored
from tunesmith.engine.head import Teacher
from tunesmith.engine.heads import read_task_head
from tunesmith.engine.model import Model
from tunesmith.engine.pack import Pack
from tunesmith.engine.processes import ALONE, Processes
from tunesmith.engine.units import Answers, amounts_of, drift_on, parted
from tunesmith.objectives import OBJECTIVES, Objective
from tunesmith.objectives.wanted import together
from tunesmith.spec import objective_calls


@dataclass(frozen=True, slots=True)
class Part:
    """One objective of a run. factor: how much it counts beside the first."""

    objective: Objective
    options: Mapping[str, Any]
    factor: float = 1.0


def parts_of(expression: str) -> list[Part]:
    """The objectives of a spec's `objective`, the first of which says what the rows are."""
    return [Part(OBJECTIVES[call.name], call.options, call.factor) for call in objective_calls(expression)]


@dataclass(frozen=True, slots=True)
class Beside:
    """What a loss may need beside the pack. kl, values: see `units.Answers`. teacher: what a divergence is from. others: further
    objectives, whose factors bring their sums to the first one's denominator. temperature: that answers were sampled at, by which the
    logits are divided."""

    kl: Tensor | None = None
    values: Tensor | None = None
    teacher: Teacher | None = None
    others: Sequence[Part] = ()
    temperature: float = 1.0


def others_of(parts: Sequence[Part], rows: Sequence[Row], weight: float | None) -> list[Part]:
    """The objectives beside the first, their factors times what brings their sums over the step to its denominator."""
    out = []
    for part in parts[1:]:
        own = weight_of(rows, part.objective, part.options, best=part.objective.unit != parts[0].objective.unit)
        if own is None or weight is None:
            raise SpecError(
                f"objective {part.objective.name} has no denominator of the whole step, and cannot be mixed.", where="objective"
            )
        out.append(replace(part, factor=part.factor * weight / own))
    return out


def loss_of(
    forward: Forward,
    adapter: Adapter,
    pack: Pack,
    objective: Objective,
    options: Mapping[str, Any],
    *,
    logging: bool = False,
    beside: Beside | None = None,
) -> Loss:
    """The objective's loss on a pack, with gradient. logging: with its metrics as well.

    Raises AdapterError where the objective reads a task head and the adapter has none.
    """
    if objective.reads_labels:
        if adapter.head is None:
            raise AdapterError(f"objective {objective.name} reads a task head, and '{adapter.expression}' has none.")
        return objective.loss(read_task_head(forward, pack, adapter.head), options)
    beside = beside or Beside()
    wanted = [part.objective.wanted(part.options, logging=logging) for part in (Part(objective, options), *beside.others)]
    asked = together(wanted)
    if beside.temperature != 1.0:
        asked = replace(asked, temperature=beside.temperature)
    scored = forward(pack, asked, teacher=beside.teacher)
    read = scored if objective.unit == "tokens" else Answers(scored, kl=beside.kl, values=beside.values)
    loss = objective.loss(read, options)
    for part in beside.others:
        of = read if part.objective.unit == objective.unit or isinstance(read, Scored) else read.best_ones()
        more = part.objective.loss(of, part.options)
        named = {f"{part.objective.name}_{name}": part.factor * value for name, value in more.metrics.items()}
        loss = Loss(loss.total + part.factor * more.total, loss.weight, {**loss.metrics, **named})
    return loss


def weight_of(
    rows: Sequence[Row], objective: Objective, options: Mapping[str, Any] = MappingProxyType({}), *, best: bool = False
) -> float | None:
    """What the objective's sum over a step of these rows is divided by; None: by the number of its micro-batches. best: it reads the
    best answer of each group alone."""
    if objective.unit == "labels":
        asked = [part.labels[part.asked] for row in rows for part in row.segments if part.labels is not None]
        return float(sum(objective.counts(labels) for labels in asked))
    return objective.weigh(amounts_of(rows, best=best), options)


@torch.no_grad()
def judge(
    model: Model, rows: Sequence[Row], objective: Objective, options: Mapping[str, Any], pack_tokens: int, processes: Processes = ALONE
) -> dict[str, float]:
    """What the objective says of rows that nothing is learned from: its metrics and its loss, over its denominator.

    The model is to be active. Raises as `loss_of`.
    """
    own, others = parted(rows)
    forward = model.forward
    kl = drift_on(others, model, pack_tokens, processes) if others else None
    budget = max(pack_tokens, *map(forward.size, own))
    dealt = deal(lambda tokens: list(own), forward.size, budget, budget, processes.count)
    sums: dict[str, float] = {}
    for _, batch in dealt.of(processes.rank):
        loss = loss_of(forward, model.adapter, forward.pack(batch), objective, options, logging=True, beside=Beside(kl))
        for name, value in {**loss.metrics, "loss": loss.total}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    weight = weight_of(own, objective, options) or float(len(dealt.batches))
    return {name: value / weight for name, value in processes.sum_named(sums).items()}
