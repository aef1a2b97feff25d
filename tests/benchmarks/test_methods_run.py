"""The comparison from end to end, on tiny random models: cells in processes, resumed after a kill, pages written."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from methods.command import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every cell loads the libraries anew, which takes minutes")


def cells(folder: Path) -> dict[str, int]:
    """Files of results, and when they were written."""
    return {file.name: file.stat().st_mtime_ns for file in (folder / "cells").glob("*.json")}


def results(folder: Path) -> dict[str, Any]:
    return {(read := json.loads(file.read_text()))["name"]: read for file in (folder / "cells").glob("*.json")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("comparison")
    assert main(["--smoke", "--folder", str(made)]) == 0
    return made


def test_a_comparison_measures_what_each_method_gives_and_costs(folder: Path) -> None:
    found = results(folder)
    lora, full, prompt = (found[f"encoder-24-{name}-seed-0"] for name in ("lora", "full", "prompt"))
    assert len(lora["top"]) == 30 and lora["steps"] == 4 and lora["train_seconds"] > 0 and lora["peak_mb"] >= lora["before_mb"] > 0
    assert lora["counts"]["rank"] == 2 and lora["counts"]["matrices"] == 4 and lora["counts"]["stored"] > 0
    assert full["counts"]["changed"] > 0.5 * full["counts"]["of"] and full["counts"]["rank"] == 16
    assert prompt["counts"]["changed"] == 0 and prompt["counts"]["merges"]
    assert {"cross_entropy", "drift"} == set(lora["forgetting"]) and lora["forgetting"]["drift"] > 0
    decoder = found["decoder-all-lora-seed-0"]
    assert set(decoder["forgetting"]) == {"cross_entropy"} and decoder["steps"] == 6


def test_rates_were_tried_on_dev_for_a_share_of_the_steps(folder: Path) -> None:
    found = results(folder)
    tried = [result for name, result in found.items() if name.startswith("encoder-24-full-rate")]
    assert len(tried) in (2, 3) and all(result["steps"] == 2 and len(result["top"]) == 15 for result in tried)
    assert found["encoder-24-full-seed-0"]["rate"] in [result["rate"] for result in tried]


def test_what_a_base_cannot_carry_stands_on_the_page_with_its_reason(folder: Path) -> None:
    page = (folder / "comparison.md").read_text(encoding="utf-8")
    assert "decoder, all: bitfit (seed 0)" in page and "biases" in page.split("## Not run")[1]
    assert (folder / "comparison.html").stat().st_size > 10_000


def test_a_second_run_does_nothing_again(folder: Path) -> None:
    before = cells(folder)
    assert main(["--smoke", "--folder", str(folder)]) == 0
    assert cells(folder) == before


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        try:
            main(["--smoke", "--folder", str(tmp_path)])
        finally:
            os._exit(0)
    end = time.monotonic() + 60
    while len(list((tmp_path / "cells").glob("*.json"))) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    before = cells(tmp_path)
    assert len(before) >= 2
    assert main(["--smoke", "--folder", str(tmp_path), "--only", "encoder/24/full/0"]) == 0
    after = cells(tmp_path)
    assert "encoder-24-full-seed-0" in results(tmp_path)
    assert {name: after[name] for name in before if "-rate-" in name} == {name: at for name, at in before.items() if "-rate-" in name}


def test_where_the_time_is_up_nothing_is_begun_and_all_is_listed_as_not_run(tmp_path: Path) -> None:
    assert main(["--smoke", "--folder", str(tmp_path), "--budget-hours", "0"]) == 3
    page = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "encoder, 24: full (seed 0), lora (seed 0), prompt (seed 0), bitfit (seed 0), lora q (seed 0), full (seed 1)" in page


def test_a_mistake_in_a_pattern_is_told_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--smoke", "--folder", str(tmp_path), "--only", "nothing/*"]) == 2
    assert "TASK/SIZE/METHOD/SEED" in capsys.readouterr().err
