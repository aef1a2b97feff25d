"""Objectives: pure functions from log-probabilities to a loss. No model, no optimiser, no input or output."""

from tunesmith.objectives.choose import choose
from tunesmith.objectives.classify import classify
from tunesmith.objectives.distil import distil
from tunesmith.objectives.kto import kto
from tunesmith.objectives.policy import cispo, dapo, dr_grpo, grpo, gspo, rloo
from tunesmith.objectives.ppo import ppo
from tunesmith.objectives.preferences import (
    apo_down,
    apo_zero,
    bco,
    discopop,
    dpo,
    exo,
    hinge,
    ipo,
    nca,
    orpo,
    robust_dpo,
    simpo,
    sppo,
)
from tunesmith.objectives.ranking import plackett_luce
from tunesmith.objectives.registry import OBJECTIVES, Objective, objective
from tunesmith.objectives.regress import regress
from tunesmith.objectives.rewarding import reward
from tunesmith.objectives.sft import dft, sft
from tunesmith.objectives.tag import tag
from tunesmith.objectives.wanted import Divergence, Wanted

__all__ = [
    "OBJECTIVES",
    "Divergence",
    "Objective",
    "Wanted",
    "apo_down",
    "apo_zero",
    "bco",
    "choose",
    "cispo",
    "classify",
    "dapo",
    "dft",
    "discopop",
    "distil",
    "dpo",
    "dr_grpo",
    "exo",
    "grpo",
    "gspo",
    "hinge",
    "ipo",
    "kto",
    "nca",
    "objective",
    "orpo",
    "plackett_luce",
    "ppo",
    "regress",
    "reward",
    "rloo",
    "robust_dpo",
    "sft",
    "simpo",
    "sppo",
    "tag",
]
