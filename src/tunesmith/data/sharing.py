"""Rows that begin alike become one tree: what they share is stored, packed and computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from tunesmith.core.row import ROOT, Row, Segment


@dataclass(frozen=True, slots=True)
class Member:
    """One original row within a merged one. index: its place in the input. leaves: where its leaves are now, in its order."""

    index: int
    leaves: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shared:
    """A merged row and the original rows it holds."""

    row: Row
    members: tuple[Member, ...]


def share_prefix(rows: Sequence[Row], min_tokens: int = 16, max_tokens: int | None = None) -> list[Shared]:
    """Merge rows whose first tokens are alike into trees.

    Every path of a merged row has the ids and the mask of the original's path. Only tokens that nothing is learned from are
    shared (the others count once for each row), and only prefixes of at least `min_tokens`.
    max_tokens: no merged row stores more (one that was longer to begin with stays as it is). Every row comes back exactly
    once; the merged rows are ordered by their first member.
    """
    if min_tokens < 1:
        raise ValueError(f"min_tokens is at least 1, not {min_tokens}")
    found: list[Shared] = []
    for group in _groups(rows, range(len(rows)), 0, min_tokens):
        found.extend(_fitting(rows, group, min_tokens, max_tokens))
    return sorted(found, key=lambda shared: shared.members[0].index)


def _fitting(rows: Sequence[Row], group: list[int], min_tokens: int, max_tokens: int | None) -> Iterator[Shared]:
    shared = _merge(rows, group, min_tokens)
    if len(group) == 1 or max_tokens is None or shared.row.tokens <= max_tokens:
        yield shared
        return
    middle = len(group) // 2
    yield from _fitting(rows, group[:middle], min_tokens, max_tokens)
    yield from _fitting(rows, group[middle:], min_tokens, max_tokens)


def _sharable(row: Row) -> int:
    """How many first tokens of a row others may share: a single root's, up to the first that is learned from, and never all of a leaf."""
    roots = [part for part in row.segments if part.parent == ROOT]
    if len(roots) != 1:
        return 0
    counted = np.concatenate([np.flatnonzero(roots[0].supervised), roots[0].asked])
    limit = int(counted.min()) if len(counted) else len(roots[0])
    return min(limit, len(roots[0]) - 1) if len(row.segments) == 1 else limit


def _groups(rows: Sequence[Row], indices: Sequence[int], start: int, min_tokens: int) -> Iterator[list[int]]:
    """Rows by the `min_tokens` tokens from `start`; rows that end before stay alone. Sorted, so that likes are neighbours."""
    long = [index for index in indices if _sharable(rows[index]) >= start + min_tokens]
    alone = set(indices) - set(long)

    ordered = sorted(long, key=lambda index: (_prefix(rows[index], start, _sharable(rows[index])), index))
    for _, same in groupby(ordered, lambda index: _prefix(rows[index], start, start + min_tokens)):
        yield list(same)
    for index in sorted(alone):
        yield [index]


def _prefix(row: Row, start: int, end: int) -> bytes:
    return row.segments[0].ids[start:end].astype(">i4").tobytes()


def _common(rows: Sequence[Row], group: Sequence[int], start: int) -> int:
    """Where the common prefix of a group ends; the group is alike up to `start` already."""
    end = min(_sharable(rows[index]) for index in group)
    first = rows[group[0]].segments[0].ids
    for index in group[1:]:
        differ = np.flatnonzero(rows[index].segments[0].ids[start:end] != first[start:end])
        if len(differ):
            end = start + int(differ[0])
    return end


def _merge(rows: Sequence[Row], group: list[int], min_tokens: int) -> Shared:
    if len(group) == 1:
        row = rows[group[0]]
        return Shared(row, (Member(group[0], tuple(row.leaves())),))
    segments: list[Segment] = []
    members: list[Member] = []
    _grow(rows, group, 0, ROOT, min_tokens, segments, members)
    first = rows[min(group)]
    where = f"{first.where} and {len(group) - 1} more" if first.where else ""
    return Shared(Row(tuple(segments), where), tuple(sorted(members, key=lambda member: member.index)))


def _grow(
    rows: Sequence[Row], group: list[int], start: int, parent: int, min_tokens: int, segments: list[Segment], members: list[Member]
) -> None:
    if len(group) == 1:
        members.append(_attach(rows[group[0]], group[0], start, parent, segments))
        return
    end = _common(rows, group, start)
    ids = rows[group[0]].segments[0].ids[start:end]
    segments.append(Segment(ids, np.zeros(len(ids), np.bool_), parent, "shared"))
    here = len(segments) - 1
    for smaller in _groups(rows, group, end, min_tokens):
        _grow(rows, smaller, end, here, min_tokens, segments, members)


def _attach(row: Row, index: int, start: int, parent: int, segments: list[Segment]) -> Member:
    """Hang what is left of a row on a shared segment; a root that is used up is left out."""
    place: dict[int, int] = {}
    for number, part in enumerate(row.segments):
        if part.parent != ROOT:
            segments.append(part.part(slice(None), place[part.parent]))
        elif len(part) == start and len(row.segments) > 1:
            place[number] = parent
            continue
        else:
            segments.append(part.part(slice(start, None), parent))
        place[number] = len(segments) - 1
    return Member(index, tuple(place[leaf] for leaf in row.leaves()))
