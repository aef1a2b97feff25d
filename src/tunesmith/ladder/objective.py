"""The objective of a spec, and the samples that it learns from where these are answers held against one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tunesmith.core.errors import SpecError
from tunesmith.core.record import Record
from tunesmith.objectives import OBJECTIVES, Objective
from tunesmith.objectives.registry import Unit
from tunesmith.spec import Spec, objective_call


def objective_of(spec: Spec) -> Objective:
    """The spec's objective."""
    return OBJECTIVES[objective_call(spec.objective).name]


COMPARED: Mapping[Unit, tuple[str, ...]] = {
    "pairs": ("pair",),
    "rankings": ("ranking", "pair"),
    "scores": ("pair", "ranking"),
    "answers": ("rated", "pair"),
}
"""Shapes of records that each unit learns from."""

_SAID: Mapping[str, str] = {
    "pair": "pairs of answers",
    "ranking": "answers in order",
    "rated": "answers marked good or bad",
}
_HINTS: Mapping[str, str] = {
    "pair": "data.columns.prompt=NAME data.columns.chosen=NAME data.columns.rejected=NAME",
    "ranking": "data.columns.prompt=NAME data.columns.answers=NAME",
    "rated": "data.columns.prompt=NAME data.columns.completion=NAME data.columns.good=NAME",
}


def compares(objective: Objective) -> bool:
    """Does it learn from answers that are held against one another, or against a mark?"""
    return objective.unit in COMPARED


def check_compared(objective: Objective, records: Iterable[Record]) -> None:
    """Raises SpecError for records that the objective cannot learn from."""
    wanted = COMPARED[objective.unit]
    for record in records:
        if record.shape not in wanted:
            what = f"objective {objective.name} learns from {_SAID[wanted[0]]}, and this row reads as '{record.shape}'."
            hints = [f"Name the columns:  {_HINTS[wanted[0]]}", "To make such data from scores, raters or samples:  tunesmith pairs --help"]
            raise SpecError(what, where=record.where, hints=hints)
