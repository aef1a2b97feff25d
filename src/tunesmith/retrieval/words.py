"""Search by words: BM25 (Robertson and Zaragoza 2009) in Lucene's form through bm25s, k1 = 1.5, b = 0.75."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.core.words import words

__all__ = ["Hit", "WordIndex", "words"]


@dataclass(frozen=True, slots=True)
class Hit:
    """index: place in the indexed texts. score: BM25, higher is nearer."""

    index: int
    score: float


class WordIndex:
    """An index of texts by their words; a CJK character is a word."""

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        self.size = len(texts)
        vocabulary: dict[str, int] = {}
        ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in words(text)] for text in texts]
        self._vocabulary = vocabulary
        self._index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        if vocabulary:
            self._index.index((ids, vocabulary), show_progress=False)

    def search(self, text: str, count: int) -> list[Hit]:
        """The nearest texts, best first, at most `count`; equal scores in the order of the index."""
        import numpy as np

        known = [self._vocabulary[word] for word in words(text) if word in self._vocabulary]
        scores = self._index.get_scores_from_ids(known) if known else np.zeros(self.size)
        best = np.argsort(-scores, kind="stable")[:count]
        return [Hit(int(i), float(scores[i])) for i in best]
