"""Heads that are more than a projection (soft-capped, scaled): the model's own code makes the logits, a chunk of targets at a time.

The model is called with a body that gives back hidden states computed before, so that only its head runs. Where that does
not give the model's own numbers, its logits at all targets are taken whole, in the model's dtype; they are widened in
blocks all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OwnLogits:
    """Logits still to be made. make: states [n, width] -> logits [n, vocab], with gradient. states: [targets, width]."""

    make: Callable[[Tensor], Tensor]
    states: Tensor
    vocabulary: int

    def detach(self) -> OwnLogits:
        """The same without gradients: a teacher."""
        return OwnLogits(self.make, self.states.detach(), self.vocabulary)

    def part(self, rows: slice) -> OwnLogits:
        """The same for some of the targets."""
        return OwnLogits(self.make, self.states[rows], self.vocabulary)

    def into(self, out: Tensor, rows: slice) -> Tensor:
        """Write the logits of some rows into `out` [rows, vocab], without gradient."""
        with torch.no_grad():
            return out.copy_(self.make(self.states[rows]))


def through_own_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The model's logits from the hidden states of its body: [n, width] -> [n, vocab]."""
    body: Any = model.base_model
    ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    before = body.__dict__.get("forward")
    body.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=hidden[None])
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        if before is None:
            del body.forward
        else:
            body.forward = before
    return logits


@torch.no_grad()
def runs_alone(model: PreTrainedModel, read: Callable[..., Tensor]) -> bool:
    """Whether the head alone gives the model's own logits. read(body=True or False): hidden states, or logits, of some tokens."""
    whole = read(body=False)
    try:
        alone = through_own_head(model, read(body=True))
    except Exception as cause:  # a model that wants more from its body than its last states
        _log.debug("the model's head cannot run alone: %s", cause)
        return False
    return alone.shape == whole.shape and bool((alone - whole).abs().max() <= 0.02 * whole.abs().max())
