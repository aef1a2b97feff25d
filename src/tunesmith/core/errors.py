"""One family of errors, each saying what is wrong, where, and what to do now.

The command line prints them without a traceback and exits with their `exit_code`; from Python they are ordinary
exceptions. Anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class TunesmithError(Exception):
    """A mistake or an obstacle that the user can act on.

    what: one sentence, what is wrong. where: file, line, key (may be empty). hints: what to do now, one line each.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", hints: Sequence[str] = ()) -> None:
        self.what, self.where, self.hints = what, where, tuple(hints)
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return "\n".join([head, *(f"  {hint}" for hint in self.hints)])

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.hints)


def _rebuild(kind: type[TunesmithError], what: str, where: str, hints: tuple[str, ...]) -> TunesmithError:
    return kind(what, where=where, hints=hints)


class SpecError(TunesmithError):
    """The run's description is wrong: an unknown key, a value out of range, a combination that cannot work."""


class DataError(TunesmithError):
    """A record cannot be read or used; `where` names the file and line."""


class LeakError(DataError):
    """The same text stands on both sides of a split."""


class RenderError(TunesmithError):
    """A chat template cannot be rendered or masked exactly; the message shows the renderings."""


class BaseError(TunesmithError):
    """A base model cannot be found, read or run."""


class AdapterError(TunesmithError):
    """An adapter cannot be built, attached, merged, saved or loaded."""


class RunError(TunesmithError):
    """A run cannot start, go on or be resumed."""

    exit_code = 3


class Interrupted(RunError):
    """Ctrl-C or a termination signal: the state was saved; the message says how to go on."""

    exit_code = 130


def nearest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known words closest to a misspelt one, best first (for "did you mean")."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)


def unknown(kind: str, word: str, known: Iterable[str], *, where: str = "", error: type[TunesmithError] = SpecError) -> TunesmithError:
    """An error for a name that is not known, with the nearest known ones and then all of them."""
    names = sorted(known)
    close = nearest(word, names)
    hints = [f"Did you mean:  {'  ·  '.join(close)}"] if close else []
    hints.append(f"Known: {', '.join(names) or 'none'}")
    return error(f"unknown {kind} '{word}'.", where=where, hints=hints)
