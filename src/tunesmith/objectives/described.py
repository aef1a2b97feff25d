"""The objectives as people read them: by family, each with its equation, papers, options, and by what its sum is divided."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass

from tunesmith.objectives.registry import OBJECTIVES, Objective

FAMILIES = {
    "likelihood of texts": ("sft",),
    "a teacher's probabilities": ("distil",),
    "pairs of answers": ("preferences",),
    "rankings of answers": ("ranking",),
    "good and bad answers": ("kto",),
    "reward models": ("rewarding",),
    "sampled answers": ("policy",),
    "sampled answers and a critic": ("ppo",),
    "task heads": ("classify", "tag", "regress", "choose"),
}
"""What is learned from, and the modules whose objectives learn from it."""

OTHERS = "others"


@dataclass(frozen=True, slots=True)
class Described:
    """An objective in words. title: what it is, in a sentence, most with the equation. text: all that is said of it. papers: their
    arXiv numbers. options: name -> default, None where it has to be given. unit: what it reads values of. reads: their names.
    denominator: what its sum over a step is divided by."""

    name: str
    family: str
    title: str
    text: str
    papers: tuple[str, ...]
    options: dict[str, str | None]
    unit: str
    reads: tuple[str, ...]
    denominator: str

    @property
    def written(self) -> str:
        """As a spec would have it, with every option at its default."""
        options = ", ".join(name if default is None else f"{name}={default}" for name, default in self.options.items())
        return f"{self.name}({options})" if options else self.name


def described(name: str) -> Described:
    """All there is to say of an objective. Raises SpecError for a name that is not in the table, with the nearest ones."""
    entry = OBJECTIVES[name]
    text = inspect.getdoc(entry.function) or ""
    options = {
        each.name: None if each.default is each.empty else _plain(each.default)
        for each in inspect.signature(entry.function).parameters.values()
        if each.kind is each.KEYWORD_ONLY
    }
    papers = tuple(dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", text)))
    title = " ".join(text.split("\n\n")[0].split())
    return Described(name, _family(entry), title, text, papers, options, entry.unit, entry.reads, entry.denominator)


def by_family() -> dict[str, list[Described]]:
    """Every objective of the table, family by family."""
    every = [described(name) for name in OBJECTIVES]
    found = {family: [each for each in every if each.family == family] for family in (*FAMILIES, OTHERS)}
    return {family: entries for family, entries in found.items() if entries}


def notation(family: str) -> str:
    """What the modules of a family say of all its objectives, such as what the letters in its equations mean."""
    modules = (sys.modules[f"tunesmith.objectives.{name}"] for name in FAMILIES.get(family, ()))
    return "\n\n".join(inspect.getdoc(module) or "" for module in modules)


def _family(entry: Objective) -> str:
    package, _, module = entry.function.__module__.rpartition(".")
    known = [family for family, modules in FAMILIES.items() if package == "tunesmith.objectives" and module in modules]
    return known[0] if known else OTHERS


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
