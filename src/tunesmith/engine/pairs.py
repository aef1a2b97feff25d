"""Which tokens of a pack belong to the second text of a pair, for encoders that mark them (BERT's segments A and B)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tunesmith.core.row import SECOND
from tunesmith.engine.pack import Pack


def marked(model: Any, pack: Pack) -> Tensor | None:
    """1 at tokens of second texts, else 0, [tokens]; None where the model marks none, or there are none."""
    second = [
        own
        for row, index, own in zip(pack.segment_row, pack.segment_index, pack.own, strict=True)
        if pack.laid[row].segments[index].name == SECOND
    ]
    if not second or not _marks(model):
        return None
    out = torch.zeros(pack.tokens, dtype=torch.long)
    for own in second:
        out[torch.from_numpy(own)] = 1
    return out.to(pack.ids.device)


def _marks(model: Any) -> bool:
    """Has it vectors for two kinds of texts?"""
    kinds = getattr(model.config.get_text_config(), "type_vocab_size", 0) or 0
    return kinds > 1 and "token_type_ids" in inspect.signature(model.base_model.forward).parameters
