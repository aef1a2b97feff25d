"""Finished answers of unfinished work, on disk: what a second call need not ask again."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from tunesmith.core.errors import RunError
from tunesmith.core.packages import cache_dir
from tunesmith.engine.asking import Reply


def digest(value: Any) -> str:
    """Content hash of plain values."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True, default=str).encode("utf-8", "surrogatepass")).hexdigest()[
        :24
    ]


class Journal:
    """A JSONL file a (server, model); a line a finished answer, keyed by the hash of its whole request. Questions are not in it.

    Work that ends well takes its lines out again, so that the file holds unfinished work only, and a server whose model
    has changed behind its name is asked anew. folder: within the cache, of another kind of answers.
    """

    def __init__(self, identity: str, folder: str = "answers") -> None:
        self.path: Path = cache_dir() / folder / f"{digest(identity)}.jsonl"
        self.used: set[str] = set()
        self._kept = self._read()
        self._file: IO[str] | None = None

    def get(self, key: str) -> Reply | None:
        """The kept answer to a request."""
        self.used.add(key)
        return self._kept.get(key)

    def keep(self, key: str, reply: Reply) -> None:
        """Write an answer down. Raises RunError where the cache cannot be written."""
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace")
                self._file.write("\n")  # a line that a kill cut short ends here
            self._file.write(_line(key, reply))
            self._file.flush()
        except OSError as cause:
            hints = ["Choose another place:  export TUNESMITH_CACHE=FOLDER"]
            raise RunError(f"answers cannot be kept: {cause.strerror}.", where=str(self.path), hints=hints) from None
        self.used.add(key)
        self._kept[key] = reply

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def forget(self) -> None:
        """The work is done: take its answers out."""
        self.close()
        others = {key: reply for key, reply in self._read().items() if key not in self.used}
        with contextlib.suppress(OSError):  # a line too many costs nothing
            if not others:
                self.path.unlink(missing_ok=True)
                return
            beside = self.path.with_suffix(".new")
            beside.write_text("".join(_line(*item) for item in others.items()), encoding="utf-8", errors="backslashreplace")
            beside.replace(self.path)

    def _read(self) -> dict[str, Reply]:
        kept: dict[str, Reply] = {}
        with contextlib.suppress(OSError):
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, TypeError, KeyError):  # cut short, or written by another version
                    values: Mapping[str, Any] = json.loads(line)
                    kept[values["key"]] = Reply(**values["reply"])
        return kept


def _line(key: str, reply: Reply) -> str:
    return json.dumps({"key": key, "reply": asdict(reply)}) + "\n"
