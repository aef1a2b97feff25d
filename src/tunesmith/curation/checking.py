"""A judge held against human labels before it is used."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.core.errors import DataError
from tunesmith.core.words import pieces
from tunesmith.curation.agreement import (
    Share,
    agreement,
    corrected_agreement,
    corrected_rate,
    difference,
    kappa,
    share,
    sides,
    single_rater,
    weighted_kappa,
)
from tunesmith.curation.labels import as_text
from tunesmith.curation.pairs import Pair, Rules, folded, ordered
from tunesmith.engine.journal import digest
from tunesmith.evaluation.statistics import FEW
from tunesmith.rollout.judges import Duel, Judge, Judgement, weights_of

UNCHECKED = "not held against human labels"

WIN_RATES = (0.55, 0.6, 0.7)
"""Win rates by the judge that the report translates into win rates by people."""


@dataclass(slots=True)
class Checked:
    """What a judge is worth, measured on pairs that people have labelled.

    agreement: with the majority. single_rater: with one rater; ceiling: how often one rater sides with the majority. corrected: agreement
    with raters who never err. kappa, weighted_kappa: see `agreement`. flips: verdicts that change with the order; first: share of
    verdicts for whichever stands first. judge_longer, people_longer, length_bias: share of verdicts for the longer answer, the same of
    people on those pairs, and the difference. pairs: judged; none: without a verdict; soft: whether labels are shares of raters.
    translated: what a win rate by this judge says of people, [rate, corrected, low, high]. rates: it rated each answer by itself.
    identity: what it is recognised by, see `judges.weights_of`. created: ISO 8601, UTC.
    """

    judge: str
    rubric: str
    source: str
    pairs: int
    none: int
    soft: bool
    agreement: Share
    kappa: Share
    single_rater: Share | None = None
    ceiling: float | None = None
    corrected: Share | None = None
    weighted_kappa: Share | None = None
    flips: Share | None = None
    first: Share | None = None
    judge_longer: Share | None = None
    people_longer: Share | None = None
    length_bias: Share | None = None
    translated: tuple[tuple[float, float, float, float], ...] = ()
    asked: str = ""
    examples: tuple[str, ...] = ()
    rates: bool = False
    identity: str = ""
    created: str = ""

    @property
    def verdict(self) -> str:
        """In one sentence: is the judge of use?"""
        found = self.agreement
        said = f"{found.value * 100:.1f} % agreement, 95 % interval {found.low * 100:.1f} to {found.high * 100:.1f}"
        if found.high < 0.5:
            return f"The judge sides against people: it is worse than chance ({said}). Do not use it as it is."
        if found.low <= 0.5:
            return f"The judge is no better than chance on these pairs ({said}). Do not use it, or check it on more of them."
        if self.flips is not None and self.flips.value > 0.5:
            return f"The judge is better than chance ({said}), though most of its verdicts turn with the order: ask both orders."
        return f"The judge is better than chance ({said})."

    @property
    def better_than_chance(self) -> bool:
        """Does the interval of its agreement lie above one half?"""
        return self.agreement.low > 0.5

    def as_dict(self) -> dict[str, Any]:
        """In plain values, for JSON."""
        out: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            out[name] = value.as_dict() if isinstance(value, Share) else list(value) if isinstance(value, tuple) else value
        return out | {"verdict": self.verdict, "better_than_chance": self.better_than_chance}


def check_judge(
    judge: Judge, pairs: Sequence[Pair], *, rate: bool = False, limit: int | None = None, source: str = "", seed: int = 0
) -> Checked:
    """Ask the judge about labelled pairs and measure it. rate: it rates each answer by itself, and the higher rating wins.

    A question without a verdict is left out and counted, whatever the judge's policy. limit: at most so many pairs, drawn by content.
    Raises DataError where people took no side on any pair, or the judge gave no verdict on any.
    """
    chosen = ordered(pairs, Rules(seed=seed))[:limit] if limit is not None else list(pairs)
    asking = replace(judge, no_verdict="skip")
    said = _rated(asking, chosen) if rate else asking.compare([_duel(pair) for pair in chosen])
    judged = [(pair, one) for pair, one in zip(chosen, said, strict=True) if one.preference is not None]
    if not judged:
        hints = [f"It said:  {text}" for text in asking.told] or ["Try another rubric:  --rubric FILE"]
        raise DataError(f"the judge gave no verdict on any of {len(chosen):,} pairs.", where=judge.name, hints=hints)
    human = [pair.probability for pair, _ in judged]
    if not sides(human).any():
        raise DataError("people took no side on any pair: all are ties.", where=source)
    soft = any(value not in (0.5, 1.0) for value in human)
    verdicts = [float(one.preference or 0.0) for _, one in judged]
    clusters = _clusters([pair for pair, _ in judged])
    found = Checked(
        judge=f"{judge.name}{', rating' if rate else ''}",
        rubric=judge.rubric,
        source=source,
        pairs=len(judged),
        none=len(chosen) - len(judged),
        soft=soft,
        agreement=agreement(human, verdicts, clusters),
        kappa=kappa(human, verdicts, clusters),
        weighted_kappa=weighted_kappa(human, verdicts, clusters) if soft else None,
        corrected=corrected_agreement(human, verdicts, clusters),
        asked=asking.tally.line(),
        examples=tuple(asking.told),
        rates=rate,
        identity=weights_of(judge.model) or "",
        created=datetime.now(UTC).isoformat(),
    )
    if soft:
        found.single_rater = single_rater(human, verdicts, clusters)
        found.ceiling = float(np.mean(np.maximum(human, 1 - np.asarray(human))))
    if not rate and judge.both_orders:
        _places(found, [one for _, one in judged], clusters)
    _lengths(found, [pair for pair, _ in judged], human, verdicts, clusters)
    found.translated = _translated(found)
    return found


def _duel(pair: Pair) -> Duel:
    return Duel(pair.chosen, pair.rejected, as_text(pair.prompt), str(pair.provenance.get("where", "")))


def _rated(judge: Judge, pairs: Sequence[Pair]) -> list[Judgement]:
    """Each answer rated by itself; a side is taken as surely as by any other judge."""
    ratings = judge.rate([(as_text(pair.prompt), text) for pair in pairs for text in (pair.chosen, pair.rejected)])
    out = []
    for first, second in zip(ratings[::2], ratings[1::2], strict=True):
        none = first is None or second is None
        out.append(Judgement(None if none else 0.5 + 0.5 * float(np.sign(round((first or 0.0) - (second or 0.0), 9)))))
    return out


def _clusters(pairs: Sequence[Pair]) -> list[Hashable] | None:
    """Pairs of one prompt belong together; None where every pair stands alone, or one prompt stands over all.

    Texts without a prompt that meet again in other pairs are not brought together, for drawn pairs tie all of them into one."""
    names: list[Hashable] = [folded(pair.prompt) if pair.prompt else place for place, pair in enumerate(pairs)]
    return None if len(set(names)) in (1, len(names)) else names


def _places(found: Checked, said: Sequence[Judgement], clusters: Sequence[Hashable] | None) -> None:
    """The bias of place: `ahead` and `behind` are of the chosen answer, so it stands first in one and second in the other."""
    found.flips = share([float(bool(one.flips)) for one in said], clusters)
    ahead, behind = (sides([value or 0.0 for value in values]) for values in zip(*((one.ahead, one.behind) for one in said), strict=True))
    first = (np.where(ahead > 0, 1.0, np.where(ahead < 0, 0.0, 0.5)) + np.where(behind < 0, 1.0, np.where(behind > 0, 0.0, 0.5))) / 2
    found.first = share(first, clusters)


def _lengths(
    found: Checked, pairs: Sequence[Pair], human: Sequence[float], judge: Sequence[float], clusters: Sequence[Hashable] | None
) -> None:
    """The bias of length, on pairs of unequal numbers of words."""
    gaps = [len(pieces(pair.chosen)) - len(pieces(pair.rejected)) for pair in pairs]
    unequal = [place for place, gap in enumerate(gaps) if gap]
    if not unequal:
        return
    own = None if clusters is None else [clusters[place] for place in unequal]
    said, people = sides(judge), np.asarray(human, np.float64)
    by_judge = [0.5 + 0.5 * float(said[place]) * (1 if gaps[place] > 0 else -1) for place in unequal]
    by_people = [float(people[place] if gaps[place] > 0 else 1 - people[place]) for place in unequal]
    found.judge_longer, found.people_longer = share(by_judge, own), share(by_people, own)
    found.length_bias = difference(by_judge, by_people, own)


def _translated(found: Checked) -> tuple[tuple[float, float, float, float], ...]:
    """Win rates by the judge as win rates by people, from what is known of its agreement alone (as many comparisons as one likes)."""
    if not found.agreement.low > 0.5 or found.pairs < FEW:
        return ()
    out = []
    for rate in WIN_RATES:
        known = corrected_rate(rate, 10**9, found.agreement.value, found.agreement.of)
        if known is not None:
            out.append((rate, known.value, known.low, known.high))
    return tuple(out)


def save(found: Checked, root: Path, name: str) -> Path:
    """Write the report to ROOT/NAME/judge-KEY.json, whole or not at all. KEY follows from the judge, its rubric and how it was asked,
    so that an earlier check of the same is replaced and none of another."""
    folder = root / (re.sub(r"[^\w.-]+", "-", name).strip("-.") or "judge")
    folder.mkdir(parents=True, exist_ok=True)
    key = digest([found.identity or found.judge, found.judge, found.rubric])[:8]
    beside = folder / f".judge-{key}.json.new"
    beside.write_text(json.dumps(found.as_dict(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    return beside.replace(folder / f"judge-{key}.json")


def latest(root: Path, judge: Judge, *, rates: bool) -> dict[str, Any] | None:
    """The last check of this judge by this rubric under a folder of runs, one asked in the same way (rates: each answer by itself) before
    others; None where there is none. What cannot be read is passed over."""
    identity, found = weights_of(judge.model), []
    for file in root.glob("*/judge-*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            values: dict[str, Any] = json.loads(file.read_text("utf-8"))
            if identity and values["identity"] == identity and values["rubric"] == judge.rubric:
                found.append((values["rates"] == rates, values["created"], values))
    return max(found, key=lambda one: one[:2])[2] if found else None


def held_against(root: Path, judge: Judge, *, rates: bool) -> str:
    """What the last check of a judge found, in a few words; "not held against human labels" where there is none."""
    known = latest(root, judge, rates=rates)
    if known is None:
        return UNCHECKED
    found = known["agreement"]
    how = "" if known["rates"] == rates else ", asked to rate" if known["rates"] else ", asked to compare"
    within = f"{found['value'] * 100:.1f} % (95 %: {found['low'] * 100:.1f} to {found['high'] * 100:.1f})"
    source = f" of {known['source']}" if known["source"] else ""
    return f"agrees with people in {within} of {known['pairs']:,} pairs{source}{how}"
