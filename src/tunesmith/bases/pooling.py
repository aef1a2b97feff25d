"""What a base was made to read of a text: which of its hidden states stands for the whole."""

from __future__ import annotations

import json

from tunesmith.bases.base import Base
from tunesmith.bases.fingerprint import weight_files

_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_lasttoken": "last",
}
"""sentence-transformers' switches for pooling, and what they are called here."""


def own_pooling(base: Base) -> str:
    """ "mean", "first", "last" or "pooler".

    What sentence-transformers' file in the base's folder says; else the base's own pooler, if its checkpoint holds one;
    else the first token of an encoder and the last of a decoder.
    """
    try:
        said = json.loads((base.folder / "1_Pooling" / "config.json").read_text("utf-8"))
        modes = [ours for theirs, ours in _MODES.items() if said.get(theirs)]
        if len(modes) == 1:
            return modes[0]
    except (OSError, ValueError, AttributeError):
        pass
    if base.kind == "decoder":
        return "last"
    return "pooler" if has_pooler(base) else "first"


def has_pooler(base: Base) -> bool:
    """Has the base a pooler, and does its checkpoint hold the weights of it?"""
    from safetensors import SafetensorError, safe_open

    if getattr(base.model.base_model, "pooler", None) is None:
        return False
    try:
        for file in weight_files(base.folder):
            with safe_open(file, framework="pt") as weights:
                if any("pooler." in key for key in weights.keys()):  # noqa: SIM118 (not a dict)
                    return True
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError):
        return False
    return False
