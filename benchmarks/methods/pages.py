"""A comparison as files: CSV, JSON, Markdown and an HTML page with pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from methods.board import Board
from methods.cells import versions
from methods.page import size, to_html
from methods.summary import Absent, Line, plain, summary
from tunesmith.bases.hardware import hardware
from tunesmith.engine.checkpoint import write_whole
from tunesmith.report.markdown import table, text
from tunesmith.report.numbers import duration, memory, parameters, signed

COLUMNS = [
    *("task", "size", "method", "adapter", "block", "measure", "questions", "seeds"),
    *("quality", "low", "high", "spread"),
    *("reference", "difference", "difference_low", "difference_high", "p_adjusted", "verdict"),
    *("learning_rate", "rate_at_edge"),
    *("trainable", "base_parameters", "changed", "rank", "matrices", "stored_bytes", "flops_a_token", "merges"),
    *("train_seconds", "peak_mb", "rise_mb", "forgetting_nats", "drift"),
]


def write_all(board: Board, folder: Path, facts: Mapping[str, Any]) -> dict[str, Path]:
    """Write methods.csv, methods.json, comparison.md and comparison.html, and say where. facts: how the cells were run."""
    lines, absent = summary(board)
    texts = {
        "methods.csv": to_csv(board, lines),
        "methods.json": to_json(board, lines, absent, facts),
        "comparison.md": to_markdown(board, lines, absent, facts),
        "comparison.html": to_html(board, lines, absent, facts),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        write_whole(folder / name, content)
    return {name: folder / name for name in texts}


def publish(written: Mapping[str, Path], root: Path) -> None:
    """Copy the table and the page to where the repository keeps them."""
    write_whole(root / "docs" / "comparison.md", written["comparison.md"].read_text(encoding="utf-8"))
    write_whole(root / "benchmarks" / "results" / "methods.csv", written["methods.csv"].read_text(encoding="utf-8"))


def to_csv(board: Board, lines: Sequence[Line]) -> str:
    """One row a method, task and size."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({key: _short(value) for key, value in _row(board, line).items()})
    return out.getvalue()


def _row(board: Board, line: Line) -> dict[str, Any]:
    cost, versus = line.cost, line.against
    values = [
        *(line.task, line.size, line.method, line.adapter, line.block, line.measure, line.questions, len(line.seeds)),
        *(line.quality, line.low, line.high, line.spread, board.table.references[line.block] if versus else None),
        *((versus.difference, versus.low, versus.high, versus.p_adjusted, versus.verdict) if versus else (None,) * 5),
        *(line.chosen.rate, line.chosen.edge, cost.trainable, cost.of, cost.changed, cost.rank, cost.matrices, cost.stored),
        *(cost.flops, not cost.merges, cost.train_seconds, cost.peak_mb, cost.rise_mb, line.forgetting, line.drift),
    ]
    return dict(zip(COLUMNS, values, strict=True))


def _short(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def to_json(board: Board, lines: Sequence[Line], absent: Sequence[Absent], facts: Mapping[str, Any]) -> str:
    """Everything: the table that was asked for, what came out, seed by seed, and what was not run."""
    values = {
        "title": board.table.title,
        "versions": versions(),
        "machine": hardware(),
        "run": dict(facts),
        "table": board.table.model_dump(mode="json"),
        "lines": [plain(line) for line in lines],
        "absent": [{"cell": each.want.name, "why": each.why} for each in absent],
    }
    return json.dumps(values, indent=1, allow_nan=False, default=str) + "\n"


def to_markdown(board: Board, lines: Sequence[Line], absent: Sequence[Absent], facts: Mapping[str, Any]) -> str:
    """The page."""
    parts = [f"# {board.table.title}", introduction(board, facts)]
    for task_name, task in board.table.tasks.items():
        for size_name, budget in task.sizes.items():
            own = [line for line in lines if (line.task, line.size) == (task_name, size_name)]
            if not own:
                continue
            parts.append(f"## {task.title}, {samples(budget.rows)}\n\n{budget.steps} steps of {budget.batch} rows for every method.")
            for block, reference in board.table.references.items():
                if block_lines := [line for line in own if line.block == block]:
                    parts += [f"### {block[0].upper()}{block[1:]}", _quality(block_lines, reference), _costs(block_lines)]
    parts += [_rates(board, lines), _absent(absent)]
    return "\n\n".join(part for part in parts if part) + "\n"


def samples(rows: int | None) -> str:
    return "all samples" if rows is None else f"{rows:,} samples"


def introduction(board: Board, facts: Mapping[str, Any]) -> str:
    """How it was done, so that the numbers can be judged."""
    return "\n".join(f"- {line}" for line in method_notes(board, facts))


def method_notes(board: Board, facts: Mapping[str, Any]) -> list[str]:
    """The same, a sentence or two each."""
    tasks = board.table.tasks.values()
    shares = ", ".join(sorted({f"{task.grid.share:.0%}" for task in tasks}))
    extend = max((task.grid.extend for task in tasks), default=0)
    return [
        "Written by `make bench-methods` from a table in YAML; a method is a line of it. Every method has the same samples, steps and "
        "batch. A seed draws the samples (of 100 and 1,000), their order and the adapter's start, the same for every method.",
        f"Learning rate: chosen for each method and task on dev, from its own grid (at the end of this page), by a training of {shares} of "
        f"the steps at the size named there, with one seed. Where the best is the first or the last of the grid, {extend} more beyond it "
        "is tried. The rate serves all sizes. Training ends after the last step; no step is chosen on dev.",
        "Quality: on a test set that is used for nothing else, the mean over seeds. Interval: 95 %, over seeds and questions at once "
        "(pigeonhole bootstrap), which with three seeds shows two thirds of their variance; of one seed Wilson's, over questions alone.",
        "Difference: from the reference over the seeds that both have, paired by question (seeds taken as they are), Holm over the methods "
        f"of a table; equivalent: the whole interval within {100 * board.table.margin:.0f} points.",
        "Counts: trained values (a task head counts), values of the base that are others afterwards, and the highest rank of a change of a "
        "weight with the number of weights changed. A method that is no change of weights shows 0 and a dash.",
        "Forgetting: rise of the base's own kind of loss on fixed general text (leads of an encyclopaedia). Decoder: of the next token. "
        "Sentence encoder: of telling each text by its description among all, cosine times 20; drift: 1 less the mean cosine of a "
        "text's mean state with what it was. A task head takes no part in either.",
        f"Cost: every cell is a process of its own with one thread, {facts['at_once']} at once, so times are for comparison with one "
        "another. Training: seconds of the processor, which other work on the machine hardly lengthens. Memory: the process's highest "
        "while training, and in brackets how far that is above where it began. Stored: the adapter's files, without the optimiser's state.",
        f"Machine: {facts['machine']}. {', '.join(f'{name} {number}' for name, number in versions().items())}.",
    ]


def _quality(lines: Sequence[Line], reference: str) -> str:
    head = ["method", "seeds", lines[0].measure, "95 %", "deviation over seeds", f"against {reference}", "", "forgetting, nats", "drift"]
    rows = []
    for line in sorted(lines, key=lambda line: -line.quality):
        versus = line.against
        rows.append(
            [
                f"`{line.method}`",
                str(len(line.seeds)),
                f"{100 * line.quality:.1f} %",
                f"{100 * line.low:.1f} to {100 * line.high:.1f}",
                "" if line.spread is None else f"{100 * line.spread:.1f}",
                "" if versus is None else difference(line),
                "" if versus is None else versus.verdict,
                signed(line.forgetting, 3),
                "" if line.drift is None else f"{line.drift:.3f}",
            ]
        )
    return table(head, rows)


def difference(line: Line) -> str:
    """Of quality from the reference, in points, with its interval."""
    assert line.against is not None
    one, low, high = (signed(100 * value, 1) for value in (line.against.difference, line.against.low, line.against.high))
    return f"{one} ({low} to {high})"


def _costs(lines: Sequence[Line]) -> str:
    head = ["method", "adapter", "trained", "of the base", "changed", "rank", "FLOP a token", "merges", "stored", "training", "memory"]
    rows = []
    for line in lines:
        cost = line.cost
        rows.append(
            [
                f"`{line.method}`",
                f"`{line.adapter}`",
                f"{cost.trainable:,}",
                f"{cost.trainable / cost.of:.2%}" if cost.of else "",
                parameters(cost.changed) if cost.changed else "0",
                f"{cost.rank} in {cost.matrices}" if cost.matrices else "–",
                parameters(cost.flops) if cost.flops else "0",
                "no" if cost.merges else "yes",
                size(cost.stored),
                duration(cost.train_seconds),
                f"{memory(cost.peak_mb)} ({signed(cost.rise_mb, 0)})",
            ]
        )
    return table(head, rows)


def _rates(board: Board, lines: Sequence[Line]) -> str:
    rows = []
    for task in board.table.tasks:
        for method in dict.fromkeys(line.method for line in lines if line.task == task):
            if (chosen := board.chosen(task, method)) is None or not chosen.scores:
                continue
            tried = ", ".join(f"{rate:g}: {'diverged' if score is None else f'{100 * score:.1f}'}" for rate, score in chosen.scores.items())
            rows.append([task, f"`{method}`", f"{chosen.rate:g}", "at the edge" if chosen.edge else "", tried])
    if not rows:
        return ""
    sizes = sorted({f"{name}: {samples(task.sizes[task.grid.size].rows)}" for name, task in board.table.tasks.items()})
    words = f"On dev, quality in percent. Size that rates are chosen at: {'; '.join(sizes)}."
    return "\n\n".join(["## Learning rates", words, table(["task", "method", "chosen", "", "tried"], rows)])


def _absent(absent: Sequence[Absent]) -> str:
    if not absent:
        return ""
    return "\n\n".join(["## Not run", "\n".join(f"- {text(line)}" for line in absent_lines(absent))])


def absent_lines(absent: Sequence[Absent]) -> list[str]:
    """What has no result, by reason: cells of one task, size and reason on one line."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for each in absent:
        groups.setdefault((each.want.task, each.want.size, each.why), []).append(f"{each.want.method} (seed {each.want.seed})")
    return [f"{task}, {size}: {', '.join(names)}: {why}" for (task, size, why), names in groups.items()]
