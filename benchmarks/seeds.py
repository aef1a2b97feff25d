"""The demo's trained rung over several seeds: python benchmarks/seeds.py [SEED ...]

Seeds change the adapter's start and the order of the samples; base, samples and questions stay. Each seed is a ladder of
one rung in runs/seed-N, resumable; a table in Markdown goes to stdout.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tunesmith.core.progress import Terminal
from tunesmith.ladder.climb import climb
from tunesmith.ladder.demo import demo_spec
from tunesmith.report import read_report
from tunesmith.report.schema import Report


def of_seed(seed: int) -> Report:
    """The report of one seed; a finished one is read from its folder."""
    folder = Path("runs") / f"seed-{seed}"
    if (folder / "report.json").exists():
        return read_report(folder)
    spec = demo_spec([f"name=seed-{seed}", f"train.seed={seed}", "climb.rungs=[sft]"])
    return climb(spec, resume=True, reporter=Terminal())[0]


def main(seeds: list[int]) -> None:
    """Print a line a seed."""
    print("| seed | right | 95 % interval | macro F1 | training, s | steps kept |")
    print("|---|---|---|---|---|---|")
    for seed in seeds:
        rung = of_seed(seed).rungs[0]
        best = max((point for point in rung.curve if point.dev_metric is not None), key=lambda point: point.dev_metric or 0.0)
        interval = f"{100 * rung.ci_low:.1f} to {100 * rung.ci_high:.1f} %"
        print(f"| {seed} | {100 * rung.accuracy:.1f} % | {interval} | {rung.macro_f1:.3f} | {rung.train_seconds:.0f} | {best.step} |")


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [0, 1, 2])
