"""Base: a frozen model with its tokenizer and everything the rest of the house asks about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Kind = Literal["decoder", "encoder"]
Special = Literal["text", "refuse", "trust"]
SystemTurn = Literal["template", "user"]
Quantised = Literal["nf4", "fp4"]
"""Kinds of 4-bit numbers that the linear maps of a base can be kept in."""


@dataclass(slots=True, eq=False)
class Base:
    """A model to adapt: in eval mode, no parameter asks for a gradient.

    source: as the user wrote it. name: short, for people. folder: where weights and tokenizer were loaded from.
    fingerprint: content hash of weights, configuration and added tokens. context_length: tokens a row may have at most
    (None where the model sets no limit). decisions: lines for the terminal, each with its reason. template: the chat
    template that replaces the tokenizer's own, None where the own one is used (`tokenizer.chat_template` is already the
    one in force, except for "plain", which is built in). special: what to do with special-token text in the data.
    system_turn: whether system turns go to the template, or to the head of the first user turn. template_variables: more
    names for the template. new_token_ids: ids whose embedding rows were added for this task and have to be trained. quantise: the
    kind of 4-bit numbers that the linear maps of its blocks are kept in; they compute in `dtype`.
    """

    model: PreTrainedModel
    tokenizer: Any
    source: str
    name: str
    kind: Kind
    folder: Path
    fingerprint: str
    dtype: torch.dtype
    dtype_reason: str
    device: torch.device
    context_length: int | None
    template: str | None = None
    special: Special = "text"
    system_turn: SystemTurn = "template"
    template_variables: dict[str, Any] = field(default_factory=dict)
    new_token_ids: list[int] = field(default_factory=list)
    quantise: Quantised | None = None
    decisions: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones counted once; a byte of a 4-bit map holds two."""
        return sum(p.numel() * (1 if p.is_floating_point() else 2) for p in self.model.parameters())

    def describe(self) -> str:
        """One line: name, size, dtype with its reason, device if it is not the CPU."""
        count = self.parameters
        size = f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
        where = "" if self.device.type == "cpu" else f" · {self.device}"
        bits = "" if self.quantise is None else f" · blocks in 4 bits ({self.quantise})"
        return f"{self.name} · {size} parameters{bits} · {self.dtype_reason}{where}"
