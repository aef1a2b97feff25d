"""Row and segment: the one format that every objective and every evaluation reads.

A row is a small tree of segments. A plain supervised sample is one segment; a preference pair is a prompt and two
continuations; a multiple-choice question is a prompt and its options. What segments share is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]
Labels = NDArray[np.float32]
Given = Mapping[str, NDArray[np.float32]]

ROOT = -1

SECOND = "second"
"""Name of a segment that is the second text of a pair, where the tokenizer marks it as such (BERT's segment B)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens that continues its parent (or starts the row).

    ids: token ids, [tokens]. supervised: True where the token is a target, [tokens]; a target is predicted from the
    token before it on its path, so the first token of a root can never be one. parent: index of the segment it
    continues within the row, ROOT (-1) for a root. name: what the segment is ("prompt", "positive", "chosen"). labels:
    what a task head shall say at a token, a class's number or a value, NaN where it is not asked, [tokens]; None where it
    is asked nowhere. What is said of a whole path is asked at its last token. given: other numbers of each token, by name
    ("reference", "advantage"), [tokens] each, read where a token is a target or a head is asked; a number of the whole
    segment stands at each of its tokens.
    """

    ids: Ids
    supervised: Mask
    parent: int = ROOT
    name: str = ""
    labels: Labels | None = None
    given: Given = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.shape != self.supervised.shape:
            raise ValueError(f"a segment needs one mask value a token, got {self.ids.shape} and {self.supervised.shape}")
        if self.labels is not None and self.labels.shape != self.ids.shape:
            raise ValueError(f"a segment needs one label a token, NaN for none, got {self.ids.shape} and {self.labels.shape}")
        for name, values in self.given.items():
            if values.shape != self.ids.shape:
                raise ValueError(f"'{name}' needs one number a token, got {values.shape} for {self.ids.shape}")

    @property
    def asked(self) -> NDArray[np.int64]:
        """Places of the tokens at which a task head is asked, [asked]."""
        return np.zeros(0, np.int64) if self.labels is None else np.flatnonzero(~np.isnan(self.labels))

    def part(self, kept: slice | Mask, parent: int | None = None) -> Segment:
        """Some of its tokens, with all that is known of them. parent: another one, where it moves."""
        labels = None if self.labels is None else self.labels[kept]
        given = {name: values[kept] for name, values in self.given.items()}
        return Segment(self.ids[kept], self.supervised[kept], self.parent if parent is None else parent, self.name, labels, given)

    def with_given(self, **values: float | NDArray[np.float32]) -> Segment:
        """The same with more numbers at its tokens: one for all of them, or one each."""
        more = {name: np.broadcast_to(np.asarray(value, np.float32), self.ids.shape) for name, value in values.items()}
        return replace(self, given={**self.given, **more})

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Row:
    """A tree of segments, parents before children. where: what it was made from ("reviews.jsonl, line 417")."""

    segments: tuple[Segment, ...]
    where: str = ""

    def __post_init__(self) -> None:
        ends: list[int] = []  # tokens up to and with each segment, on its path
        for index, segment in enumerate(self.segments):
            if not ROOT <= segment.parent < index:
                raise ValueError(f"segment {index} names parent {segment.parent}; parents come first")
            before = 0 if segment.parent == ROOT else ends[segment.parent]
            if not before and len(segment) and segment.supervised[0]:
                raise ValueError("the first token of a path cannot be supervised: nothing predicts it")
            ends.append(before + len(segment))

    @property
    def tokens(self) -> int:
        """Tokens stored, shared ones counted once."""
        return sum(len(segment) for segment in self.segments)

    @property
    def supervised_tokens(self) -> int:
        return sum(int(segment.supervised.sum()) for segment in self.segments)

    @property
    def asked_tokens(self) -> int:
        """Tokens at which a task head is asked."""
        return sum(len(segment.asked) for segment in self.segments)

    def path(self, index: int) -> list[int]:
        """Indices of a segment and its ancestors, root first."""
        chain = []
        while index != ROOT:
            chain.append(index)
            index = self.segments[index].parent
        return chain[::-1]

    def leaves(self) -> list[int]:
        """Indices of the segments that nothing continues."""
        parents = {segment.parent for segment in self.segments}
        return [index for index in range(len(self.segments)) if index not in parents]


def segment(
    ids: Sequence[int] | NDArray[Any], supervised: Sequence[bool] | NDArray[Any] | bool = False, parent: int = ROOT, name: str = ""
) -> Segment:
    """A segment from plain lists or arrays; `supervised` may be one value for all tokens."""
    array = np.asarray(ids, dtype=np.int32)
    mask = np.full(array.shape, supervised) if isinstance(supervised, bool) else np.asarray(supervised, dtype=np.bool_)
    return Segment(array, mask, parent, name)


def single(ids: Sequence[int] | NDArray[Any], supervised: Sequence[bool] | NDArray[Any] | bool, where: str = "") -> Row:
    """A row of one segment."""
    return Row((segment(ids, supervised),), where)
