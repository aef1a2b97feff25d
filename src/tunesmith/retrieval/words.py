"""Search by words: BM25 (Robertson and Zaragoza 2009) through bm25s."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\W_]+", re.UNICODE)  # a CJK character is a word


@dataclass(frozen=True, slots=True)
class Hit:
    """index: place in the indexed texts. score: BM25, higher is nearer."""

    index: int
    score: float


def words(text: str) -> list[str]:
    """Lower-cased words; each CJK character counts as one."""
    return _WORD.findall(text.lower())


class WordIndex:
    """An index of texts by their words."""

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        self.size = len(texts)
        vocabulary: dict[str, int] = {}
        ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in words(text)] for text in texts]
        self._vocabulary = vocabulary
        self._index = bm25s.BM25()
        if vocabulary:
            self._index.index((ids, vocabulary), show_progress=False)

    def search(self, text: str, count: int) -> list[Hit]:
        """The nearest texts, best first, at most `count`; equal scores in the order of the index."""
        import numpy as np

        known = [self._vocabulary[word] for word in words(text) if word in self._vocabulary]
        scores = self._index.get_scores_from_ids(known) if known else np.zeros(self.size)
        best = np.argsort(-scores, kind="stable")[:count]
        return [Hit(int(i), float(scores[i])) for i in best]
