"""The sites of a model as people read them: one line for each kind, whatever the number of layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from tunesmith.adapters.sites import SUBLAYERS, find_sites, find_sublayers, select
from tunesmith.core.errors import AdapterError


@dataclass(frozen=True, slots=True)
class Shape:
    """Sites of one name and shape. layers: as ranges, "0-29"; empty outside of blocks. path: of the modules, * for the layer's number.
    values: of all their weights and biases together; 0 for a sub-layer, which has none of its own."""

    name: str
    inputs: int
    outputs: int
    bias: bool
    layers: str
    path: str
    values: int


def site_table(model: nn.Module) -> list[Shape]:
    """Every kind of site that this model has: linear maps, sub-layers, and the vocabulary head. Raises AdapterError without blocks."""
    every = [*find_sites(model), *find_sublayers(model)]
    with suppress(AdapterError):  # an encoder's body has no vocabulary
        every += select(model, ["head"])
    kinds: dict[tuple[str, int, int, bool, str], list[Any]] = {}
    for site in every:
        biased = getattr(site.module, "bias", None) is not None and site.name not in SUBLAYERS
        path = re.sub(r"\.\d+(?=\.|$)", ".*", site.path, count=1)
        kinds.setdefault((site.name, site.inputs, site.outputs, biased, path), []).append(site)
    out = []
    for (name, inputs, outputs, biased, path), sites in kinds.items():
        values = 0 if name in SUBLAYERS else len(sites) * (inputs * outputs + biased * outputs)
        out.append(Shape(name, inputs, outputs, biased, ranges([site.layer for site in sites if site.layer >= 0]), path, values))
    return out


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
