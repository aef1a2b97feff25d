"""Objectives: pure functions from log-probabilities to a loss. No model, no optimiser, no input or output."""

from tunesmith.objectives.registry import OBJECTIVES, Objective, objective
from tunesmith.objectives.sft import sft

__all__ = ["OBJECTIVES", "Objective", "objective", "sft"]
