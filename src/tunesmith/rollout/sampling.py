"""Answers of the policy to prompts, one turn each: all samples of a prompt from one reading of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tunesmith.engine.memory import in_mode
from tunesmith.engine.model import Model
from tunesmith.engine.sampler import Completion, Sampling, generate
from tunesmith.rollout.answers import Answer, Prompt
from tunesmith.rolloutspec import RolloutSpec


def sampling_of(spec: RolloutSpec, seed: int, *, temperature: float | None = None) -> Sampling:
    """How tokens are chosen. temperature: another one than the spec's; at 0 nothing is cut from the tail."""
    if temperature == 0:
        return Sampling(spec.max_new_tokens, seed=seed)
    heat = spec.temperature if temperature is None else temperature
    return Sampling(spec.max_new_tokens, heat, spec.top_p, spec.top_k, spec.min_p, seed=seed)


@torch.no_grad()
def answer_prompts(
    model: Model, prompts: Sequence[Prompt], sampling: Sampling, *, samples: int, seeds: Sequence[int], batch: int
) -> list[list[Answer]]:
    """`samples` answers to each prompt. seeds: what each prompt's random numbers start from, beside the sampling's own seed.

    What is said depends on the weights, the prompt and its seed; not on the prompts beside it, at the same decoding size.
    """
    if not prompts:
        return []
    with model.active(), in_mode(model.base.model, training=False):
        said = generate(
            model.forward,
            model.base.tokenizer,
            model.forward.prompts([prompt.ids for prompt in prompts]),
            sampling,
            samples=samples,
            ends=model.renderer.stop_ids,
            batch=batch,
            seeds=seeds,
        )
    answers = [_answer(one) for one in said]
    return [answers[at : at + samples] for at in range(0, len(answers), samples)]


def _answer(said: Completion) -> Answer:
    return Answer(said.ids, [True] * len(said.ids), said.log_probs, said.text, said.finished == "end")


def seed_of(*parts: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint32)[0])
