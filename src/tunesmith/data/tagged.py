"""Rows for task heads that say something of each word: a sentence as its tokenizer writes it, asked at a piece of every word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np

from tunesmith.core.errors import DataError, RenderError
from tunesmith.core.row import Segment
from tunesmith.core.words import CJK
from tunesmith.data.encoding import Encoded, Piece
from tunesmith.data.rendering import Renderer
from tunesmith.data.rows import CHUNK
from tunesmith.data.templates import added_around
from tunesmith.data.textrow import TextRow

Subwords = Literal["first", "last", "all"]

WORDLESS = "words of which the tokenizer leaves nothing have no piece to be asked at"

_CJK = re.compile(f"[{CJK}]")


@dataclass(frozen=True, slots=True)
class Sentence:
    """words: none empty. labels: what shall be said of each. later: what of a word's further pieces, where all are asked."""

    words: tuple[str, ...]
    labels: tuple[float, ...]
    later: tuple[float, ...] = ()
    where: str = ""


def tagged_rows(renderer: Renderer, sentences: Iterable[Sentence], subwords: Subwords) -> Iterator[TextRow]:
    """One row a sentence, in order, asked at the first piece of each word, its last, or all of them.

    Words are joined by spaces, CJK characters by nothing, and stand between what the tokenizer puts around a text, or before
    the eos token. Each word is encoded apart from its neighbours, so none shares a piece with another. A word of which the
    tokenizer leaves nothing is not asked, and a note says so. Sentences may be shortened from the left. Raises RenderError
    where the text cannot be encoded; it names the place.
    """
    tokenizer: Any = renderer.tokenizer
    head, tail = added_around(tokenizer)
    tail = tail or ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
    remaining = iter(sentences)
    while chunk := list(islice(remaining, CHUNK)):
        for sentence, (words, notes) in zip(chunk, _encoded(renderer, chunk), strict=True):
            yield _row(sentence, words, head, tail, subwords, notes)


def _encoded(renderer: Renderer, sentences: Sequence[Sentence]) -> Iterator[tuple[list[tuple[list[int], int]], tuple[str, ...]]]:
    """Of each sentence its words as (ids, place of the piece with the word's first character), and notes."""
    pieces: list[list[Piece]] = []
    owners: list[list[int]] = []
    notes: list[tuple[str, ...]] = []
    for sentence in sentences:
        parts, owner, said = list[Piece](), list[int](), list[str]()
        for place, word in enumerate(sentence.words):
            try:
                found, told = renderer.text_pieces(_space(sentence.words, place) + word)
            except RenderError as cause:
                raise RenderError(cause.what, where=sentence.where, hints=cause.hints) from cause
            parts += found
            owner += [place] * len(found)
            said += told
        pieces.append(parts)
        owners.append(owner)
        notes.append(tuple(dict.fromkeys(said)))
    for sentence, row, owner, note in zip(sentences, _at(renderer, sentences, pieces), owners, notes, strict=True):
        yield _by_word(sentence.words, row, owner), note


def _at(renderer: Renderer, sentences: Sequence[Sentence], pieces: Sequence[list[Piece]]) -> list[list[Encoded]]:
    try:
        return renderer.encoder().encode(pieces)
    except RenderError:
        pass  # once more, one by one, to name the sentence
    found = []
    for sentence, row in zip(sentences, pieces, strict=True):
        try:
            found += renderer.encoder().encode([row])
        except RenderError as cause:
            raise RenderError(cause.what, where=sentence.where, hints=cause.hints) from cause
    return found


def _space(words: Sequence[str], place: int) -> str:
    """What parts a word from the one before it."""
    if not place or (_CJK.match(words[place]) and _CJK.match(words[place - 1][-1])):
        return ""
    return " "


def _by_word(words: Sequence[str], encoded: Sequence[Encoded], owner: Sequence[int]) -> list[tuple[list[int], int]]:
    ids: list[list[int]] = [[] for _ in words]
    ends: list[list[int]] = [[] for _ in words]  # where each piece ends in the text
    for one, place in zip(encoded, owner, strict=True):
        ids[place] += one.ids
        ends[place] += [end for _, end in one.offsets or []]
    out, at = [], 0
    for place, word in enumerate(words):
        at += len(_space(words, place))
        first = next((number for number, end in enumerate(ends[place]) if end > at), 0)  # a space may be a piece of its own
        out.append((ids[place], first))
        at += len(word)
    return out


def _row(
    sentence: Sentence,
    words: Sequence[tuple[list[int], int]],
    head: Sequence[int],
    tail: Sequence[int],
    subwords: Subwords,
    notes: tuple[str, ...],
) -> TextRow:
    ids: list[int] = [*head]
    asked: dict[int, float] = {}
    later = sentence.later or sentence.labels
    for (own, first), label, further in zip(words, sentence.labels, later, strict=True):
        if own:
            start, end = len(ids) + first, len(ids) + len(own)
            if subwords == "all":
                asked.update(dict.fromkeys(range(start + 1, end), further))
            asked[end - 1 if subwords == "last" else start] = label
        ids += own
    if any(not own for own, _ in words):
        notes = (*notes, WORDLESS)
    end = len(ids)
    ids += tail
    if not ids:
        raise DataError("the tokenizer leaves nothing of the sentence.", where=sentence.where)
    labels = np.full(len(ids), np.nan, np.float32)
    labels[list(asked)] = list(asked.values())
    segment = Segment(np.asarray(ids, np.int32), np.zeros(len(ids), np.bool_), labels=labels)
    return TextRow((segment,), sentence.where, cuttable=((len(head), end),) if end > len(head) else (), notes=notes)
