"""The comparison's table, the order of its cells, the choice of learning rates, and estimates of what is left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from methods.board import Board, Estimate, best_rate, further_rate
from methods.cells import Cell, Store, Want, wants_of
from methods.command import chosen
from methods.table import Table, read_table

from tunesmith.adapters import plan
from tunesmith.core.errors import SpecError

COMPARISON = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "methods" / "comparison.yaml"
SIZES = {"10": {"rows": 10, "steps": 10, "batch": 2}, "all": {"steps": 40, "batch": 2}}


def table(**changes: Any) -> Table:
    """Two methods on two tasks, and one that is only run when it is asked for."""
    task = {"title": "t", "base": "b", "objective": "classify", "data": {}, "sizes": SIZES, "grid": {"size": "10", "share": 0.5}}
    values = {
        "title": "T",
        "general": {"source": "s", "text": "text", "description": "about"},
        "methods": {"full": {"adapter": "full", "rates": [1e-4, 1e-3]}, "lora": {"adapter": "lora", "rates": [1e-3, 1e-2, 1e-1]}},
        "tasks": {"a": task, "b": task, "extra": {**task, "opt_in": True}},
        "waves": [
            {"tasks": ["a"], "sizes": ["10"], "seeds": [0]},
            {"tasks": ["a", "b"], "sizes": ["10", "all"], "seeds": [0, 1]},
            {"tasks": ["extra"], "sizes": ["10"], "seeds": [0]},
        ],
    }
    return Table.model_validate({**values, **changes})


@pytest.fixture
def board(tmp_path: Path) -> Board:
    made = table()
    return Board(made, Store(tmp_path, made), wants_of(made))


def done(board: Board, cell: Cell, **result: Any) -> None:
    board.store.put(cell, {"seconds": 1.0, **(result or {"quality": 0.5})})


def rates(board: Board, scores: Mapping[float, float], task: str = "a", method: str = "lora") -> None:
    for rate, score in scores.items():
        done(board, Cell(Want(task, "10", method, 0), "rate", rate), quality=score)


def test_the_first_slice_has_all_methods_at_the_middle_size_with_one_seed_and_nothing_comes_twice() -> None:
    names = [want.name for want in wants_of(table())]
    assert names[:2] == ["a/10/full/0", "a/10/lora/0"]
    assert names[2:6] == ["a/all/full/0", "a/all/lora/0", "b/10/full/0", "b/10/lora/0"]
    assert names.index("b/all/lora/0") < names.index("a/10/full/1"), "a seed is run everywhere before the next one"
    assert len(names) == len(set(names)) == 16


def test_an_opt_in_task_is_run_where_it_is_asked_for_alone() -> None:
    assert not any(want.task == "extra" for want in wants_of(table()))
    assert [want.name for want in wants_of(table(), frozenset(["extra"]))][-2:] == ["extra/10/full/0", "extra/10/lora/0"]


def test_rates_are_tried_before_the_cell_that_needs_them_and_a_second_process_looks_ahead(board: Board) -> None:
    first, second = Cell(Want("a", "10", "full", 0), "rate", 1e-4), Cell(Want("a", "10", "full", 0), "rate", 1e-3)
    assert board.next() == first and board.next([first]) == second
    ahead = board.next([first, second])
    assert ahead is not None and (ahead.want.method, ahead.rate) == ("lora", 1e-3)
    rates(board, {1e-4: 0.4, 1e-3: 0.5, 1e-2: 0.3}, method="full")
    assert board.next() == Cell(Want("a", "10", "full", 0), "final", 1e-3)


def test_a_short_training_chooses_the_rate_and_the_whole_one_uses_it(board: Board) -> None:
    rates(board, {1e-3: 0.5, 1e-2: 0.7, 1e-1: 0.6})
    chosen_rate = board.chosen("a", "lora")
    assert chosen_rate is not None and (chosen_rate.rate, chosen_rate.edge) == (1e-2, False)
    final = board.final(Want("a", "all", "lora", 1))
    assert final is not None and final.rate == 1e-2 and final.budget(board.table).steps == 40
    assert Cell(Want("a", "10", "lora", 0), "rate", 1e-2).budget(board.table).steps == 5
    assert board.chosen("b", "lora") is None, "each task has a rate of its own"


def test_where_the_best_rate_is_at_an_end_one_more_is_tried_beyond_it_and_then_it_is_said(board: Board) -> None:
    rates(board, {1e-3: 0.5, 1e-2: 0.6, 1e-1: 0.7})
    assert board.chosen("a", "lora") is None
    assert Cell(Want("a", "10", "lora", 0), "rate", 1.0) in board.left()
    rates(board, {1.0: 0.8})
    found = board.chosen("a", "lora")
    assert found is not None and found.rate == 1.0 and found.edge and len(found.scores) == 4


@pytest.mark.parametrize(
    ("scores", "further"),
    [
        ({1e-3: 1.0, 1e-2: 0.0}, 1e-4),
        ({1e-3: 0.0, 1e-2: 1.0}, 1e-1),
        ({1e-3: 0.0, 1e-2: 1.0, 1e-1: 0.0}, None),
        ({1e-3: None, 1e-2: None}, None),
    ],
)
def test_the_further_rate_goes_on_in_the_steps_of_the_grid(scores: dict[float, float | None], further: float | None) -> None:
    assert further_rate(list(scores), scores, 1) == further
    assert further_rate(list(scores), scores, 0) is None


def test_of_equal_rates_the_middle_one_is_taken_and_one_that_diverged_never() -> None:
    assert best_rate({1.0: 0.5, 2.0: 0.5, 3.0: 0.5}) == 2.0
    assert best_rate({1.0: None, 2.0: 0.1}) == 2.0
    assert best_rate({1.0: None}) is None


def test_a_method_that_the_base_cannot_carry_is_tried_once_and_its_reason_kept(board: Board) -> None:
    done(board, Cell(Want("a", "10", "full", 0), "rate", 1e-4), refused="no biases")
    assert board.refusal("a", "full") == "no biases" and board.refusal("b", "full") == ""
    assert not any(cell.want.task == "a" and cell.want.method == "full" for cell in board.left())


def test_a_result_belongs_to_the_content_of_its_cell(board: Board) -> None:
    cell = Cell(Want("a", "10", "full", 0), "final", 1e-4)
    done(board, cell)
    assert Store(board.store.folder, board.table).get(cell) is not None
    other = table(methods={"full": {"adapter": "full", "rates": [1e-4, 1e-3]}, "lora": {"adapter": "lora(rank=2)", "rates": [1e-3]}})
    assert Store(board.store.folder, other).get(cell) is not None, "another method's change does not touch it"
    shorter = table(tasks={"a": {**other.tasks["a"].model_dump(), "sizes": {"10": {"rows": 10, "steps": 9, "batch": 2}}}}, waves=[])
    assert Store(board.store.folder, shorter).get(cell) is None


def test_what_is_left_is_estimated_from_the_most_similar_cells(board: Board) -> None:
    estimate = Estimate(board.table)
    short, long = Cell(Want("a", "10", "full", 0), "rate", 1e-4), Cell(Want("a", "all", "lora", 0), "final", 1e-3)
    assert estimate.seconds(long) is None and estimate.all([short, long], 1) is None
    estimate.learn(short, 5.0)  # of 5 steps of 2 rows
    assert estimate.seconds(long) == pytest.approx(40.0)
    estimate.learn(Cell(Want("a", "all", "full", 0), "final", 1e-4), 20.0)
    assert estimate.seconds(long) == pytest.approx(20.0)
    assert estimate.all([short, long], 2) == pytest.approx(12.5)


def test_cells_are_chosen_by_patterns_and_a_pattern_without_cells_is_refused() -> None:
    assert [want.name for want in chosen(table(), ["b/*/lora/1"], [])] == ["b/10/lora/1", "b/all/lora/1"]
    with pytest.raises(SpecError, match="no cell"):
        chosen(table(), ["c/*"], [])
    with pytest.raises(SpecError, match="extra"):
        chosen(table(), [], ["extras"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"waves": [{"tasks": ["c"], "sizes": ["10"], "seeds": [0]}]}, "unknown task 'c'"),
        ({"waves": [{"tasks": ["a"], "sizes": ["11"], "seeds": [0]}]}, "unknown size '11'"),
        ({"references": {"methods": "fulll"}}, "fulll"),
        ({"methods": {"full": {"adapter": "full", "rates": [1e-2, 1e-3]}}}, "rise"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused_with_the_key(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    import yaml

    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump({**table().model_dump(mode="json"), **changes}))
    with pytest.raises(SpecError, match=said):
        read_table(path)


def test_the_standard_table_is_sound_and_names_methods_that_exist() -> None:
    made = read_table(COMPARISON)
    for method in made.methods.values():
        assert plan(method.adapter)
    first = made.waves[0]
    assert len(first.seeds) == 1 and len(first.sizes) == 1, "a complete slice comes first"
    assert set(made.methods_of(first.tasks[0])) >= {"full", "lora", "prefix", "mam", "unipelt", "lora everywhere"}
    assert {seed for wave in made.waves for seed in wave.seeds} >= {0, 1, 2}
