"""Where virtual tokens stand among the words of rows and prompts: the one place that puts them there.

Rows and prompts as users, data and objectives know them hold words alone. What goes through the model holds the virtual
tokens of the adapters that are switched on as well: most stand at the start of every path, where a pack holds them once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tunesmith.adapters import standing, vocabulary_of
from tunesmith.core.row import Row, Segment


@dataclass(frozen=True, slots=True, eq=False)
class Extra:
    """Virtual tokens as ids. root: those at the start of every path. shared: nothing that follows changes what they are to
    others, even where tokens look ahead. within: (place, ids) of those within, places as of `adapters.virtual.Place`.
    vocabulary: ids from here on are virtual."""

    root: np.ndarray
    shared: bool
    within: tuple[tuple[int | str, np.ndarray], ...]
    vocabulary: int

    @property
    def tokens(self) -> int:
        """Tokens that a path has more."""
        return len(self.root) + sum(len(ids) for _, ids in self.within)

    def __bool__(self) -> bool:
        return bool(self.tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extra) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        return (self.root.tobytes(), self.shared, tuple((place, ids.tobytes()) for place, ids in self.within), self.vocabulary)


NO_EXTRA = Extra(np.zeros(0, np.int64), True, (), 0)


def extra_of(model: Any, names: Sequence[str] | None = None) -> Extra:
    """The virtual tokens of the adapters that are switched on, or of some of these, by name."""
    on = standing(model, names)
    if not on:
        return NO_EXTRA
    vocabulary = vocabulary_of(model)
    groups = [(place, np.array(numbers) + vocabulary, tokens.fixed) for tokens in on for place, numbers in tokens.groups()]
    root = [ids for place, ids, _ in groups if place == 0]
    within = tuple((place, ids) for place, ids, _ in groups if place != 0)
    fixed = all(fixed for place, _, fixed in groups if place == 0)
    return Extra(np.concatenate(root) if root else np.zeros(0, np.int64), fixed, within, vocabulary)


def prompt_with(ids: Sequence[int], extra: Extra) -> list[int]:
    """A prompt, as generation reads it, with its virtual tokens."""
    if not extra:
        return [int(token) for token in ids]
    plain = np.asarray(ids, np.int64)
    pieces, start = [extra.root], 0
    for at, more in _in_order(extra.within, len(plain)):
        pieces += [plain[start:at], more]
        start = at
    return [int(token) for token in np.concatenate([*pieces, plain[start:]])]


def inserted(row: Row, extra: Extra) -> Row:
    """A row with the virtual tokens that stand within its paths, each path once; those at its start are the pack's.

    A place is counted in tokens of the path. None lies behind the first token that is learned from: what would stand there
    stands right before it, as does what stands at the "end".
    """
    if not extra.within:
        return row
    made: list[Segment] = []
    waiting: list[list[tuple[int | str, np.ndarray]]] = []  # behind each segment
    ends: list[int] = []  # tokens of its path up to there, virtual ones not counted
    children: list[list[int]] = [[] for _ in row.segments]
    for index, part in enumerate(row.segments):
        if part.parent >= 0:
            children[part.parent].append(index)
    for index, part in enumerate(row.segments):
        pending = waiting[part.parent] if part.parent >= 0 else list(extra.within)
        before = ends[part.parent] if part.parent >= 0 else 0
        limit = _first_learned(part)
        last = limit is not None or not children[index] or _all_learned([row.segments[child] for child in children[index]])
        here = [one for one in pending if last or (isinstance(one[0], int) and one[0] <= before + len(part))]
        chosen = [(max(place - before, 0) if isinstance(place, int) else place, ids) for place, ids in here]
        made.append(_with(part, chosen, len(part) if limit is None else limit))
        waiting.append([one for one in pending if not any(one is taken for taken in here)])
        ends.append(before + len(part))
    return replace(row, segments=tuple(made))


def _first_learned(part: Segment) -> int | None:
    """Place of the first token that is supervised or asked, None where none is."""
    found = np.concatenate([np.flatnonzero(part.supervised), part.asked])
    return int(found.min()) if len(found) else None


def _all_learned(parts: Sequence[Segment]) -> bool:
    return all(_first_learned(part) == 0 for part in parts)


def _in_order(within: Sequence[tuple[int | str, np.ndarray]], limit: int) -> list[tuple[int, np.ndarray]]:
    """Places as numbers up to `limit`, in order."""
    placed = [(min(place, limit) if isinstance(place, int) else limit, ids) for place, ids in within]
    return sorted(placed, key=lambda one: one[0])


def _with(part: Segment, within: Sequence[tuple[int | str, np.ndarray]], limit: int) -> Segment:
    ids, supervised, labels, start = list[np.ndarray](), list[np.ndarray](), list[np.ndarray](), 0
    given: dict[str, list[np.ndarray]] = {name: [] for name in part.given}
    for at, more in [*_in_order(within, limit), (len(part), np.zeros(0, np.int64))]:
        ids += [part.ids[start:at], more]
        supervised += [part.supervised[start:at], np.zeros(len(more), np.bool_)]
        if part.labels is not None:
            labels += [part.labels[start:at], np.full(len(more), np.nan, np.float32)]
        for name, pieces in given.items():  # nothing is learned at a virtual token, so what stands there is not read
            pieces += [part.given[name][start:at], np.zeros(len(more), np.float32)]
        start = at
    joined = np.concatenate(labels) if labels else None
    whole = {name: np.concatenate(pieces) for name, pieces in given.items()}
    return Segment(np.concatenate(ids).astype(np.int32), np.concatenate(supervised), part.parent, part.name, joined, whole)
