"""Task heads: what is said of a text, or of a token, from the hidden states of the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from tunesmith.adapters.hooks import ByName
from tunesmith.core.errors import AdapterError

Pool = Literal["pooler", "first", "last", "mean"]
"""Which state a head reads: that of the path's first token, through the base's own pooler or as it is, that of the asked
token (the last one, for whole texts), or the mean over the path."""

POOLS: tuple[str, ...] = ("auto", *get_args(Pool))

Says = Literal["label", "tags", "value", "choice"]
"""What a head says: a label of a text, a tag of each word, a number, or how well a candidate answers."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a head was made and reads. limit: texts are shortened to so many tokens, as in training; None: they are not.

    says: what its outputs are. mean, deviation: of the values that a number was learned from; its output is in deviations
    from the mean. subwords: pieces of a word that it was trained at ("first", "last", "all"). theirs: what transformers
    calls such a head on this base; "" for what the bias tells.
    """

    pool: Pool
    hidden: int = 0
    dropout: float = 0.0
    bias: bool = True
    limit: int | None = None
    says: Says = "label"
    mean: float = 0.0
    deviation: float = 1.0
    subwords: str = "first"
    theirs: str = ""

    @property
    def root(self) -> str:
        """What transformers calls such a head."""
        return self.theirs or ("classifier" if self.bias else "score")


class TaskHead(nn.Module):
    """y = V dropout(x) + c, or y = V dropout(tanh(W dropout(x) + b)) + c with a hidden layer.

    labels: what the outputs are called, in order. Weights are fp32, normal with deviation 0.02, biases zero (Devlin et
    al. 2019, 1810.04805, and the code of that paper).
    """

    def __init__(self, width: int, labels: Sequence[str], way: Way) -> None:
        super().__init__()
        self.labels, self.way = tuple(labels), way
        self.hidden = nn.Linear(width, way.hidden) if way.hidden else None
        self.out = nn.Linear(way.hidden or width, len(self.labels), bias=way.bias)
        for linear in (self.hidden, self.out):
            if linear is not None:
                nn.init.normal_(linear.weight, std=0.02)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [reads, width] in any dtype -> [reads, outputs] in the head's, fp32."""
        x = x.to(self.out.weight.dtype)
        if self.hidden is not None:
            x = torch.tanh(self.hidden(self._dropped(x)))
        return cast(Tensor, self.out(self._dropped(x)))

    def _dropped(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.way.dropout) if self.training and self.way.dropout else x


def put_head(model: Any, name: str, head: TaskHead) -> None:
    """Make a head a submodule of the model under an adapter's name. Raises AdapterError where there is one already."""
    if not hasattr(model, "ts_heads"):
        model.ts_heads = ByName()
    if name in model.ts_heads:
        raise AdapterError(f"the adapter '{name}' has a head already.")
    model.ts_heads[name] = head.to(next(model.parameters()).device).eval()


def remove_head(model: Any, name: str) -> None:
    """Take an adapter's head off, and leave no trace of it."""
    if hasattr(model, "ts_heads") and name in model.ts_heads:
        del model.ts_heads[name]
        if not model.ts_heads:
            del model.ts_heads


def states_width(model: Any) -> int:
    """Width of the model's last hidden states."""
    return int(model.config.get_text_config().hidden_size)
