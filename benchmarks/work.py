"""What both sides of a benchmark read: the same rows, the same start, the same settings, as files in a folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

WORDS = [
    "phone",
    "film",
    "book",
    "soup",
    "chair",
    "song",
    "train",
    "lamp",
    "love",
    "hate",
    "great",
    "the",
    "a",
    "this",
    "is",
    "quite",
    "never",
]
"""Of made-up texts."""


@dataclass(frozen=True)
class Work:
    """One row of the table. prompt, answer: (median, smallest, largest) tokens, log-normal with this sigma. batch: rows of
    an optimiser step. steps: how many are run; the first `warm` are not counted. full: all parameters instead of LoRA."""

    name: str
    prompt: tuple[int, int, int]
    answer: tuple[int, int, int]
    batch: int
    steps: int
    warm: int
    lr: float
    full: bool = False
    sigma: float = 0.5
    adapter: str = "lora(rank=16, sites=[q, v])"


WORKS = {
    work.name: work
    for work in (
        Work("sft-lora-short", (45, 12, 200), (60, 8, 250), batch=8, steps=10, warm=3, lr=2e-4),
        Work("sft-lora-long", (700, 500, 1000), (700, 500, 1000), batch=2, steps=4, warm=1, lr=2e-4, sigma=0.2),
        Work("sft-full-short", (45, 12, 200), (60, 8, 250), batch=8, steps=8, warm=2, lr=2e-5, full=True),
    )
}


def write_rows(work: Work, folder: Path, vocabulary: int, seed: int = 0) -> None:
    """rows.json: {"ids": [...], "supervised": [...]} a row, in the order in which steps take them."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(work.batch * work.steps):
        lengths = []
        for median, low, high in (work.prompt, work.answer):
            lengths.append(int(np.clip(round(float(rng.lognormal(np.log(median), work.sigma))), low, high)))
        prompt, answer = lengths
        ids = rng.integers(100, min(vocabulary, 40_000), prompt + answer).tolist()
        rows.append({"ids": ids, "supervised": [0] * prompt + [1] * answer})
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "work.json").write_text(json.dumps(asdict(work)))


def read(folder: Path) -> tuple[Work, list[dict[str, list[int]]]]:
    """What `write_rows` wrote."""
    values = json.loads((folder / "work.json").read_text())
    work = Work(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    return work, json.loads((folder / "rows.json").read_text())


def say(losses: list[float], seconds: list[float], tokens: list[int], warm: int, peak_mb: float, dtype: str) -> None:
    """The side's result, one JSON line on stdout. Speed: all tokens of the counted steps over their time."""
    rate = sum(tokens[warm:]) / sum(seconds[warm:])
    print(json.dumps({"losses": losses, "tokens_per_second": rate, "seconds": seconds, "peak_mb": peak_mb, "dtype": dtype}), flush=True)
