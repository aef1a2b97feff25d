"""Slopes of functions by finite differences, to hold gradients against."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def slope(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """d function / d at, by central differences, in the shape of `at`."""
    out = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        above, below = at.copy(), at.copy()
        above[place] += step
        below[place] -= step
        out[place] = (function(above) - function(below)) / (2 * step)
    return out
