"""Writes what came of each cell of the conformance suite into a file as it runs, and leaves out what stands there already.

    python -m pytest -p recording --record FILE tests/adapters/test_conformance.py

A cell is a test with a method and a family. The file holds one JSON object a line: claim, method, family, outcome (passed, hole,
failed), reason, seconds, source. Cells of the same source that did not fail are not run again, so the suite can be run in pieces,
stopped at any time and by several processes at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("src/tunesmith/adapters", "src/tunesmith/engine", "src/tunesmith/core", "tests/adapters/conformance.py", "tests/families.py")
"""What the outcomes depend on, beside the test itself and the libraries."""


def source() -> str:
    """A digest of the code and libraries that the outcomes belong to."""
    import torch
    import transformers

    found = hashlib.sha256(f"{torch.__version__} {transformers.__version__}".encode())
    for name in (*SOURCES, "tests/adapters/test_conformance.py", "tests/engine/processes/test_methods_together.py"):
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return found.hexdigest()[:16]


def recorded(file: Path) -> Iterator[dict[str, Any]]:
    """What stands in a file; a line that was cut off in the writing is left out."""
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def cell(item: Any) -> tuple[str, str, str] | None:
    """(claim, method, family) of a test; None where it is no cell."""
    values = item.callspec.params if hasattr(item, "callspec") else {}
    if "method" not in values or "family" not in values:
        return None
    return item.originalname.removeprefix("test_").replace("_", " "), values["method"], values["family"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--record", metavar="FILE", help="write outcomes of the conformance suite's cells here, and skip those that are here")
    group.addoption("--methods", metavar="NAMES", default="", help="only these methods, separated by commas")
    group.addoption("--families", metavar="NAMES", default="", help="only these families, separated by commas")


class Recorder:
    """Chooses what is run, and writes what came of it."""

    def __init__(self, file: Path, methods: str, families: str) -> None:
        self.file, self.source = file, source()
        self.only = tuple({name for name in names.split(",") if name} for names in (methods, families))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        known = {
            (line["claim"], line["method"], line["family"])
            for line in recorded(self.file)
            if line["source"] == self.source and line["outcome"] != "failed"
        }
        methods, families = self.only
        left: list[Any] = []
        for item in items:
            found = cell(item)
            chosen = found is not None and (not methods or found[1] in methods) and (not families or found[2] in families)
            if chosen and found not in known:
                left.append(item)
        config.hook.pytest_deselected(items=[item for item in items if item not in left])
        items[:] = left

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Generator[None, Any, Any]:
        report = yield
        found = cell(item)
        if found is None or (report.when != "call" and not report.failed and not report.skipped) or report.when == "teardown":
            return report
        outcome, reason = report.outcome, ""
        if report.skipped:
            outcome, reason = "hole", str(report.longrepr[2]).removeprefix("Skipped: ")
        elif report.failed:
            reason = str(report.longrepr).strip().splitlines()[-1][:300]
        line = dict(zip(("claim", "method", "family"), found, strict=True)) | {
            "outcome": outcome,
            "reason": reason,
            "seconds": round(report.duration, 3),
            "source": self.source,
        }
        with self.file.open("a", encoding="utf-8") as opened:  # one write a line: several processes append to one file
            opened.write(json.dumps(line, ensure_ascii=False) + "\n")
        return report


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record"):
        file = Path(config.getoption("--record"))
        file.parent.mkdir(parents=True, exist_ok=True)
        config.pluginmanager.register(Recorder(file, config.getoption("--methods"), config.getoption("--families")))
