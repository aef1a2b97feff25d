"""Rows that a task head is asked with, held to the length that it was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from tunesmith.core.errors import SpecError
from tunesmith.data.lengths import fit
from tunesmith.data.textrow import TextRow
from tunesmith.engine.model import Model

PACK_TOKENS = 4096
"""Tokens of a pack; nothing is kept for a backward."""


def fitted(model: Model, rows: Iterable[TextRow]) -> list[TextRow]:
    """The rows, shortened as in training where that was allowed; else one beyond the context raises DataError."""
    head, made = model.head, list(rows)
    if head is None:
        raise SpecError(f"{model.base.name} has no task head.", hints=["Train one:  objective: classify"])
    limit = head.way.limit or model.context_length
    if not limit:
        return made
    kept, _ = fit(made, limit, "truncate-left-of-prompt" if head.way.limit else "error", model.base.tokenizer)
    return list(cast(Sequence[TextRow], kept))
