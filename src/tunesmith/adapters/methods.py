"""The catalogue: each method of the literature as a point of the space sites x forms x composition.

An expression names methods with options, `lora(rank=8, sites=[q, v]) + ...`; options are checked against the
signatures below and nothing is accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import nn

from tunesmith.adapters.forms import Form
from tunesmith.adapters.heads import POOLS
from tunesmith.adapters.sites import Site
from tunesmith.adapters.virtual import Encode, VirtualTokens
from tunesmith.core.errors import AdapterError, unknown
from tunesmith.core.registry import Registry, check_options, parse_calls

Kind = Literal["listen", "in-place", "virtual", "head"]
Pick = Callable[[nn.Module, Mapping[str, nn.Parameter]], Sequence[str]]
"""From a model and its own parameters by path to the paths of those that are trained."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a method asks for, before it meets a model.

    kind: "listen" puts a form at each site and leaves the base alone; "in-place" trains parameters of the base; "virtual" puts
    `tokens` tokens of its own among those of a text, built by `make_tokens`; "head" puts a task head behind its last layer.
    sites, layers: where. make: builds the form of a site; raises AdapterError where it cannot. alone: no other form may listen
    at the same site. form: options of the form, as PEFT's files have them. pick: which parameters of the base are trained, by
    path; raises AdapterError where there are none. lr: learning rate where none is given. sublayers: it may listen at sub-layers.
    lowest: layers below do without. resolve: makes the whole plan once the finished adapters that it joins are known, from their
    expressions by name (None: to be read), the base's fingerprint and digests of the adapters on it. finished: these expressions.
    chained: each form reads the one below it, so all stand beside one stack of layers.
    """

    method: str
    kind: Kind
    sites: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    form: dict[str, Any] = field(default_factory=dict)
    make: Callable[[Site], Form] | None = None
    alone: bool = False
    pick: Pick | None = None
    lr: float = 2e-4
    tokens: int = 0
    make_tokens: Callable[[Any, Encode | None], VirtualTokens] | None = None
    sublayers: bool = False
    lowest: int = 0
    resolve: Callable[[Mapping[str, str] | None, str | None, Sequence[str]], Plan] | None = None
    finished: Mapping[str, str] = field(default_factory=dict)
    chained: bool = False


Method = Callable[..., Plan | list[Plan]]
METHODS: Registry[Method] = Registry("adapter method")

F = TypeVar("F", bound=Method)


def method(name: str) -> Callable[[F], F]:
    """Enter a method into the catalogue under its name. A method that is several together returns their plans."""

    def enter(function: F) -> F:
        METHODS.add(name, function)
        return function

    return enter


def names_of(name: str, value: Sequence[str] | str) -> tuple[str, ...]:
    names = tuple(value.replace(",", " ").split()) if isinstance(value, str) else tuple(value)
    if not names or not all(isinstance(each, str) for each in names):
        raise AdapterError(f"{name}: a list of names is needed, not {value!r}.")
    return names


@method("head")
def head(*, pool: str = "auto", hidden: int = 0, dropout: float = 0.0) -> Plan:
    """A task head: a linear map from the base's last hidden states to labels, for objectives that read labels.

    pool: what it reads of a text: "first" token, "last" token, "mean" over its tokens, "pooler" (the base's own, on the first
    token), or "auto", what the base was made for. hidden: width of a tanh layer before the map. Alone, nothing else is trained.
    """
    if pool not in POOLS:
        raise unknown("pool", pool, POOLS, error=AdapterError)
    if type(hidden) is not int or hidden < 0:
        raise AdapterError(f"head: hidden must be a whole number of at least 0, not {hidden!r}.")
    if not 0 <= dropout < 1:
        raise AdapterError(f"head: dropout must lie in [0, 1), not {dropout}.")
    return Plan("head", "head", form={"pool": pool, "hidden": hidden, "dropout": float(dropout)})


def plan(expression: str) -> list[Plan]:
    """Read an adapter expression into plans, one a term. Raises SpecError or AdapterError where it cannot be."""
    plans: list[Plan] = []
    for call in parse_calls(expression, kind="adapter"):
        function = METHODS[call.name]
        check_options(function, call.options, kind=f"adapter {call.name}", error=AdapterError)
        try:
            made = function(**call.options)
        except TypeError as cause:
            raise AdapterError(f"adapter {call.name}: {cause}.") from None
        plans += made if isinstance(made, list) else [made]
    beside = [p for p in plans if p.kind != "head"]
    if len(plans) - len(beside) > 1:
        raise AdapterError(f"'{expression}' has more than one head.", hints=["A run trains one head."])
    if len(beside) > 1 and any(p.kind == "in-place" for p in beside):
        raise AdapterError(
            f"'{expression}' trains parameters of the base in place and adds forms to it at the same time.",
            hints=["Train one, then the other on top of it:  base: runs/FIRST  with the second adapter."],
        )
    if len({p.form["stabilised"] for p in beside if "stabilised" in p.form}) > 1:
        raise AdapterError(
            f"'{expression}' scales one part as lora and another as rslora; PEFT's file format has one scaling an adapter.",
            hints=["Use one of the two for all parts, with alpha to match."],
        )
    return plans
