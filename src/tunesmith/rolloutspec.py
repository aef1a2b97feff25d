"""The `rollout` section of a spec: how answers are sampled, what is made of their rewards, and how often they are learned from.

What is left open (null) follows from the objective, for papers differ in it; `settled` says how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tunesmith.adapters.methods import plan
from tunesmith.core.errors import SpecError, TunesmithError
from tunesmith.core.section import Section

Truncated = Literal["keep", "mask"]
Scale = Literal["group", "batch", "none", "leave_one_out"]


class RolloutSpec(Section):
    """Answers that the policy gives while it is trained."""

    prompts: int = Field(default=8, ge=1, description="prompts of an iteration")
    samples: int = Field(default=8, ge=1, description="answers to each prompt")
    max_new_tokens: int = Field(default=128, ge=1, description="longest answer")
    temperature: float = Field(default=1.0, gt=0, description="of sampling, and of the log-probabilities that are learned from")
    top_p: float = Field(default=1.0, gt=0, le=1, description="sample from the likeliest tokens that have so much probability")
    top_k: int = Field(default=0, ge=0, description="sample from so many likeliest tokens; 0: all")
    min_p: float = Field(default=0.0, ge=0, lt=1, description="sample from tokens with this share of the likeliest one's probability")
    batch: int = Field(default=64, ge=1, description="answers decoded at once")
    epochs: int | None = Field(default=None, ge=1, description="times that an iteration's answers are learned from; default: 1, ppo: 4")
    minibatches: int = Field(default=1, ge=1, description="optimiser steps that share out the prompts of an iteration")
    advantage: Scale | None = Field(
        default=None,
        description="what a reward less its group's mean is divided by: the deviation of the group, of the batch, nothing; or less "
        "the mean of the others alone; default: group, dr_grpo: none, rloo: leave_one_out",
    )
    dynamic: bool | None = Field(default=None, description="replace prompts whose answers are all rewarded alike; default: no, dapo: yes")
    tries: int = Field(default=5, ge=1, description="rounds of sampling in an iteration, with dynamic")
    truncated: Truncated | None = Field(
        default=None, description="answers cut off at max_new_tokens: learned from, or not; default: keep, dapo: mask"
    )
    overlong: int = Field(default=0, ge=0, description="last tokens before max_new_tokens over which a penalty grows to 1; 0: no penalty")
    missing_end: float = Field(default=0.0, ge=0, description="taken off the reward of an answer that does not end by itself")
    kl: float | None = Field(
        default=None, ge=0, description="of the divergence from the reference, taken off the reward; default: 0, ppo: 0.05"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(default="k1", description="of that divergence at a token")
    kl_target: float | None = Field(default=None, gt=0, description="nats an answer, which kl is steered towards; null: kl stays")
    kl_horizon: int = Field(default=10_000, ge=1, description="answers over which kl changes by 20 % at most")
    stop_kl: float | None = Field(
        default=None, gt=0, description="nats a token from the policy that sampled, beyond which an iteration's other steps are left out"
    )
    gamma: float = Field(default=1.0, ge=0, le=1, description="ppo: discount of a token")
    gae_lambda: float = Field(default=0.95, ge=0, le=1, description="ppo: of generalised advantages")
    whiten: bool = Field(default=True, description="ppo: advantages of an iteration with mean 0 and deviation 1")
    whiten_rewards: bool = Field(default=False, description="ppo: rewards of tokens with deviation 1")
    critic: str = Field(default="lora(rank=16)", description="ppo: the adapter of the value model, on the policy's base")
    dev_temperature: float = Field(default=0.0, ge=0, description="of answers to dev prompts; 0: greedy")
    own: float = Field(
        default=0.0, ge=0, le=1, description="distil: share of the steps with answers of the policy's own in place of those in the data"
    )
    show: int = Field(default=10, ge=0, description="iterations between two tables of answers in the terminal; 0: none")
    tools: list[str] = Field(default_factory=list, description="functions that the policy may call: path/to/tools.py:function")
    turns: int = Field(default=8, ge=1, description="with tools: turns of the policy in an answer")
    tool_seconds: float = Field(default=10.0, gt=0, description="with tools: seconds of a call, after which it has failed")
    result_tokens: int = Field(default=256, ge=8, description="with tools: tokens of a result, which is cut there")

    @field_validator("critic")
    @classmethod
    def _critic_exists(cls, value: str) -> str:
        try:
            parts = plan(value)
        except TunesmithError as cause:
            raise ValueError(cause.what) from None
        if any(part.kind == "in-place" for part in parts):
            raise ValueError("a critic lies beside the policy on one base, so it changes no weight of that; lora(rank=16) does not")
        return value

    @model_validator(mode="after")
    def _fits(self) -> RolloutSpec:
        if self.overlong >= self.max_new_tokens:
            raise ValueError("the penalty on long answers has to begin after their first token: rollout.overlong < rollout.max_new_tokens")
        if self.minibatches > self.prompts:
            raise ValueError("each mini-batch has a prompt at least: rollout.minibatches <= rollout.prompts")
        return self


@dataclass(frozen=True, slots=True)
class Settled:
    """What the open keys of the section are for an objective. kl: the coefficient as the run begins. beta: of the divergence from the
    reference within the loss. critic: is there a value model?"""

    epochs: int
    advantage: Scale
    dynamic: bool
    truncated: Truncated
    kl: float
    beta: float
    critic: bool

    @property
    def refers(self) -> bool:
        """Is the reference read?"""
        return bool(self.kl or self.beta)


def settled(rollout: RolloutSpec, objective: str, options: Mapping[str, Any]) -> Settled:
    """The section for an objective with its options."""
    critic, dapo = objective == "ppo", objective == "dapo"
    scale: Mapping[str, Scale] = {"dr_grpo": "none", "rloo": "leave_one_out"}

    def given(value: Any, otherwise: Any) -> Any:
        return otherwise if value is None else value

    return Settled(
        given(rollout.epochs, 4 if critic else 1),
        given(rollout.advantage, scale.get(objective, "group")),
        given(rollout.dynamic, dapo),
        given(rollout.truncated, "mask" if dapo else "keep"),
        given(rollout.kl, 0.05 if critic else 0.0),
        float(options.get("beta") or 0.0),
        critic,
    )


_OWN = ("own", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "batch")
"""Keys that distillation on the policy's own answers reads."""

_CRITICS = ("gamma", "gae_lambda", "whiten", "whiten_rewards", "critic")
"""Keys that only an actor and a critic read."""


def check_rollout(
    rollout: RolloutSpec, objective: str, *, samples: bool, alone: bool, batch_given: bool, sharded: bool, last_turn: bool = False
) -> None:
    """Raises SpecError where the section does not go with the rest of the spec.

    samples: does the objective learn from the policy's own answers? alone: is it the only one? batch_given: train.batch is set.
    sharded: train.sharding is. last_turn: data.supervise is "last".
    """
    changed = _changed(rollout)
    if not samples:
        if objective == "distil" and rollout.own:
            changed = [name for name in changed if name not in _OWN]
        elif objective == "distil" and changed:
            raise _nearest(f"rollout.{changed[0]} is of answers that the policy samples, and rollout.own is 0.", "rollout.own=0.5")
        if changed:
            what = f"rollout.{changed[0]} is of answers that the policy samples, and objective {objective} learns from those in the data."
            raise _nearest(what, "objective: grpo")
        return
    if rollout.own:
        raise _nearest(f"rollout.own is of distillation, and objective {objective} samples all of its answers.", "rollout.own=0")
    if not alone:
        what = f"objective {objective} learns from answers that the policy samples, which others have nothing to learn from."
        raise _nearest(what, f"objective: {objective}")
    if batch_given:
        what = "train.batch is of rows in the data; a step learns from rollout.prompts x rollout.samples / rollout.minibatches answers."
        raise _nearest(what, "rollout.prompts=8 rollout.samples=8")
    if last_turn:
        what = f"data.supervise is of turns in the data, and objective {objective} learns from every turn that the policy samples."
        raise _nearest(what, "data.supervise=all")
    if sharded:
        raise _nearest(f"objective {objective} samples on every process, which takes the whole base there.", "train.sharding=none")
    if objective == "ppo":
        _check_critic(rollout)
    else:
        _check_groups(rollout, objective, changed)
    if "tries" in changed and not settled(rollout, objective, {}).dynamic:
        raise _nearest("rollout.tries counts rounds of dynamic sampling.", "rollout.dynamic=true")
    if rollout.kl_target is not None and not settled(rollout, objective, {}).kl:
        raise _nearest("rollout.kl_target steers rollout.kl, which is 0.", "rollout.kl=0.05")
    _check_idle(rollout, settled(rollout, objective, {}), changed)
    for name in ("turns", "tool_seconds", "result_tokens"):
        if name in changed and not rollout.tools:
            raise _nearest(f"rollout.{name} is of answers with tools.", "rollout.tools=[path/to/tools.py:function]")


def _check_idle(rollout: RolloutSpec, found: Settled, changed: Sequence[str]) -> None:
    """Refuse keys that nothing would read as the others stand."""
    if "kl_estimator" in changed and not found.kl:
        raise _nearest("rollout.kl_estimator is of rollout.kl, which is 0.", "rollout.kl=0.05")
    if "kl_horizon" in changed and rollout.kl_target is None:
        raise _nearest("rollout.kl_horizon is of steering rollout.kl, and no rollout.kl_target is set.", "rollout.kl_target=6")
    if rollout.stop_kl is not None and found.epochs * rollout.minibatches == 1:
        what = "rollout.stop_kl leaves out later steps of an iteration, and each has one step alone."
        raise _nearest(what, "rollout.epochs=2")


def _check_critic(rollout: RolloutSpec) -> None:
    if rollout.advantage is not None:
        what = "rollout.advantage is of groups of answers, and objective ppo takes its advantages from the critic."
        raise _nearest(what, "objective: grpo")
    if rollout.dynamic:
        what = "rollout.dynamic is of groups of answers, and objective ppo learns from each answer by itself."
        raise _nearest(what, "objective: dapo")


def _check_groups(rollout: RolloutSpec, objective: str, changed: Sequence[str]) -> None:
    if own := [name for name in changed if name in _CRITICS]:
        raise _nearest(f"rollout.{own[0]} is of a critic, and objective {objective} has none.", "objective: ppo")
    if rollout.samples < 2:
        raise _nearest(f"objective {objective} holds the answers to a prompt against one another.", "rollout.samples=8")


def _changed(rollout: RolloutSpec) -> list[str]:
    """Keys with another value than their default."""
    default = RolloutSpec()
    return [name for name in RolloutSpec.model_fields if getattr(rollout, name) != getattr(default, name)]


def _nearest(what: str, works: str) -> SpecError:
    return SpecError(what, hints=[f"Nearest that works here:  {works}"])
