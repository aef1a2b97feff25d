"""Search by words, against BM25 worked by hand."""

from __future__ import annotations

import math

import pytest

from tunesmith.retrieval.words import WordIndex

TEXTS = ["the cat sat on the mat", "a dog sat", "cats and dogs", "the cat"]


def bm25(query: list[str], texts: list[list[str]], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Lucene's form: idf = ln(1 + (N - n + 0.5) / (n + 0.5)), tf / (tf + k1 (1 - b + b length / mean length))."""
    mean = sum(map(len, texts)) / len(texts)
    scores = []
    for text in texts:
        score = 0.0
        for word in query:
            n = sum(word in other for other in texts)
            if n:
                tf = text.count(word)
                score += math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) * tf / (tf + k1 * (1 - b + b * len(text) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["cat", "the cat sat", "the the", "dog unknown", "Cat, SAT!"])
def test_scores_are_bm25_by_hand_and_ranked_by_them(query):
    expected = bm25(query.lower().replace(",", "").replace("!", "").split(), [text.split() for text in TEXTS])
    hits = WordIndex(TEXTS).search(query, 4)
    assert [hit.score for hit in hits] == pytest.approx([expected[hit.index] for hit in hits], rel=1e-5)
    assert [hit.index for hit in hits] == sorted(range(4), key=lambda i: (-round(expected[i], 6), i))


def test_equal_scores_come_in_the_order_of_the_index_and_no_more_than_asked():
    assert [hit.index for hit in WordIndex(["b", "a x", "a y", "a z"]).search("a", 2)] == [1, 2]


def test_chinese_is_found_by_its_characters_even_right_beside_latin_letters():
    index = WordIndex(["我喜欢这部电影", "iPhone很贵", "天气很好"])
    assert index.search("电影", 1)[0].index == 0
    assert index.search("贵", 1)[0].index == 1
    assert index.search("iphone", 1)[0].index == 1


@pytest.mark.parametrize("texts", [["", "..."], ["a b", "c"]])
def test_a_query_without_known_words_gives_the_first_texts_with_score_0(texts):
    hits = WordIndex(texts).search("zzz !", 2)
    assert [(hit.index, hit.score) for hit in hits] == [(0, 0.0), (1, 0.0)]


def test_an_empty_text_among_others_is_never_a_hit_and_an_empty_index_has_none():
    assert next(hit.index for hit in WordIndex(["", "a b", "c"]).search("c", 3)) == 2
    assert WordIndex([]).search("a", 3) == []
