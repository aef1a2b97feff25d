"""Runs that learn from the policy's own answers: their prompts, rewards, critic, and the reward on dev prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.core.errors import SpecError
from tunesmith.core.record import Record
from tunesmith.engine.model import Model
from tunesmith.engine.rundir import RunFolder
from tunesmith.ladder.data import take
from tunesmith.ladder.judging import reward_judges
from tunesmith.ladder.objective import objective_of
from tunesmith.ladder.streaming import RecordStream
from tunesmith.rollout.begin import critic_of, dev_reward, rollouts, save_critic
from tunesmith.rollout.feed import Rollouts
from tunesmith.rollout.rewards import Rewards
from tunesmith.rollout.scoring import Score, scored_by
from tunesmith.spec import Spec

if TYPE_CHECKING:
    from tunesmith.ladder.job import Job


@dataclass(slots=True)
class Rollout:
    """feed: where the trainer's rows come from. critic: the value model, where there is one. dev: judges by the reward on dev prompts."""

    feed: Rollouts
    critic: Model | None
    dev: Callable[[], Mapping[str, float]] | None

    def save(self, folder: RunFolder) -> None:
        """Write what a run leaves beside its adapter."""
        if self.critic is not None and folder.processes.first:
            save_critic(self.critic, folder.path)


def check_rewards(spec: Spec, records: Sequence[Record] | RecordStream) -> Rewards | None:
    """The spec's rewards, held against the columns of the data; None where nothing is sampled.

    Raises SpecError for an objective that samples without rewards, rewards that nobody reads, and what `Rewards` and its `check` refuse.
    """
    if not objective_of(spec).samples:
        if spec.rewards:
            what = f"rewards are of answers that the policy samples, and objective {objective_of(spec).name} learns from those in the data."
            raise SpecError(what, where="rewards", hints=["Nearest that works here:  objective: grpo", "Or leave rewards out."])
        return None
    if isinstance(records, RecordStream):
        raise SpecError("prompts are held in memory while their answers are sampled.", where="data.stream", hints=["data.stream=false"])
    rewards = Rewards(spec.rewards, columns={column for record in records[:100] for column in map(str, record.fields)})
    rewards.check()
    return rewards


def critic_for(job: Job) -> Model | None:
    """The value model of an actor and a critic, None for other objectives. To be called before the policy's adapter is on, which may
    change the base's own weights; these are then kept for the critic."""
    if objective_of(job.spec).name != "ppo":
        return None
    job.keep_base = True
    return critic_of(job.start, job.spec)


def begin(job: Job, model: Model, folder: RunFolder, critic: Model | None) -> Rollout:
    """What a run needs beside its policy. To be called before the trainer resumes. Raises as `rollout.begin.rollouts`."""
    spec, score = job.spec, _score(job)
    assert not isinstance(job.splits.train, RecordStream)
    feed = rollouts(
        model, spec, job.splits.train, score, folder.path, start=job.start, critic=critic, ask=job.task.ask, reporter=job.reporter,
        processes=folder.processes,
    )  # fmt: skip
    asked = take(job.splits.dev, spec.train.dev_questions, spec.train.seed)
    dev = dev_reward(model, spec, asked, score, ask=job.task.ask, processes=folder.processes) if asked else None
    step = spec.rollout.prompts * spec.rollout.samples
    job.reporter.line(
        "rollouts", f"{len(job.splits.train):,} prompts · {spec.rollout.prompts} x {spec.rollout.samples} = {step} answers each"
    )
    return Rollout(feed, critic, dev)


def _score(job: Job) -> Score:
    assert job.rewards is not None
    job.rewards.share(job.base)
    job.reporter.line("rewards", " · ".join(job.rewards.names))
    for judge in reward_judges(job.rewards, "gives the reward"):
        job.reporter.line("judge", judge.line())
    return scored_by(job.rewards)
