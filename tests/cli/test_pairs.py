"""`tunesmith pairs` and `tunesmith judge check` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.data import read_records


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def scored(count: int = 30) -> list[dict[str, Any]]:
    return [{"prompt": f"q{at}", "answers": [f"good {at}", f"poor {at}"], "scores": [2 + at % 3, 1]} for at in range(count)]


def test_scores_become_pairs_with_splits_and_a_report_that_training_can_read(tunesmith, tmp_path) -> None:
    write(tmp_path / "scored.jsonl", scored())
    done = tunesmith("pairs", "scored.jsonl", "--out", "pairs.jsonl", "--test", "20%", "--min-margin", "2")
    assert done.exit_code == 0, done.output
    train, test = rows_of(tmp_path / "pairs.jsonl"), rows_of(tmp_path / "pairs.test.jsonl")
    assert len(train) + len(test) == 20 and train[0]["margin"] >= 2 and train[0]["probability"] == 1.0
    assert train[0]["provenance"]["source"] == "scored.jsonl" and train[0]["provenance"]["where"].startswith("line ")
    report = json.loads((tmp_path / "pairs.report.json").read_text("utf-8"))
    assert report["splits"]["train"]["pairs"] == len(train) and report["shared"] == {"train and test": 0}
    records = list(read_records(tmp_path / "pairs.jsonl"))
    assert records[0].shape == "pair" and records[0].margin == train[0]["margin"] and records[0].soft == 1.0


def test_without_out_the_report_alone_is_shown(tunesmith, tmp_path) -> None:
    write(tmp_path / "scored.jsonl", scored())
    done = tunesmith("pairs", "scored.jsonl", "--json")
    assert json.loads(done.stdout)["splits"]["train"]["pairs"] == 30 and not (tmp_path / "pairs.jsonl").exists()


def test_an_existing_file_is_not_lost_and_a_held_out_one_not_leaked(tunesmith, tmp_path) -> None:
    write(tmp_path / "scored.jsonl", scored())
    write(tmp_path / "test.jsonl", [{"prompt": "q3"}])
    assert tunesmith("pairs", "scored.jsonl", "--out", "pairs.jsonl").exit_code == 0
    again = tunesmith("pairs", "scored.jsonl", "--out", "pairs.jsonl")
    assert again.exit_code == 3 and "--overwrite" in again.output
    leaked = tunesmith("pairs", "scored.jsonl", "--held-out", "test.jsonl")
    assert leaked.exit_code == 2 and "scored.jsonl, line 4: 1 pairs share a prompt or a text with test.jsonl" in leaked.output
    assert tunesmith("pairs", "scored.jsonl", "--held-out", "test.jsonl", "--leaks", "drop").exit_code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rubric", "kinder"], "--rubric changes nothing without --judge"),
        (["--hard", "hardest"], "unknown value of --hard"),
        (["--samples", "2"], "--samples changes nothing without --sample"),
        (["--sample", "x"], "nothing says which of the sampled answers is better"),
        (["--columns", "scores"], "is no column mapping"),
        (["--columns", "score=points"], "there is no column 'points'"),
        (["--columns", "points=score"], "unknown role of a column"),
        (["--split-by", "group"], "no group to split by"),
        (["--weight", "1", "--weight", "2"], "1 sources and 2 weights"),
        (["--weight", "1"], "--weight is of several sources"),
        (["--raters", "same"], "--raters is of raters' ratings"),
        (["--per-item", "5"], "--per-item is of texts without a prompt"),
    ],
)
def test_mistakes_are_told_with_what_to_do(tunesmith, tmp_path, words, said) -> None:
    write(tmp_path / "scored.jsonl", scored())
    done = tunesmith("pairs", "scored.jsonl", *words)
    assert done.exit_code == 2 and said in done.output


def test_a_local_judge_writes_preferences_on_sampled_answers_and_is_held_against_people(tunesmith, tmp_path, tiny_base_folder) -> None:
    write(tmp_path / "prompts.jsonl", [{"prompt": f"What is {at}?"} for at in range(4)])
    made = tunesmith(
        "pairs", "prompts.jsonl", "--sample", tiny_base_folder, "--samples", "2", "--max-tokens", "4", "--judge", tiny_base_folder,
        "--out", "pairs.jsonl",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    pairs = rows_of(tmp_path / "pairs.jsonl")
    assert pairs and all(0.5 <= pair["probability"] < 1 and pair["provenance"]["kind"] == "judge" for pair in pairs)
    people = [{"prompt": "q", "chosen": f"good {at}", "rejected": f"poor {at}", "probability": 0.8} for at in range(12)]
    write(tmp_path / "people.jsonl", people)
    done = tunesmith("judge", "check", tiny_base_folder, "people.jsonl", "--rubric", "Which is kinder?", "--name", "held")
    assert done.exit_code in (0, 1) and "agreement" in done.output and "flips" in done.output
    (file,) = (tmp_path / "runs" / "held").glob("judge-*.json")
    report = json.loads(file.read_text("utf-8"))
    assert report["pairs"] == 12 and report["rubric"] == "Which is kinder?" and report["ceiling"] == pytest.approx(0.8)
    assert (done.exit_code == 0) == report["better_than_chance"]


def test_a_check_needs_labelled_pairs(tunesmith, tmp_path) -> None:
    write(tmp_path / "scored.jsonl", scored())
    done = tunesmith("judge", "check", "nowhere", "scored.jsonl")
    assert done.exit_code == 2 and "the rows are no pairs" in done.output


def test_a_reward_scores_sampled_answers(tunesmith, tmp_path, tiny_base_folder) -> None:
    write(tmp_path / "prompts.jsonl", [{"prompt": f"What is {at}?"} for at in range(4)])
    (tmp_path / "mine.py").write_text("def short(completions):\n    return [-float(len(text)) for text in completions]\n", "utf-8")
    done = tunesmith(
        "pairs", "prompts.jsonl", "--sample", tiny_base_folder, "--samples", "3", "--max-tokens", "5", "--reward", "./mine.py:short",
        "--ties", "drop", "--out", "pairs.jsonl",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert all(len(pair["chosen"]) < len(pair["rejected"]) for pair in rows_of(tmp_path / "pairs.jsonl"))


def test_a_stopped_call_scores_nothing_twice_and_what_was_kept_goes_with_the_pairs(tunesmith, tmp_path) -> None:
    rows = [{"prompt": f"q{at}", "answers": [f"good {at}", f"poor {at} indeed"]} for at in range(100)]
    write(tmp_path / "silent.jsonl", rows)
    code = (
        "from pathlib import Path\n"
        "def short(completions):\n"
        "    with Path('asked').open('a') as file: file.write(f'{len(completions)}\\n')\n"
        "    if len(Path('asked').read_text().split()) == 2: raise KeyboardInterrupt\n"
        "    return [-float(len(text)) for text in completions]\n"
    )
    (tmp_path / "mine.py").write_text(code, "utf-8")
    words = ("pairs", "silent.jsonl", "--reward", "./mine.py:short", "--out", "pairs.jsonl")
    assert tunesmith(*words).exit_code != 0
    assert tunesmith(*words).exit_code == 0
    assert (tmp_path / "asked").read_text().split() == ["128", "72", "72"]
    pairs = rows_of(tmp_path / "pairs.jsonl")
    assert len(pairs) == 100 and all("good" in pair["chosen"] for pair in pairs)
    assert tunesmith(*words, "--overwrite").exit_code == 0
    assert (tmp_path / "asked").read_text().split()[3:] == ["128", "72"]
