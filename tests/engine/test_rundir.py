"""A run folder holds whole checkpoints or none, one process at a time, and says what is wrong with it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tunesmith.core.errors import RunError
from tunesmith.engine import checkpoint, trackers
from tunesmith.engine.checkpoint import Checkpoints, new_folder, write_whole
from tunesmith.engine.rundir import Metrics, RunFolder, read_metrics
from tunesmith.engine.train import Trainer
from tunesmith.spec import make_spec

Make = Callable[..., Trainer]
SOURCES = Path(__file__).resolve().parents[2] / "src"
FULL = OSError(errno.ENOSPC, "No space left on device")


def stored(folder: Path, step: int, value: float = 1.0, best: int | None = None, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    checkpoints.save(step, {"weights": {"w": torch.full((50,), value)}, "moments": {"m": torch.ones(3)}}, {"lr": 0.5}, best=best)
    return checkpoints


# Checkpoints


def test_what_is_saved_is_loaded_and_old_ones_go_but_never_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 6, 10):
        checkpoints = stored(tmp_path, step, step, best=4)
    assert checkpoints.steps() == [4, 6, 10]
    tensors, state = checkpoints.load(10)
    assert torch.equal(tensors["weights"]["w"], torch.full((50,), 10.0)) and torch.equal(tensors["moments"]["m"], torch.ones(3))
    assert (state["lr"], state["step"]) == (0.5, 10)


@pytest.mark.parametrize("file", ["weights.safetensors", "moments.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["a flipped byte", "cut short", "missing", "empty", "other JSON"])
def test_any_damage_to_a_checkpoint_is_noticed_and_the_message_names_its_folder_and_the_way_out(
    file: str, damage: str, tmp_path: Path
) -> None:
    stored(tmp_path, 2)
    checkpoints = stored(tmp_path, 4)
    path = tmp_path / "step-4" / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "a flipped byte":
        at = content.index(b"0.5") if file == "state.json" else len(content) - 2
        content[at] ^= 1  # in state.json: a number that still is one
        path.write_bytes(content)
    else:
        path.write_bytes({"cut short": bytes(content[:-9]), "empty": b"", "other JSON": b"[1]"}[damage])
    with pytest.raises(RunError) as caught:
        checkpoints.load(4)
    assert "the checkpoint is damaged" in caught.value.what and file in caught.value.what + caught.value.where + "state.json"
    assert caught.value.where == str(tmp_path / "step-4")
    assert "Remove that folder; resume then goes on from step 2." in caught.value.hints
    checkpoints.load(2)


def test_with_the_damaged_one_removed_the_run_goes_on_from_the_one_before(make_trainer: Make) -> None:
    whole = make_trainer("whole")
    whole.run()
    first = make_trainer("run")
    first.run()
    weights = first.folder.checkpoints.path(8) / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="damaged"):
        make_trainer("run").run(resume=True)
    for file in weights.parent.iterdir():
        file.unlink()
    weights.parent.rmdir()
    again = make_trainer("run")
    again.run(resume=True)
    assert all(torch.equal(value, whole.adapter.state()[name]) for name, value in again.adapter.state().items())


def test_a_checkpoint_of_another_adapter_is_refused(make_trainer: Make) -> None:
    make_trainer("run", adapter="lora(rank=4)").run()
    with pytest.raises(RunError, match=r"not of this adapter: 'model.layers.0.self_attn.q_proj.a' has shape \(4, 32\)"):
        make_trainer("run", adapter="lora(rank=2)").run(resume=True)
    with pytest.raises(RunError, match=r"not of this adapter: it differs in 'model\.layers"):
        make_trainer("run", adapter="lora(rank=4, sites=[q])").run(resume=True)


# A full disk


@pytest.mark.parametrize("cause", [FULL, SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")])
@pytest.mark.parametrize("at", [1, 2])
def test_a_full_disk_leaves_the_last_whole_checkpoint_and_nothing_half_written(
    cause: Exception, at: int, make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    original, calls = checkpoint.save_file, []

    def save_file(values: Any, file: Path) -> None:
        calls.append(file)
        if len(calls) == 2 + at:  # the first or the second file of the second checkpoint
            file.write_bytes(b"half")
            raise cause
        original(values, file)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(RunError) as caught:
        trainer.run()
    assert "no space left on the device" in str(caught.value) and "--resume" in str(caught.value)
    checkpoints = trainer.folder.checkpoints
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-2"]
    checkpoints.load(2)
    monkeypatch.undo()
    whole = make_trainer("whole")
    whole.run()
    again = make_trainer()
    again.run(resume=True)
    assert all(torch.equal(value, whole.adapter.state()[name]) for name, value in again.adapter.state().items())


def test_a_full_disk_while_metrics_or_small_files_are_written_is_said_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise FULL

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(RunError, match=r"metrics.jsonl: no space left"):
        metrics.write(step=1)
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", full)
    folder = RunFolder(tmp_path / "run")
    with folder, pytest.raises(RunError, match=r"environment.json: no space left"):
        folder.begin(make_spec({"base": "x"}), {})
    with pytest.raises(RunError, match="no space left"):
        write_whole(tmp_path / "note", "text")
    assert not folder.started and not [path for path in tmp_path.rglob("*") if "writing" in path.name or path.name == "note"]


def test_another_obstacle_to_writing_is_an_error_with_its_reason_not_a_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "save_file", denied)
    with pytest.raises(RunError, match="cannot be written: Permission denied"):
        stored(tmp_path, 2)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"), RunFolder(tmp_path / "file" / "run"):
        pass


def test_a_folder_is_replaced_only_by_a_whole_one_and_left_overs_of_a_killed_process_go(tmp_path: Path) -> None:
    with new_folder(tmp_path / "adapter") as folder:
        (folder / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "adapter") as folder:
        (folder / "a").write_text("half")
        _ = 1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"] and (tmp_path / "adapter" / "a").read_text() == "old"
    with new_folder(tmp_path / "adapter") as folder:
        (folder / "b").write_text("new")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["b"]
    left_over = tmp_path / "checkpoints" / ".step-7.writing"
    left_over.mkdir(parents=True)
    assert stored(tmp_path / "checkpoints", 8).steps() == [8] and not left_over.exists()


# One process at a time


def test_a_folder_in_use_by_another_process_is_refused_and_free_again_once_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from tunesmith.engine.rundir import RunFolder
with RunFolder(Path({str(tmp_path / "run")!r})):
    print("in", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SOURCES)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline().strip() == "in"
    with pytest.raises(RunError, match=rf"another process \(process {process.pid}\) is using this run folder(.|\n)*name=NAME"):
        RunFolder(tmp_path / "run").__enter__()
    process.kill()
    process.wait()
    process.stdout.close()
    with RunFolder(tmp_path / "run") as folder:
        assert folder.path.is_dir()
    assert not (tmp_path / "run" / ".holder").exists()


# What the folder says


def test_a_folder_that_holds_a_run_is_neither_begun_again_nor_taken_for_finished(tmp_path: Path) -> None:
    spec = make_spec({"base": "x", "name": "run", "train": {"lr": 3e-5}})
    with RunFolder(tmp_path) as folder:
        with pytest.raises(RunError, match=r"no finished run here(.|\n)*tunesmith train spec.yaml"):
            folder.result()
        folder.begin(spec, {"threads": 1})
        assert folder.spec() == spec and folder.environment() == {"threads": 1}
        with pytest.raises(RunError, match=r"a run that was begun(.|\n)*--resume(.|\n)*name=NAME(.|\n)*--overwrite"):
            folder.begin(spec, {})
        with pytest.raises(RunError, match=r"no finished run here(.|\n)*--resume"):
            folder.result()
        folder.finish({"steps": 3})
        assert folder.result() == {"steps": 3} and folder.finished
        with pytest.raises(RunError, match="a finished run"):
            folder.begin(spec, {})


def test_overwriting_removes_a_run_and_never_a_folder_of_something_else(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run") as folder:
        folder.begin(make_spec({"base": "x"}), {})
        stored(folder.path / "checkpoints", 2)
        folder.clear()
        assert not folder.started and folder.checkpoints.steps() == []
        folder.clear()  # nothing to do
    precious = tmp_path / "precious" / "thesis.txt"
    precious.parent.mkdir()
    precious.touch()
    with RunFolder(precious.parent) as folder, pytest.raises(RunError, match="files and no run; nothing was removed"):
        folder.clear()
    assert precious.exists()


def test_metrics_are_cut_back_to_the_checkpoint_and_survive_a_half_written_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    metrics.write(step=1, loss=2.5)
    offset = metrics.offset()
    metrics.write(step=2, loss=2.0)
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    Metrics(path, offset).write(step=2, loss=1.0)
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.0}]
    path.write_text("")
    Metrics(path, offset).write(step=2, loss=1.0)  # a file that lost more than the checkpoint knows is not filled with zeros
    assert read_metrics(path) == [{"step": 2, "loss": 1.0}]
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    assert read_metrics(path) == [{"step": 2, "loss": 1.0}]
    assert read_metrics(tmp_path / "none") == []


# Trackers


def test_tensorboard_gets_every_steps_numbers(make_trainer: Make) -> None:
    trainer = make_trainer(steps=4, evaluate_every=2, track=["tensorboard"], dev=lambda: {"accuracy": 0.25})
    trainer.run()
    deadline, events = time.monotonic() + 10, []
    while not events and time.monotonic() < deadline:
        events = list(trainer.folder.path.rglob("events.out.tfevents.*"))
    seen: dict[str, list[Any]] = {}
    for folder in {event.parent for event in events}:
        board = EventAccumulator(str(folder))
        board.Reload()
        for tag in board.Tags()["scalars"]:
            seen[tag] = board.Scalars(tag)
    losses = [line["loss"] for line in read_metrics(trainer.folder.path / "metrics.jsonl") if "loss" in line]
    assert [point.value for point in seen["loss"]] == pytest.approx(losses)
    assert [(point.step, point.value) for point in seen["dev_accuracy"]] == [(2, 0.25), (4, 0.25)]


def test_a_tracker_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"'wandb' is not installed(.|\n)*pip install wandb"):
        make_trainer(track=["wandb"]).run()
