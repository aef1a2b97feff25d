"""From cells to lines of a table: quality over seeds and questions, paired comparisons, and what each method costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from methods.board import Board, Chosen
from methods.cells import Result, Want
from tunesmith.evaluation.ratios import Ratio, compared
from tunesmith.evaluation.resampling import Floats, Interval
from tunesmith.evaluation.statistics import Verdict, judged, verdicts, wilson

DRAWS = 4000


@dataclass(frozen=True, slots=True)
class Cost:
    """What a method costs on a task, the median over seeds. rise_mb: of resident memory while it trained."""

    train_seconds: float
    peak_mb: float
    rise_mb: float
    trainable: int
    of: int
    changed: int
    rank: int
    matrices: int
    stored: int
    flops: int
    merges: str


@dataclass(frozen=True, slots=True)
class Line:
    """A method on a task with so many samples. seeds: the quality of each. low, high: 95 %, over seeds and questions. forgetting:
    rise of the base's own loss on the general text, nats, the mean over seeds; drift: of encoders. against: the comparison
    with the block's reference; None for itself, and where they have no seed in common."""

    task: str
    size: str
    method: str
    adapter: str
    block: str
    measure: str
    questions: int
    seeds: dict[int, float]
    quality: float
    low: float
    high: float
    chosen: Chosen
    cost: Cost
    forgetting: float
    drift: float | None
    against: Verdict | None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds."""
        return statistics.stdev(self.seeds.values()) if len(self.seeds) > 1 else None


@dataclass(frozen=True, slots=True)
class Absent:
    """A cell of the table that has no result, and why."""

    want: Want
    why: str


def summary(board: Board) -> tuple[list[Line], list[Absent]]:
    """The lines of all that is done, in the order of the table, and what is not."""
    results: dict[tuple[str, str, str], dict[int, Result]] = {}
    absent = []
    for want in board.wants:
        result = board.result(want)
        if result is not None and "quality" in result:
            results.setdefault((want.task, want.size, want.method), {})[want.seed] = result
        else:
            absent.append(Absent(want, _why(board, want, result)))
    lines = []
    for task in board.table.tasks:
        for size in board.table.tasks[task].sizes:
            lines += _of_size(board, task, size, {name: found for (t, s, name), found in results.items() if (t, s) == (task, size)})
    return lines, absent


def _why(board: Board, want: Want, result: Result | None) -> str:
    if refusal := board.refusal(want.task, want.method):
        return refusal
    if result is not None:
        return str(result.get("failed") or result.get("refused"))
    tried = board.tried(want.task, want.method)
    if tried and board.chosen(want.task, want.method) is None and all("failed" in (board.store.get(cell) or {}) for cell in tried):
        return f"training failed at every learning rate: {(board.store.get(tried[0]) or {})['failed']}"
    return "not run"


def _of_size(board: Board, task: str, size: str, found: Mapping[str, dict[int, Result]]) -> list[Line]:
    against: dict[str, Verdict] = {}
    for block, reference in board.table.references.items():
        own = [name for name in found if board.table.methods[name].block == block]
        against |= _against(found, [name for name in own if name != reference], reference, board.table.margin)
    return [_line(board, task, size, name, found[name], against.get(name)) for name in board.table.methods if name in found]


def _against(found: Mapping[str, dict[int, Result]], names: Sequence[str], reference: str, margin: float) -> dict[str, Verdict]:
    """Each method against the reference over the seeds that both have: paired by question, corrected for one another."""
    pairs = {}
    for name in names:
        seeds = sorted(set(found[name]) & set(found.get(reference, {})))
        if seeds:
            pairs[name] = (mean_of([found[name][seed] for seed in seeds]), mean_of([found[reference][seed] for seed in seeds]))
    if all(np.all(ratio.bottom == 1) for pair in pairs.values() for ratio in pair):
        made = verdicts([(a.top.tolist(), b.top.tolist()) for a, b in pairs.values()], margin=margin) if pairs else []
    else:
        measured = [compared(a, b, *_wins(a, b)) for a, b in pairs.values()]
        made = judged(measured, margin=margin)
    return dict(zip(pairs, made, strict=True))


def mean_of(results: Sequence[Result]) -> Ratio:
    """Several seeds on the same questions as one: what each question adds to the two sums, the mean over seeds."""
    return Ratio(*(np.mean([np.asarray(result[part], np.float64) for result in results], axis=0) for part in ("top", "bottom")))


def _wins(a: Ratio, b: Ratio) -> tuple[int, int]:
    gap = a.top - a.value * a.bottom - (b.top - b.value * b.bottom)
    return int((gap > 1e-12).sum()), int((gap < -1e-12).sum())


def _line(board: Board, task: str, size: str, name: str, found: Mapping[int, Result], against: Verdict | None) -> Line:
    results = [found[seed] for seed in sorted(found)]
    interval = interval_of(results)
    method, chosen = board.table.methods[name], board.chosen(task, name)
    assert chosen is not None
    lost = [result["forgetting"] for result in results]
    drifts = [each["drift"] for each in lost if "drift" in each]
    return Line(
        task=task,
        size=size,
        method=name,
        adapter=method.adapter,
        block=method.block,
        measure=results[0]["measure"],
        questions=len(results[0]["top"]),
        seeds={seed: found[seed]["quality"] for seed in sorted(found)},
        quality=statistics.fmean(result["quality"] for result in results),
        low=interval.low,
        high=interval.high,
        chosen=chosen,
        cost=_cost(results),
        forgetting=statistics.fmean(each["cross_entropy"] for each in lost),
        drift=statistics.fmean(drifts) if drifts else None,
        against=against,
    )


def _cost(results: Sequence[Result]) -> Cost:
    counts: dict[str, Any] = next((result["counts"] for result in results if "counts" in result), {})
    known = {key: counts.get(key, 0) for key in ("trainable", "of", "changed", "rank", "matrices", "stored", "flops")}
    return Cost(
        train_seconds=statistics.median(result["train_seconds"] for result in results),
        peak_mb=statistics.median(result["peak_mb"] for result in results),
        rise_mb=statistics.median(result["peak_mb"] - result["before_mb"] for result in results),
        merges=counts.get("merges", ""),
        **known,
    )


def interval_of(results: Sequence[Result]) -> Interval:
    """95 % of the mean quality: Wilson for one seed of rights and wrongs, else the bootstrap over seeds and questions at once."""
    top, bottom = (np.asarray([result[part] for result in results], np.float64) for part in ("top", "bottom"))
    if len(results) == 1 and np.all(bottom == 1) and np.all((top == 0) | (top == 1)):
        return wilson(int(top.sum()), top.shape[1])
    return crossed(top, bottom)


def crossed(top: Floats, bottom: Floats, *, draws: int = DRAWS, seed: int = 0) -> Interval:
    """95 % of the mean over seeds of sum(top) / sum(bottom), [seeds, questions], seeds and questions both drawn with replacement.

    Owen 2007, the pigeonhole bootstrap: cautious about questions; of few seeds, it sees (n - 1) / n of their variance.
    """
    rng = np.random.default_rng(seed)
    seeds, questions = top.shape
    times = rng.multinomial(questions, np.full(questions, 1 / questions), size=draws).astype(np.float64)
    above, below = times @ top.T, times @ bottom.T
    ratios = np.divide(above, below, out=np.zeros_like(above), where=below != 0)
    weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    low, high = np.quantile((weights * ratios).sum(axis=1), (0.025, 0.975))
    return Interval(float(low), float(high))


def plain(line: Line) -> dict[str, Any]:
    """A line as plain values."""
    return {**asdict(line), "spread": line.spread}
