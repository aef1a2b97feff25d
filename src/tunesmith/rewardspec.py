"""The `rewards` section of a spec: what answers are rewarded for, and how several rewards become one number.

Held here against their form alone; names and options are held against the registry of rewards as a run is prepared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from tunesmith.core.errors import SpecError, TunesmithError
from tunesmith.core.registry import Call, parse_calls
from tunesmith.core.section import Section

FORMS = "Forms:  name(option=value)  ·  path/to/file.py:function"

_FUNCTION = re.compile(r"(?P<file>\S.*\.py):(?P<name>\w*)")


class RewardSpec(Section):
    """One reward. A plain string in the YAML means `reward`."""

    reward: str = Field(description="a reward with options, or path/to/file.py:function")
    name: str = Field(default="", description="what its part is called in metrics and tables; default: the reward's own name")
    weight: float = Field(default=1.0, description="its factor in the sum; negative for a penalty, 0 to watch it or to have its gate alone")
    clip: tuple[float, float] | None = Field(default=None, description="lowest and highest value, before anything else")
    normalise: Literal["none", "group", "batch"] = Field(
        default="none", description="to mean 0 and deviation 1 over the answers to a prompt, or over all answers of an iteration"
    )
    gate: float | None = Field(default=None, description="what the reward has to be above, else the total is `floor`")
    floor: float = Field(default=0.0, description="the total of an answer that does not pass the gate")
    compares: bool = Field(
        default=False, description="a function that holds a prompt's answers against one another, and returns a pick, an order or a matrix"
    )
    on_error: Literal["error", "skip"] = Field(
        default="error", description="a reward that fails or is no number: the run stops, or the reward counts as missing for that answer"
    )
    batch: int | None = Field(default=None, ge=1, description="answers of a call; default: all of an iteration")
    concurrency: int = Field(default=8, ge=1, description="calls of an async function under way at once")

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return {"reward": value} if isinstance(value, str) else value

    @field_validator("reward")
    @classmethod
    def _reads(cls, value: str) -> str:
        try:
            reward_call(value)
        except TunesmithError as cause:
            raise ValueError(cause.what.rstrip(".")) from None
        return value

    @model_validator(mode="after")
    def _fits(self) -> RewardSpec:
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError("clip is the lowest and then the highest value")
        if self.floor and self.gate is None:
            raise ValueError("floor is the total of answers that do not pass a gate, and there is none")
        if self.compares and self.batch is not None:
            raise ValueError("a reward that compares is called once a prompt, with all its answers")
        return self


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str | Mapping) else value


RewardList = Annotated[list[RewardSpec], BeforeValidator(_listed)]
"""One reward stands for a list of it."""


def function_of(text: str) -> tuple[str, str] | None:
    """(file, function) of `path/to/file.py:function`; None for another form. Raises SpecError without a function's name."""
    found = _FUNCTION.fullmatch(text.strip())
    if found is None:
        return None
    if not found["name"]:
        raise SpecError(f"the reward '{text}' names no function.", hints=["Form:  path/to/file.py:function"])
    return found["file"], found["name"]


def reward_call(text: str) -> Call | None:
    """`name(option=value)` read, or None for a function in a file. Raises SpecError for what is neither."""
    if function_of(text) is not None:
        return None
    calls = parse_calls(text, kind="reward")
    if len(calls) != 1:
        hints = ["rewards:", *(f"  - {call.name}" for call in calls)]
        raise SpecError(f"'{text}' is {len(calls)} rewards; each is an entry of its own, with its weight.", hints=hints)
    return calls[0]


def reward_spec(given: str | Mapping[str, Any] | RewardSpec) -> RewardSpec:
    """From a string, plain values or a RewardSpec. Raises SpecError."""
    if isinstance(given, RewardSpec):
        return given
    from pydantic import ValidationError

    try:
        return RewardSpec.model_validate(given)
    except ValidationError as cause:
        said = [".".join([*map(str, each["loc"]), each["msg"].removeprefix("Value error, ")][-2:]) for each in cause.errors()]
        raise SpecError(f"the reward {given!r} cannot be used: {'; '.join(said)}.", hints=[FORMS]) from None
