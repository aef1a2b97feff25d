"""The `rewards` and `evaluate` sections of a spec: what sampled answers are rewarded for, and who judges answers in the end.

Held here against their form alone; names and options are held against the registry of rewards as a run is prepared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from tunesmith.core.errors import SpecError, TunesmithError
from tunesmith.core.registry import Call, parse_calls
from tunesmith.core.section import Section

FORMS = "Forms:  name(option=value)  ·  path/to/file.py:function"

_S = TypeVar("_S", bound=Section)
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


class JudgeSpec(Section):
    """Who judges answers. A plain string in the YAML means `model`."""

    model: str = Field(description="who judges: a base, a run, or a server (http://HOST:PORT/v1#MODEL)")
    rubric: str | None = Field(default=None, description="by what: a text, or a .txt or .md file; default: a general one")
    asks: Literal["rating", "comparison"] = Field(
        default="rating", description="how good each answer is by itself, or whether it is better than the one in the data"
    )
    scale: list[str] = Field(default_factory=list, description="words to rate in, the worst first; default: 1 to 10")
    reasons: bool = Field(default=False, description="think in words before the verdict")
    way: Literal["auto", "likelihood", "generation"] = Field(
        default="auto", description="likelihood of each verdict, or words that are parsed; auto: likelihood, of a server words"
    )
    both_orders: bool = Field(default=True, description="of comparisons: asked in both orders and averaged, or in one drawn by content")
    no_verdict: Literal["error", "skip", "tie"] = Field(
        default="error",
        description="where it gives none, even asked again: stop, leave the question out, or the middle of the scale",
    )
    key_env: str | None = Field(default=None, description="environment variable that holds a server's key")

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> JudgeSpec:
        if self.asks == "comparison" and self.scale:
            raise ValueError("a comparison says which of two is better, so it has no scale: leave scale out, or asks: rating")
        if self.asks == "rating" and not self.both_orders:
            raise ValueError("a rating is of one answer alone, which has no order: leave both_orders out, or asks: comparison")
        return self


class EvaluateSpec(Section):
    """How answers in free words are judged in the end: by `climb`, `evaluate` and `compare`, not by training on its dev samples."""

    judge: JudgeSpec | None = Field(default=None, description="a judge's verdicts in place of task.metric; a plain string is its `model`")


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
    return _checked(RewardSpec, given, "the reward", FORMS)


def judge_spec(given: str | Mapping[str, Any] | JudgeSpec) -> JudgeSpec:
    """From a model's name, plain values or a JudgeSpec. Raises SpecError."""
    return _checked(JudgeSpec, given, "the judge", "Form:  {model: MODEL, rubric: TEXT}")


def _checked(kind: type[_S], given: Any, what: str, form: str) -> _S:
    if isinstance(given, kind):
        return given
    try:
        return kind.model_validate(given)
    except ValidationError as cause:
        said = [".".join([*map(str, each["loc"]), each["msg"].removeprefix("Value error, ")][-2:]) for each in cause.errors()]
        raise SpecError(f"{what} {given!r} cannot be used: {'; '.join(said)}.", hints=[form]) from None
