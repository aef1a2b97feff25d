"""Distillation on the policy's own words: rows whose answers are now and then what the policy says itself.

Where a student learns from texts it would never write, it meets at use what it has not seen in training (Agarwal et al. 2024,
2306.13649, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tunesmith.core.row import Row, Segment
from tunesmith.engine.feed import Batch, Feed, Fixed
from tunesmith.engine.memory import in_mode
from tunesmith.engine.model import Model
from tunesmith.engine.processes import ALONE, Processes
from tunesmith.engine.sampler import generate
from tunesmith.rollout.sampling import sampling_of, seed_of
from tunesmith.spec import Spec


def own_answers(model: Model, spec: Spec, rows: Sequence[Row], processes: Processes = ALONE) -> Feed | Sequence[Row]:
    """The rows of a run, of which `rollout.own` of the steps have answers of the policy's in place of their last ones; the rows
    themselves where that is 0. processes: that share the sampling of a step."""
    return OwnAnswers(model, spec, rows, processes) if spec.rollout.own and rows else rows


class OwnAnswers(Fixed):
    """What a step gets follows from its number and the weights: nothing is to be remembered."""

    def __init__(self, model: Model, spec: Spec, rows: Sequence[Row], processes: Processes = ALONE) -> None:
        super().__init__(rows, spec)
        self.model, self.spec, self.processes = model, spec.rollout, processes

    def batch(self, step: int) -> Batch:
        """The rows of a step; whether it is one of the policy's own is drawn from its number."""
        rows = super().batch(step).rows
        if np.random.default_rng([self.seed, step, 3]).random() >= self.spec.own:
            return Batch(rows, figures={"own": 0.0})
        own = list(range(self.processes.rank, len(rows), self.processes.count))
        said = self._sampled([rows[place] for place in own], seed_of(self.seed, step, 4), own)
        out = list(rows)
        for rank, part in enumerate(self.processes.gathered(said)):
            for place, ids in zip(range(rank, len(rows), self.processes.count), part, strict=True):
                if ids:
                    out[place] = _with_answer(rows[place], ids)
        lengths = [row.supervised_tokens for row in out]
        return Batch(out, figures={"own": 1.0, "answer_tokens": sum(lengths) / len(lengths)})

    def _sampled(self, rows: Sequence[Row], seed: int, seeds: Sequence[int]) -> list[list[int]]:
        """The policy's answer to what stands before each row's last one; none where the context has no room for it."""
        prompts = [row.segments[0].ids[: last_answer(row.segments[0])].tolist() for row in rows]
        context = self.model.context_length or 2**31
        rooms = [min(self.spec.max_new_tokens, context - len(prompt)) for prompt in prompts]
        asked = [place for place, (prompt, room) in enumerate(zip(prompts, rooms, strict=True)) if prompt and room > 0]
        out: list[list[int]] = [[] for _ in rows]
        if not asked:
            return out
        with self.model.active(), in_mode(self.model.base.model, training=False):
            said = generate(
                self.model.forward,
                self.model.base.tokenizer,
                self.model.forward.prompts([prompts[place] for place in asked]),
                sampling_of(self.spec, seed),
                ends=self.model.renderer.stop_ids,
                batch=self.spec.batch,
                budgets=[rooms[place] for place in asked],
                seeds=[seeds[place] for place in asked],
            )
        for place, one in zip(asked, said, strict=True):
            out[place] = one.ids
        return out


def last_answer(part: Segment) -> int:
    """Where a row's last run of supervised tokens begins."""
    targets = np.flatnonzero(part.supervised)
    if not len(targets):
        return len(part)
    gaps = np.flatnonzero(np.diff(targets) > 1)
    return int(targets[gaps[-1] + 1] if len(gaps) else targets[0])


def _with_answer(row: Row, ids: Sequence[int]) -> Row:
    """The row up to its last answer, which alone is learned from, and another one in its place."""
    start = last_answer(row.segments[0])
    whole = np.concatenate([row.segments[0].ids[:start], np.asarray(ids, np.int32)])
    return replace(row, segments=(Segment(whole, np.arange(len(whole)) >= start, name=row.segments[0].name),))
