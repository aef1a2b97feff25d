"""Text to token ids, piece by piece: what is cut apart in the text stays apart in the tokens.

A prompt's ids are therefore a prefix of the ids of prompt and answer, whatever the answer begins with, and a mask that
is exact in the text is exact in the tokens. Tokenizers that put a space before every text (SentencePiece's dummy prefix)
are found by a probe; their pieces are encoded in context.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import RenderError

Offsets = list[tuple[int, int]]

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_ANCHORS = ("\n", "x", ".")
_PROBES = ("a", " a", "a b", "(a")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text encoded apart from its neighbours.

    literal: special-token text within is written by the data, not by the template, and is encoded as plain text.
    turn: index of the assistant turn it belongs to, -1 outside. supervised: a target if that turn is one.
    """

    text: str
    literal: bool = False
    turn: int = -1
    supervised: bool = False


@dataclass(frozen=True, slots=True)
class Encoded:
    """A piece's ids, and each token's character span in the whole text (None where the tokenizer cannot say)."""

    ids: list[int]
    offsets: Offsets | None


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Text and id of every token that the tokenizer calls special (the bytes that some list among them are ordinary text)."""
    found = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    for text in tokenizer.all_special_tokens:
        found.setdefault(text, tokenizer.convert_tokens_to_ids(text))
    return {text: index for text, index in found.items() if text and index is not None and not _BYTE.fullmatch(text)}


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of these texts, longest first; for none of them one that never matches."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=lambda t: (-len(t), t))) or "(?!)")


class PieceEncoder:
    """Encodes pieces of text with one tokenizer.

    control: the tokens that only a template may write, text to id; their number in the ids is checked against the text.
    """

    def __init__(self, tokenizer: Any, control: dict[str, int]) -> None:
        self.tokenizer = tokenizer
        self._control = control
        self._pattern = any_of(control)
        unknown = getattr(tokenizer, "unk_token_id", None)
        counted = set(control.values())
        if unknown != getattr(tokenizer, "eos_token_id", None):
            counted.discard(unknown)  # plain text may hold characters that are unknown
        self._counted = frozenset(counted)
        self.in_context = self._adds_prefix()

    def _adds_prefix(self) -> bool:
        """Whether text encodes otherwise at the start than after something else: then pieces need their context."""
        anchor = self._ids([_ANCHORS[0]])[0]
        alone = self._ids(list(_PROBES))
        joined = self._ids([_ANCHORS[0] + probe for probe in _PROBES])
        return any(anchor + a != b for a, b in zip(alone, joined, strict=True))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self._encode(texts)]

    def _encode(self, texts: list[str]) -> list[Encoded]:
        if not texts:
            return []
        fast = bool(self.tokenizer.is_fast)
        options = {"return_offsets_mapping": True} if fast else {}
        out = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=False, verbose=False, **options)
        offsets = out["offset_mapping"] if fast else [None] * len(texts)
        return [Encoded(list(ids), spans) for ids, spans in zip(out["input_ids"], offsets, strict=True)]

    def encode(self, rows: Sequence[Sequence[Piece]]) -> list[list[Encoded]]:
        """Encode the pieces of many rows in one call. Raises RenderError where the tokens cannot follow the text."""
        if self.in_context:
            return [self._checked(row, self._encode_in_context(row)) for row in rows]
        texts = {text: index for index, text in enumerate(dict.fromkeys(t for row in rows for piece in row for t in _parts(piece)))}
        table = self._encode(list(texts))
        return [self._checked(row, self._gather(row, texts, table)) for row in rows]

    def _gather(self, row: Sequence[Piece], texts: dict[str, int], table: list[Encoded]) -> list[Encoded]:
        encoded, at = [], 0
        for piece in row:
            ids: list[int] = []
            offsets: Offsets | None = []
            for part in _parts(piece):
                found = table[texts[part]]
                ids.extend(found.ids)
                offsets = None if offsets is None or found.offsets is None else offsets + [(at + a, at + b) for a, b in found.offsets]
                at += len(part)
            encoded.append(Encoded(ids, offsets))
        return encoded

    def _encode_in_context(self, row: Sequence[Piece]) -> list[Encoded]:
        """Each piece as the tokens it adds to all that stands before it; where it would change those, behind an anchor.

        What a piece becomes depends on the text up to its end only, so a prompt is encoded alike with and without an answer.
        """
        ends = [sum(len(piece.text) for piece in row[: index + 1]) for index in range(len(row))]
        text = "".join(piece.text for piece in row)
        whole = self._encode([text[:end] for end in ends])
        so_far: list[int] = []
        encoded: list[Encoded] = []
        for piece, end, candidate in zip(row, ends, whole, strict=True):
            count = len(so_far)
            if not piece.literal and candidate.ids[:count] == so_far:
                found = Encoded(candidate.ids[count:], candidate.offsets and candidate.offsets[count:])
            else:
                found = self._anchored(piece, end - len(piece.text))
            encoded.append(found)
            so_far = so_far + found.ids
        return encoded

    def _anchored(self, piece: Piece, start: int) -> Encoded:
        ids: list[int] = []
        offsets: Offsets | None = []
        for part in _parts(piece):
            found = self._behind_anchor(part)
            ids.extend(found.ids)
            offsets = None if offsets is None or found.offsets is None else offsets + [(start + a, start + b) for a, b in found.offsets]
            start += len(part)
        return Encoded(ids, offsets)

    def _behind_anchor(self, text: str) -> Encoded:
        for anchor in _ANCHORS:
            alone, joined = self._encode([anchor, anchor + text])
            count, shift = len(alone.ids), len(anchor)
            if joined.ids[:count] == alone.ids:
                spans = joined.offsets and [(max(a - shift, 0), max(b - shift, 0)) for a, b in joined.offsets[count:]]
                return Encoded(joined.ids[count:], spans)
        tokens = self.tokenizer.convert_ids_to_tokens
        raise RenderError(
            f"the tokenizer joins {text[:40]!r} with the text before it, so it cannot be masked apart.",
            hints=[f"Alone:   {tokens(self._ids([text])[0])[:12]}", f"Joined:  {tokens(self._ids([_ANCHORS[0] + text])[0])[:12]}"],
        )

    def _checked(self, row: Sequence[Piece], encoded: list[Encoded]) -> list[Encoded]:
        """Special tokens in the ids are those the template wrote, no more and no fewer."""
        written = sum(len(self._pattern.findall(p.text)) if not p.literal else 0 for p in row if self._pattern.search(p.text))
        if len(self._counted) < len(set(self._control.values())):
            written -= sum(self._control[t] not in self._counted for p in row if not p.literal for t in self._pattern.findall(p.text))
        found = [index for piece in encoded for index in piece.ids if index in self._counted]
        if len(found) != written:
            raise RenderError(
                f"the text holds {written} special tokens and its encoding {len(found)}: data is taken for a special token.",
                hints=[f"In the ids: {', '.join(map(str, self.tokenizer.convert_ids_to_tokens(found)[:12]))}"],
            )
        return encoded


def _parts(piece: Piece) -> list[str]:
    """A literal special token is cut after its first character: neither part is the token, and decoding gives it back."""
    if not piece.literal:
        return [piece.text]
    return [piece.text[:1], piece.text[1:]] if len(piece.text) > 1 else [piece.text]
