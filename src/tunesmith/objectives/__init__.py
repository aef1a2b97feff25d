"""Objectives: pure functions from log-probabilities to a loss. No model, no optimiser, no input or output."""

from tunesmith.objectives.classify import classify
from tunesmith.objectives.registry import OBJECTIVES, Objective, objective
from tunesmith.objectives.sft import dft, sft
from tunesmith.objectives.wanted import Divergence, Wanted

__all__ = ["OBJECTIVES", "Divergence", "Objective", "Wanted", "classify", "dft", "objective", "sft"]
