"""`tunesmith data show` shows prompts with their answers, and counts what a model could learn from them that nobody meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PAIRS = [
    {"prompt": "Name a colour.", "chosen": "Red is a colour.", "rejected": "Seven.", "margin": 0.5, "probability": 0.9},
    {"prompt": "Name a number.", "chosen": "Seven.", "rejected": "Red [b]or[/b] so.", "probability": 0.5},
]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


def test_pairs_are_shown_in_words_with_their_counts(tunesmith: Any, pairs: Path) -> None:
    shown = tunesmith("data", "show", pairs)
    assert shown.exit_code == 0, shown.output
    for words in (
        "line 1 ──  margin 0.5 · probability 0.9",
        "line 2 ──  probability 0.5",
        "chosen: Red is a colour.",
        "rejected (a tie): Red [b]or[/b] so.",
        "2 pairs · different questions: 2",
        "ties: 1",
        "--base",
    ):
        assert words in shown.stdout
    assert "longer one in 100.0% of 1" in shown.stdout


def test_pairs_are_shown_in_tokens_as_they_are_trained_on(tunesmith: Any, pairs: Path, tiny_base_folder: Path) -> None:
    shown = tunesmith("data", "show", pairs, "--base", tiny_base_folder, "task.system=Be brief.", "data.max_tokens=20", "-n", 1)
    assert shown.exit_code == 0, shown.output
    assert "-- chosen --\n[[Red is a colour.<|im_end|>]]" in shown.stdout.replace("\n\n", "\n")
    assert shown.stdout.count("Be brief.") == 1 and "[[Seven.<|im_end|>]]" in shown.stdout
    assert "2 rows · " in shown.stdout and "are over data.max_tokens=20" in shown.stdout


def test_rated_answers_rankings_and_questions_are_shown(tunesmith: Any, tmp_path: Path, tiny_base_folder: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for row, shape, words in (
        ({"prompt": "Name a colour.", "completion": "Seven.", "label": False}, "rated", "bad: Seven."),
        ({"prompt": "Name a colour.", "answers": ["Red.", "Seven.", "Two."]}, "ranking", "3: Two."),
        ({"prompt": "Name a colour."}, "question", "questions: 1 · with their answer: 0"),
    ):
        path.write_text(json.dumps(row) + "\n")
        assert words in tunesmith("data", "show", path, f"data.shape={shape}").stdout
        shown = tunesmith("data", "show", path, f"data.shape={shape}", "--base", tiny_base_folder)
        assert shown.exit_code == 0, shown.output
        assert ("[[Seven.<|im_end|>]]" in shown.stdout) == (shape != "question") and "<|im_start|>assistant" in shown.stdout


def test_a_run_on_pairs_that_is_streamed_is_refused_with_the_reason(tunesmith: Any, pairs: Path, tiny_base_folder: Path) -> None:
    spec = pairs.with_name("spec.yaml")
    spec.write_text(f"base: {tiny_base_folder}\ndata: {{train: {pairs}, stream: true}}\nobjective: dpo\n")
    refused = tunesmith("train", spec)
    assert refused.exit_code != 0 and "reads as 'pair'" in refused.output and "data.stream=false" in refused.output
