"""Rewards from comparisons: a pick, an order or soft preferences of the answers to one prompt."""

from __future__ import annotations

from typing import Any

import torch

from tunesmith.objectives.advantage import picked, preferred, ranked


def rewards_of(said: Any, size: int) -> list[float]:
    """The reward of each answer, [size], in 0..1.

    said: the place of the best one, for 1 and 0; all places with the best one first, for even steps from 1 to 0; or a matrix, whose
    entry (i, j) is the probability that i is preferred to j, for the mean over the others. Places count from 0. Raises ValueError,
    saying what is wrong, for anything else.
    """
    value = said.tolist() if hasattr(said, "tolist") else said
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < size:
            raise ValueError(f"it picked answer {value} of {size} (places count from 0)")
        return [float(each) for each in picked(torch.tensor([value]), size)[0].tolist()]
    if not isinstance(value, list | tuple) or len(value) != size:
        raise ValueError(f"it returned {_short(said)}, which is no pick, no order and no matrix of {size} answers")
    if all(isinstance(row, list | tuple) for row in value):
        return _from_matrix(value, size)
    if sorted(value, key=str) != sorted(range(size), key=str) or any(isinstance(each, bool) for each in value):
        raise ValueError(f"it returned {_short(said)}, and an order holds every place from 0 to {size - 1} once")
    rank = [0] * size
    for place, index in enumerate(value):
        rank[int(index)] = place
    return [float(each) for each in ranked(torch.tensor([rank]))[0].tolist()]


def _from_matrix(rows: Any, size: int) -> list[float]:
    if any(len(row) != size for row in rows):
        raise ValueError(f"it returned a matrix that is not {size} x {size}")
    for place, row in enumerate(rows):
        for other, value in enumerate(row):
            if place != other and not (isinstance(value, int | float) and 0 <= value <= 1):
                raise ValueError(f"preference ({place}, {other}) is {value!r}, not a probability")
    filled = [[0.0 if place == other else float(value) for other, value in enumerate(row)] for place, row in enumerate(rows)]
    return [float(each) for each in preferred(torch.tensor([filled], dtype=torch.float64))[0].tolist()]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
