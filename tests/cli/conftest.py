"""A command line in process, in a folder of its own, with sixty reviews to learn from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

Tunesmith = Callable[..., Result]

THINGS = ("phone", "film", "book", "soup", "chair", "song", "train", "game", "shoe", "lamp")
PRAISE = ("I love this {}.", "What a great {}.", "The {} is wonderful.")
BLAME = ("I hate this {}.", "What a terrible {}.", "The {} is awful.")


def review_rows() -> list[dict[str, str]]:
    """Sixty different texts, half of them positive."""
    texts = [(text, "positive") for text in PRAISE] + [(text, "negative") for text in BLAME]
    return [{"text": text.format(thing), "label": label} for thing in THINGS for text, label in texts]


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def tunesmith(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tunesmith:
    """Runs the command in an empty folder, as `tunesmith("train", "spec.yaml")`; what escapes from it is raised here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TUNESMITH_DTYPE", "fp32")

    def run(*words: object, stdin: str = "") -> Result:
        from tunesmith.cli.app import app

        return CliRunner().invoke(app, [str(word) for word in words], input=stdin, catch_exceptions=False)

    return run


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "reviews.jsonl", review_rows())


@pytest.fixture
def spec(tmp_path: Path, tiny_base_folder: Path, reviews: Path) -> Path:
    """A run of three small steps on the tiny base."""
    path = tmp_path / "spec.yaml"
    path.write_text(
        f"base: {tiny_base_folder}\n"
        "data: {train: reviews.jsonl, test: 12}\n"
        "adapter: lora(rank=2)\n"
        "train: {steps: 3, batch: 4, lr: 1e-3}\n",
        encoding="utf-8",
    )
    return path
