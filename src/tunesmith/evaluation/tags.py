"""Tags of words and the spans that they mark: schemes recognised, checked and converted; seqeval's and CoNLL's reading of spans."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Scheme = Literal["IOB2", "IOB1", "BIOES", "plain"]
"""IOB2 (BIO): B begins every span. IOB1: B only where a span follows one of its type at once. BIOES: E ends a span and S is
one alone (BILOU's L and U are read as these). plain: every word has a tag of its own, and there is no outside."""

OUTSIDE = "O"

_TAG = re.compile(r"([BIESLU])(?:-(.*))?", re.DOTALL)
_AS_BIOES = {"L": "E", "U": "S"}


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Words first to last, both included, counted from 0, of one type ("" where tags name none)."""

    first: int
    last: int
    type: str


def parted(tag: str) -> tuple[str, str] | None:
    """("B", "PER") of "B-PER", ("O", "") of "O"; None for a tag of another form."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    match = _TAG.fullmatch(tag)
    return (_AS_BIOES.get(match[1], match[1]), match[2] or "") if match else None


def recognise(sentences: Iterable[Sequence[str]]) -> Scheme:
    """The scheme that these tags are written in.

    plain: a tag has another form than O or a prefix and a type. BIOES: an E, S, L or U occurs. IOB1: it breaks no rule of
    IOB1, and a rule of IOB2. Else IOB2.
    """
    kept = [list(tags) for tags in sentences]
    known = {tag: parted(tag) for tags in kept for tag in tags}
    if not all(known.values()):
        return "plain"
    if any(pair and pair[0] in "ES" for pair in known.values()):
        return "BIOES"
    if any(illegal(tags, "IOB2") is not None for tags in kept) and all(illegal(tags, "IOB1") is None for tags in kept):
        return "IOB1"
    return "IOB2"


def illegal(tags: Sequence[str], scheme: Scheme) -> int | None:
    """Place of the first tag that breaks the scheme; None for none.

    IOB2: I without a span of its type before it. IOB1: B that follows no span of its type. BIOES: I or E that continues
    nothing, or anything else while a span is open; a span left open breaks it at its last word.
    """
    if scheme == "plain":
        return None
    prefixes = {"IOB2": "BIO", "IOB1": "BIO", "BIOES": "BIOES"}[scheme]
    before = (OUTSIDE, "")
    for place, tag in enumerate(tags):
        pair = parted(tag)
        if pair is None or pair[0] not in prefixes:
            return place
        prefix, kind = pair
        follows = before[0] in "BI" and before[1] == kind
        if scheme == "BIOES":
            wrong = not (follows and prefix in "IE") if before[0] in "BI" else prefix in "IE"
        else:
            wrong = prefix == ("I" if scheme == "IOB2" else "B") and not follows
        if wrong:
            return place
        before = pair
    return len(tags) - 1 if scheme == "BIOES" and before[0] in "BI" else None


def spans(tags: Sequence[str], scheme: Scheme = "IOB2") -> list[Span]:
    """The spans as seqeval's default mode finds them (and conlleval before it), whatever the transitions.

    A span begins at B or S, at another type than the word's before, at I or E after O, E or S, and at E after E; it ends
    where the next word's tag is B, S or O, or of another type, and after E or S. plain: every word is one.
    """
    if scheme == "plain":
        return [Span(place, place, tag) for place, tag in enumerate(tags)]
    found: list[Span] = []
    first, before = 0, (OUTSIDE, "")
    for place, tag in enumerate([*tags, OUTSIDE]):
        pair = parted(tag) or (OUTSIDE, "")
        if before[0] != OUTSIDE and (before[0] in "ES" or pair[0] in "BSO" or pair[1] != before[1]):
            found.append(Span(first, place - 1, before[1]))
        if pair[0] in "BS" or before[0] in "OES" or pair[1] != before[1]:
            first = place
        before = pair
    return found


def strict_spans(tags: Sequence[str], scheme: Scheme = "IOB2") -> list[Span]:
    """The spans as seqeval's strict mode finds them: those alone that the scheme's rules make whole.

    IOB2: B and the I's of its type after it; an I that continues nothing is none. BIOES: S alone, or B, I's and E.
    """
    if scheme == "plain":
        return spans(tags, scheme)
    found: list[Span] = []
    open_: tuple[int, str] | None = None
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, kind = parted(tag) or (OUTSIDE, "")
        if open_ is not None and not (prefix in "IE" and kind == open_[1]):
            if scheme != "BIOES":
                found.append(Span(open_[0], place - 1, open_[1]))
            open_ = None
        if scheme == "BIOES" and open_ is not None and prefix == "E":
            found.append(Span(open_[0], place, kind))
            open_ = None
        if prefix == "S":
            found.append(Span(place, place, kind))
        elif prefix == "B":
            open_ = place, kind
    return found


def written(found: Iterable[Span], words: int, scheme: Scheme) -> tuple[str, ...]:
    """Tags of so many words that mark these spans, in IOB2 or BIOES."""
    tags = [OUTSIDE] * words
    for span in found:
        alone, kind = span.first == span.last, f"-{span.type}" if span.type else ""
        tags[span.first : span.last + 1] = [f"I{kind}"] * (span.last - span.first + 1)
        tags[span.first] = f"{'S' if alone and scheme == 'BIOES' else 'B'}{kind}"
        if scheme == "BIOES" and not alone:
            tags[span.last] = f"E{kind}"
    return tuple(tags)


def names_of(types: Iterable[str], scheme: Scheme) -> tuple[str, ...]:
    """All tags of these types of spans in IOB2 or BIOES, O first."""
    prefixes = "BIES" if scheme == "BIOES" else "BI"
    return (OUTSIDE, *(f"{prefix}-{kind}" if kind else prefix for kind in sorted(types) for prefix in prefixes))


def further(tag: str) -> str:
    """The tag of a word's further pieces where each is labelled: what begins a span is inside of it from the second on."""
    pair = parted(tag)
    if pair is None or pair[0] not in "BS":
        return tag
    return f"I-{pair[1]}" if pair[1] else "I"


@dataclass(frozen=True, slots=True)
class Counts:
    """Spans of one type: found and right, found, and there to be found."""

    hits: int
    found: int
    gold: int


def count(gold: Iterable[Span], found: Iterable[Span]) -> Counts:
    """A span is right where words and type are those of a gold one."""
    wanted, given = set(gold), set(found)
    return Counts(len(wanted & given), len(given), len(wanted))


def by_type(pairs: Iterable[tuple[Sequence[Span], Sequence[Span]]]) -> dict[str, Counts]:
    """Counts of each type over sentences of (gold, found) spans, types in order."""
    hits, found, gold = Counter[str](), Counter[str](), Counter[str]()
    for wanted, given in pairs:
        hits.update(span.type for span in set(wanted) & set(given))
        found.update(span.type for span in given)
        gold.update(span.type for span in wanted)
    return {kind: Counts(hits[kind], found[kind], gold[kind]) for kind in sorted({*found, *gold})}
