"""Pairs: two answers to one prompt, how sure it is which one is better, and where that is known from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from typing import Any, Literal

import numpy as np

from tunesmith.core.errors import SpecError
from tunesmith.engine.journal import digest

Hard = Literal["smallest", "largest"]
Raters = Literal["same", "any"]

EQUAL = 1e-9
"""Scores closer than this are a tie."""


@dataclass(frozen=True, slots=True)
class Pair:
    """prompt: "" where texts are compared by themselves; a list of messages stays one. margin: difference of the scores, in their unit,
    None where there were none. probability: that the chosen answer is the better one, 0.5 to 1. provenance: how that is known."""

    chosen: str
    rejected: str
    prompt: Any = ""
    margin: float | None = None
    probability: float = 1.0
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def key(self) -> str:
        """Content hash of the prompt and the two answers in any order, spaces folded."""
        return digest([folded(self.prompt), *sorted([folded(self.chosen), folded(self.rejected)])])

    def row(self) -> dict[str, Any]:
        """As a line of JSONL."""
        out: dict[str, Any] = {"prompt": self.prompt} if self.prompt else {}
        out |= {"chosen": self.chosen, "rejected": self.rejected}
        if self.margin is not None:
            out["margin"] = round(self.margin, 9)
        return out | {"probability": round(self.probability, 9), "provenance": dict(self.provenance)}


@dataclass(frozen=True, slots=True)
class Answers:
    """All answers to one prompt, or texts that stand alone (prompt "").

    scores: of each, higher is better; () if none. ratings: of each, by its raters; () if none. ranked: the order is that of worth.
    about: of each answer, what its provenance says. group: never parted by a split. fields: the row it came from.
    """

    texts: tuple[str, ...]
    prompt: Any = ""
    scores: tuple[float, ...] = ()
    ratings: tuple[tuple[float, ...], ...] = ()
    ranked: bool = False
    where: str = ""
    about: tuple[Mapping[str, Any], ...] = ()
    group: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def told(self, index: int) -> dict[str, Any]:
        """What is known of one answer."""
        own: dict[str, Any] = dict(self.about[index]) if self.about else {}
        if self.scores:
            own["score"] = self.scores[index]
        if self.ratings:
            own["ratings"] = len(self.ratings[index])
        return own


@dataclass(frozen=True, slots=True)
class Rules:
    """Which pairs are made of answers, and which are kept.

    min_margin, max_margin: bounds of the margin, both included. ties: whether pairs of equal worth are kept, with probability 0.5.
    soften: scale of the scores' differences that makes probabilities of them, sigmoid(margin / soften) (Bradley & Terry 1952); 0: 1
    for any difference. raters: "same" where the k-th rating of every answer is by one rater, "any" where raters differ. hard: pairs of
    the smallest or of the largest margin first. per_prompt: at most so many of each prompt. seed: of what is drawn.
    """

    min_margin: float = 0.0
    max_margin: float = math.inf
    ties: bool = True
    soften: float = 0.0
    raters: Raters = "any"
    hard: Hard | None = None
    per_prompt: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.min_margin <= self.max_margin:
            raise SpecError(
                f"margins go from 0 up, and {self.min_margin:g} to {self.max_margin:g} do not.", hints=["--min-margin 0.5 --max-margin 2"]
            )
        if self.soften < 0 or (self.per_prompt is not None and self.per_prompt < 1):
            raise SpecError("soften is at least 0, and per-prompt at least 1.")


def folded(value: Any) -> str:
    """A text as it is compared: spaces folded; of a dialogue, its roles and contents."""
    if isinstance(value, str):
        return " ".join(value.split())
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def share_above(first: Sequence[float], second: Sequence[float], raters: Raters = "any") -> float:
    """Probability that a rater rates the first above the second, ties half.

    "same": the k-th numbers are one rater's, and the share is that of raters. "any": two raters drawn at random, the probability of
    superiority (McGraw & Wong 1992; the Mann-Whitney U over the number of pairs of ratings). Raises ValueError for no ratings, and for
    "same" with unequal numbers of them.
    """
    if not first or not second:
        raise ValueError("there are no ratings")
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if raters == "same":
        if len(a) != len(b):
            raise ValueError(f"the same raters gave {len(a)} and {len(b)} ratings")
        return float(((a > b) + 0.5 * (a == b)).mean())
    return float(((a[:, None] > b) + 0.5 * (a[:, None] == b)).mean())


def pairs_of(answers: Answers, rules: Rules) -> list[Pair]:
    """Every pair of the answers whose worth is known, the better one chosen; equal texts make none.

    With ratings the probability is the raters'; with scores alone it is 1, or `soften`ed, and 0.5 for a tie; in a ranking 1.
    """
    found = []
    for i, j in combinations(range(len(answers.texts)), 2):
        if folded(answers.texts[i]) != folded(answers.texts[j]) and (pair := _pair(answers, i, j, rules)) is not None:
            found.append(pair)
    return _best(found, rules)


def _pair(answers: Answers, i: int, j: int, rules: Rules) -> Pair | None:
    margin = answers.scores[i] - answers.scores[j] if answers.scores else None
    if answers.ratings:
        probability, kind = share_above(answers.ratings[i], answers.ratings[j], rules.raters), "raters"
        margin = margin if margin is not None else float(np.mean(answers.ratings[i]) - np.mean(answers.ratings[j]))
    elif margin is not None:
        probability, kind = _soft(margin, rules.soften), "scores"
    elif answers.ranked:
        probability, kind = 1.0, "ranking"
    else:
        raise ValueError("nothing says which answer is better")
    return oriented(answers, i, j, probability, margin, kind)


def _soft(margin: float, scale: float) -> float:
    if abs(margin) <= EQUAL:
        return 0.5
    if not scale:
        return float(margin > 0)
    return 1 / (1 + math.exp(-max(-700.0, min(700.0, margin / scale))))


def oriented(answers: Answers, i: int, j: int, probability: float, margin: float | None, kind: str, **more: Any) -> Pair:
    """The pair with the likelier answer as chosen; undecided, the one with the higher score, else the first. kind: of the provenance."""
    if probability < 0.5 or (probability == 0.5 and margin is not None and margin < 0):
        i, j, probability, margin = j, i, 1 - probability, None if margin is None else -margin
    named = bool(answers.about) and all("where" in own for own in answers.about)
    place = {} if named else {"where": answers.where}
    provenance = {"kind": kind, **place, "chosen": answers.told(i), "rejected": answers.told(j), **more}
    return Pair(answers.texts[i], answers.texts[j], answers.prompt, margin, probability, provenance)


def kept(pairs: Iterable[Pair], rules: Rules) -> list[Pair]:
    """Those within the margins, and ties where they are wanted."""
    out = []
    for pair in pairs:
        tie = abs(pair.probability - 0.5) <= EQUAL
        size = abs(pair.margin) if pair.margin is not None else None
        if (rules.ties or not tie) and (size is None or rules.min_margin <= size <= rules.max_margin):
            out.append(pair)
    return out


def ordered(pairs: Iterable[Pair], rules: Rules) -> list[Pair]:
    """By margin where hard ones go first (those without a margin last), else drawn by content."""

    def rank(pair: Pair) -> tuple[float, str]:
        if rules.hard is None:
            return 0.0, digest([rules.seed, pair.key()])
        size = math.inf if pair.margin is None else abs(pair.margin) * (1 if rules.hard == "smallest" else -1)
        return size, digest([rules.seed, pair.key()])

    return sorted(pairs, key=rank)


def _best(pairs: Sequence[Pair], rules: Rules) -> list[Pair]:
    """Of one prompt's pairs those that are kept, at most `per_prompt`."""
    found = kept(pairs, rules)
    return found if rules.per_prompt is None or len(found) <= rules.per_prompt else ordered(found, rules)[: rules.per_prompt]


def merged(pairs: Sequence[Pair]) -> tuple[list[Pair], int, int]:
    """Pairs of the same prompt and answers as one, their probabilities averaged; (pairs, how many were merged, how many of them disagreed).

    Where two sources name opposite answers the pair becomes soft, as two raters who disagree make it.
    """
    by_key: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_key.setdefault(pair.key(), []).append(pair)
    out, disagreed = [], 0
    for same in by_key.values():
        if len(same) == 1:
            out.append(same[0])
            continue
        first = same[0]
        turned = [folded(pair.chosen) != folded(first.chosen) for pair in same]
        disagreed += len(set(turned)) > 1
        out.append(_mean(first, same, turned))
    return out, len(pairs) - len(out), disagreed


def _mean(first: Pair, same: Sequence[Pair], turned: Sequence[bool]) -> Pair:
    probability = sum(1 - pair.probability if flip else pair.probability for pair, flip in zip(same, turned, strict=True)) / len(same)
    margins = [pair.margin * (-1 if flip else 1) for pair, flip in zip(same, turned, strict=True) if pair.margin is not None]
    margin = sum(margins) / len(margins) if margins else None
    provenance = {**first.provenance, "merged": [pair.provenance.get("where", "") for pair in same]}
    labelled: list[Any] = []
    for one in chain(*(pair.provenance.get("labelled_by", ()) for pair in same)):
        labelled += [one] if one not in labelled else []
    if labelled:  # each of them had a say
        provenance["labelled_by"] = labelled
    if probability >= 0.5:
        return replace(first, probability=probability, margin=margin, provenance=provenance)
    told = {"chosen": provenance.get("rejected", {}), "rejected": provenance.get("chosen", {})}
    turned_margin = None if margin is None else -margin
    return Pair(first.rejected, first.chosen, first.prompt, turned_margin, 1 - probability, {**provenance, **told})


def drawn(items: Sequence[Answers], per_item: int, seed: int) -> list[Answers]:
    """Pairs of single texts: in `per_item` rounds each text meets another one, no two twice; with an odd number one rests a round.

    A text is met as often as any other, so no judge or model learns from how often it is seen.
    """
    rng, met, out = np.random.default_rng(seed), set[tuple[int, int]](), []
    for _ in range(per_item):
        order = [int(index) for index in rng.permutation(len(items))]
        for i, j in zip(order[::2], order[1::2], strict=False):
            pair = (min(i, j), max(i, j))
            if pair not in met:
                met.add(pair)
                out.append(joined(items[i], items[j]))
    return out


def joined(first: Answers, second: Answers) -> Answers:
    """Two single texts as the answers to nothing."""
    both = (first, second)
    return Answers(
        texts=tuple(one.texts[0] for one in both),
        scores=tuple(one.scores[0] for one in both) if all(one.scores for one in both) else (),
        ratings=tuple(one.ratings[0] for one in both) if all(one.ratings for one in both) else (),
        where=f"{first.where} and {second.where}",
        about=tuple({**(one.about[0] if one.about else {}), "where": one.where} for one in both),
    )


def mixed(sources: Sequence[Sequence[Pair]], weights: Sequence[float], count: int | None, rules: Rules) -> list[Pair]:
    """Pairs of several sources in proportion to their weights: `count` in all, or as many as the scarcest source allows.

    Raises SpecError where a source has too few for the count.
    """
    total = sum(weights)
    if total <= 0 or any(weight < 0 or not math.isfinite(weight) for weight in weights):
        raise SpecError("weights are positive numbers.", where="--weight")
    most = min(len(own) * total / weight for own, weight in zip(sources, weights, strict=True) if weight)
    wanted = int(most) if count is None else count
    out: list[Pair] = []
    quotas = _quotas(weights, wanted)
    for number, (own, quota) in enumerate(zip(sources, quotas, strict=True), 1):
        if quota > len(own):
            what = f"source {number} has {len(own):,} pairs, and its share of {wanted:,} is {quota:,}."
            raise SpecError(what, where="--count", hints=[f"Most that the weights allow:  --count {int(most)}"])
        out += ordered(own, rules)[:quota]
    return out


def _quotas(weights: Sequence[float], wanted: int) -> list[int]:
    """Whole numbers in proportion to the weights that add up, by largest remainder."""
    shares = [wanted * weight / sum(weights) for weight in weights]
    quotas = [math.floor(share) for share in shares]

    def missing(at: int) -> tuple[float, int]:
        return quotas[at] - shares[at], at

    for at in sorted(range(len(shares)), key=missing)[: wanted - sum(quotas)]:
        quotas[at] += 1
    return quotas
