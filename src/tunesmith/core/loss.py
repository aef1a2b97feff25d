"""What an objective returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Loss:
    """A sum still to be divided by its denominator over the whole step, all micro-batches and processes.

    total: the summed loss, a scalar with gradient. weight: this part's share of the denominator (tokens, pairs, ...).
    metrics: sums to be divided by the same denominator, for logging.
    """

    total: Tensor
    weight: float
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
