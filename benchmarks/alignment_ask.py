"""One system of `alignment.py` asked one thing: python benchmarks/alignment_ask.py SYSTEM pairs|sums|films|tweets OUT.json

pairs and tweets: the questions that its run held back, right or wrong. sums: greedy answers to sums that no run was shown.
films: greedy answers to prompts about films that no run was shown, scored by the reward model from people's ratings.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REWARDED: dict[str, tuple[str, int, str]] = {
    "sums": ("examples/right-wrong.test.jsonl", 12, "numeric"),
    "films": ("examples/film-lines.test.jsonl", 24, "model(source=runs/reward-films-0)"),
}
"""(prompts, most new tokens, reward)."""


def held_back(system: str) -> list[float]:
    """Scores of the questions that a run's data holds back."""
    import tunesmith as ts
    from tunesmith.engine.rundir import RunFolder
    from tunesmith.evaluation.task import make_task
    from tunesmith.ladder.data import load_splits

    spec = RunFolder(Path(system)).spec()
    splits = load_splits(spec.data)
    return ts.evaluate(system, splits.test, task=make_task(spec.task, splits.train), data=spec.data).scores


def rewarded(system: str, asked: str) -> list[float]:
    """Rewards of greedy answers."""
    import tunesmith as ts
    from tunesmith.rollout.rewards import Rewards
    from tunesmith.rollout.sample import Sample

    source, tokens, reward = REWARDED[asked]
    rows: list[dict[str, Any]] = [json.loads(line) for line in Path(source).read_text().splitlines()]
    said = ts.generate(system, [row["prompt"] for row in rows], max_new_tokens=tokens)
    samples = [
        Sample(({"role": "user", "content": row["prompt"]},), text, answer=row.get("chosen"), fields=row, group=at)
        for at, (row, text) in enumerate(zip(rows, said, strict=True))
    ]
    return [float(score) for score in Rewards([reward]).score(samples).total]


if __name__ == "__main__":
    who, what, out = sys.argv[1:]
    scores = rewarded(who, what) if what in REWARDED else held_back(who)
    Path(out).write_text(json.dumps(scores))
