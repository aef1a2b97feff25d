"""Writes docs/methods.md: which method keeps which promises on which family of models, with the reason for every hole.

    make conformance        or:  python docs/conformance.py .cache/conformance.jsonl

The suite records what came of each of its cells (tests/recording.py); this sums it up in docs/conformance.json and writes the page
from there. Without a record, only the page is written anew; with --check nothing is, and a page that is behind is an error.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.adapters.space import POINTS

DOCS = Path(__file__).parent
SUMMARY, PAGE = DOCS / "conformance.json", DOCS / "methods.md"
ENCODERS = ("bert", "roberta", "electra", "distilbert", "albert", "modernbert", "deberta-v2", "t5-encoder")

_FOLDER = re.compile(r"[^\s'\"\[(,]*tunesmith-test-[^/\s'\"]*/")
"""Where the suite keeps what it saves: named anew in every process."""

_MANY = 8
"""Families; a claim that fewer were asked is said to be one of a part."""

Cell = Mapping[str, Any]
"""passed: how many claims. failed, holes: reason -> claims, by number."""


def summed_up(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last outcome of each cell, of the source that the last line of its claim has."""
    of_claim = {line["claim"]: line["source"] for line in lines}
    last = {(line["claim"], line["method"], line["family"]): line for line in lines if line["source"] == of_claim[line["claim"]]}
    claims = list(dict.fromkeys(claim for claim, _, _ in last))
    source = lines[-1]["source"]
    cells: dict[str, dict[str, Any]] = {}
    for (claim, method, family), line in last.items():
        cell = cells.setdefault(method, {}).setdefault(family, {"passed": 0, "failed": {}, "holes": {}})
        if line["outcome"] == "passed":
            cell["passed"] += 1
        else:
            of = cell["failed" if line["outcome"] == "failed" else "holes"]
            of.setdefault(_FOLDER.sub("runs/", line["reason"]), []).append(claims.index(claim))
    part = {claim: asked for claim in claims if len(asked := list(dict.fromkeys(f for c, _, f in last if c == claim))) < _MANY}
    earlier = [claim for claim in claims if of_claim[claim] != source]
    return {"source": source, "claims": claims, "part": part, "earlier": earlier, "cells": cells}


class Notes:
    """Numbered remarks, each once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def page(summary: Mapping[str, Any]) -> str:
    """methods.md."""
    cells, claims = summary["cells"], summary["claims"]
    families = list(dict.fromkeys(family for of in cells.values() for family in of))
    notes = Notes()
    totals = Counter[str]()
    for of in cells.values():
        for cell in of.values():
            totals["kept"] += cell["passed"]
            for kind in ("failed", "holes"):
                totals[kind] += sum(map(len, cell[kind].values()))
    own = {method: _everywhere(of) for method, of in cells.items()}
    out = [
        "# Methods and the models that carry them",
        "_Written by `make conformance` from what the suite found; edit docs/conformance.py._",
        f"Every method of the catalogue was put on a tiny random model of every family, and asked to keep these promises. "
        f"{totals['kept']:,} were kept, {totals['holes']:,} do not apply or are refused, each with its reason below, "
        f"and {totals['failed']:,} were broken.",
        "\n".join(f"{number}. {claim}{_asked(summary, claim)}" for number, claim in enumerate(claims, 1)),
        "✓ it keeps all promises that apply to it · — it is refused there · ✗ it breaks one · a dot: not run · numbers: the notes below. "
        "What a method cannot do on any family stands under “Holes of a method”.",
        "## Decoders",
        _matrix(cells, [family for family in families if family not in ENCODERS], own, notes, claims),
        "## Encoders",
        _matrix(cells, [family for family in families if family in ENCODERS], own, notes, claims),
        "## Notes",
        "\n".join(f"{number}. {text}" for number, text in enumerate(notes.texts, 1)) or "None.",
        "## Holes of a method",
        _table(("method", "promise", "why not"), [row for method, holes in own.items() for row in _holes(method, holes, claims)]),
    ]
    return "\n\n".join(out) + "\n"


def _asked(summary: Mapping[str, Any], claim: str) -> str:
    """Whom a claim was asked, where not of all and now."""
    part, earlier = summary.get("part", {}).get(claim), claim in summary.get("earlier", ())
    said = [*([f"of {', '.join(part)}"] if part else []), *(["of the code before its last change"] if earlier else [])]
    return f" ({'; '.join(said)})" if said else ""


def _everywhere(of: Mapping[str, Cell]) -> dict[str, list[int]]:
    """Holes that a method has on every family that was asked: reason -> claims."""
    common: dict[str, list[int]] | None = None
    for cell in of.values():
        holes = cell["holes"]
        if common is None:
            common = dict(holes)
        else:
            common = {why: both for why, found in common.items() if (both := [n for n in found if n in holes.get(why, [])])}
    return common or {}


def _holes(method: str, holes: Mapping[str, Sequence[int]], claims: Sequence[str]) -> list[tuple[str, ...]]:
    return [(f"`{method}`", "; ".join(claims[n] for n in which), _plain(why)) for why, which in holes.items()]


def _matrix(
    cells: Mapping[str, Mapping[str, Cell]],
    families: Sequence[str],
    own: Mapping[str, Mapping[str, Sequence[int]]],
    notes: Notes,
    claims: Sequence[str],
) -> str:
    rows = []
    for method in POINTS:
        of = cells.get(method, {})
        shown = [_shown(of[family], own[method], notes, claims) if family in of else "·" for family in families]
        rows.append((f"`{method}`", *shown))
    return _table(("method", *families), rows)


def _shown(cell: Cell, own: Mapping[str, Sequence[int]], notes: Notes, claims: Sequence[str]) -> str:
    if cell["failed"]:
        broken = [f"broken: {claims[n]} ({why})" for why, which in cell["failed"].items() for n in which]
        return "✗ " + ", ".join(str(notes.number(text)) for text in broken)
    marks = []
    for why, which in cell["holes"].items():
        left = [n for n in which if n not in own.get(why, [])]
        if left:
            marks.append(notes.number(_plain(why) if not cell["passed"] or len(left) > 3 else f"{_of(left, claims)}: {_plain(why)}"))
    sign = "✓" if cell["passed"] else "—"
    return " ".join([sign, ", ".join(map(str, marks))]).strip()


def _of(which: Sequence[int], claims: Sequence[str]) -> str:
    return "; ".join(claims[n] for n in which)


def _plain(reason: str) -> str:
    return reason.removeprefix("refused: ")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str]) -> int:
    """The exit status: 1 where a promise is broken, or with --check where the page is behind."""
    files = [Path(word) for word in arguments if not word.startswith("-")]
    if files:
        lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        SUMMARY.write_text(json.dumps(summed_up(lines), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    summary = json.loads(SUMMARY.read_text(encoding="utf-8"))
    text = page(summary)
    if "--check" in arguments:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    broken = sum(bool(cell["failed"]) for of in summary["cells"].values() for cell in of.values())
    print(f"wrote docs/{PAGE.name}; {broken} methods on a family break a promise")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
