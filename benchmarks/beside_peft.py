"""Every method that PEFT has too, ours and PEFT's in turn: python benchmarks/beside_peft.py [NAME ...] [--pairs N]

On the demo's model the peer is TRL's SFTTrainer with PEFT, on short chat rows; on MiniLM it is transformers' Trainer with PEFT,
on tweets. Both sides begin with the same adapter, through PEFT's files, and take the same rows in the same order; where the files cannot
hold such a start, each begins with its own. Each row of the table is kept in results/beside_peft.json as soon as it is there,
and is not measured again unless it is named. --fast: speed and memory alone, both sides in the same dtype.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import classify
from run import BASE, HERE, bench, matrix_limit, peer_python, side
from work import WORKS

from tunesmith.bases import load_base

METHODS = {
    "lora": "lora(rank=16, sites=[q, v])",
    "rslora": "rslora(rank=16, sites=[q, v])",
    "dora": "dora(rank=16, sites=[q, v])",
    "pissa": "pissa(rank=16, sites=[q, v])",
    "adalora": "adalora(rank=8, initial=16, sites=[q, v])",
    "ia3": "ia3",
    "prompt": "prompt(tokens=20)",
    "ptuning": "ptuning(tokens=20)",
    "prefix": "prefix(tokens=30)",
    "ptuning_v2": "ptuning_v2(tokens=30)",
}
FRESH: dict[str, dict[str, Any]] = {
    "ptuning": {"peft_type": "P_TUNING", "num_virtual_tokens": 20, "encoder_hidden_size": 128},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 30, "prefix_projection": True, "encoder_hidden_size": 512},
}
"""PEFT's files keep what a network made, without the network."""
PROMPT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20}
"""On an encoder PEFT's head reads the first vector and ours the first token of the text, so there is no file for both."""
DECODER = replace(WORKS["sft-lora-short"], steps=6, warm=3)
TWEETS = 640
KEPT = HERE / "results" / "beside_peft.json"


def main() -> None:
    """The rows named (METHOD-smollm2, METHOD-minilm), or all that are not there yet."""
    names = [f"{method}-{base}" for base in ("smollm2", "minilm") for method in METHODS]
    parser = argparse.ArgumentParser(description="Methods beside PEFT's.")
    parser.add_argument("names", nargs="*", choices=[[], *names])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--fast", action="store_true")
    given = parser.parse_args()
    found: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    base = load_base(BASE)
    for name in given.names or [name for name in names if "ours" not in found.get(name, {})]:
        method, which = name.rsplit("-", 1)
        options: dict[str, Any] = {"exact": not given.fast, "fresh": FRESH.get(method)}
        try:
            if which == "smollm2":
                found[name] = bench(replace(DECODER, name=name, adapter=METHODS[method]), base, given.pairs, **options)
            else:
                options |= {"adapter": METHODS[method] + " + head(pool=pooler)", "rows": TWEETS, "name": name}
                options["fresh"] = PROMPT if method == "prompt" else options["fresh"]
                found[name] = classify.bench(side, peer_python(), given.pairs, matrix_limit, **options)
        except SystemExit as failed:  # one side cannot do it: said, and the next one follows
            found[name] = {"work": name, "failed": str(failed)[-600:]}
        KEPT.write_text(json.dumps(found, indent=2) + "\n")
        row = found[name]
        differs = row.get("largest_loss_difference_fp32")
        print(
            f"{name:<20} failed: {row['failed'].splitlines()[-1]}"
            if "failed" in row
            else f"{name:<20} {row['ours']:>8.1f} {row['peer']:>8.1f} {row['unit']:<9} {row['ratio']:>5.2f}x {row['ours_peak_mb']:>6} MB "
            f"{row['peer_peak_mb']:>6} MB" + ("" if differs is None else f"  losses differ by {differs:.1e}"),
            flush=True,
        )


if __name__ == "__main__":
    main()
