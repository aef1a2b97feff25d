"""Writes the pages of docs/ that say what the code says: spec.md from the spec's models, report-schema.md from the report's,
objectives.md from the table of objectives.

    make docs        or:  python docs/generate.py

`--check` writes nothing and fails where a page is not what the code says.
"""

from __future__ import annotations

import inspect
import json
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tunesmith.adapters.methods import METHODS
from tunesmith.evaluation.metrics import METRICS
from tunesmith.ladder.rungs import RUNGS
from tunesmith.objectives import OBJECTIVES, advantage
from tunesmith.objectives.actions import AGGREGATIONS
from tunesmith.objectives.described import Described, by_family, notation
from tunesmith.report import schema
from tunesmith.spec import Spec

DOCS = Path(__file__).parent
EXCERPT = DOCS / "report-excerpt.json"

MEANT: Mapping[str, str] = {
    "base": "the model to adapt; a plain string is its `model`. See [bases](bases.md)",
    "base.dtype": "numbers that the model computes with; auto: what a short matrix test shows faster",
    "base.device": "auto, cpu, cuda, cuda:1, mps",
    "base.revision": "branch, tag or commit of a hub model",
    "base.trust_remote_code": "run Python that comes with the model",
    "data": "where samples come from; a plain string or list is its `train`. See [data](data.md)",
    "data.train": "a source, or a list of them",
    "data.shape": "shape of the rows, where the columns allow several",
    "data.encoding": "of text files",
    "data.decode_errors": "bytes that are not in the encoding: an error, or read as a mark (�)",
    "data.overlong": "what is done with rows longer than max_tokens",
    "data.seed": "of splits, limit and balance",
    "task": "what is asked and how it is judged. See [evaluation](evaluation.md)",
    "task.name": "for the report",
    "task.kind": "a choice among labels, tags of words, a number, one of a question's candidates, or free text; auto: by the samples",
    "task.max_new_tokens": "longest generated answer",
    "adapter": "what is trained: a method with options, below, or `continue` (see [training](training.md))",
    "objective": "the loss, below",
    "train": "how it is optimised. See [training](training.md)",
    "train.steps": "optimiser steps; instead of epochs",
    "train.epochs": "passes over the rows; default: 3",
    "train.schedule": "of the learning rate after the warm-up",
    "train.weight_decay": "of AdamW",
    "train.betas": "of AdamW",
    "train.eps": "of AdamW",
    "train.neftune_noise": "its distribution",
    "train.seed": "of the order of rows, dropout, noise and new parameters",
    "climb": "which rungs the ladder tries",
    "climb.rungs": "in the order of their cost, below",
    "track": "experiment trackers, one or a list",
}
"""What the code does not say of a key in its description."""


def spec_page() -> str:
    """spec.md: every key, and every adapter, objective, metric and rung with its options."""
    out = [
        "# Keys of a spec",
        _WRITTEN,
        "A spec is a YAML file. Every key can be set on the command line too, as `key=value` (`train.lr=1e-4`); the value is YAML. "
        "An unknown key is an error that names the nearest known one.",
        "## The run",
        _table(("key", "type", "default", "meaning"), [_row(name, field, "") for name, field in Spec.model_fields.items()]),
    ]
    for name, field in Spec.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows = [_row(key, inner, f"{name}.") for key, inner in field.annotation.model_fields.items()]
            out += [f"## {name}", inspect.cleandoc(field.annotation.__doc__ or ""), _table(("key", "type", "default", "meaning"), rows)]
            out += [part for key, inner in field.annotation.model_fields.items() for part in _within(f"{name}.{key}", inner)]
    out += [
        "## Adapters",
        "`adapter: name(option=value, ...)`; several are joined by `+`. A list is written `[q, v]`.",
        _catalogue(METHODS.items()),
        "## Objectives",
        _catalogue((name, entry.function) for name, entry in OBJECTIVES.items()),
        "## Metrics",
        "`task.metric: name`, `name(option=value)` or `{name: {option: value}}`; for generated text. "
        "A function of your own is `path/to/file.py:name` or `module:name`. Label tasks are judged by accuracy.",
        _catalogue(METRICS.items()),
        "## Rungs",
        "`climb.rungs: [name, name(option=value)]`.",
        _catalogue(RUNGS.items()),
    ]
    return "\n\n".join(out) + "\n"


def _within(key: str, field: FieldInfo) -> list[str]:
    """The keys of a section that stands within another, where it may be left out."""
    found = [each for each in get_args(field.annotation) if isinstance(each, type) and issubclass(each, BaseModel)]
    if not found:
        return []
    rows = [_row(name, inner, f"{key}.") for name, inner in found[0].model_fields.items()]
    return [f"### {key}", inspect.cleandoc(found[0].__doc__ or ""), _table(("key", "type", "default", "meaning"), rows)]


_WRITTEN = "_Written by `make docs` from the code; edit the descriptions there._"


def _row(name: str, field: FieldInfo, prefix: str) -> tuple[str, ...]:
    key = f"{prefix}{name}"
    inner = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    meant = field.description or MEANT[key]
    kind = f"[section](#{name})" if inner else _type(field.annotation)
    return f"`{key}`", kind + _bounds(field), "" if inner else _default(field), meant


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(part) for part in inner))
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return f"mapping of {_type(inner[0])} to {_type(inner[1])}"
    if origin is tuple:
        return f"list of {len(inner)}: {', '.join(dict.fromkeys(_type(part) for part in inner))}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "any value"}[annotation]


def _bounds(field: FieldInfo) -> str:
    signs = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
    said = [f"{sign} {getattr(each, name)}" for each in field.metadata for name, sign in signs if getattr(each, name, None) is not None]
    return f", {' and '.join(said)}" if said else ""


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "required"
    return f"`{json.dumps(value)}`"


def _catalogue(entries: Any) -> str:
    """Name with options, and the first paragraph of what the code says of each."""
    return _table(("written", "what it is"), [(f"`{_written(name, function)}`", _said(function)) for name, function in entries])


def _written(name: str, function: Callable[..., Any]) -> str:
    options = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if not options:
        return name
    return f"{name}({', '.join(p.name if p.default is p.empty else f'{p.name}={_plain(p.default)}' for p in options)})"


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"[{', '.join(map(_plain, value))}]" if isinstance(value, tuple | list) else str(value)


_METRICS: Mapping[str, str] = {
    "exact_match": "1 if prediction and reference are the same words; strict: the same characters",
    "token_f1": "F1 over the words that both hold",
    "rouge_l": "F1 of the longest common subsequence of words",
    "chrf": "F over character n-grams",
}


def _said(function: Callable[..., Any]) -> str:
    text = inspect.getdoc(function)
    if text is None:
        text = _METRICS[function.__name__.strip("_")]
    return " ".join(text.split("\n\n")[0].split())


def report_page() -> str:
    """report-schema.md: every part of report.json with its fields, and an excerpt of a real one."""
    excerpt = json.loads(EXCERPT.read_text(encoding="utf-8"))
    for rung in excerpt["rungs"]:
        schema.Rung.model_validate(rung)
    out = [
        "# report.json",
        _WRITTEN,
        f"Schema version {schema.SCHEMA_VERSION}. Within one major version every field here keeps its name and meaning; "
        "fields may be added. "
        "Numbers that are shares go from 0 to 1; times are in seconds.",
    ]
    definitions = schema.Report.model_json_schema()
    parts = {"Report": definitions, **definitions.pop("$defs")}
    for name, part in parts.items():
        needed = set(part.get("required", ()))
        rows = [
            (
                f"`{field}`",
                _json_type(value),
                "always" if field in needed else _json_default(value),
                value.get("description", _plainly(field)),
            )
            for field, value in part["properties"].items()
        ]
        said = str(part.get("description", "")).split("\n\n")[0]
        out += [f"## {name}", *([said] if said else []), _table(("field", "type", "given", "meaning"), rows)]
    out += [
        "## Excerpt",
        "Of the report of a random model of 32,896 parameters on 20 questions, made to show the form: its last rung and one question.",
        f"```json\n{json.dumps(excerpt, indent=2, ensure_ascii=False)}\n```",
    ]
    return "\n\n".join(out) + "\n"


def _plainly(field: str) -> str:
    return _REPORT.get(field, field.replace("_", " "))


_REPORT: Mapping[str, str] = {
    "difference_low": "lower end of its 95 % interval (Tango 1998)",
    "difference_high": "upper end of it",
    "ci_low": "lower end of the 95 % interval",
    "ci_high": "upper end of it",
    "accuracy": "share of answers that are right; for graded metrics the mean score",
    "verdict": "better, worse, equivalent (the whole interval lies within the margin) or undecided",
    "train_seconds": "of training, without judging on dev; 0 for prompts",
    "peak_memory_mb": "most memory the process held",
    "versus_previous": "against the rung before it",
    "versus_best_before": "against the best of all rungs before it",
    "curve": "training, step by step",
    "classes": "by label, for label tasks",
    "counts": "answers, [gold][labels]",
    "support": "questions of this label",
    "n_questions": "asked of every rung",
    "title": "a heading",
    "task": "name of the task",
    "base": "name of the model that was adapted",
    "labels": "of label tasks, in order",
    "metric": "what the scores are",
    "rungs": "in the order in which they were climbed",
    "recommendation": "the rung to take, and why",
    "rung": "name of the rung",
    "reason": "why, in a sentence with its numbers",
    "macro_f1": "mean F1 over labels; for generated text the mean score",
    "correct": "whether the score is 1",
    "precision": "0 if the label was never said",
    "recall": "0 if the label never occurs",
    "f1": "harmonic mean of the two",
    "step": "optimiser step",
    "loss": "mean over the step's supervised tokens, nats",
    "dev_metric": "on the dev samples, where they were judged at this step",
    "lr": "learning rate",
    "prompt_tokens_per_answer": "mean",
    "completion_tokens_per_answer": "mean",
    "seconds_per_answer": "mean",
    "trainable_parameters": "0 for prompts",
    "settings": "what the rung was made with",
    "id": "content hash of the question",
    "gold": "the right answer",
}


def objectives_page() -> str:
    """objectives.md: every objective with its equation, papers, options and denominator, and how rewards become advantages."""
    out = [
        "# Objectives",
        _WRITTEN,
        "`objective: name(option=value, ...)`. An objective is a pure function from what was read of a step to a loss: a sum, divided by "
        "its denominator over the whole step, all micro-batches and processes, so that neither accumulation nor packing changes it. "
        "`tunesmith objectives` lists them, `tunesmith objectives dpo` explains one.",
    ]
    for family, entries in by_family().items():
        out += [f"## {family[0].upper()}{family[1:]}", notation(family)]
        out += [part for each in entries for part in _objective(each)]
    sums = [(f"`{name}`", how.said) for name, how in AGGREGATIONS.items()]
    functions = [each for name, each in vars(advantage).items() if inspect.isfunction(each) and each.__module__ == advantage.__name__]
    said = [(f"`{each.__name__}`", " ".join((inspect.getdoc(each) or "").split())) for each in functions if each.__name__[0] != "_"]
    out += [
        "## Sums over sampled tokens",
        "The option `aggregation` of the objectives that learn from sampled answers.",
        _table(("aggregation", "the sum is divided by"), sums),
        "## From rewards to advantages",
        inspect.getdoc(advantage) or "",
        _table(("function", "what it computes"), said),
    ]
    return "\n\n".join(out) + "\n"


def _objective(one: Described) -> list[str]:
    papers = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in one.papers)
    rows = [("unit", one.unit), ("reads", ", ".join(f"`{name}`" for name in one.reads)), ("sum divided by", one.denominator)]
    rows += [("papers", papers)] if papers else []
    text = one.text.replace("*", "\\*")
    return [f"### {one.name}", f"`{one.written}`", text, _table(("", ""), rows)]


def _json_type(value: Mapping[str, Any]) -> str:
    if "$ref" in value:
        name = str(value["$ref"]).rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in value:
        return " or ".join(_json_type(each) for each in value["anyOf"])
    if "enum" in value:
        return " or ".join(f"`{each}`" for each in value["enum"])
    if value.get("type") == "array":
        return f"list of {_json_type(value['items'])}"
    if value.get("type") == "object":
        held = value.get("additionalProperties")
        return f"object of {_json_type(held)}" if isinstance(held, dict) and held else "object"
    return {"string": "text", "boolean": "true or false"}.get(str(value.get("type")), str(value.get("type")))


def _json_default(value: Mapping[str, Any]) -> str:
    return f"default `{json.dumps(value['default'])}`" if "default" in value else "may be empty"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PAGES: Mapping[str, Callable[[], str]] = {"spec.md": spec_page, "report-schema.md": report_page, "objectives.md": objectives_page}


def main(arguments: list[str]) -> int:
    """Write the pages; with --check only compare. The exit status: how many pages are not what the code says."""
    stale = 0
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if "--check" in arguments:
            stale += 1
            print(f"docs/{name} is not what the code says; write it anew:  make docs", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote docs/{name}")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
