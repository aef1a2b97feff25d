"""What an answer is worth: classification scores and scores of free text.

Every text metric scores one answer between 0 and 1, so that two systems can be compared question by question.
Chinese, Japanese and Korean characters count as words of their own wherever a metric counts words.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from tunesmith.core.errors import DataError, RunError, SpecError, TunesmithError
from tunesmith.core.record import Record
from tunesmith.core.registry import Registry, check_options, parse_calls
from tunesmith.core.words import fold, pieces, words

UNPARSEABLE = "(unparseable)"

Score = Callable[[str, str, Mapping[str, Any]], float]
"""(prediction, reference, the record's fields) -> 0 to 1."""


# Classification. `predicted` holds None where an answer named no label: that is wrong, and never dropped.


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One label: precision (0 if it was never predicted), recall (0 if it never occurs), f1, and how often it occurs."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class ConfusionMatrix:
    """counts[row][column]: answers of gold label gold[row] that were taken for labels[column]."""

    labels: list[str]
    gold: list[str]
    counts: list[list[int]]


def accuracy(gold: Sequence[str], predicted: Sequence[str | None]) -> float:
    """Share of answers that name the gold label. Raises ValueError for none, or for unequal lengths."""
    if not gold:
        raise ValueError("accuracy of no answers")
    return sum(g == p for g, p in zip(gold, predicted, strict=True)) / len(gold)


def confusion(gold: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]) -> ConfusionMatrix:
    """Counts by gold label and prediction; unparseable answers, if any, in a last column "(unparseable)".

    Raises DataError for a gold label or a prediction that is not among the labels.
    """
    _check_labels(gold, predicted, labels)
    columns = [*labels, UNPARSEABLE] if None in predicted else list(labels)
    counted = Counter((g, UNPARSEABLE if p is None else p) for g, p in zip(gold, predicted, strict=True))
    return ConfusionMatrix(columns, list(labels), [[counted[row, column] for column in columns] for row in labels])


def per_class(gold: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]) -> list[ClassScore]:
    """Precision, recall and F1 of each label, in the order of the labels. Raises as `confusion`."""
    _check_labels(gold, predicted, labels)
    hits = Counter(g for g, p in zip(gold, predicted, strict=True) if g == p)
    support, named = Counter(gold), Counter(predicted)
    return [
        ClassScore(x, _ratio(hits[x], named[x]), _ratio(hits[x], support[x]), _ratio(2 * hits[x], named[x] + support[x]), support[x])
        for x in labels
    ]


def macro_f1(gold: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]) -> float:
    """Mean F1 over the labels that occur among the gold labels or the predictions. Raises as `confusion`."""
    seen = {*gold, *predicted}
    scores = [score.f1 for score in per_class(gold, predicted, labels) if score.label in seen]
    if not scores:
        raise ValueError("macro F1 of no answers")
    return sum(scores) / len(scores)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _check_labels(gold: Sequence[str], predicted: Sequence[str | None], labels: Sequence[str]) -> None:
    known = set(labels)
    for kind, names in (("gold label", gold), ("predicted label", predicted)):
        for name in names:
            if name is not None and name not in known:
                raise DataError(f"the {kind} '{name}' is not among the {len(known)} labels.", hints=[f"Labels: {', '.join(labels)}"])


# Words and characters


def _normalised(text: str) -> str:
    """SQuAD's normal form (Rajpurkar et al. 2016), with all of Unicode's punctuation and full-width forms folded.

    Lower case, no punctuation, no English articles, single spaces. A step that would leave nothing is not taken:
    an answer "A" or "+" stays itself, where SQuAD's script would equate it with an empty one.
    """
    text = " ".join(fold(text).lower().split())
    bare = "".join(c for c in text if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    text = " ".join(bare.split()) or text
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()) or text


# Metrics of free text


def exact_match(prediction: str, reference: str, /, *, strict: bool = False) -> float:
    """1 if the texts are the same after SQuAD's normalisation (case, punctuation, articles, spaces), else 0.

    That normalisation also drops a number's sign and decimal point, so for numbers use strict, where the texts must
    be equal but for spaces around them.
    """
    if strict:
        return float(prediction.strip() == reference.strip())
    return float(_normalised(prediction) == _normalised(reference))


def token_f1(prediction: str, reference: str, /) -> float:
    """F1 over the shared words of the normalised texts, as SQuAD's script; an empty text matches only an empty one."""
    mine, theirs = (Counter(pieces(_normalised(text))) for text in (prediction, reference))
    if not mine or not theirs:
        return float(mine == theirs)
    return 2 * (mine & theirs).total() / (mine.total() + theirs.total())


def rouge_l(prediction: str, reference: str, /) -> float:
    """ROUGE-L (Lin 2004): F1 over the longest common subsequence of words, as Google's rouge_score without stemming.

    It differs where that package keeps ASCII only: letters of every script count. Texts without a single word score
    1 if equal, else 0.
    """
    mine, theirs = words(prediction), words(reference)
    if not mine and not theirs:
        return float(prediction.strip() == reference.strip())
    return 2 * _common_subsequence(mine, theirs) / (len(mine) + len(theirs))


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table as the bits of one number (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for index, item in enumerate(a):
        places[item] = places.get(item, 0) | 1 << index
    everything = (1 << len(a)) - 1
    row = everything
    for item in b:
        matches = row & places.get(item, 0)
        row = ((row + matches) | (row - matches)) & everything
    return len(a) - row.bit_count()


def chrf(prediction: str, reference: str, /, *, order: int = 6, beta: float = 2.0) -> float:
    """chrF (Popović 2015): F-beta over character n-grams, spaces removed, case kept.

    As sacrebleu's sentence chrF2 with its defaults, over 100: precision and recall are averaged over the orders for
    which both texts have an n-gram ("effective order", no smoothing), then combined. Two empty texts score 1.
    """
    mine, theirs = "".join(prediction.split()), "".join(reference.split())
    orders = range(1, min(order, len(mine), len(theirs)) + 1)
    if not orders:
        return float(mine == theirs)
    shared = [(_ngrams(mine, n) & _ngrams(theirs, n)).total() for n in orders]
    precision = sum(count / (len(mine) - n + 1) for count, n in zip(shared, orders, strict=True)) / len(orders)
    recall = sum(count / (len(theirs) - n + 1) for count, n in zip(shared, orders, strict=True)) / len(orders)
    return _ratio((1 + beta**2) * precision * recall, beta**2 * precision + recall)


def _ngrams(text: str, n: int) -> Counter[str]:
    return Counter(text[i : i + n] for i in range(len(text) - n + 1))


# Metrics by name

METRICS: Registry[Callable[..., Score]] = Registry("metric")
"""Name -> maker: called with the metric's options, it gives the score."""


def metric(spec: str | Mapping[str, Mapping[str, Any] | None], **options: Any) -> Score:
    """A metric by name: "token_f1", "chrf(order=4)", {"regex": {"pattern": "..."}}, or a user's function.

    "path/to/file.py:name" and "module:name" are short for function(name=...). Raises SpecError for an unknown name or
    option, with the nearest known ones, for a pattern that cannot work, and for a function that cannot be loaded.
    """
    name, written = _read_spec(spec)
    if repeated := written.keys() & options.keys():
        raise SpecError(f"the metric's option '{min(repeated)}' is given twice.", where=name)
    maker = METRICS[name]
    given = {**written, **options}
    check_options(maker, given, kind=f"metric '{name}'")
    for option, parameter in inspect.signature(maker).parameters.items():
        if option not in given and parameter.default is parameter.empty:
            raise SpecError(f"the metric '{name}' needs its option '{option}'.", hints=[f"Form:  {{{name}: {{{option}: ...}}}}"])
        if option in given and type(given[option]) not in _TYPES[parameter.annotation]:
            raise SpecError(f"the metric's option '{option}' is {given[option]!r}, not of type {parameter.annotation}.", where=name)
    return maker(**given)


_TYPES: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}


def _read_spec(spec: str | Mapping[str, Mapping[str, Any] | None]) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, Mapping):
        if len(spec) != 1:
            raise SpecError(f"a metric is one name with its options, not {len(spec)}.", hints=["Form:  {name: {option: value}}"])
        ((name, options),) = spec.items()
        if options is not None and not isinstance(options, Mapping):
            raise SpecError(f"the options of the metric '{name}' are {options!r}, not a mapping.", hints=["Form:  {name: {option: value}}"])
        return name, dict(options or {})
    if re.fullmatch(r".+:[A-Za-z_]\w*", spec):
        return "function", {"name": spec}
    calls = parse_calls(spec, kind="metric")
    if len(calls) != 1:
        raise SpecError(f"'{spec}' names {len(calls)} metrics where one is wanted.")
    return calls[0].name, calls[0].options


def _exact_match(*, strict: bool = False) -> Score:
    return lambda prediction, reference, fields: exact_match(prediction, reference, strict=strict)


def _token_f1() -> Score:
    return lambda prediction, reference, fields: token_f1(prediction, reference)


def _rouge_l() -> Score:
    return lambda prediction, reference, fields: rouge_l(prediction, reference)


def _chrf(*, order: int = 6, beta: float = 2.0) -> Score:
    if order < 1 or beta <= 0:
        raise SpecError(f"chrf needs an order of at least 1 and a beta above 0, got {order} and {beta}.")
    return lambda prediction, reference, fields: chrf(prediction, reference, order=order, beta=beta)


def _regex(*, pattern: str, take: str = "last") -> Score:
    """1 or 0 by a regular expression, in one of two ways.

    A pattern with {gold}: whether it is found, {gold} standing for the reference, literally. A pattern with a group:
    whether the group, in the last match (or the first: take), equals the reference but for spaces around them.
    """
    if take not in ("first", "last"):
        raise SpecError(f"'take' is '{take}'; it can be first or last.", where="metric 'regex'")
    try:
        compiled = re.compile(pattern.replace("{gold}", ""))
    except re.error as cause:
        raise SpecError(f"the pattern '{pattern}' is not a regular expression: {cause}.", where="metric 'regex'") from None
    if "{gold}" in pattern:
        return lambda prediction, reference, fields: float(
            re.search(pattern.replace("{gold}", re.escape(reference.strip())), prediction) is not None
        )
    if not compiled.groups:
        raise SpecError(
            f"the pattern '{pattern}' would score every question alike: it has neither a group nor {{gold}}.",
            where="metric 'regex'",
            hints=[r"A group to compare with the gold answer:  Answer:\s*(\S+)", "Or the gold answer itself:  Answer: {gold}"],
        )

    def score(prediction: str, reference: str, fields: Mapping[str, Any]) -> float:
        found = [match.group(1) for match in compiled.finditer(prediction)]
        chosen = found[0 if take == "first" else -1] if found else None
        return float(chosen is not None and chosen.strip() == reference.strip())

    return score


def score_all(score: Score, predictions: Sequence[str], records: Sequence[Record]) -> list[float]:
    """Score each answer against its record's gold answer. An error names the question; a record without answer is one."""
    return [_scored(score, prediction, record) for prediction, record in zip(predictions, records, strict=True)]


def _scored(score: Score, prediction: str, record: Record) -> float:
    where, question = record.where or f"question {record.key()}", _short(record.question())
    reference = record.answer()
    if reference is None:
        raise DataError(f"the question has no gold answer to score against: {question}", where=where)
    try:
        return score(prediction, reference, record.fields)
    except TunesmithError as cause:
        raise type(cause)(cause.what, where=where, hints=[*cause.hints, f"Question: {question}"]) from cause.__cause__


def _short(text: str, limit: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


# A user's own function


def _function(*, name: str) -> Score:
    """A user's Python function, "path/to/file.py:name" or "module:name", called with (prediction, reference).

    A third parameter that is required or called `fields` gets the record's fields. It returns a number from 0 to 1 (or
    a bool); anything else, or an exception, is a RunError. Naming it runs its file: nothing is loaded unless named.
    """
    function = _load(name)
    takes_fields = _takes_fields(function, name)

    def score(prediction: str, reference: str, fields: Mapping[str, Any]) -> float:
        shown = [f"Prediction: {_short(prediction)!r}", f"Gold answer: {_short(reference)!r}"]
        try:
            value = function(prediction, reference, fields) if takes_fields else function(prediction, reference)
        except Exception as cause:
            raise RunError(f"the metric '{name}' failed: {type(cause).__name__}: {cause}.", hints=shown) from cause
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number <= 1:
            raise RunError(f"the metric '{name}' returned {_short(repr(value))}, not a number from 0 to 1.", hints=shown)
        return number

    return score


def _load(name: str) -> Callable[..., Any]:
    source, _, attribute = name.rpartition(":")
    form = "Form:  path/to/file.py:name  or  module:name"
    if not source or not attribute:
        raise SpecError(f"the metric function '{name}' has no file or no name.", hints=[form])
    try:
        module = _load_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except TunesmithError:
        raise
    except Exception as cause:
        raise SpecError(f"'{source}' cannot be imported: {type(cause).__name__}: {cause}.", where=name, hints=[form]) from cause
    function = getattr(module, attribute, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise SpecError(f"'{source}' has no function '{attribute}'.", hints=[f"Its functions: {', '.join(known) or 'none'}"])
    return function  # type: ignore[no-any-return]


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SpecError("the metric's file does not exist.", where=str(path))
    spec = importlib.util.spec_from_file_location(f"tunesmith_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise SpecError("the metric's file is not Python.", where=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling in the user's file look their module up
    spec.loader.exec_module(module)
    return module


def _takes_fields(function: Callable[..., Any], name: str) -> bool:
    """Whether to pass the record's fields; raises SpecError if the function cannot be called with what there is."""
    refusal = SpecError(
        f"the metric function '{name}' must take (prediction, reference) or (prediction, reference, fields).",
        hints=[f"Its signature: {_short(_signature_text(function))}"],
    )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise refusal from None
    places = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    wanted = len(places) >= 3 and (places[2].default is places[2].empty or places[2].name == "fields")
    try:
        signature.bind(*["", "", {}][: 3 if wanted else 2])
    except TypeError:
        raise refusal from None
    return wanted


def _signature_text(function: Callable[..., Any]) -> str:
    try:
        return str(inspect.signature(function))
    except (TypeError, ValueError):
        return "unknown"


METRICS.add("exact_match", _exact_match)
METRICS.add("token_f1", _token_f1)
METRICS.add("rouge_l", _rouge_l)
METRICS.add("chrf", _chrf)
METRICS.add("regex", _regex)
METRICS.add("function", _function)
