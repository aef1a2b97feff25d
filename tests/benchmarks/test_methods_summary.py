"""From cells to lines: means and intervals over seeds and questions, comparisons with the reference, and the pages."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from methods.board import Board
from methods.cells import Cell, Store, Want, wants_of
from methods.page import WIDTH, frontier, log_axis, placed
from methods.pages import COLUMNS, to_csv, to_json, to_markdown, write_all
from methods.sources import characters, resolved
from methods.summary import crossed, interval_of, summary
from methods.table import Table

from tunesmith.evaluation.statistics import wilson

FACTS = {"at_once": 2, "machine": "a machine"}
COUNTS = {"trainable": 7, "of": 1000, "changed": 12, "rank": 2, "matrices": 3, "stored": 4000, "flops": 8, "merges": ""}


def result(right: list[float], *, bottom: list[float] | None = None, **more: Any) -> dict[str, Any]:
    below = bottom or [1.0] * len(right)
    measured = {"quality": sum(right) / sum(below), "measure": "F1 of spans" if bottom else "accuracy", "top": right, "bottom": below}
    cost = {"train_seconds": 2.0, "peak_mb": 300.0, "before_mb": 200.0, "forgetting": {"cross_entropy": 0.25, "drift": 0.1}}
    return {**measured, **cost, "counts": COUNTS, "seconds": 3.0, **more}


def board_of(folder: Path, results: dict[tuple[str, int], dict[str, Any]]) -> Board:
    """Methods with one rate each on one task; results by method and seed."""
    methods = {name: {"adapter": name, "rates": [1e-3]} for name in ("full", "lora", "ia3")}
    task = {"title": "Task", "base": "b", "objective": "classify", "data": {}, "grid": {"size": "10"}}
    table = Table.model_validate(
        {
            "title": "T",
            "general": {"source": "s", "text": "text", "description": "about"},
            "methods": methods,
            "tasks": {"a": {**task, "sizes": {"10": {"rows": 10, "steps": 10, "batch": 2}}}},
            "waves": [{"tasks": ["a"], "sizes": ["10"], "seeds": [0, 1]}],
        }
    )
    board = Board(table, Store(folder, table), wants_of(table))
    for (method, seed), found in results.items():
        board.store.put(Cell(Want("a", "10", method, seed), "final", 1e-3), found)
    return board


def test_a_line_is_the_mean_over_seeds_compared_on_the_seeds_that_both_have(tmp_path: Path) -> None:
    good, worse = [1.0] * 80 + [0.0] * 20, [1.0] * 60 + [0.0] * 40
    board = board_of(tmp_path, {("full", 0): result(good), ("full", 1): result(worse), ("lora", 0): result(worse)})
    lines, absent = summary(board)
    full, lora = lines
    assert full.quality == pytest.approx(0.7) and full.spread == pytest.approx(0.1414, abs=1e-3) and full.against is None
    assert lora.against is not None and lora.against.difference == pytest.approx(-0.2) and lora.against.verdict == "worse"
    assert lora.cost.rise_mb == 100.0 and lora.cost.trainable == 7 and lora.forgetting == 0.25
    assert {(each.want.method, each.want.seed): each.why for each in absent} == {
        (m, s): "not run" for m, s in (("lora", 1), ("ia3", 0), ("ia3", 1))
    }


def test_methods_that_do_the_same_on_many_questions_are_equivalent(tmp_path: Path) -> None:
    right = [1.0, 1.0, 0.0] * 200
    lines, _ = summary(board_of(tmp_path, {("full", 0): result(right), ("lora", 0): result(right)}))
    assert lines[1].against is not None and lines[1].against.verdict == "equivalent"


def test_f1_is_compared_as_a_ratio_of_sums_and_not_as_a_mean_over_sentences(tmp_path: Path) -> None:
    bottom = [2.0, 10.0] * 40
    full = result([2.0, 9.0] * 40, bottom=bottom)
    lora = result([2.0, 5.0] * 40, bottom=bottom)
    lines, _ = summary(board_of(tmp_path, {("full", 0): full, ("lora", 0): lora}))
    assert lines[1].quality == pytest.approx(7 / 12) and lines[1].low < 7 / 12 < lines[1].high
    assert lines[1].against is not None and lines[1].against.difference == pytest.approx(-4 / 12)
    assert lines[1].against.verdict == "worse" and lines[1].against.losses == 40


def test_what_was_refused_or_failed_is_listed_with_its_reason(tmp_path: Path) -> None:
    board = board_of(
        tmp_path, {("full", 0): result([1.0]), ("lora", 0): {"refused": "no such site"}, ("ia3", 0): {"failed": "loss exploded"}}
    )
    why = {each.want.name: each.why for each in summary(board)[1]}
    assert why["a/10/lora/0"] == why["a/10/lora/1"] == "no such site"
    assert why["a/10/ia3/0"] == "loss exploded" and why["a/10/ia3/1"] == "not run"
    page = to_markdown(board, *summary(board), FACTS)
    assert "a, 10: lora (seed 0), lora (seed 1): no such site" in page and "loss exploded" in page


def test_one_seed_has_wilsons_interval_and_several_one_that_sees_seeds_and_questions() -> None:
    one = result([1.0] * 30 + [0.0] * 10)
    assert interval_of([one]) == wilson(30, 40)
    rng = np.random.default_rng(0)
    same = np.tile(rng.random((1, 400)) < 0.7, (3, 1)).astype(float)
    apart = np.stack([rng.random(400) < share for share in (0.5, 0.7, 0.9)]).astype(float)
    ones = np.ones((3, 400))
    narrow, wide = crossed(same, ones), crossed(apart, ones)
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 * (0.7 * 0.3 / 400) ** 0.5, rel=0.1)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_the_files_hold_every_line_and_read_back(tmp_path: Path) -> None:
    board = board_of(tmp_path / "cells", {("full", 0): result([1.0, 0.0] * 20), ("lora", 0): result([1.0, 1.0] * 20, counts=COUNTS)})
    lines, absent = summary(board)
    rows = list(csv.DictReader(io.StringIO(to_csv(board, lines))))
    assert [row["method"] for row in rows] == ["full", "lora"] and list(rows[0]) == COLUMNS
    assert float(rows[1]["quality"]) == 1.0 and rows[1]["reference"] == "full" and rows[0]["reference"] == ""
    read = json.loads(to_json(board, lines, absent, FACTS))
    assert read["lines"][1]["seeds"] == {"0": 1.0} and len(read["absent"]) == 4
    written = write_all(board, tmp_path, FACTS)
    page = written["comparison.html"].read_text(encoding="utf-8")
    assert "<script" not in page and "http:" not in page and "https:" not in page
    assert page.count('<g class="point') == 2 * 6 and "Trained values" in page
    assert "| `lora` | 1 | 100.0 % |" in written["comparison.md"].read_text(encoding="utf-8")


def test_pages_are_written_before_anything_is_done(tmp_path: Path) -> None:
    written = write_all(board_of(tmp_path / "cells", {}), tmp_path, FACTS)
    assert "Not run" in written["comparison.md"].read_text(encoding="utf-8")


def test_the_frontier_holds_what_no_cheaper_method_matches() -> None:
    assert frontier([(5.0, 0.9), (1.0, 0.5), (2.0, 0.4), (2.0, 0.7), (9.0, 0.9)]) == [1, 3, 0]


def test_a_scale_of_powers_of_ten_holds_all_values_and_zero_stands_at_its_left_end() -> None:
    scale = log_axis([0, 150, 20_000_000])
    assert (scale.low, scale.high) == (2.0, 8.0)
    assert [tick.text for tick in scale.ticks][:3] == ["100", "1,000", "10,000"] and scale.ticks[-1].text == "10⁸"


def test_names_in_a_picture_cover_neither_points_nor_one_another() -> None:
    points = [(WIDTH / 2 + dx, 100.0 + dy) for dx in (0, 3, 30) for dy in (0, 4, 40)]
    labels = placed(["a long name"] * len(points), points)
    shown = [label for label in labels if label is not None]
    assert 3 <= len(shown) <= len(points)
    assert len({(label.x, label.y) for label in shown}) == len(shown)


def test_words_and_kinds_become_tagged_characters_and_a_file_in_parts_becomes_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    tagged = list(characters("总书记/n  江/nr  泽民/nr  在/p  北京/ns"))
    assert [tag for _, tag in tagged] == ["O", "O", "O", "B-PER", "I-PER", "I-PER", "O", "B-LOC", "I-LOC"]
    (tmp_path / "words.txt").write_text("江/nr  在/p\n" + "长/a " * 200 + "\n", encoding="utf-8")
    made = Path(resolved(f"words:{tmp_path / 'words.txt'}"))
    assert made.read_text(encoding="utf-8") == "江\tB-PER\n在\tO\n\n"
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    assert Path(resolved(f"{tmp_path / 'a'} + {tmp_path / 'b'}")).read_bytes() == b"ab"
    assert resolved("pypi:x==1") == "pypi:x==1"
