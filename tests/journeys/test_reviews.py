"""A user's way from sixty reviews to a verdict, through the real command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

User = Any


@pytest.fixture(scope="module")
def user(
    tmp_path_factory: pytest.TempPathFactory, tiny_base_folder: Path, user_in: Callable[[Path], User], reviews: list[dict[str, str]]
) -> User:
    """Has written sixty rows and a spec, and trained on them."""
    folder = tmp_path_factory.mktemp("reviews")
    (folder / "reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews[:-18]))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews[-18:]))
    (folder / "reviews.yaml").write_text(
        f"base: {tiny_base_folder}\n"
        "data: {train: reviews.jsonl, dev: 6, test: test.jsonl}\n"
        "adapter: lora(rank=16, sites=all)\n"
        "train: {steps: 200, batch: 16, lr: 2e-2, evaluate_every: 50}\n"
    )
    found = user_in(folder)
    told = found.types("train", "reviews.yaml")
    assert told.returncode == 0, told.stdout + told.stderr
    assert "36 train · 6 dev · 18 test" in told.stderr
    return found


def test_the_run_folder_holds_what_the_readme_says(user: User) -> None:
    run = user.folder / "runs" / "reviews"
    assert {item.name for item in run.iterdir()} >= {
        "spec.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "result.json",
    }


def test_the_plan_said_what_the_run_then_took(user: User) -> None:
    plan = json.loads(user.gets("plan", "reviews.yaml", "--json"))
    result = json.loads((user.folder / "runs" / "reviews" / "result.json").read_text())
    assert plan["fits"] is True
    assert plan["training"]["steps"] == result["planned_steps"] == 200
    assert plan["trainable"] == result["trainable_parameters"]
    assert 0.75 < plan["peak"] / 2**20 / result["peak_memory_mb"] < 1.33
    shown = user.gets("plan", "reviews.yaml", "train.checkpointing=true")
    assert "peak memory" in shown and "fits" in shown and "200 steps and 4 evaluations" in shown


def test_resuming_a_finished_run_does_nothing_and_says_so(user: User) -> None:
    assert "finished; nothing to do" in user.types("train", "reviews.yaml", "--resume").stderr


def test_the_run_beats_the_base_on_questions_that_neither_has_seen(user: User, tiny_base_folder: Path) -> None:
    told = user.gets("compare", tiny_base_folder, "runs/reviews", "--questions", "test.jsonl", "--report", "comparison")
    assert f"runs/reviews against {tiny_base_folder}: better" in told
    assert (user.folder / "comparison" / "report.html").read_text().startswith("<!")


def test_the_run_is_evaluated_on_the_questions_that_its_spec_held_back(user: User) -> None:
    found = json.loads(user.gets("evaluate", "runs/reviews", "--json"))
    assert (found["n_questions"], found["metric"]) == (18, "accuracy")
    assert found["score"] > 0.8


def test_a_run_can_be_asked_and_talked_to(user: User) -> None:
    asked = "Classify the text. Answer with one of: negative, positive.\n\nText: I love this lamp."
    answers = [
        json.loads(line)["answer"] for line in user.gets("generate", "runs/reviews", asked, "--json", "--max-tokens", 8).splitlines()
    ]
    assert len(answers) == 1
    assert answers[0].startswith("pos")
    assert user.gets("chat", "runs/reviews", "--max-tokens", 4, stdin="hello\n/quit\n").strip() != ""


def test_the_rows_can_be_looked_at(user: User) -> None:
    shown = user.gets("data", "show", "reviews.jsonl", "--spec", "reviews.yaml", "-n", 1)
    assert "[[positive<|im_end|>]]" in shown
    assert "42 rows" in shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "none.yaml"], "none.yaml: there is no such spec file"),
        (["evaluate", "runs/reviews", "tset.jsonl"], "Did you mean:  test.jsonl"),
        (["evalute"], "evaluate"),
    ],
)
def test_a_mistake_is_told_in_a_few_lines(user: User, words: list[str], told: str) -> None:
    done = user.types(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 8
