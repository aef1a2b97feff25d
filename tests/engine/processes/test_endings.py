"""However a run of two processes ends, it ends: with a message, in time, and with what is needed to go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import RunError
from tunesmith.engine import processes
from tunesmith.engine.checkpoint import Checkpoints
from tunesmith.engine.launchers import zero_stage
from tunesmith.engine.rundir import RunFolder, read_metrics

SOURCES = Path(__file__).resolve().parents[3] / "src"
TRAIN = {"steps": 6, "batch": 8, "lr": 1e-2, "save_every": 2, "pack_tokens": 64}
BOUND = 60
"""Seconds; without care, the others would wait for half an hour."""


def plan(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "adapter": "lora(rank=4)", "train": {**TRAIN, **more.pop("train", {})}, **more}


def ended(process: subprocess.Popen[str]) -> str:
    """What a job said that failed, in time."""
    said, _ = process.communicate(timeout=BOUND)
    assert process.returncode != 0
    return said


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_for_lines(file: Path, count: int) -> None:
    deadline = time.monotonic() + BOUND
    while (not file.exists() or file.read_bytes().count(b"\n") < count) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert file.exists() and file.read_bytes().count(b"\n") >= count


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_process_that_is_killed_ends_the_job_and_the_run_goes_on_from_its_checkpoint(sharding: str, together: Any) -> None:
    train = {"sharding": sharding}
    said = ended(together.start(plan(f"killed-{sharding}", die=4, train=train)))
    assert "SIGKILL" in said or "exitcode  : -9" in said
    checkpoints = Checkpoints(together.folder / f"killed-{sharding}" / "checkpoints")
    assert checkpoints.steps() == [2]
    together.one(plan(f"killed-{sharding}", train=train), plan(f"untouched-{sharding}", train=train))
    ours, theirs = (together.metrics(f"{name}-{sharding}") for name in ("killed", "untouched"))
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_process_that_raises_ends_the_job_with_its_message(together: Any) -> None:
    said = ended(together.start(plan("raised", fail=3)))
    assert "the second process has had enough." in said
    assert "Traceback (most recent call last):\n  File" not in said.split("ChildFailedError")[0].split("the second process")[0]


def test_a_process_that_is_waited_for_in_vain_ends_the_job_after_the_time_that_was_set(together: Any) -> None:
    began = time.monotonic()
    process = together.start(plan("late", timeout=4, slow=0.05, train={"steps": 500}))
    wait_for_lines(together.folder / "late" / "metrics.jsonl", 2)
    second = children(process)[1]
    os.kill(second, signal.SIGSTOP)
    assert process.stdout is not None
    heard = any("process 0 waited 4 s for the others" in line for line in process.stdout)
    os.kill(second, signal.SIGCONT)  # the launcher would kill it after half a minute
    ended(process)
    assert heard and time.monotonic() - began < BOUND


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launcher_that_is_asked_to_stop_lets_both_finish_the_step_and_save(number: int, together: Any) -> None:
    name = f"asked-{number}"
    process = together.start(plan(name, slow=0.05, train={"steps": 400, "save_every": 1000}))
    wait_for_lines(together.folder / name / "metrics.jsonl", 3)
    if number == signal.SIGINT:  # as a terminal does it: every process hears it, and the launcher passes it on
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    said = ended(process)
    (step,) = Checkpoints(together.folder / name / "checkpoints").steps()
    assert f"stopped at step {step} of 400; everything is saved" in said
    Checkpoints(together.folder / name / "checkpoints").load(step)
    assert len(read_metrics(together.folder / name / "metrics.jsonl")) == step


@pytest.mark.parametrize("sharding", ["none", pytest.param("fsdp", marks=pytest.mark.slow), pytest.param("zero", marks=pytest.mark.slow)])
def test_accelerate_launch_trains_a_spec_from_end_to_end(sharding: str, together: Any, tmp_path: Path) -> None:
    words = ["love", "hate", "phone", "film", "great", "awful"]
    lines = [f'{{"text": "{words[n % 6]} {words[n % 5]} {n}", "label": "{"good" if n % 2 else "bad"}"}}' for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "spec.yaml").write_text(
        f"base: {{model: {together.base}, dtype: fp32}}\ndata: {{train: rows.jsonl, dev: 7}}\nadapter: lora(rank=4)\n"
        f"train: {{steps: 4, batch: 6, evaluate_every: 2, lr: 1e-2, sharding: {sharding.replace('zero', 'none')}}}\n"
    )
    env = {**os.environ, "PYTHONPATH": str(SOURCES), "TUNESMITH_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hf")}
    if sharding == "zero":  # its launcher needs DeepSpeed installed; what it tells the processes is this
        env |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    program = ["-m", "tunesmith", "train", "spec.yaml"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]

    def run(command: list[str]) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    said = run([*launch, *program, "name=two"])
    assert "2 on cpu" in said and said.count("trained ") == 1
    assert ("each holds a piece" in said) == (sharding != "none") and ("asks for DeepSpeed ZeRO 3" in said) == (sharding == "zero")
    run([sys.executable, *program, "name=one", "train.sharding=none"])
    ours, theirs = (read_metrics(tmp_path / "runs" / name / "metrics.jsonl") for name in ("two", "one"))
    for key in ("loss", "dev_accuracy"):
        assert [line[key] for line in ours if key in line] == pytest.approx([line[key] for line in theirs if key in line], abs=1e-5)
    shutil.rmtree(tmp_path / "runs" / "two" / "checkpoints" / "step-4")
    (tmp_path / "runs" / "two" / "result.json").unlink()
    run([sys.executable, *program, "name=two", "train.sharding=none", "--resume"])


# What is refused


def test_work_of_one_process_is_refused_under_a_launcher_of_several(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="started 2 processes, and this works on one"), RunFolder(tmp_path / "run"):
        pass
    with pytest.raises(RunError, match=r"names one device(.|\n)*base.device=auto"):
        processes.start("cuda:1")
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(RunError, match=r"Megatron(.|\n)*train.sharding=fsdp"):
        processes.start()


def test_a_deepspeed_configuration_is_read_for_its_stage_and_offloading_is_refused(tmp_path: Path) -> None:
    def asked(**more: str) -> dict[str, str]:
        return {"ACCELERATE_USE_DEEPSPEED": "true", **{f"ACCELERATE_DEEPSPEED_{key}": value for key, value in more.items()}}

    def file(text: str) -> dict[str, str]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(text)
        return asked(CONFIG_FILE=str(path))

    assert zero_stage({}) == 0 and zero_stage(asked()) == 2 and zero_stage(asked(ZERO_STAGE="3", OFFLOAD_PARAM_DEVICE="none")) == 3
    assert zero_stage(file("{}")) == 0 and zero_stage(file('{"zero_optimization": {"stage": 1, "offload_param": {"device": "none"}}}')) == 1
    for bad, why in (
        (asked(OFFLOAD_OPTIMIZER_DEVICE="cpu"), r"offload(.|\n)*train.sharding=fsdp"),
        (file('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}'), "offload"),
        (file('{"zero_optimization": {"stage": 4}}'), "stage is 0, 1, 2 or 3, not 4"),
        (file('{"zero_optimization": 3}'), "must be a JSON object"),
        (file("{"), "is no JSON"),
        (asked(CONFIG_FILE=str(tmp_path / "none.json")), "cannot be read"),
    ):
        with pytest.raises(RunError, match=why):
            zero_stage(bad)


def test_one_process_tells_itself_nothing() -> None:
    alone = processes.ALONE
    assert processes.start() is alone is processes.current() and alone.first and not alone.several
    assert alone.sum([1.5, 2]) == [1.5, 2] and alone.told({"a": 1}) == {"a": 1} and alone.gathered(3) == [3]
    alone.meet()
    alone.same("thing", 1)
