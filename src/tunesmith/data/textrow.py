"""A row that still knows which of its tokens may be cut away, and what was decided when it was rendered."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tunesmith.core.row import Row


@dataclass(frozen=True, slots=True)
class TextRow(Row):
    """A row made from text.

    cuttable: spans (start, end) of tokens in the first segment that hold the content of turns, in the order in which they
    may be shortened. notes: decisions a reader must know.
    """

    cuttable: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()

    def at(self, where: str) -> TextRow:
        """The same row, made from another place in the data."""
        return self if where == self.where else replace(self, where=where)
