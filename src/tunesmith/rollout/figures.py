"""What is said of an iteration: numbers for the metrics, answers with their rewards for the run folder and the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tunesmith.core.progress import Reporter
from tunesmith.rollout.answers import Answer, Prompt
from tunesmith.rollout.gathering import Gathered, Group

_SHOWN, _WIDTH = 3, 96
"""Answers in the terminal's table, and characters of each."""


def figures_of(gathered: Gathered) -> dict[str, float]:
    """Of all answers that were sampled in an iteration, those that were replaced included.

    reward, reward_std, reward_NAME: mean and deviation of the rewards, and the mean of each part. unscored: share without a reward.
    sampled_entropy: mean of -log p of the tokens as they were sampled, nats, which is the policy's entropy on average. answer_tokens,
    longest_answer: of chosen tokens. truncated: share that did not end by itself. turns: where there was more than one. groups,
    degenerate: how many were sampled, and the share whose answers were all rewarded alike. rounds: of sampling.
    """
    groups = [*gathered.groups, *gathered.left]
    answers = [answer for group in groups for answer in group.answers]
    rewards = _known([value for group in groups for value in group.outcome])
    lengths = [answer.tokens for answer in answers]
    drawn = sum(lengths)
    out = {
        "reward": _mean(rewards),
        "reward_std": float(np.std(rewards)) if rewards else 0.0,
        **{f"reward_{name}": _mean(_known([v for g in groups for v in g.parts[name]])) for name in groups[0].parts},
        "unscored": 1 - len(rewards) / len(answers),
        "sampled_entropy": -sum(sum(answer.log_probs) for answer in answers) / drawn,
        "answer_tokens": drawn / len(answers),
        "longest_answer": float(max(lengths)),
        "truncated": _mean([float(not answer.ended) for answer in answers]),
        "groups": float(len(groups)),
        "degenerate": _mean([float(not group.signal) for group in groups]),
        "rounds": float(gathered.rounds),
        "sampling_seconds": gathered.sampling,
        "scoring_seconds": gathered.scoring,
        "sampling_tokens_per_second": drawn / max(gathered.sampling, 1e-9),
    }
    if any(answer.turns > 1 for answer in answers):
        out["turns"] = _mean([float(answer.turns) for answer in answers])
    return out


def lines_of(gathered: Gathered, prompts: Sequence[Prompt], iteration: int, step: int) -> list[dict[str, Any]]:
    """What `samples.jsonl` holds of an iteration: a line a group, replaced ones marked."""
    marked = [*((group, False) for group in gathered.groups), *((group, True) for group in gathered.left)]
    return [
        {
            "iteration": iteration,
            "step": step,
            "where": prompts[group.prompt].record.where,
            "prompt": _asked(prompts[group.prompt]),
            **({"replaced": True} if replaced else {}),
            "answers": [_line(answer, group, place) for place, answer in enumerate(group.answers)],
        }
        for group, replaced in marked
    ]


def _line(answer: Answer, group: Group, place: int) -> dict[str, Any]:
    return {
        "reward": _json(group.outcome[place]),
        **{f"reward_{name}": _json(values[place]) for name, values in group.parts.items()},
        "tokens": answer.tokens,
        "ended": answer.ended,
        "text": answer.text,
        **({"messages": answer.messages} if answer.messages else {}),
    }


def show(reporter: Reporter, gathered: Gathered, prompts: Sequence[Prompt], iteration: int) -> None:
    """The best, the middle and the worst answer of an iteration's first group, with their rewards."""
    groups = [*gathered.groups, *gathered.left]
    group = next((group for group in groups if group.signal), groups[0])
    order = sorted(range(len(group.answers)), key=lambda place: -_or_least(group.outcome[place]))
    places = order if len(order) <= _SHOWN else [order[0], order[len(order) // 2], order[-1]]
    reporter.line("sample", f"iteration {iteration + 1} · {_cut(_asked(prompts[group.prompt]))}")
    for place in places:
        answer = group.answers[place]
        parts = " ".join(f"{name} {values[place]:.3g}" for name, values in group.parts.items()) if len(group.parts) > 1 else ""
        said = f"{group.outcome[place]:>7.3f} · {answer.tokens} tokens{'' if answer.ended else ', cut off'}"
        reporter.line("", f"{said}{f' · {parts}' if parts else ''} · {_cut(answer.text)}")


def degenerate_line(gathered: Gathered, wanted: int) -> str | None:
    """Of prompts that had to be left out, since no round of sampling brought answers that were rewarded differently."""
    if len(gathered.groups) >= wanted:
        return None
    tried = f"{len(gathered.left)} of {len(gathered.left) + len(gathered.groups)} prompts had answers that were all rewarded alike"
    rounds = f"in {gathered.rounds} round{'s' if gathered.rounds > 1 else ''} of sampling"
    learned = f"it learns from {len(gathered.groups)} of {wanted}" if gathered.groups else "nothing is learned in it"
    return f"{tried} {rounds}; {learned}"


def truncated_line(gathered: Gathered, longest: int) -> str | None:
    """Of answers that were cut off and masked, where these are most of them."""
    ended = [answer.ended for group in gathered.groups for answer in group.answers]
    cut = len(ended) - sum(ended)
    if 2 * cut <= len(ended):
        return None
    way = "rollout.max_new_tokens gives them room, rollout.truncated=keep learns from them"
    return f"{cut} of {len(ended)} answers were cut off at {longest} tokens and are not learned from; {way}"


def _asked(prompt: Prompt) -> str:
    """The last turn of the prompt."""
    content = prompt.messages[-1].get("content") if prompt.messages else ""
    return content if isinstance(content, str) else str(content)


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _known(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def _or_least(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _json(value: float) -> float | None:
    """JSON knows no NaN."""
    return None if math.isnan(value) else value


def reported(values: Mapping[str, float]) -> dict[str, float]:
    """Figures that are numbers."""
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}
