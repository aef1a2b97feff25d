"""The device, the dtype and why, memory, and what the doctor says."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import torch

from tunesmith.bases import doctor, hardware, memory
from tunesmith.bases.doctor import diagnose
from tunesmith.bases.hardware import pick_device, pick_dtype
from tunesmith.bases.memory import PeakMemory, peak_memory_mb
from tunesmith.core.errors import BaseError

CPU = torch.device("cpu")
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


@pytest.fixture(autouse=True)
def nothing_measured_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_chosen", {})


@pytest.mark.parametrize(
    ("ratio", "dtype", "reason"),
    [
        (3.94, torch.bfloat16, "bf16 (matrix test: 3.9x fp32 on this CPU)"),
        (1.29, torch.float32, "fp32 (matrix test: bf16 is only 1.3x as fast on this CPU)"),
        (0.02, torch.float32, "fp32 (matrix test: bf16 is only 0.02x as fast on this CPU)"),
    ],
)
def test_bf16_is_chosen_only_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, ratio: float, dtype: torch.dtype, reason: str
) -> None:
    monkeypatch.setattr(hardware, "_speed_ratio", lambda _: ratio)
    assert pick_dtype(CPU) == (dtype, reason)


def test_the_matrix_test_is_run_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    first = pick_dtype(CPU)
    monkeypatch.setattr(hardware, "_speed_ratio", lambda _: pytest.fail("measured again"))
    assert pick_dtype(CPU) == first


def test_the_real_matrix_test_gives_a_number_in_reason() -> None:
    assert 0.001 < hardware._speed_ratio(CPU) < 100


def test_a_device_that_is_hopeless_at_bf16_is_not_measured_at_length(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    monkeypatch.setattr(hardware, "_times", lambda device, shape, budget: shapes.append(shape) or 0.01)
    assert hardware._speed_ratio(CPU) == 0.01 and len(shapes) == 1


def test_a_device_without_bf16_computes_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_supports", lambda device, dtype: dtype is not torch.bfloat16)
    assert pick_dtype(CPU) == (torch.float32, "fp32 (this CPU has no bf16)")
    with pytest.raises(BaseError, match="cannot compute in bf16"):
        pick_dtype(CPU, "bf16")


def test_the_environment_decides_unless_the_call_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_DTYPE", "fp32")
    assert pick_dtype(CPU) == (torch.float32, "fp32 (from TUNESMITH_DTYPE)")
    assert pick_dtype(CPU, "bfloat16") == (torch.bfloat16, "bf16 (as asked)")
    monkeypatch.setenv("TUNESMITH_DTYPE", "int3")
    with pytest.raises(BaseError, match="unknown dtype 'int3'"):
        pick_dtype(CPU)


def test_a_misspelt_dtype_is_answered_with_the_nearest() -> None:
    with pytest.raises(BaseError, match=r"unknown dtype 'bf61'(.|\n)*bf16"):
        pick_dtype(CPU, "bf61")


def test_a_device_that_is_not_there_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(BaseError, match=r"no device 'cuda:3'(.|\n)*cpu"):
        pick_device("cuda:3")
    with pytest.raises(BaseError, match="unknown device 'gpu'"):
        pick_device("gpu")


def test_the_hardware_is_described_in_plain_values() -> None:
    facts = hardware.hardware()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["threads"] >= 1
    assert 100 < facts["memory_total_mb"] < 100_000_000
    assert all(isinstance(value, str | int | list | bool) for value in facts.values())


def allocate(mb: int) -> None:
    bytearray(b"x") * (mb << 20)


def test_peak_memory_sees_what_was_freed_within_the_block_and_not_what_came_before() -> None:
    allocate(120)
    with PeakMemory() as quiet_block:
        pass
    with PeakMemory() as block:
        allocate(100)
    assert 80 < block.mb - quiet_block.mb < 130
    assert block.gpu_mb == 0 or torch.cuda.is_available()


def test_an_inner_block_does_not_make_the_outer_one_forget() -> None:
    with PeakMemory() as outer:
        allocate(100)
        with PeakMemory() as inner:
            allocate(20)
        inside = inner.mb
    assert inner.mb == inside
    assert outer.mb - inner.mb > 60


def test_peak_memory_is_sampled_where_the_kernel_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_reset_high_water_mark", lambda: False)
    with PeakMemory() as before:
        pass
    with PeakMemory() as block:
        held = [bytearray(b"x") * (60 << 20)]
        while block.mb < before.mb + 40:
            pass
        held.clear()
    assert block.mb - before.mb > 40


def test_a_peak_is_not_written_over_by_a_sample_that_was_begun_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    block = PeakMemory()
    monkeypatch.setattr(memory, "_resident_mb", lambda: block._raise_to(900.0) or 5.0)  # read while another thread saw more
    block._sampler = threading.current_thread()
    block._fold()
    assert block._mb == 900.0


def test_onednn_is_told_to_keep_few_kernels_unless_the_user_says_how_many() -> None:
    program = "import os, tunesmith.bases; print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    for given, kept in (({}, "64"), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}, "7")):
        env = {key: value for key, value in os.environ.items() if not key.startswith("ONEDNN")} | given
        assert subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout.strip() == kept


def test_the_process_peak_is_at_least_what_is_resident() -> None:
    import psutil

    assert peak_memory_mb() >= psutil.Process().memory_info().rss / 2**20 - 1


def test_the_doctor_looks_at_everything_and_hints_wherever_something_is_wrong() -> None:
    checks = {check.name: check for check in diagnose()}
    assert {"python", "cpu", "memory", "dtype", "threads", "disk, cache", "cache", "compiler", "pip", "hub", "torch"} <= set(checks)
    assert checks["torch"].detail == importlib.metadata.version("torch")
    assert all(check.hint for check in checks.values() if check.status != "ok")
    assert not any(check.hint for check in checks.values() if check.status == "ok")


def test_an_extra_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "1.0" if name in (*doctor.CORE, "wandb") else None)
    checks = {check.name: check for check in diagnose()}
    assert (checks["extra quant"].status, checks["extra quant"].hint) == ("missing", "pip install 'tunesmith[quant]'")
    assert (checks["extra trackers"].status, checks["extra trackers"].detail) == ("ok", "wandb 1.0")


def test_a_missing_core_package_is_told_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert next(check for check in diagnose() if check.name == "torch").status == "missing"


def test_a_wrong_forced_dtype_is_a_warning_of_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_DTYPE", "int3")
    assert next(check for check in diagnose() if check.name == "dtype").status == "warn"


def test_the_doctor_knows_what_the_project_declares() -> None:
    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[<>=; ]", requirement)[0] for requirement in requirements}

    assert set(doctor.CORE) == names(PROJECT["dependencies"])
    extras = {extra: names(wanted) for extra, wanted in PROJECT["optional-dependencies"].items() if extra not in ("test", "dev")}
    assert {extra: set(wanted) for extra, wanted in doctor.EXTRAS.items()} == extras
    assert set(doctor.PURPOSE) == set(doctor.EXTRAS)
