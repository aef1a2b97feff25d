"""The coloured view: what the model reads, and what is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tunesmith.core.row import Row
from tunesmith.data.rendering import Rendered

if TYPE_CHECKING:
    from rich.text import Text

READ, TRAINED, SPECIAL, SPECIAL_TRAINED = "dim", "bold green", "magenta", "bold black on green"
OPEN, CLOSE = "[[", "]]"


def coloured(tokenizer: Any, shown: Row | Rendered) -> Text:
    """The tokens as text: what is only read is dim, what is trained on is green, special tokens stand out; with a legend.

    A tree is shown as its root and, under their names, its continuations.
    """
    from rich.text import Text

    special = _special_ids(tokenizer)
    text = Text()
    for title, ids, supervised in _parts(shown):
        if title:
            text.append(f"\n── {title} ──\n", style="bold")
        for trained, is_special, words in _runs(tokenizer, ids, supervised, special):
            styles = (SPECIAL_TRAINED if is_special else TRAINED) if trained else (SPECIAL if is_special else READ)
            text.append(words, style=styles)
    text.append("\n\n")
    for words, style in (
        ("read", READ),
        ("trained on", TRAINED),
        ("special token, read", SPECIAL),
        ("special token, trained on", SPECIAL_TRAINED),
    ):
        text.append(words, style=style)
        text.append("  ")
    text.append(_count(shown))
    return text


def plain(tokenizer: Any, shown: Row | Rendered) -> str:
    """The same without colours, for pipes: what is trained on stands in [[ ]]."""
    special = _special_ids(tokenizer)
    lines = []
    for title, ids, supervised in _parts(shown):
        if title:
            lines.append(f"\n-- {title} --\n")
        for trained, runs in groupby(_runs(tokenizer, ids, supervised, special), key=lambda run: run[0]):
            words = "".join(run[2] for run in runs)
            lines.append(f"{OPEN}{words}{CLOSE}" if trained else words)
    return "".join(lines) + f"\n({_count(shown)}; [[ ]] is trained on)"


def _count(shown: Row | Rendered) -> str:
    parts = list(_parts(shown))
    return f"{sum(len(ids) for _, ids, _ in parts):,} tokens, {sum(map(sum, (s for _, _, s in parts))):,} trained on"


def _parts(shown: Row | Rendered) -> Iterator[tuple[str, list[int], list[bool]]]:
    if isinstance(shown, Rendered):
        yield "", list(shown.ids), list(shown.supervised)
        return
    for number, part in enumerate(shown.segments):
        title = (part.name or f"segment {number + 1}") if len(shown.segments) > 1 else ""
        yield title, part.ids.tolist(), part.supervised.tolist()


def _special_ids(tokenizer: Any) -> set[int]:
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)


def _runs(tokenizer: Any, ids: Sequence[int], supervised: Sequence[bool], special: set[int]) -> Iterator[tuple[bool, bool, str]]:
    """Stretches of tokens of one kind, decoded together: a character may span several tokens."""
    at = 0
    for (trained, is_special), run in groupby(zip(ids, supervised, strict=True), key=lambda pair: (pair[1], pair[0] in special)):
        tokens = [token for token, _ in run]
        yield trained, is_special, _decode(tokenizer, ids[max(0, at - 1) : at], tokens)
        at += len(tokens)


def _decode(tokenizer: Any, before: Sequence[int], tokens: Sequence[int]) -> str:
    """Decode in context: a SentencePiece vocabulary drops the first space of what it decodes."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    head = tokenizer.decode(list(before), **options) if before else ""
    whole = str(tokenizer.decode([*before, *tokens], **options))
    return whole[len(head) :] if whole.startswith(head) else str(tokenizer.decode(list(tokens), **options))
