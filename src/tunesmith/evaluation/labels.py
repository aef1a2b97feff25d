"""The label that a generated answer names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from tunesmith.core.words import CJK, fold

_MARKER = re.compile(
    r"(?:(?<![^\W_])(?<!/)(?:answer|label|category|class|classification|prediction|verdict|choice)"
    r"|答案|答|标签|標籤|类别|類別|分类|分類|结论|結論)"
    r"[\s\"'*_`]*(?:(?:(?:is|are)\b|是|为|為)[\s\"'*_`]*:?|[:=>])|\\boxed\{|####",
    re.IGNORECASE,
)
_DECORATION = re.compile(r"(?:[\s\"'“‘*_`(\[{<]|-(?=\s))*")
_DENIAL = re.compile(r"(?:\bnot|n['’]t|\bnon)(?:\s+(?:an?|the))?[\s\"'“‘*_`-]*$", re.IGNORECASE)
_EITHER = re.compile(r"[\s\"'”’*_`]*(?:\b(?:or|and)\b|[/,|&、或和与與])[\s\"'“‘*_`]*(?:\b(?:or|and)\b\s*)?", re.IGNORECASE)


def parse_label(text: str, labels: Sequence[str]) -> str | None:
    """The one label that a generated answer names, or None (unparseable) where it names none or several.

    In this order: the whole text, or its first line, is a label but for punctuation; the last "Answer: X" or the like
    ("label is X", "答案：X", \\boxed{X}, #### X), X standing first or alone in what follows on that line; the only label
    found anywhere as a whole word (CJK labels: as a substring). Of labels within one another the longest counts; case,
    and spaces, hyphens or underscores between words, do not matter. A label right after "not" is not named.
    """
    finder = _finder(tuple(labels))
    text = fold(text).strip()
    for part in (text, text.split("\n")[0]):
        found = finder.find(part)
        if len(found) == 1 and not re.search(r"[^\W_]", part[: found[0].start()] + part[found[0].end() :]):
            return finder.name(found[0].group())
    for marker in reversed(list(_MARKER.finditer(text))):
        rest = re.sub(r"^[\s*_`]*\n", "", text[marker.end() :]).strip()
        if named := finder.first_or_only(rest.split("\n")[0]):
            return named
        if re.search(r"\w", rest):
            break
    return finder.only(text)


class _Finder:
    """Finds labels in text; built once for a set of labels."""

    def __init__(self, labels: tuple[str, ...]) -> None:
        if not any(label.strip() for label in labels):
            raise ValueError("there are no labels to look for")
        self.by_key: dict[str, list[str]] = {}
        for label in dict.fromkeys(labels):
            self.by_key.setdefault(_key(label), []).append(label)
        longest_first = sorted((fold(label).strip() for label in labels if label.strip()), key=len, reverse=True)
        starts = "".join(re.escape(start) for start in sorted({label[0] for label in longest_first}))
        anyone = "|".join(_label_pattern(label) for label in longest_first)
        # the look at the first character spares most places of a long text a try of every label
        self.pattern = re.compile(f"(?=[{starts}])(?:{anyone})", re.IGNORECASE)

    def find(self, text: str) -> list[re.Match[str]]:
        return [match for match in self.pattern.finditer(text) if not _DENIAL.search(text[max(0, match.start() - 16) : match.start()])]

    def name(self, found: str) -> str | None:
        """The label written as found; of labels that differ only in case, the one written so."""
        candidates = self.by_key.get(_key(found), [])
        exact = [label for label in candidates if fold(label).strip() == found]
        return candidates[0] if len(candidates) == 1 else exact[0] if exact else None

    def first_or_only(self, text: str) -> str | None:
        """The label that the text begins with, unless it goes on with "or" and another; else the only one in it."""
        found, opening = self.find(text), _DECORATION.match(text)
        if not found or (opening and found[0].start() > opening.end()) or found[0].group() in ("a", "i"):
            return self.only(text)
        either = len(found) > 1 and _EITHER.fullmatch(text[found[0].end() : found[1].start()])
        return None if either and _key(found[0].group()) != _key(found[1].group()) else self.name(found[0].group())

    def only(self, text: str) -> str | None:
        found = {self.name(match.group()) for match in self.find(text) if not _is_article(match, text)}
        return found.pop() if len(found) == 1 else None


_finder = lru_cache(maxsize=32)(_Finder)


def _is_article(match: re.Match[str], text: str) -> bool:
    """Whether a one-letter label stands there as a word of English: "a cat", "A good answer", "I think"."""
    following = r"\s+(?!(?:is|because|or|and)\b)" + ("[a-z]" if match.group().isupper() else r"[^\W\d_]")
    return match.group() in ("a", "i", "A", "I") and re.match(following, text[match.end() :]) is not None


def _key(label: str) -> str:
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", fold(label).strip()).casefold()


def _label_pattern(label: str) -> str:
    """A label as a whole word; CJK characters and symbols need no boundary, and a digit is no part of a longer number."""
    words = re.split(r"(?<=\w)[\s_-]+(?=\w)", label)
    body = r"[\s_-]+".join(re.escape(word) for word in words)
    letter = f"[^\\W_{CJK}]"
    before = f"(?<!{letter})" if re.match(letter, label) else ""
    after = f"(?!{letter}|['’]{letter})" if re.match(letter, label[-1]) else ""
    if label[0].isdigit():
        before += r"(?<!\d[.,])(?<!\W-)(?<!^-)"
    if label[-1].isdigit():
        after += r"(?![.,]\d)"
    return before + body + after
