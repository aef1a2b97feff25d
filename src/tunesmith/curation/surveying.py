"""What a set of pairs holds, before anything is trained on it: margins, lengths, duplicates, leaks; and its files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.core.errors import DataError, RunError
from tunesmith.core.words import pieces
from tunesmith.curation.building import Built
from tunesmith.curation.pairs import EQUAL, Pair
from tunesmith.curation.reading import read_source, texts_of
from tunesmith.data.splits import TRAIN


def survey(built: Built) -> dict[str, Any]:
    """The report, in plain values.

    Of each split: pairs, ties, how many by kind and by source; margins and lengths in words by quantile; probability, the mean of the
    label, and with it `ceiling`: how often one rater sides with the majority, which no model can beat on average; longer: the share of
    pairs whose chosen answer is the longer one, which is what a model that only counts words would learn. flips: of a judge's verdicts
    those that turn with the order. shared: prompts, or texts,
    that two splits have in common.
    """
    names = list(built.splits)
    shared = {
        f"{a} and {b}": len(set(texts_of(built.splits[a])) & set(texts_of(built.splits[b])))
        for at, a in enumerate(names)
        for b in names[at + 1 :]
    }
    return {
        "splits": {name: _split(pairs) for name, pairs in built.splits.items()},
        "merged": built.merged,
        "disagreed": built.disagreed,
        "shared": shared,
        "leaks": dict(built.leaks),
        "notes": list(built.notes),
    }


def _split(pairs: Sequence[Pair]) -> dict[str, Any]:
    if not pairs:
        return {"pairs": 0}
    chosen, rejected = (
        [len(pieces(text)) for text in texts] for texts in zip(*((pair.chosen, pair.rejected) for pair in pairs), strict=True)
    )
    differing = [(a, b) for a, b in zip(chosen, rejected, strict=True) if a != b]
    probability = np.array([pair.probability for pair in pairs])
    margins = [abs(pair.margin) for pair in pairs if pair.margin is not None]
    return {
        "pairs": len(pairs),
        "prompts": len(set(texts_of([pair for pair in pairs if pair.prompt]))),
        "ties": int((np.abs(probability - 0.5) <= EQUAL).sum()),
        "ceiling": float(probability.mean()),
        "margins": _quantiles(margins) if margins else None,
        "words": {"chosen": _quantiles(chosen), "rejected": _quantiles(rejected)},
        "longer": sum(a > b for a, b in differing) / len(differing) if differing else None,
        "flips": _flips(pairs),
        "kinds": dict(Counter(str(pair.provenance.get("kind", "pairs")) for pair in pairs)),
        "sources": dict(Counter(str(pair.provenance.get("source", "")) for pair in pairs)),
    }


def _flips(pairs: Sequence[Pair]) -> float | None:
    """Of pairs that a judge compared in both orders, the share whose verdict turned with the order."""
    said = [bool(pair.provenance["flips"]) for pair in pairs if "flips" in pair.provenance]
    return sum(said) / len(said) if said else None


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    found = np.quantile(np.asarray(values, np.float64), [0, 0.25, 0.5, 0.75, 1])
    return {name: float(value) for name, value in zip(("least", "quarter", "median", "three_quarters", "most"), found, strict=True)}


def files_of(out: Path, splits: Sequence[str]) -> dict[str, Path]:
    """Where each split goes: train into the file named, the others beside it (`pairs.test.jsonl`), the report into `pairs.report.json`."""
    if out.suffix != ".jsonl":
        raise DataError("pairs are written as JSON Lines.", where=str(out), hints=[f"Name it:  {out.with_suffix('.jsonl')}"])
    files = {name: out if name == TRAIN else out.with_name(f"{out.stem}.{name}.jsonl") for name in splits}
    return files | {"report": out.with_name(f"{out.stem}.report.json")}


def refuse_existing(out: Path, splits: Sequence[str], overwrite: bool) -> None:
    """Raise RunError where a file would be lost."""
    there = [file for file in files_of(out, splits).values() if file.exists()]
    if there and not overwrite:
        raise RunError("the file is there already.", where=str(there[0]), hints=["Replace it:  --overwrite", "Or name another one."])


def write(built: Built, out: Path) -> dict[str, Path]:
    """Write the splits and the report, each whole or not at all."""
    files = files_of(out, list(built.splits))
    for name, pairs in built.splits.items():
        _write(files[name], "".join(json.dumps(pair.row(), ensure_ascii=False) + "\n" for pair in pairs))
    _write(files["report"], json.dumps(survey(built), indent=1, ensure_ascii=False) + "\n")
    return files


def _write(file: Path, text: str) -> None:
    beside = file.with_name(f".{file.name}.new")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, "utf-8", errors="backslashreplace")
        beside.replace(file)
    except OSError as cause:
        raise RunError(f"the file cannot be written: {cause.strerror}.", where=str(file)) from None


def read_pairs(source: str, columns: Mapping[str, str] | None = None) -> list[Pair]:
    """A file of pairs (chosen, rejected, and prompt, margin, probability where it has them).

    Raises DataError where it holds anything else.
    """
    found = read_source(source, columns)
    if found.kind != "pairs":
        hints = [
            "Make pairs of it first:  tunesmith pairs FILE --out pairs.jsonl",
            "Or name the columns:  --columns chosen=NAME --columns rejected=NAME",
        ]
        raise DataError("the rows are no pairs: they lack 'chosen' and 'rejected'.", where=source, hints=hints)
    return found.pairs


def known_texts(source: str) -> list[Pair]:
    """What a held-out file knows, as pairs: its own, or its prompts, or its texts without a prompt."""
    found = read_source(source)
    if found.kind == "pairs":
        return found.pairs
    return [Pair(text, text, own.prompt) for own in found.answers for text in (own.texts or ("",))]
