"""From sources to pairs: read, split so that nothing stands on two sides, pair, mix, and hold against held-out files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from tunesmith.core.errors import DataError, LeakError, SpecError
from tunesmith.core.joining import Joined
from tunesmith.core.progress import Quiet, Reporter
from tunesmith.core.record import Record
from tunesmith.curation.pairs import Answers, Pair, Rules, drawn, folded, kept, merged, mixed, ordered, pairs_of
from tunesmith.curation.reading import Source, texts_of
from tunesmith.data.splits import TRAIN, Size, split

Leaks = Literal["error", "drop", "allow"]


class Labels(Protocol):
    """Who says which answer is better, where the file does not: a judge or a reward. told: what there is to say of the work, or ""."""

    @property
    def told(self) -> str: ...

    def __call__(self, answers: Sequence[Answers], rules: Rules) -> list[list[Pair]]:
        """The pairs of each."""

    def done(self) -> None:
        """The pairs are written."""


class Sampler(Protocol):
    """Who answers prompts."""

    def __call__(self, prompts: Sequence[Answers]) -> list[Answers]:
        """The prompts with answers, and with whatever prompts were made of them."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """splits: sizes of dev and test, as in data. per_item: pairs that each single text is in. count: pairs of the training split.
    weights: one for each source, () for all of every source. leaks: what becomes of pairs that share a prompt or a text with a held-out
    file."""

    rules: Rules = field(default_factory=Rules)
    splits: Mapping[str, Size] = field(default_factory=dict)
    per_item: int = 2
    count: int | None = None
    weights: tuple[float, ...] = ()
    leaks: Leaks = "error"


@dataclass(slots=True)
class Built:
    """splits: pairs of each, train first. merged, disagreed: pairs that stood several times, and how many of those named opposite answers.
    leaks: by held-out file, how many pairs share a prompt or a text with it. notes: for the reader."""

    splits: dict[str, list[Pair]]
    merged: int = 0
    disagreed: int = 0
    leaks: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def build(
    sources: Sequence[Source],
    recipe: Recipe,
    *,
    labels: Labels | None = None,
    sampler: Sampler | None = None,
    held_out: Mapping[str, Sequence[Pair]] | None = None,
    reporter: Reporter | None = None,
) -> Built:
    """The pairs of all sources. Raises DataError, LeakError or SpecError.

    Prompts, and texts without a prompt, are split before anything is paired, all sources together, so none stands in two splits.
    """
    reporter = reporter or Quiet()
    _check(sources, recipe, labels, sampler)
    sources = [_sampled(source, sampler) for source in sources] if sampler else sources
    units = [unit for source in sources for unit in _units(source)]
    parts = _split(units, recipe)
    built = Built({}, notes=[note for source in sources for note in source.notes])
    place = {id(unit): name for name, own in parts.items() for unit in own}
    for name in parts:
        own = [_pairs(source, [u for u in _units_of(source, units) if place[id(u)] == name], recipe, labels) for source in sources]
        pairs = _together(own, recipe, name)
        distinct, same, disagreed = merged(pairs)
        built.merged, built.disagreed = built.merged + same, built.disagreed + disagreed
        built.splits[name] = ordered(kept(distinct, recipe.rules), recipe.rules) if recipe.rules.hard else kept(distinct, recipe.rules)
    _limit(built, recipe)
    _without_leaks(built, recipe, held_out or {})
    if not built.splits[TRAIN]:
        raise DataError("no pair is left.", hints=["Widen the margins, keep ties (--ties keep), or bring more data."])
    return built


@dataclass(frozen=True, slots=True, eq=False)
class _Unit:
    """What is never parted: a prompt with its answers, a single text, or a pair."""

    source: int
    content: Answers | Pair

    @property
    def name(self) -> str:
        if isinstance(self.content, Pair):
            return folded(self.content.prompt) or f"{folded(self.content.chosen)}\n{folded(self.content.rejected)}"
        return folded(self.content.prompt) or folded(self.content.texts[0])


def _units(source: Source) -> list[_Unit]:
    contents: list[Answers | Pair] = [*source.answers, *source.pairs]
    return [_Unit(id(source), content) for content in contents]


def _units_of(source: Source, units: Sequence[_Unit]) -> list[_Unit]:
    return [unit for unit in units if unit.source == id(source)]


def _check(sources: Sequence[Source], recipe: Recipe, labels: Labels | None, sampler: Sampler | None) -> None:
    if recipe.weights and len(recipe.weights) != len(sources):
        raise SpecError(
            f"there are {len(sources)} sources and {len(recipe.weights)} weights.", where="--weight", hints=["One for each, in order."]
        )
    for source in sources:
        if sampler is not None:
            if source.kind == "items" or source.kind == "pairs":
                raise SpecError(
                    "answers are sampled to prompts, and this source has none.",
                    where=source.name,
                    hints=["Name the column:  --columns prompt=NAME"],
                )
            continue
        if source.kind == "prompts":
            raise DataError(
                "the rows have prompts and no answers.",
                where=source.name,
                hints=["Sample some:  --sample SYSTEM --judge JUDGE", "Or name the column:  --columns answers=NAME"],
            )
        silent = source.answers and not (source.answers[0].scores or source.answers[0].ratings or source.answers[0].ranked)
        if silent and labels is None:
            hints = ["Name the column:  --columns score=NAME", "Or let a judge or a reward say it:  --judge JUDGE  ·  --reward EXPR"]
            raise DataError("nothing says which of the answers is better.", where=source.name, hints=hints)


def _sampled(source: Source, sampler: Sampler | None) -> Source:
    assert sampler is not None
    return replace(source, kind="answers", answers=sampler(source.answers))


def _split(units: Sequence[_Unit], recipe: Recipe) -> dict[str, list[_Unit]]:
    if not recipe.splits:
        return {TRAIN: list(units)}
    groups = _joint(units)
    records = [Record("text", text=unit.name, group=group, fields={"unit": unit}) for unit, group in zip(units, groups, strict=True)]
    parts = split(records, recipe.splits, seed=recipe.rules.seed, stratify=False)
    return {name: [record.fields["unit"] for record in own] for name, own in parts.items()}


def _joint(units: Sequence[_Unit]) -> list[str | None]:
    """The group of each unit; pairs without a prompt that share a text, directly or through others, are of one group."""
    joined = Joined()
    loose = [unit.content for unit in units if isinstance(unit.content, Pair) and not unit.content.prompt]
    for pair in loose:
        joined.join(folded(pair.chosen), folded(pair.rejected))
    groups: list[str | None] = []
    for unit in units:
        content = unit.content
        if isinstance(content, Pair):
            groups.append(None if content.prompt else joined.root(folded(content.chosen)))
        else:
            same = not content.prompt and folded(content.texts[0]) in joined
            groups.append(joined.root(folded(content.texts[0])) if same else content.group)
    return groups


def _pairs(source: Source, units: Sequence[_Unit], recipe: Recipe, labels: Labels | None) -> list[Pair]:
    """The pairs of one source's share of a split."""
    ready = [unit.content for unit in units if isinstance(unit.content, Pair)]
    answers = [unit.content for unit in units if isinstance(unit.content, Answers)]
    if source.items:
        answers = drawn(answers, recipe.per_item, recipe.rules.seed)
    if labels is not None and ready:
        answers += [Answers((pair.chosen, pair.rejected), pair.prompt, where=str(pair.provenance.get("where", ""))) for pair in ready]
        ready = []
    made = labels(answers, recipe.rules) if labels is not None else [pairs_of(own, recipe.rules) for own in answers]
    found = [pair for own in made for pair in own] + kept(ready, recipe.rules)
    return [replace(pair, provenance={"source": source.name, **_placed(pair.provenance, source.name)}) for pair in found]


def _placed(provenance: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The provenance with places told within its source ("line 7"), which stands beside them."""
    out: dict[str, Any] = {key: _placed(value, name) if isinstance(value, Mapping) else value for key, value in provenance.items()}
    if isinstance(out.get("where"), str):
        out["where"] = out["where"].removeprefix(f"{name}, ")
    return out


def _together(own: Sequence[Sequence[Pair]], recipe: Recipe, name: str) -> list[Pair]:
    if not recipe.weights:
        return [pair for pairs in own for pair in pairs]
    return mixed(own, recipe.weights, recipe.count if name == TRAIN else None, recipe.rules)


def _limit(built: Built, recipe: Recipe) -> None:
    """At most `count` training pairs, the hard ones first where that is asked."""
    if recipe.count is None or recipe.weights:
        return
    if recipe.count < len(built.splits[TRAIN]):
        built.splits[TRAIN] = ordered(built.splits[TRAIN], recipe.rules)[: recipe.count]
    elif recipe.count > len(built.splits[TRAIN]):
        built.notes.append(f"{recipe.count:,} pairs were asked for, and there are {len(built.splits[TRAIN]):,}")


def _without_leaks(built: Built, recipe: Recipe, held_out: Mapping[str, Sequence[Pair]]) -> None:
    """Pairs whose prompt, or where they have none one of whose texts, stands in a held-out file: refused, dropped or told."""
    for name, others in held_out.items():
        known = set(texts_of(others))
        found = {split: [pair for pair in own if known & set(texts_of([pair]))] for split, own in built.splits.items()}
        count = sum(map(len, found.values()))
        built.leaks[name] = count
        if not count:
            continue
        if recipe.leaks == "error":
            first = next(pair for own in found.values() for pair in own)
            shown = next(text for text in texts_of([first]) if text in known)
            hints = [f"The first:  '{shown[:80]}'", "Drop them:  --leaks drop", "Or keep them:  --leaks allow"]
            raise LeakError(f"{count:,} pairs share a prompt or a text with {name}.", where=_where(first), hints=hints)
        if recipe.leaks == "drop":
            for split_name, leaked in found.items():
                gone = {id(pair) for pair in leaked}
                built.splits[split_name] = [pair for pair in built.splits[split_name] if id(pair) not in gone]
            built.notes.append(f"{count:,} pairs that share a prompt or a text with {name} were dropped")


def _where(pair: Pair) -> str:
    """File and line: provenance tells the place within its source, which stands beside it."""
    told = pair.provenance
    own = told.get("chosen")
    place = str(told.get("where") or (own.get("where", "") if isinstance(own, Mapping) else ""))
    return ", ".join(part for part in (str(told.get("source", "")), place) if part)
