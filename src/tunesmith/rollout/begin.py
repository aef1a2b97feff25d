"""What a run needs that learns from its own answers: their feed, a critic, and the reward on prompts that nothing is learned from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from tunesmith.adapters import Way, save_adapter, states_width
from tunesmith.core.errors import RunError, SpecError
from tunesmith.core.progress import Reporter
from tunesmith.core.record import Message, Record
from tunesmith.engine.checkpoint import new_folder
from tunesmith.engine.critic import Critic
from tunesmith.engine.model import Model, attach_to, free_name
from tunesmith.engine.processes import ALONE, Processes
from tunesmith.engine.sampler import Sampling
from tunesmith.rollout.answers import Answer, Prompt, prompts_of
from tunesmith.rollout.feed import Rollouts
from tunesmith.rollout.gathering import Gatherer
from tunesmith.rollout.playing import Player
from tunesmith.rollout.recording import Reference
from tunesmith.rollout.sampling import answer_prompts, sampling_of, seed_of
from tunesmith.rollout.scoring import Score
from tunesmith.rollout.tools import load_tools
from tunesmith.rolloutspec import RolloutSpec, settled
from tunesmith.spec import Spec, objective_call

Ask = Callable[[Record], Sequence[Message]]
"""What the policy is asked of a record, within the task's frame."""

CRITIC = "critic"
"""Where in its run a critic lies."""


def rollouts(
    model: Model,
    spec: Spec,
    records: Sequence[Record],
    score: Score,
    folder: Path | None,
    *,
    start: Model,
    critic: Model | None = None,
    ask: Ask = Record.asked,
    reporter: Reporter | None = None,
    processes: Processes = ALONE,
) -> Rollouts:
    """The feed of a run whose objective samples: Trainer(model, rollouts(...), spec, folder, critic=critic).

    model: the policy, with its adapter on. records: whose prompts are answered; the rest of a record is for the rewards. ask: what is
    asked of one. score: the rewards, see `scoring.scored_by`. folder: the run's, for samples.jsonl. start: what the run began with,
    which is the reference. critic: from `critic_of`, with ppo.

    To be made before the trainer resumes: where the reference's weights are trained, they are kept as they are now. Raises DataError for
    a prompt after which there is no room for an answer, and data.overlong is not "drop".
    """
    prompts, play = _playing(model, spec, records, ask)
    call = objective_call(spec.objective)
    refers = settled(spec.rollout, call.name, call.options).refers
    reference = Reference(start, model) if refers or not model.adapter.in_place else None
    gatherer = Gatherer(prompts, partial(_all_samples, play, spec.rollout), score, spec.rollout, spec.train.seed, processes)
    valued = None if critic is None else Critic(critic)
    return Rollouts(model, spec, gatherer, reference=reference, critic=valued, folder=folder, reporter=reporter)


class Answering(Protocol):
    """`sampling.answer_prompts` of a model, or the same with tools."""

    def __call__(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, samples: int, seeds: Sequence[int], batch: int
    ) -> list[list[Answer]]: ...


def _playing(model: Model, spec: Spec, records: Sequence[Record], ask: Ask) -> tuple[list[Prompt], Answering]:
    """The prompts of records, and how they are answered."""
    rollout, drop = spec.rollout, spec.data.overlong == "drop"
    if spec.data.overlong == "truncate-left-of-prompt":
        what = "prompts that the policy answers are not cut: its answers would be to other questions than their rewards are."
        raise SpecError(what, where="data.overlong", hints=["Nearest that works here:  data.overlong=drop"])
    tools = load_tools(rollout.tools)
    schemas = [tool.schema for tool in tools.values()]
    prompts = prompts_of(model, records, ask, rollout.max_new_tokens, limit=spec.data.max_tokens, drop=drop, tools=schemas)
    return prompts, Player(model, tools, rollout).play if tools else partial(answer_prompts, model)


def _all_samples(play: Answering, rollout: RolloutSpec, prompts: Sequence[Prompt], seed: int, seeds: Sequence[int]) -> list[list[Answer]]:
    return play(prompts, sampling_of(rollout, seed), samples=rollout.samples, seeds=seeds, batch=rollout.batch)


def critic_of(start: Model, spec: Spec) -> Model:
    """The value model of ppo: an adapter of its own on what the run began with, and a head of one value.

    To be made before the policy's adapter, where that changes the base's own weights (which then have to be kept).
    """
    trained = [p for adapter in start.adapters for _, p in adapter.named_parameters() if p.requires_grad]
    model = attach_to(start, spec.rollout.critic, name=free_name(start.base, CRITIC), seed=seed_of(spec.train.seed, 1))
    if model.head is None:
        model.adapter.give_head(states_width(model.base.model), ("value",), Way("last", says="value"), seed=spec.train.seed)
    for parameter in trained:  # a policy that goes on training the adapter of its start
        parameter.requires_grad_(True)
    return model


def save_critic(critic: Model, folder: Path) -> None:
    """Write the critic into its run, `critic/`, beside the adapter, whole or not at all."""
    with new_folder(folder / CRITIC) as beside:
        beneath = [each.digest for each in critic.adapters[:-1]]
        save_adapter(critic.adapter, beside, base=critic.base.source, fingerprint=critic.base.fingerprint, beneath=beneath)


def dev_reward(
    model: Model, spec: Spec, records: Sequence[Record], score: Score, *, ask: Ask = Record.asked, processes: Processes = ALONE
) -> Callable[[], Mapping[str, float]]:
    """A dev metric for the trainer: the mean reward of one answer to each prompt ("reward", then each part), the answers greedy unless
    rollout.dev_temperature says otherwise. processes: that share the prompts.

    Raises as `rollouts`; what it returns raises RunError where no reward speaks of any answer.
    """
    rollout = spec.rollout
    prompts, play = _playing(model, spec, records, ask)
    sampling = sampling_of(rollout, seed_of(spec.train.seed, 2), temperature=rollout.dev_temperature)

    def judge() -> Mapping[str, float]:
        places = range(processes.rank, len(prompts), processes.count)
        own = [prompts[place] for place in places]
        answers = play(own, sampling, samples=1, seeds=list(places), batch=rollout.batch)
        rewarded = score(own, answers)
        sums: dict[str, float] = {"reward": 0.0}
        for name, values in {"reward": rewarded.total, **{f"reward_{name}": part for name, part in rewarded.parts.items()}}.items():
            known = [value for value in values if value == value]  # no NaN
            sums[name], sums[f"# {name}"] = sum(known), float(len(known))
        sums = processes.sum_named(sums)
        if prompts and not sums["# reward"]:
            hints = ["Look at what the rewards say of an answer, or train without dev prompts:  data.dev=null"]
            raise RunError(f"no reward said anything of the answers to {len(prompts)} dev prompts.", hints=hints)
        return {name: value / max(1.0, sums[f"# {name}"]) for name, value in sums.items() if not name.startswith("# ")}

    return judge
