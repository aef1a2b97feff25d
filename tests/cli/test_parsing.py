"""What the command understands, and how it says that it does not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

SOURCES = Path(__file__).resolve().parents[2] / "src"
VERBS = ("demo", "climb", "train", "evaluate", "compare", "generate", "chat", "data show", "doctor")


def test_help_lists_every_verb_with_a_line_about_it(tunesmith: Any) -> None:
    shown = tunesmith("--help")
    assert shown.exit_code == 0
    for verb in (*VERBS[:-2], "data", "doctor"):
        line = next(line for line in shown.output.splitlines() if line.strip("│ ").split()[:1] == [verb])
        assert len(line.split()) > 5, line


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_its_arguments_and_shows_an_example(tunesmith: Any, verb: str) -> None:
    shown = tunesmith(*verb.split(), "--help")
    assert shown.exit_code == 0
    words = shown.output[shown.output.index("Example:") :]
    assert f"tunesmith {verb}" in words
    for line in shown.output.splitlines():  # an argument or an option is followed by its explanation
        if line.startswith("│ ") and line.split()[1].startswith("-"):
            assert len(line.strip("│ ").split()) > 3, line


def test_examples_reach_the_reader_with_their_brackets(tunesmith: Any) -> None:
    assert "climb.rungs=[zero_shot, sft]" in tunesmith("climb", "--help").output
    assert "[[ ]]" in tunesmith("data", "show", "--help").output


def test_help_is_there_in_half_a_second() -> None:
    taken = []
    for _ in range(3):  # the best of three, since others use this machine
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "tunesmith", "--help"], env=_environment(), capture_output=True, check=True)
        taken.append(time.perf_counter() - began)
        assert b"demo" in done.stdout
    assert min(taken) < 0.5


def test_an_unknown_verb_names_the_nearest(tunesmith: Any) -> None:
    _refused(tunesmith("evalaute"), "evalaute", "evaluate")


def test_an_unknown_option_names_the_nearest(tunesmith: Any) -> None:
    _refused(tunesmith("train", "spec.yaml", "--resum"), "--resum", "--resume")


def test_a_missing_argument_is_named(tunesmith: Any) -> None:
    _refused(tunesmith("train"), "SPEC")


def test_the_version_is_printed(tunesmith: Any) -> None:
    shown = tunesmith("--version")
    assert (shown.exit_code, shown.stdout.split()[0].strip(",")) == (0, "tunesmith")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_quiet_is_understood_wherever_it_stands(tunesmith: Any, tmp_path: Path, place: int) -> None:
    words = ["data", "show", "none.jsonl"]
    shown = tunesmith(*words[:place], "--quiet", *words[place:])
    _refused(shown, "none.jsonl")


def test_after_two_dashes_quiet_is_a_word_like_any_other(tunesmith: Any) -> None:
    _refused(tunesmith("data", "show", "--", "--quiet"), "there is no such file", "--quiet")


def test_text_of_the_user_is_never_read_as_markup(tunesmith: Any) -> None:
    _refused(tunesmith("data", "show", "a[bold]b[/bold][/x].jsonl"), "a[bold]b[/bold][/x].jsonl")


def test_a_broken_pipe_is_no_traceback(tmp_path: Path) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("some line of plain text\n" * 20_000, encoding="utf-8")
    command = f"{sys.executable} -m tunesmith data show {rows} -n 20000 | head -1"
    done = subprocess.run(["bash", "-c", command], env=_environment(), capture_output=True, text=True)
    assert "rows.txt" in done.stdout
    assert done.stderr == ""


def test_a_bug_keeps_its_traceback(tunesmith: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("tunesmith.bases.doctor.diagnose", broken)
    with pytest.raises(ZeroDivisionError, match="ours"):
        tunesmith("doctor")


def test_ctrl_c_ends_with_the_code_that_shells_expect(tunesmith: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tunesmith.bases.doctor.diagnose", interrupted)
    assert tunesmith("doctor").exit_code == 130


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCES), "COLUMNS": "120"}


def _refused(result: Result, *words: str) -> None:
    """The command ended with a mistake of the user, told on stderr without a traceback."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
