"""The catalogue: each method of the literature as a point of the space sites x forms x composition.

An expression names methods with options, `lora(rank=8, sites=[q, v]) + ...`; options are checked against the
signatures below and nothing is accepted and ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tunesmith.core.errors import AdapterError
from tunesmith.core.registry import Registry, check_options, parse_calls

Kind = Literal["listen", "in-place"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a method asks for, before it meets a model.

    kind: "listen" puts a form at each site and leaves the base alone; "in-place" trains parameters of the base.
    sites, layers: where. form: options of the form. last: the last k layers. names: patterns of module paths.
    """

    method: str
    kind: Kind
    sites: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    form: dict[str, Any] = field(default_factory=dict)
    last: int | None = None
    names: tuple[str, ...] = ()


METHODS: Registry[Callable[..., Plan]] = Registry("adapter method")


def method(name: str) -> Callable[[Callable[..., Plan]], Callable[..., Plan]]:
    """Enter a method into the catalogue under its name."""
    return lambda function: METHODS.add(name, function)


def _names(name: str, value: Sequence[str] | str) -> tuple[str, ...]:
    names = tuple(value.replace(",", " ").split()) if isinstance(value, str) else tuple(value)
    if not names or not all(isinstance(each, str) for each in names):
        raise AdapterError(f"{name}: a list of names is needed, not {value!r}.")
    return names


def _low_rank(
    name: str, rank: int, alpha: float, dropout: float, sites: Sequence[str] | str, layers: Sequence[int] | None, *, stabilised: bool
) -> Plan:
    if type(rank) is not int or rank < 1:
        raise AdapterError(f"{name}: rank must be a whole number of at least 1, not {rank!r}.")
    if not 0 <= dropout < 1:
        raise AdapterError(f"{name}: dropout must lie in [0, 1), not {dropout}.")
    if not 0 < alpha < math.inf:
        raise AdapterError(f"{name}: alpha must be a number above 0, not {alpha}.")
    form = {"rank": rank, "alpha": float(alpha), "dropout": float(dropout), "stabilised": stabilised}
    return Plan(name, "listen", _names(name, sites), None if layers is None else tuple(layers), form)


@method("lora")
def lora(
    *, rank: int = 16, alpha: float = 32, dropout: float = 0.0, sites: Sequence[str] | str = ("q", "v"), layers: Sequence[int] | None = None
) -> Plan:
    """Low-rank adaptation: y = Wx + (alpha / r) B A x. Hu et al. 2021 · 2106.09685."""
    return _low_rank("lora", rank, alpha, dropout, sites, layers, stabilised=False)


@method("rslora")
def rslora(
    *, rank: int = 16, alpha: float = 16, dropout: float = 0.0, sites: Sequence[str] | str = ("q", "v"), layers: Sequence[int] | None = None
) -> Plan:
    """LoRA with scale alpha / sqrt(r), stable at high rank. Kalajdzievski 2023 · 2312.03732."""
    return _low_rank("rslora", rank, alpha, dropout, sites, layers, stabilised=True)


@method("full")
def full() -> Plan:
    """Every parameter of the base."""
    return Plan("full", "in-place")


@method("layers")
def layers(*, last: int | None = None, only: Sequence[int] | None = None) -> Plan:
    """Every parameter of the last k blocks, or of the blocks named (from 0; negative counts from the end)."""
    if (last is None) == (only is None):
        raise AdapterError("layers needs exactly one of last=K or only=[...].", hints=["For example:  layers(last=4)"])
    if last is not None and (type(last) is not int or last < 1):
        raise AdapterError(f"layers: last must be a whole number of at least 1, not {last!r}.")
    return Plan("layers", "in-place", last=last, layers=None if only is None else tuple(only))


@method("modules")
def modules(*, names: Sequence[str] | str) -> Plan:
    """The parameters whose path matches one of the names: a module or parameter path, a part of it, or with * as wildcard."""
    return Plan("modules", "in-place", names=_names("modules", names))


def plan(expression: str) -> list[Plan]:
    """Read an adapter expression into plans, one a term. Raises SpecError or AdapterError where it cannot be."""
    plans = []
    for call in parse_calls(expression, kind="adapter"):
        function = METHODS[call.name]
        check_options(function, call.options, kind=f"adapter {call.name}", error=AdapterError)
        try:
            plans.append(function(**call.options))
        except TypeError as cause:
            raise AdapterError(f"adapter {call.name}: {cause}.") from None
    if len(plans) > 1 and any(p.kind == "in-place" for p in plans):
        raise AdapterError(
            f"'{expression}' trains parameters of the base in place and adds forms to it at the same time.",
            hints=["Train one, then the other on top of it:  base: runs/FIRST  with the second adapter."],
        )
    if len({p.form.get("stabilised") for p in plans}) > 1:
        raise AdapterError(
            f"'{expression}' scales one part as lora and another as rslora; PEFT's file format has one scaling an adapter.",
            hints=["Use one of the two for all parts, with alpha to match."],
        )
    return plans
