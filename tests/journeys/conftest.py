"""Somebody who types commands, and the reviews that they have."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

SOURCES = Path(__file__).resolve().parents[2] / "src"
THINGS = ("phone", "film", "book", "soup", "chair", "song", "train", "game", "shoe", "lamp")
TEXTS = {
    "positive": ("I love this {}.", "What a great {}.", "The {} is wonderful."),
    "negative": ("I hate this {}.", "The {} is awful.", "Oh, this {}!"),
}


class User:
    """Somebody in a folder of their own, typing commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        own = {"PYTHONPATH": str(SOURCES), "TUNESMITH_DTYPE": "fp32", "TUNESMITH_CACHE": str(folder / "cache"), "COLUMNS": "160"}
        self.environment = {**os.environ, **own}

    def types(self, *words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tunesmith", *map(str, words)]
        return subprocess.run(command, cwd=self.folder, env=self.environment, input=stdin, capture_output=True, text=True, timeout=120)

    def gets(self, *words: object, stdin: str = "") -> str:
        """What a command that works prints."""
        done = self.types(*words, stdin=stdin)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def user_in() -> Callable[[Path], User]:
    """A user in this folder."""
    return User


@contextmanager
def _typed_in(folder: Path) -> Iterator[Callable[..., Result]]:
    own = {"COLUMNS": "200", "TUNESMITH_CACHE": str(folder / "cache"), "TUNESMITH_DTYPE": "fp32"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for key, value in own.items():
            patch.setenv(key, value)

        def run(*words: object) -> Result:
            from tunesmith.cli.app import app

            return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)

        yield run


@pytest.fixture(scope="session")
def typed_in() -> Callable[[Path], AbstractContextManager[Callable[..., Result]]]:
    """The command, in this process, within a folder."""
    return _typed_in


@pytest.fixture(scope="session")
def reviews() -> list[dict[str, str]]:
    """Sixty rows, as many of each label."""
    return [{"text": text.format(thing), "label": label} for thing in THINGS for label, texts in TEXTS.items() for text in texts]
