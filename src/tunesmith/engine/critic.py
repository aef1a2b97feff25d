"""The value model of an actor and a critic: adapters of its own on the policy's base, and a head that says one number a token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tunesmith.core.errors import AdapterError
from tunesmith.core.row import Row
from tunesmith.engine.model import Model, attached_to

NAME = "critic."


class Critic:
    """What a state is worth, read where the next token is about to be chosen. Raises AdapterError without a head of one value."""

    def __init__(self, model: Model) -> None:
        head = model.head
        if head is None or len(head.labels) != 1:
            raise AdapterError("a critic says one number, and this model has no head that does.")
        self.model, self.head = model, head
        self._read: Tensor | None = None
        self._said: Tensor | None = None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained of it, under names that no policy's parameter has."""
        return ((f"{NAME}{name}", parameter) for name, parameter in self.model.adapter.named_parameters())

    def rates(self) -> Mapping[str, float]:
        """Factors on the learning rate, by name."""
        return {f"{NAME}{name}": rate for name, rate in self.model.adapter.rates().items()}

    def values(self, rows: Sequence[Row]) -> Tensor:
        """The value before each target of the rows, as one pack of them has these in order, [targets].

        A leaf: a loss leaves its gradient there, and `learn` takes it on to the weights.
        """
        with self._alone():
            self._read = self._values(rows)
        self._said = self._read.detach().requires_grad_()
        return self._said

    def learn(self) -> None:
        """The gradient of the weights, from what a loss has left at the values that were said last.

        Apart from the policy's, for where that trains the base's own weights, the critic's are others in the forward and the backward.
        """
        read, said = self._read, self._said
        self._read = self._said = None
        if read is not None and said is not None and said.grad is not None:
            with self._alone():
                read.backward(said.grad)

    @torch.no_grad()
    def numbers(self, rows: Sequence[Row]) -> Tensor:
        """The values without gradient."""
        with self._alone():
            return self._values(rows)

    def _values(self, rows: Sequence[Row]) -> Tensor:
        forward = self.model.forward
        pack = forward.pack(rows)
        values: Tensor = self.head(forward.states(pack, pack.source))[:, 0]
        return values

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """With the critic's adapters, of which the last alone is learned."""
        own = {id(parameter) for _, parameter in self.model.adapter.named_parameters()}
        others = [p for adapter in attached_to(self.model.base) for _, p in adapter.named_parameters() if id(p) not in own]
        learned = [parameter for parameter in others if parameter.requires_grad]
        with self.model.active():
            for parameter in learned:
                parameter.requires_grad_(False)
            try:
                yield
            finally:
                for parameter in learned:
                    parameter.requires_grad_(True)
