"""Rewards in the user's own files: functions that are called by the names of their parameters."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.core.errors import SpecError, nearest
from tunesmith.rollout.rewarding import Scoring, is_async
from tunesmith.rollout.sample import Sample

GIVEN: Mapping[str, Callable[[Sample], Any]] = {
    "prompts": lambda sample: [dict(message) for message in sample.prompt],
    "questions": lambda sample: sample.question,
    "completions": lambda sample: sample.completion,
    "completion_ids": lambda sample: list(sample.ids),
    "answers": lambda sample: sample.answer,
    "finished": lambda sample: sample.finished,
    "where": lambda sample: sample.where,
    "groups": lambda sample: sample.group,
    "calls": lambda sample: list(sample.calls),
}
"""What a function may ask for beside the columns of the data; each is a list with one entry an answer."""

RIGHT_FORM = (
    "def NAME(completions, answers, **fields): return [1.0 if said == right else 0.0 for said, right in zip(completions, answers)]",
    f"Parameters are lists, by name: {', '.join(GIVEN)}, or any column of the data; **fields takes the other columns.",
)


def load_function(file: str, name: str, what: str = "reward") -> Callable[..., Any]:
    """The function of a Python file. what: it is, for errors. Raises SpecError where there is none, naming those that there are."""
    path = Path(file).expanduser()
    if not path.is_file():
        close = nearest(path.name, [each.name for each in path.parent.glob("*.py")]) if path.parent.is_dir() else []
        raise SpecError(f"the {what}'s file does not exist.", where=file, hints=[f"Did you mean:  {path.parent / each}" for each in close])
    unique = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"tunesmith_{what}_{path.stem}_{unique}", path)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in the user's file look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as cause:
        raise SpecError(f"the {what}'s file cannot be imported: {type(cause).__name__}: {cause}.", where=file) from cause
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        raise SpecError(f"there is no function '{name}'.", where=file, hints=[f"Its functions: {', '.join(known) or 'none'}"])
    return function  # type: ignore[no-any-return]


def by_names(function: Callable[..., Any], written: str, columns: Collection[str] | None = None) -> Scoring:
    """A function of lists as a function of samples. written: as the user named it, for errors. columns: of the data, where known.

    Raises SpecError where a parameter is neither one of `GIVEN` nor a column (or, with columns unknown, at the first call).
    """
    wanted, takes_rest = _parameters(function, written)
    if columns is not None:
        _check(function, written, wanted, columns)

    def call(samples: Sequence[Sample]) -> Any:
        there = {key for sample in samples for key in sample.fields}
        _check(function, written, wanted, there)
        names = [name for name in wanted if name in GIVEN or name in there]
        names += sorted(there - GIVEN.keys() - set(wanted)) if takes_rest else []
        return function(**{name: [_of(sample, name) for sample in samples] for name in names})

    async def awaited(samples: Sequence[Sample]) -> Any:
        return await call(samples)

    return awaited if is_async(function) else call


def _of(sample: Sample, name: str) -> Any:
    return GIVEN[name](sample) if name in GIVEN else sample.fields.get(name)


def _parameters(function: Callable[..., Any], written: str) -> tuple[dict[str, bool], bool]:
    """(name: must it be there, does the function take all others too?)."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise SpecError(f"the reward '{written}' has no signature to call it by.", hints=RIGHT_FORM) from None
    if any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in parameters):
        raise _wrong(function, written, "is called by the names of its parameters, and has some without names")
    rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
    wanted = {p.name: p.default is p.empty for p in parameters if p.kind is not p.VAR_KEYWORD}
    if not wanted and not rest:
        raise _wrong(function, written, "takes nothing, so it cannot know what it rewards")
    return wanted, rest


def _check(function: Callable[..., Any], written: str, wanted: Mapping[str, bool], columns: Collection[str]) -> None:
    missing = [name for name, needed in wanted.items() if needed and name not in GIVEN and name not in columns]
    if missing:
        close = nearest(missing[0], [*GIVEN, *columns], 1)
        meant = f" (did you mean '{close[0]}'?)" if close else ""
        raise _wrong(function, written, f"asks for '{missing[0]}', which is neither given nor a column of the data{meant}", columns)


def _wrong(function: Callable[..., Any], written: str, what: str, columns: Collection[str] = ()) -> SpecError:
    name = getattr(function, "__name__", type(function).__name__)
    own = [f"Columns here: {', '.join(sorted(columns))}"] if columns else []
    hints = [f"Written:  def {name}{inspect.signature(function)}", f"Right:    {RIGHT_FORM[0].replace('NAME', name)}", RIGHT_FORM[1], *own]
    return SpecError(f"the reward '{written}' {what}.", hints=hints)
