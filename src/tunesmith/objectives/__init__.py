"""Objectives: pure functions from log-probabilities to a loss. No model, no optimiser, no input or output."""

from tunesmith.objectives.choose import choose
from tunesmith.objectives.classify import classify
from tunesmith.objectives.registry import OBJECTIVES, Objective, objective
from tunesmith.objectives.regress import regress
from tunesmith.objectives.sft import dft, sft
from tunesmith.objectives.tag import tag
from tunesmith.objectives.wanted import Divergence, Wanted

__all__ = ["OBJECTIVES", "Divergence", "Objective", "Wanted", "choose", "classify", "dft", "objective", "regress", "sft", "tag"]
