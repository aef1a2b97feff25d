"""What came of the conformance suite: recorded as it runs, not run twice, and shown with the reason for every hole."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from recording import Recorder, cell, recorded

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def conformance() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_conformance", DOCS / "conformance.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line(claim: str, method: str, family: str, outcome: str = "passed", reason: str = "", source: str = "s") -> dict[str, Any]:
    return {"claim": claim, "method": method, "family": family, "outcome": outcome, "reason": reason, "seconds": 0.1, "source": source}


def item(claim: str, method: str, family: str) -> Any:
    return SimpleNamespace(
        originalname=f"test_{claim.replace(' ', '_')}", callspec=SimpleNamespace(params={"method": method, "family": family})
    )


def test_the_page_is_what_the_record_says(conformance: ModuleType) -> None:
    assert conformance.main(["--check"]) == 0, "write it anew:  make docs"


def test_cells_show_promises_that_hold_holes_with_notes_and_broken_ones(conformance: ModuleType) -> None:
    lines = [line("it begins", "lora", family) for family in ("llama", "bert", "t5-encoder")]
    lines += [line("it merges", "lora", family, "hole", "not at all") for family in ("llama", "bert", "t5-encoder")]
    lines += [line("it saves", "lora", "llama", "hole", "only | there"), line("it saves", "lora", "bert")]
    lines += [line(claim, "prefix", "t5-encoder", "hole", "refused: no keys.") for claim in ("it begins", "it merges")]
    lines += [line(claim, "prefix", "llama") for claim in ("it begins", "it merges")]
    lines += [
        line("it begins", "ia3", "llama", "failed", "assert 1 == 2"),
        line("it begins", "dora", "llama", "failed", "of another source", "before"),
    ]
    summary = conformance.summed_up([lines[-1], *lines[:-1]])
    page = conformance.page(summary)
    assert "| `lora` | ✓ 1 |" in page and "| `lora` | ✓ | ✓ |" in page
    assert "| `ia3` | ✗ " in page and "| `prefix` | · | — " in page and "| `dora` | · |" in page
    assert "it saves: only | there" in page and "no keys." in page and "refused:" not in page
    assert "| `lora` | it merges | not at all |" in page, "a hole on every family stands with its method"
    assert "broken: it begins (assert 1 == 2)" in page and "another source" not in page


def test_a_promise_that_few_were_asked_or_earlier_code_says_so(conformance: ModuleType) -> None:
    families = [f"family{n}" for n in range(8)]
    lines = [line("it compiles", "lora", "llama", source="before"), *(line("it begins", "lora", family) for family in families)]
    page = conformance.page(conformance.summed_up(lines))
    assert "1. it compiles (of llama; of the code before its last change)\n2. it begins\n" in page
    assert "9 were kept" in page


def test_a_cell_that_is_recorded_for_the_same_source_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cells.jsonl"
    monkeypatch.setattr("recording.source", lambda: "now")
    known = [line("it begins", "lora", "llama", source="now"), line("it begins", "lora", "bert", source="before")]
    known += [line("it begins", "lora", "gpt2", "failed", source="now"), line("it begins", "lora", "phi3", "hole", source="now")]
    file.write_text("".join(json.dumps(each) + "\n" for each in known) + '{"claim": "cut o')
    assert list(recorded(file)) == known
    gone: list[Any] = []
    config: Any = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: gone.extend(items)))
    items = [item("it begins", "lora", family) for family in ("llama", "bert", "gpt2", "phi3", "t5-encoder")]
    items += [item("it begins", "ia3", "bert"), SimpleNamespace()]
    chosen = list(items)
    Recorder(file, "lora", "llama,bert,gpt2,phi3").pytest_collection_modifyitems(config, chosen)
    assert [cell(each) for each in chosen] == [("it begins", "lora", "bert"), ("it begins", "lora", "gpt2")] and len(gone) == 5
