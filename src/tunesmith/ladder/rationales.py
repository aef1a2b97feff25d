"""Reasoning for demonstrations where the data has none: the base explains the right answer (Zelikman et al. 2022, STaR).

The explanation is made with the answer in sight, on training samples only, and kept if it is not empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tunesmith.core.errors import DataError
from tunesmith.core.record import Record
from tunesmith.engine.model import Model
from tunesmith.engine.sampler import Sampling, generate
from tunesmith.evaluation.prompting import ANSWER, draw_balanced
from tunesmith.evaluation.task import Task

_ASK = "{question}\n\nThe right answer is: {answer}\nExplain in one sentence why. Do not repeat the question."
_TOKENS = 48


def write_rationales(model: Model, task: Task, pool: Sequence[Record], shots: int, seed: int = 0) -> list[Record]:
    """Training samples with a reasoning of one sentence each, labels in balance.

    Raises DataError where the base explains too few of them.
    """
    answered = [record for record in pool if record.answer()]
    drawn = draw_balanced(answered, 2 * shots, np.random.default_rng([seed, 1]))
    prompts = []
    for record in drawn:
        asked = task.ask(record)
        question = str(asked[-1]["content"])
        said = _ASK.format(question=question, answer=record.answer())
        prompts.append(model.renderer.prompt([*asked[:-1], {"role": "user", "content": said}]).ids)
    with model.active():
        read, sampling = model.forward.prompts(prompts), Sampling(max_new_tokens=_TOKENS)
        done = generate(model.forward, model.base.tokenizer, read, sampling, ends=model.renderer.stop_ids)
    worked = [replace(record, reasoning=text) for record, one in zip(drawn, done, strict=True) if (text := _first_sentence(one.text))]
    if len(worked) < shots:
        raise DataError(
            f"the base explained only {len(worked)} of {len(drawn)} samples; {shots} worked examples are needed.",
            hints=[
                "Write some by hand:  climb.demonstrations=FILE  (with a column 'reasoning')",
                "Or ask for fewer:  chain_of_thought(shots=N)",
            ],
        )
    return draw_balanced(worked, shots, np.random.default_rng([seed, 2]))


def _first_sentence(text: str) -> str:
    line = " ".join(text.replace(ANSWER, " ").split())
    for mark in (". ", "! ", "? "):
        if mark in line:
            line = line.split(mark)[0] + mark.strip()
    return line
