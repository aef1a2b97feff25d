"""Steps that learn from the policy's own answers: an iteration samples, scores and gives credit, and its steps share that out.

What a step learns from follows from the spec, the step number, the weights, and what `memory` holds: the answers under way, the
coefficient of the divergence, and how many prompts were drawn. Gradients, updates, checkpoints and the rest are the trainer's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tunesmith.core.progress import Quiet, Reporter
from tunesmith.core.row import Row
from tunesmith.engine.critic import Critic
from tunesmith.engine.feed import Batch
from tunesmith.engine.model import Model
from tunesmith.engine.rundir import Metrics
from tunesmith.objectives import OBJECTIVES
from tunesmith.objectives.advantage import adapted
from tunesmith.objectives.registry import Amounts
from tunesmith.rollout.answers import Answer, Held, Numbers, Prompt, as_tensors, from_tensors
from tunesmith.rollout.credit import divergence, give_group_advantages, give_token_advantages, shaped
from tunesmith.rollout.figures import degenerate_line, figures_of, lines_of, reported, show, truncated_line
from tunesmith.rollout.gathering import Gathered, Gatherer, Group
from tunesmith.rollout.order import Place, groups_of, place_of
from tunesmith.rollout.recording import Reference, log_probs, values
from tunesmith.rolloutspec import settled
from tunesmith.spec import Spec, objective_call

SAMPLES = "samples.jsonl"
"""Where in the run folder answers are kept with their rewards."""

_PROBED = 4
"""Answers of an iteration that sampler, trainer and reference are held together on, where no pass over all is made anyway."""


class Rollouts:
    """An `engine.feed.Feed` of answers that the policy samples.

    reference: None where it is not to be had. critic: the value model, with ppo. folder: None writes no samples.
    """

    def __init__(
        self,
        model: Model,
        spec: Spec,
        gatherer: Gatherer,
        *,
        reference: Reference | None = None,
        critic: Critic | None = None,
        folder: Path | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        call = objective_call(spec.objective)
        self.objective, self.options = OBJECTIVES[call.name], call.options
        self.model, self.gatherer, self.reference, self.critic = model, gatherer, reference, critic
        self.spec, self.seed, self.processes = spec.rollout, spec.train.seed, gatherer.processes
        self.settled = settled(spec.rollout, call.name, call.options)
        self.reporter = (reporter if self.processes.first else None) or Quiet()
        self.epochs, self.parts = self.settled.epochs, spec.rollout.minibatches
        self.total = spec.train.steps or self._planned(spec.train.epochs or 3.0)
        self.kl = self.settled.kl
        self.position = 0  # prompts drawn so far
        self._held: list[Held] | None = None  # of the iteration under way
        self._iteration, self._step, self._stopped = -1, -1, False
        self._file, self._offset = None if folder is None else folder / SAMPLES, 0
        self._figures: dict[str, float] = {}
        self._untold: Gathered | None = None
        self._told: set[str] = set()  # what was said once of answers that teach nothing; then it is said as often as answers are shown

    @property
    def prompts(self) -> Sequence[Prompt]:
        return self.gatherer.prompts

    def _planned(self, epochs: float) -> int:
        """Steps that ask each prompt so many times."""
        return max(1, math.ceil(epochs * len(self.prompts) / self.spec.prompts)) * self.epochs * self.parts

    # As the trainer sees it

    def batch(self, step: int) -> Batch:
        """The rows of a step, counted from 0. Nothing is learned in a step without rows."""
        place = place_of(step, self.epochs, self.parts)
        if self._iteration != place.iteration:
            self._begin(place.iteration)
        if self._untold is not None:
            self._tell(self._untold, step)
        figures, self._figures, self._step = self._figures, {}, step
        assert self._held is not None
        groups = set(groups_of(place, sorted({one.group for one in self._held}), self.parts, self.seed))
        part = [one for one in self._held if one.group in groups]
        used = [one for one in part if one.used]
        if used and not place.first and self.spec.stop_kl is not None and not self._stopped:
            figures |= self._watch(used)
        if self._stopped or not used:
            return Batch([], figures=figures)
        counted = [one for one in part if one.counted]
        amounts = Amounts(sum(int(one.chosen.sum()) for one in counted), len(counted), len({one.group for one in counted}))
        return Batch(self._rows(used, place), self.objective.weigh(amounts, self.options), figures)

    def first(self) -> Sequence[Row]:
        """The first iteration's rows, where an adapter has to see gradients before the first step."""
        if not self.model.adapter.waits:
            return []
        if self._held is None:
            self._begin(0)
        return self._rows([one for one in self._held or [] if one.used], Place(0, 0, 0))

    def tokens(self) -> float:
        """Tokens of a step, about: answers of half the longest that is allowed."""
        prompt = sum(len(one.ids) for one in self.prompts[:1000]) / len(self.prompts[:1000])
        return self.spec.prompts * (prompt + self.spec.samples * self.spec.max_new_tokens / 2) / self.parts

    def memory(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The answers under way, unless the next step begins an iteration, and the plain values beside them."""
        plain = {"kl": self.kl, "position": self.position, "stopped": self._stopped, "samples": self._offset}
        if place_of(self._step + 1, self.epochs, self.parts).first:
            return {}, plain
        return as_tensors(self._held or []), {**plain, "iteration": self._iteration, "step": self._step}

    def recall(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what `memory` gave."""
        self.kl, self.position, self._stopped = values["kl"], values["position"], values["stopped"]
        self._offset = values["samples"]
        self._held, self._iteration, self._step = None, values.get("iteration", -1), values.get("step", -1)
        if self._iteration >= 0:
            self._held = from_tensors(tensors)

    # An iteration

    def _begin(self, iteration: int) -> None:
        """Sample, score and give credit."""
        gathered = self.gatherer.gather(iteration, self.position, dynamic=self.settled.dynamic)
        began = time.perf_counter()
        self.position, self._iteration, self._stopped = gathered.position, iteration, False
        self._held = self._as_held(gathered)
        rewards = [shaped(value, answer, self.spec) for group in gathered.groups for answer, value in _pairs(group)]
        self._figures = reported(figures_of(gathered) | self._credit(gathered, rewards))
        self._figures["recording_seconds"] = time.perf_counter() - began
        self._untold = gathered

    def _as_held(self, gathered: Gathered) -> list[Held]:
        out = []
        for number, group in enumerate(gathered.groups):
            for answer, outcome in _pairs(group):
                masked = self.settled.truncated == "mask" and not answer.ended
                held = Held(group.prompt, number, np.asarray(answer.ids, np.int32), np.asarray(answer.chosen, np.bool_))
                held.counted = held.used = not (masked or math.isnan(outcome))
                out.append(held)
        return out

    def _credit(self, gathered: Gathered, rewards: Sequence[float]) -> dict[str, float]:
        """Write the numbers that the answers are learned from; what is to be known of them."""
        held = self._held
        assert held is not None
        figures: dict[str, float] = {}
        if self.settled.critic:
            self._record(held, "old", reference=self.kl > 0)
            self._write(held, "value", self._values(held))
            judged = give_token_advantages(held, rewards, self.spec, self.kl)
            figures |= {"value": judged.value, "explained_variance": judged.explained}
        else:
            if self.kl:
                self._record(held, "old", reference=True)
            give_group_advantages(held, rewards, self.spec, self.settled, self.kl)
            self._leave_out(held)
            used = [one for one in held if one.used]
            if self.epochs * self.parts > 1 and not self.kl:
                self._record(used, "old", reference=False)
            if self.settled.beta and not self.kl:
                self._record(used, None, reference=True)
        return figures | self._apart(gathered, held)

    def _leave_out(self, held: Sequence[Held]) -> None:
        """Answers with an advantage of 0 have no gradient, and are not computed; what the loss is divided by still counts them.

        Not where the divergence from the reference is part of the loss, nor where each micro-batch is divided by what it holds.
        """
        if self.settled.beta or self.objective.weigh(Amounts(1, 1, 1), self.options) is None:
            return
        for one in held:
            one.used = one.counted and bool(one.given["advantage"].any())

    def _apart(self, gathered: Gathered, held: Sequence[Held]) -> dict[str, float]:
        """How far the trainer's log-probabilities are from the sampler's, and the policy from its reference; kl is steered by it."""
        sampled = [np.asarray(answer.log_probs, np.float32) for group in gathered.groups for answer in group.answers]
        known = [(one, said) for one, said in zip(held, sampled, strict=True) if "old" in one.given]
        if not known:
            some = [(one, said) for one, said in zip(held, sampled, strict=True) if one.used][:_PROBED]
            known = [(_bare(one), said) for one, said in some]
            self._record([one for one, _ in known], "old", reference=False)
        if not known:
            return {}
        gaps = np.concatenate([(one.given["old"] - said)[one.chosen] for one, said in known])
        figures = {"sampler_gap": float(np.abs(gaps).mean()), "sampler_gap_most": float(np.abs(gaps).max())}
        referred = [one for one, _ in known if "reference" in one.given]
        if not referred and self.reference is not None:
            referred = [_bare(one) for one, _ in known[:_PROBED]]
            self._record(referred, None, reference=True)
        return figures | self._drift(referred)

    def _drift(self, held: Sequence[Held]) -> dict[str, float]:
        """The policy's divergence from its reference, a token and, as it is penalised, an answer; what the penalty becomes."""
        if not held:
            return {}
        tokens = sum(int(one.chosen.sum()) for one in held)
        figures = {"reference_kl": sum(float(divergence(one, "k3").sum()) for one in held) / tokens}
        if self.settled.kl:
            answer = sum(float(divergence(one, self.spec.kl_estimator).sum()) for one in held) / len(held)
            figures |= {"reference_kl_answer": answer, "kl_coefficient": self.kl}
            if self.spec.kl_target is not None:
                self.kl = adapted(self.kl, answer, target=self.spec.kl_target, horizon=self.spec.kl_horizon, count=len(held))
        return figures

    def _watch(self, used: Sequence[Held]) -> dict[str, float]:
        """Stop the iteration where the policy has gone too far from the one that sampled; on the answers that come next."""
        assert self.spec.stop_kl is not None
        now = log_probs(self.model, [self._row(one, ()) for one in used], self.spec.temperature, self.processes)
        change = np.concatenate(now) - np.concatenate([one.given["old"][one.chosen] for one in used])
        apart = float((np.expm1(change.astype(np.float64)) - change).mean())  # k3 of the policy that sampled from the one now
        self._stopped = apart > self.spec.stop_kl
        return {"sampled_kl": apart, "stopped": float(self._stopped)}

    # Rows and numbers

    def _rows(self, held: Sequence[Held], place: Place) -> list[Row]:
        """The answers as rows. Of the first step `old` is left out: the ratio is then 1 to the last bit."""
        wanted = {"advantage"}
        if self.settled.critic:
            wanted |= {"value", "return"}
        if self.settled.beta:
            wanted.add("reference")
        if not place.first:
            wanted.add("old")
        return [self._row(one, sorted(wanted)) for one in held]

    def _row(self, held: Held, names: Sequence[str]) -> Row:
        prompt = self.prompts[held.prompt]
        return held.row(prompt.ids, names, prompt.record.where)

    def _record(self, held: Sequence[Held], own: str | None, *, reference: bool) -> None:
        """Write what the policy (under the name `own`, if any) and its reference say of answers."""
        rows = [self._row(one, ()) for one in held]
        if own is not None:
            self._write(held, own, log_probs(self.model, rows, self.spec.temperature, self.processes))
        if reference:
            assert self.reference is not None
            self._write(held, "reference", self.reference.log_probs(rows, self.spec.temperature, self.processes))

    def _values(self, held: Sequence[Held]) -> list[Numbers]:
        assert self.critic is not None
        return values(self.critic, [self._row(one, ()) for one in held], self.processes)

    def _write(self, held: Sequence[Held], name: str, numbers: Sequence[Numbers]) -> None:
        for one, own in zip(held, numbers, strict=True):
            one.given[name] = one.at_chosen(own)

    def _tell(self, gathered: Gathered, step: int) -> None:
        self._untold = None
        if gathered.problems:
            self.reporter.line("rewards", f"{len(gathered.problems)} answers were passed over; {gathered.problems[0]}")
        shown = bool(self.spec.show) and self._iteration % self.spec.show == 0
        idle = not self.settled.dynamic and not any(one.used for one in self._held or ())
        for topic, said in (
            ("idle", "the answers to each prompt were rewarded alike, or not at all; nothing is learned in it" if idle else None),
            ("degenerate", degenerate_line(gathered, self.spec.prompts) if self.settled.dynamic else None),
            ("truncated", truncated_line(gathered, self.spec.max_new_tokens) if self.settled.truncated == "mask" else None),
        ):
            if said is not None and (shown or topic not in self._told):
                self.reporter.line("rollout", f"iteration {self._iteration + 1}: {said}")
                self._told.add(topic)
        if shown:
            show(self.reporter, gathered, self.prompts, self._iteration)
        if self._file is not None and self.processes.first:
            kept = Metrics(self._file, self._offset)  # what came after the checkpoint is cut off
            for line in lines_of(gathered, self.prompts, self._iteration, step + 1):
                kept.write(**line)
            self._offset = kept.offset()


def _bare(held: Held) -> Held:
    """The same answer, to write further numbers on that nothing is learned from."""
    return Held(held.prompt, held.group, held.ids, held.chosen, given=dict(held.given))


def _pairs(group: Group) -> Iterator[tuple[Answer, float]]:
    """Each answer with its reward."""
    return zip(group.answers, group.outcome, strict=True)
