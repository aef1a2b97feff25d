"""A run that was killed, stopped or went on later ends with the same weights as one that never stopped, to the bit."""

from __future__ import annotations

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tunesmith.core.errors import Interrupted
from tunesmith.core.row import Row
from tunesmith.engine.checkpoint import Checkpoints
from tunesmith.engine.rundir import read_metrics
from tunesmith.engine.train import Trainer

SCRIPT = Path(__file__).with_name("train_and_die.py")
SOURCES = Path(__file__).resolve().parents[2] / "src"

ADAPTER = "lora(rank=4, dropout=0.1)"


@dataclass
class Runs:
    """Runs of train_and_die.py: in a process of their own, or to the end in this one."""

    base: Path
    folder: Path

    def arguments(self, name: str, adapter: str, dtype: str) -> list[str]:
        train = {"steps": 9, "batch": 6, "lr": 1e-2, "save_every": 3, "pack_tokens": 64, "neftune": 5.0}
        spec = {"base": {"model": str(self.base), "dtype": dtype}, "name": name, "adapter": adapter, "train": train}
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(spec))
        return [str(self.base), str(self.folder / "rows.json"), str(self.folder / name), str(file)]

    def start(self, name: str, moment: str, step: int = 0, *, adapter: str = ADAPTER, dtype: str = "fp32") -> subprocess.Popen[str]:
        command = [sys.executable, str(SCRIPT), *self.arguments(name, adapter, dtype), moment, str(step)]
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(SOURCES)}, stderr=subprocess.PIPE, text=True)

    def to_the_end(self, name: str, *, adapter: str = ADAPTER, dtype: str = "fp32") -> tuple[bytes, list[dict[str, Any]]]:
        """Begin or go on with a run; its final weights and its metrics, but for what the clock says."""
        if not (self.folder / name / "result.json").exists():
            runpy.run_path(str(SCRIPT))["main"](*self.arguments(name, adapter, dtype))
        lines = read_metrics(self.folder / name / "metrics.jsonl")
        weights = (self.folder / name / "adapter" / "adapter_model.safetensors").read_bytes()
        return weights, [{key: value for key, value in line.items() if key != "seconds"} for line in lines]

    def wait_for_steps(self, name: str, count: int) -> None:
        file, deadline = self.folder / name / "metrics.jsonl", time.monotonic() + 60
        while (not file.exists() or file.read_bytes().count(b"\n") < count) and time.monotonic() < deadline:
            time.sleep(0.005)

    def wait_for_a_step(self, name: str) -> None:
        """Until the run's metrics are written to, whatever an earlier process left in them."""
        file, begun, deadline = self.folder / name / "metrics.jsonl", time.time_ns(), time.monotonic() + 60
        while (not file.exists() or file.stat().st_mtime_ns < begun) and time.monotonic() < deadline:
            time.sleep(0.005)


@pytest.fixture
def runs(tiny_base_folder: Path, samples: list[Row], tmp_path: Path) -> Runs:
    rows = [{"ids": r.segments[0].ids.tolist(), "mask": r.segments[0].supervised.tolist(), "where": r.where} for r in samples]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return Runs(tiny_base_folder, tmp_path)


def ended(process: subprocess.Popen[str]) -> int:
    _, said = process.communicate(timeout=100)
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode


@pytest.mark.parametrize(
    ("moment", "step", "whole"),
    [
        ("after the update", 2, []),
        ("within metrics", 5, [3]),
        ("within a file", 6, [3]),
        ("between the files", 6, [3]),
        ("before the name", 6, [3]),
        ("after the name", 6, [3, 6]),
    ],
)
def test_a_run_killed_at_any_moment_resumes_to_the_same_weights(moment: str, step: int, whole: list[int], runs: Runs) -> None:
    assert ended(runs.start("killed", moment, step)) == -signal.SIGKILL
    checkpoints = Checkpoints(runs.folder / "killed" / "checkpoints")
    assert checkpoints.steps() == whole
    for each in whole:
        checkpoints.load(each)
    resumed = runs.to_the_end("killed")
    assert resumed == runs.to_the_end("untouched")
    assert [line["step"] for line in resumed[1]] == list(range(1, 10))
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-6", "step-9"]


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "dtype"), [(ADAPTER, "fp32"), ("full", "bf16")])
def test_a_run_killed_again_and_again_at_random_times_ends_as_one_that_never_was(adapter: str, dtype: str, runs: Runs) -> None:
    dice = random.Random(adapter)
    for _ in range(5):
        process = runs.start("killed", "slowly", adapter=adapter, dtype=dtype)
        runs.wait_for_a_step("killed")
        time.sleep(dice.uniform(0, 0.5))  # a step takes a tenth of a second
        process.kill()
        ended(process)
    options = {"adapter": adapter, "dtype": dtype}
    assert runs.to_the_end("killed", **options) == runs.to_the_end("untouched", **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_or_a_termination_saves_says_how_to_go_on_and_exits_with_130(number: int, runs: Runs) -> None:
    process = runs.start("stopped", "slowly")
    runs.wait_for_steps("stopped", 2)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    step = Checkpoints(runs.folder / "stopped" / "checkpoints").steps()[-1]
    assert f"stopped at step {step} of 9; everything is saved" in said and "--resume" in said
    assert "Traceback" not in said
    assert runs.to_the_end("stopped") == runs.to_the_end("untouched")


@pytest.mark.parametrize(("adapter", "steps"), [("lora(rank=4, dropout=0.2)", 5), ("full", 3), ("layers(last=1)", 4)])
def test_a_run_that_goes_on_from_a_checkpoint_equals_one_that_never_stopped(
    adapter: str, steps: int, make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_trainer("whole", adapter=adapter)
    whole.run()
    cut = make_trainer("cut", adapter=adapter)
    original = Trainer._one_step

    def interrupt(self: Trainer) -> dict[str, float]:
        self._stop = self is cut and self.state.step + 1 == steps
        return original(self)

    monkeypatch.setattr(Trainer, "_one_step", interrupt)
    with pytest.raises(Interrupted) as caught:
        cut.run()
    assert caught.value.exit_code == 130
    again = make_trainer("cut", adapter=adapter)
    torch.manual_seed(12345)
    state = again.run(resume=True)
    assert all(torch.equal(value, whole.adapter.state()[name]) for name, value in again.adapter.state().items())
    assert (state.tokens, state.losses) == (whole.state.tokens, whole.state.losses)
    ours, theirs = (load_file(t.folder.checkpoints.path(8) / "moments.safetensors") for t in (again, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_resuming_a_run_that_has_no_checkpoint_begins_it_and_one_that_is_done_trains_no_further(
    make_trainer: Callable[..., Trainer],
) -> None:
    assert make_trainer("run").run(resume=True).step == 8
    again = make_trainer("run")
    again._one_step = None  # type: ignore[assignment, method-assign]  # would fail if it were called
    assert again.run(resume=True).step == 8


def test_signal_handlers_are_put_back(make_trainer: Callable[..., Trainer]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    make_trainer(steps=1).run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_ctrl_c_ends_at_once(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()
    original = trainer.objective.function

    def twice(*args: Any, **options: Any) -> Any:
        if trainer.state.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return original(*args, **options)

    trainer.objective = replace(trainer.objective, function=twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.folder.checkpoints.steps() == [2]
