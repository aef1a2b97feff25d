"""How a head that tags words is asked, and how the spans of its tags are scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.core.record import Record
from tunesmith.data.rendering import Renderer
from tunesmith.data.tagged import Sentence, Subwords, tagged_rows
from tunesmith.data.textrow import TextRow
from tunesmith.engine.asking import Progress
from tunesmith.engine.heads import task_answers
from tunesmith.engine.model import Model
from tunesmith.evaluation.fitting import PACK_TOKENS, fitted
from tunesmith.evaluation.metrics import ClassScore
from tunesmith.evaluation.ratios import Ratio
from tunesmith.evaluation.tags import OUTSIDE, Scheme, Span, by_type, count, further, spans, strict_spans
from tunesmith.evaluation.tagsets import scheme_of
from tunesmith.evaluation.task import Task

MISSED = "_"
"""What stands for the tag of a word that was not read, where no tag means "nothing"."""


def subwords_of(kind: str, task: Task) -> Subwords:
    """Pieces of a word that have its tag, on a base of this kind: a decoder has read a whole word at its last piece alone."""
    if task.subwords == "auto":
        return "first" if kind == "encoder" else "last"
    return task.subwords


def tag_rows(kind: str, renderer: Renderer, task: Task, labels: Sequence[str], records: Iterable[Record]) -> Iterator[TextRow]:
    """Records as a head learns their tags, one row each, in order. kind: of the base. Raises DataError for tags that the task lacks."""
    number = {label: float(place) for place, label in enumerate(labels)}

    def sentence(record: Record) -> Sentence:
        tags = task.tags(record)
        later = [further(tag) for tag in tags] if task.scheme != "plain" else tags
        own = tuple(number[tag] for tag in tags)
        return Sentence(record.tokens, own, tuple(number.get(tag, first) for tag, first in zip(later, own, strict=True)), record.where)

    return tagged_rows(renderer, map(sentence, records), subwords_of(kind, task))


def said_tags(
    model: Model, task: Task, records: Sequence[Record], progress: Progress | None = None
) -> tuple[list[TextRow], list[tuple[str, ...]], int]:
    """(rows, the tag of each word as the head says it, words that were not read).

    Where all pieces of a word are labelled in training, its first one answers. A word that was cut away with the beginning of a
    long sentence, or of which the tokenizer leaves nothing, is outside of every span: what it was part of counts as missed.
    """
    head = model.head
    assert head is not None
    asked: Subwords = "last" if head.way.subwords == "last" else "first"
    numbered = (Sentence(record.tokens, tuple(map(float, range(len(record.tokens)))), where=record.where) for record in records)
    rows = fitted(model, tagged_rows(model.renderer, numbered, asked))
    nothing = MISSED if task.scheme == "plain" else OUTSIDE
    tags = [[nothing] * len(record.tokens) for record in records]
    read = 0
    for places, said in task_answers(model.forward, head, rows, PACK_TOKENS):
        chosen = said.logits.argmax(-1).tolist()
        for row, word, best in zip(said.rows, said.labels.tolist(), chosen, strict=True):
            tags[places[row]][int(word)] = head.labels[best]
        read += len(chosen)
        if progress:
            progress(len(places))
    return rows, [tuple(each) for each in tags], sum(len(record.tokens) for record in records) - read


@dataclass(frozen=True, slots=True)
class Tagged:
    """Gold and predicted tags of sentences, as spans. strict: as seqeval's strict mode finds them, else as its default does."""

    gold: list[list[Span]]
    found: list[list[Span]]

    @classmethod
    def read(cls, pairs: Iterable[tuple[str, str]], labels: Sequence[str], scheme: Scheme, *, strict: bool = False) -> Tagged:
        """From (gold, predicted) tags, parted by spaces. labels, scheme: of the task."""
        own = scheme_of(labels, scheme)
        read = strict_spans if strict else spans
        parted = [(gold.split(), found.split()) for gold, found in pairs]
        return cls([read(gold, own) for gold, _ in parted], [read(found, own) for _, found in parted])

    def ratio(self) -> Ratio:
        """Micro F1: twice the spans found and right, over those found and those to be found, all sentences together."""
        counts = [count(gold, found) for gold, found in zip(self.gold, self.found, strict=True)]
        bottom = np.array([one.found + one.gold for one in counts], np.float64)
        return Ratio(np.array([2.0 * one.hits for one in counts]), bottom)

    def precision(self) -> Ratio:
        """Spans found that are right."""
        return self._part([len(found) for found in self.found])

    def recall(self) -> Ratio:
        """Spans to be found that were found."""
        return self._part([len(gold) for gold in self.gold])

    def _part(self, among: Sequence[int]) -> Ratio:
        hits = [count(gold, found).hits for gold, found in zip(self.gold, self.found, strict=True)]
        return Ratio(np.array(hits, np.float64), np.array(among, np.float64))

    def types(self) -> list[ClassScore]:
        """Precision, recall and F1 of each type of span, and how many there are to be found."""
        counted = by_type(zip(self.gold, self.found, strict=True))
        return [
            ClassScore(kind or "span", _share(c.hits, c.found), _share(c.hits, c.gold), _share(2 * c.hits, c.found + c.gold), c.gold)
            for kind, c in counted.items()
        ]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def sentence_score(gold: str, found: str, labels: Sequence[str], scheme: Scheme) -> float:
    """F1 over the spans of one sentence; 1 where there are none, and none were found."""
    one = Tagged.read([(gold, found)], labels, scheme).ratio()
    return one.value if one.bottom.sum() else 1.0
