"""What runs logged, step by step, as one picture: python benchmarks/curves.py OUT.svg KEY[,KEY ...] RUN [RUN ...]

A panel a key of metrics.jsonl, a line a run: thin the values, thick their mean over the last five steps. The colours are those that
people who see colours differently can tell apart too (Okabe and Ito).
"""

from __future__ import annotations

import argparse
import html
from pathlib import Path

import numpy as np

from tunesmith.engine.rundir import read_metrics
from tunesmith.report.figures import Axis, axis

WIDTH, HEIGHT, LEFT, TOP, GAP = 340, 200, 44, 46, 34
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MEAN_OF = 5

Series = list[tuple[int, float]]


def read(run: Path, key: str) -> Series:
    """(step, value) of the lines that have the key."""
    found = [(int(line["step"]), float(line[key])) for line in read_metrics(run / "metrics.jsonl") if line.get(key) is not None]
    if not found:
        raise SystemExit(f"{run / 'metrics.jsonl'}: no line has the key '{key}'.")
    return found


def means(series: Series) -> Series:
    """Each value's mean with those just before it."""
    values = [value for _, value in series]
    return [(step, float(np.mean(values[max(0, at + 1 - MEAN_OF) : at + 1]))) for at, (step, _) in enumerate(series)]


def points(series: Series, x: Axis, y: Axis) -> str:
    """Of an SVG polyline, in pixels of a panel."""
    return " ".join(f"{x.at(step) * WIDTH / 100:.1f},{HEIGHT - y.at(value) * HEIGHT / 100:.1f}" for step, value in series)


def panel(key: str, runs: dict[str, Series], left: int) -> list[str]:
    """The lines of one key, with axes from the smallest to the largest value."""
    values = [value for series in runs.values() for _, value in series]
    x = axis(0, max(series[-1][0] for series in runs.values()))
    y = axis(min(0.0, *values), max(values))
    out = [f'<g transform="translate({left},{TOP})">', f'<text x="0" y="-8" font-weight="600">{html.escape(key.replace("_", " "))}</text>']
    for tick in y.ticks:
        at = HEIGHT - tick.at * HEIGHT / 100
        out.append(f'<path d="M0 {at:.1f}H{WIDTH}" stroke="#8884"/><text x="-6" y="{at + 4:.1f}" text-anchor="end">{tick.text}</text>')
    for tick in x.ticks:
        out.append(f'<text x="{tick.at * WIDTH / 100:.1f}" y="{HEIGHT + 16}" text-anchor="middle">{tick.text}</text>')
    for colour, series in zip(COLOURS, runs.values(), strict=False):
        line = f'<polyline fill="none" stroke="{colour}"'
        out.append(f'{line} stroke-opacity=".3" points="{points(series, x, y)}"/>')
        out.append(f'{line} stroke-width="2" points="{points(means(series), x, y)}"/>')
    return [*out, "</g>"]


def picture(keys: list[str], runs: list[Path]) -> str:
    """The whole SVG."""
    width, height = len(keys) * (WIDTH + LEFT + GAP), TOP + HEIGHT + 40
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="11" fill="#888">',
    ]
    for number, (colour, run) in enumerate(zip(COLOURS, runs, strict=False)):
        out.append(
            f'<text x="{LEFT + 110 * number}" y="16" font-size="13" font-weight="600" fill="{colour}">{html.escape(run.name)}</text>'
        )
    for number, key in enumerate(keys):
        out += panel(key, {run.name: read(run, key) for run in runs}, LEFT + number * (WIDTH + LEFT + GAP))
    out.append(f'<text x="{LEFT}" y="{height - 4}">step; thick: mean of the last {MEAN_OF}</text></svg>')
    return "\n".join(out) + "\n"


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description="Curves of runs, side by side.")
    parser.add_argument("out", type=Path)
    parser.add_argument("keys")
    parser.add_argument("runs", type=Path, nargs="+")
    given = parser.parse_args()
    given.out.write_text(picture(given.keys.split(","), given.runs), encoding="utf-8")


if __name__ == "__main__":
    main()
