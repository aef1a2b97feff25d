"""Rows that cannot be used: refused at once, or counted and shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from tunesmith.core.errors import DataError

SHOWN = 3


@dataclass(slots=True)
class BadRows:
    """What was skipped while reading. count: rows. first: the errors of the first three. last: of the last one."""

    count: int = 0
    first: list[DataError] = field(default_factory=list)
    last: DataError | None = None

    def add(self, error: DataError) -> None:
        """Count one row, and keep what is wrong with it if it is among the first."""
        self.count += 1
        self.last = error
        if len(self.first) < SHOWN:
            self.first.append(error)

    def summary(self) -> str:
        """One line; "" if nothing was skipped."""
        if not self.count:
            return ""
        told = "; ".join(f"{error.where}: {error.what.rstrip('.')}" for error in self.first)
        more = "; ..." if self.count > len(self.first) else ""
        return f"{self.count:,} bad row{'s' if self.count > 1 else ''} skipped ({told}{more})"
