"""What a user can get wrong: each mistake says what, where and what to do, exits with its code, and shows no traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result


def test_a_missing_spec_names_the_nearest_file(tunesmith: Any, spec: Path) -> None:
    _refused(tunesmith("train", "spce.yaml"), "spce.yaml: there is no such spec file", "Did you mean:  spec.yaml")


def test_an_unknown_key_of_the_spec_names_the_nearest(tunesmith: Any, spec: Path) -> None:
    spec.write_text(spec.read_text().replace("steps: 3", "stesp: 3"))
    _refused(tunesmith("train", spec), "spec.yaml", "unknown key 'train.stesp'", "Did you mean:  train.steps")


def test_an_unknown_key_among_the_overrides_names_the_nearest(tunesmith: Any, spec: Path) -> None:
    _refused(tunesmith("train", spec, "train.step=3"), "unknown key 'train.step'", "Did you mean:  train.steps")


@pytest.mark.parametrize("word", ["train.lr", "=3"])
def test_what_is_no_override_is_refused_with_the_form(tunesmith: Any, spec: Path, word: str) -> None:
    _refused(tunesmith("train", spec, word), f"'{word}' is no override", "key=value")


def test_a_value_out_of_range_names_its_key(tunesmith: Any, spec: Path) -> None:
    _refused(tunesmith("train", spec, "train.lr=-1"), "train.lr", "greater than 0", "-1")


def test_an_unknown_option_of_an_adapter_names_the_nearest(tunesmith: Any, spec: Path) -> None:
    _refused(tunesmith("train", spec, "adapter=lora(rnak=4)"), "rnak", "Did you mean:  rank")


def test_a_missing_data_file_names_the_nearest(tunesmith: Any, spec: Path) -> None:
    _refused(tunesmith("train", spec, "data.train=review.jsonl"), "review.jsonl: there is no such file", "Did you mean:  reviews.jsonl")


def test_an_empty_file_is_refused(tunesmith: Any, spec: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    _refused(tunesmith("train", spec, "data.train=empty.jsonl"), "empty.jsonl: the file is empty")


def test_broken_json_is_refused_with_its_line(tunesmith: Any, spec: Path, reviews: Path) -> None:
    _break(reviews, 17, '{"text": "cut')
    _refused(tunesmith("train", spec), "reviews.jsonl, line 17")


def test_a_row_without_its_answer_is_refused_with_its_line(tunesmith: Any, spec: Path, reviews: Path) -> None:
    _break(reviews, 23, json.dumps({"text": "I love this silence.", "label": None}))
    _refused(tunesmith("train", spec), "reviews.jsonl, line 23")


def test_a_column_that_the_file_has_not_names_those_that_it_has(tunesmith: Any, spec: Path) -> None:
    _refused(tunesmith("train", spec, "data.columns={text: tweet, label: label}"), "reviews.jsonl", "tweet", "label")


def test_a_label_that_training_never_shows_is_refused_with_its_line(tunesmith: Any, spec: Path, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "It is a pen.", "label": "neutral"}) + "\n")
    shown = tunesmith("train", spec, "data.test=test.jsonl")
    _refused(shown, "test.jsonl, line 1", "'neutral' never occurs in the training samples", "task.labels")


def test_an_over_long_sample_is_refused_with_the_policies(tunesmith: Any, spec: Path) -> None:
    _refused(
        tunesmith("train", spec, "data.max_tokens=55"), "reviews.jsonl, line", "longer than 55 tokens", "drop, truncate-left-of-prompt"
    )


def test_test_questions_among_the_training_samples_are_refused(tunesmith: Any, spec: Path) -> None:
    shown = tunesmith("train", spec, "data.test=reviews.jsonl")
    _refused(shown, "the same questions stand in two splits", "reviews.jsonl, line 1", "data.duplicates=drop")


def test_a_base_that_is_not_there_is_refused(tunesmith: Any, spec: Path) -> None:
    _refused(tunesmith("train", spec, "base=./no-such-model"), "no-such-model: there is no such file or folder")


@pytest.mark.parametrize("verb", [["generate", "hello"], ["chat"], ["evaluate", "reviews.jsonl"]])
def test_a_system_that_is_not_there_is_refused_by_every_verb_that_asks_one(tunesmith: Any, reviews: Path, verb: list[str]) -> None:
    _refused(tunesmith(verb[0], "./no-such-model", *verb[1:]), "no-such-model: there is no such file or folder")


def test_climbing_without_questions_is_refused(tunesmith: Any, spec: Path) -> None:
    _refused(tunesmith("climb", spec, "data.test=null"), "data.test is missing", "data.test=400")


def test_evaluating_a_base_without_questions_is_refused(tunesmith: Any, tiny_base_folder: Path) -> None:
    _refused(tunesmith("evaluate", tiny_base_folder), "there are no questions", "tunesmith evaluate SYSTEM QUESTIONS")


def test_evaluating_with_a_key_that_changes_nothing_is_refused(tunesmith: Any, tiny_base_folder: Path, reviews: Path) -> None:
    _refused(
        tunesmith("evaluate", tiny_base_folder, reviews, "train.lr=1"),
        "'train.lr=1' changes nothing here",
        "data.*, task.* and evaluate.* do",
    )


def test_comparing_one_system_with_nothing_is_refused(tunesmith: Any, tiny_base_folder: Path, reviews: Path) -> None:
    _refused(tunesmith("compare", tiny_base_folder, "--questions", reviews), "at least two systems")


def test_raw_text_takes_no_system_turn(tunesmith: Any, tiny_base_folder: Path) -> None:
    _refused(tunesmith("generate", tiny_base_folder, "x", "--raw", "--system", "y"), "--raw", "--system")


def test_sampling_out_of_range_is_refused_before_the_model_is_loaded(tunesmith: Any) -> None:
    shown = tunesmith("generate", "./no-such-model", "x", "--temperature", "-1")
    _refused(shown, "out of range", "temperature >= 0")


def test_no_prompt_at_all_is_refused(tunesmith: Any, tiny_base_folder: Path) -> None:
    _refused(tunesmith("generate", tiny_base_folder, "-", stdin="\n"), "there is no prompt")


def test_a_mapping_without_a_column_is_refused(tunesmith: Any, reviews: Path) -> None:
    _refused(tunesmith("data", "show", reviews, "--columns", "text"), "--columns: 'text' is no column mapping", "ROLE=COLUMN")


def test_an_unknown_role_of_a_column_is_refused(tunesmith: Any, reviews: Path) -> None:
    _refused(tunesmith("data", "show", reviews, "--columns", "txet=text"), "txet", "text")


def test_a_folder_with_a_run_is_not_overwritten_unasked(tunesmith: Any, spec: Path, tmp_path: Path) -> None:
    (tmp_path / "runs" / "spec").mkdir(parents=True)
    (tmp_path / "runs" / "spec" / "spec.yaml").write_text(spec.read_text())
    _refused(tunesmith("train", spec), "the folder holds a run", "--resume", "--overwrite", code=3)


def _break(file: Path, number: int, line: str) -> None:
    lines = file.read_text().splitlines()
    lines[number - 1] = line
    file.write_text("\n".join(lines) + "\n")


def _refused(result: Result, *words: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
