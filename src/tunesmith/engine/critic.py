"""The value model of an actor and a critic: adapters of its own on the policy's base, and a head that says one number a token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from tunesmith.core.errors import AdapterError
from tunesmith.core.row import Row
from tunesmith.engine.model import Model

NAME = "critic."


class Critic:
    """What a state is worth, read where the next token is about to be chosen. Raises AdapterError without a head of one value."""

    def __init__(self, model: Model) -> None:
        head = model.head
        if head is None or len(head.labels) != 1:
            raise AdapterError("a critic says one number, and this model has no head that does.")
        self.model, self.head = model, head

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained of it, under names that no policy's parameter has."""
        return ((f"{NAME}{name}", parameter) for name, parameter in self.model.adapter.named_parameters())

    def rates(self) -> Mapping[str, float]:
        """Factors on the learning rate, by name."""
        return {f"{NAME}{name}": rate for name, rate in self.model.adapter.rates().items()}

    def values(self, rows: Sequence[Row]) -> Tensor:
        """The value before each target of the rows, as one pack of them has these in order, with gradient, [targets]."""
        with self.model.active():
            forward = self.model.forward
            pack = forward.pack(rows)
            values: Tensor = self.head(forward.states(pack, pack.source))[:, 0]
        return values

    @torch.no_grad()
    def numbers(self, rows: Sequence[Row]) -> Tensor:
        """The same without gradient."""
        return self.values(rows)
