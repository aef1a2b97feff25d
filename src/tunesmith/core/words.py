"""Words of a text: what every count of words in the house means by one."""

from __future__ import annotations

import re
import unicodedata

CJK = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
"""Characters of Chinese, Japanese and Korean, for a regular expression's brackets: each counts as a word of its own."""

_PIECES = re.compile(f"[{CJK}]|[^\\s{CJK}]+")
_HALF_WIDTH = {0xFF01 + offset: 0x21 + offset for offset in range(94)}


def fold(text: str) -> str:
    """One spelling of what looks the same: composed accents, half-width letters and digits. Case is kept."""
    return unicodedata.normalize("NFC", text).translate(_HALF_WIDTH)


def pieces(text: str) -> list[str]:
    """What spaces part, CJK characters alone."""
    return _PIECES.findall(text)


def words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits, CJK characters alone: on ASCII text, rouge_score's tokens without stemming."""
    lowered = fold(text).lower()
    return pieces("".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in lowered))
