"""The reward of programs: an answer's code is run with its row's tests, apart from everything else."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tunesmith.core.errors import DataError, SpecError
from tunesmith.rollout.rewarding import Scoring, reward
from tunesmith.rollout.sample import Sample
from tunesmith.rollout.sandbox import Case, Isolation, Limits, check_isolation, run_tests

_BLOCK = re.compile(r"(?s)```(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)(?:\n?```|\Z)")


@reward("code")
def code(
    *,
    tests: str = "tests",
    seconds: float = 5.0,
    megabytes: int = 512,
    processes: int = 8,
    share: bool = False,
    isolation: Isolation = "full",
) -> Scoring:
    """1 where the answer's Python passes its row's tests, else 0; share: the share of tests that it passes.

    The code is the last ```python block, else the whole answer. tests: the column that holds a program of assertions, a list of them,
    or a list of {input, output}, what a program reads and prints. seconds: for a row's tests together; megabytes: of memory;
    processes: with threads. isolation: "full" (Linux namespaces: no network, no files but its own), or "limits", which stops accidents
    only. Says nothing of a row without tests.
    """
    limits = Limits(seconds, megabytes, processes, isolation)
    if not tests:
        raise SpecError("code needs the name of the column with the tests.", hints=["code(tests=COLUMN)"])

    def one(sample: Sample) -> float | None:
        cases = _cases(code_in(sample.completion), sample, tests)
        if not cases:
            return None
        passed = run_tests(cases, limits)
        return sum(passed) / len(passed) if share else float(all(passed))

    def score(samples: Sequence[Sample]) -> list[float | None]:
        check_isolation(isolation)
        with ThreadPoolExecutor(min(len(samples), os.cpu_count() or 1, 16)) as pool:
            return list(pool.map(one, samples))

    return score


def code_in(text: str) -> str:
    """The last block of Python in an answer, else the last block that names no language, else all of it."""
    blocks = [(match["language"].lower(), match["code"]) for match in _BLOCK.finditer(text)]
    for wanted in (("python", "python3", "py"), ("",)):
        if found := [code for language, code in blocks if language in wanted]:
            return found[-1]
    return text


def _cases(program: str, sample: Sample, column: str) -> list[Case]:
    """A row's tests. Raises DataError for a row without the column, and for another form."""
    if column not in sample.fields:
        hints = [f"Its columns: {', '.join(sample.fields) or 'none'}", "Name it:  code(tests=COLUMN)"]
        raise DataError(f"the row has no tests (column '{column}').", where=sample.where, hints=hints)
    given = sample.fields[column]
    if given is None or given == "" or given == []:
        return []
    listed = given if isinstance(given, list | tuple) else [given]
    return [_case(program, each, sample.where) for each in listed]


def _case(program: str, given: Any, where: str) -> Case:
    if isinstance(given, str):
        return Case(f"{program}\n\n{given}\n")
    if isinstance(given, Mapping) and "output" in given and set(given) <= {"input", "output"}:
        return Case(program, str(given.get("input") or ""), str(given["output"]))
    hints = ["Forms:  a program of assertions  ·  a list of them  ·  a list of {input: ..., output: ...}"]
    raise DataError(f"a test is {given!r}, which cannot be run.", where=where, hints=hints)
