"""What the machine is, and which dtype it computes fastest in."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import BaseError, unknown

if TYPE_CHECKING:
    import torch

DTYPES = {
    "fp32": "float32", "float32": "float32",
    "bf16": "bfloat16", "bfloat16": "bfloat16",
    "fp16": "float16", "float16": "float16",
}  # fmt: skip
"""Words a user may write, to torch's names."""

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
WORTH_IT = 1.3
"""bf16 is chosen where it is at least this many times as fast as fp32; below that, exactness is worth more."""

_TEST_SECONDS = 0.2
_SHAPE = (512, 1024, 1024)
_PROBE = (64, 256, 256)
_chosen: dict[str, tuple[torch.dtype, str]] = {}


def pick_device(asked: str | torch.device = "auto") -> torch.device:
    """CUDA, else MPS, else CPU; or the one asked for. BaseError where this machine lacks it."""
    import torch

    if str(asked) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise unknown("device", str(asked), ("auto", "cpu", "cuda", "cuda:0", "mps"), error=BaseError) from None
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= counts.get(device.type, 0):
        there = [name for name, count in counts.items() if count]
        raise BaseError(f"this machine (or this build of torch) has no device '{asked}'.", hints=[f"There is:  {'  ·  '.join(there)}"])
    return device


def pick_dtype(device: torch.device, asked: str | torch.dtype = "auto") -> tuple[torch.dtype, str]:
    """The dtype to compute in, and a few words on why ("bf16 (matrix test: 3.9x fp32 on this CPU)").

    "auto" takes `TUNESMITH_DTYPE` if set, else measures once a process (about 0.2 s). Raises BaseError for a word that
    is no dtype and for a dtype that the device cannot multiply in.
    """
    if str(asked) != "auto":
        return _asked_dtype(device, asked, "as asked")
    if forced := os.environ.get("TUNESMITH_DTYPE"):
        return _asked_dtype(device, forced, "from TUNESMITH_DTYPE")
    key = str(device)
    if key not in _chosen:
        _chosen[key] = _measured_dtype(device)
    return _chosen[key]


def _asked_dtype(device: torch.device, asked: str | torch.dtype, why: str) -> tuple[torch.dtype, str]:
    import torch

    word = str(asked).removeprefix("torch.")
    if word not in DTYPES:
        raise unknown("dtype", word, ["auto", *SHORT.values()], error=BaseError)
    dtype: torch.dtype = getattr(torch, DTYPES[word])
    if not _supports(device, dtype):
        raise BaseError(f"{_name(device)} cannot compute in {SHORT[DTYPES[word]]}.", hints=["Leave it to the matrix test:  dtype=auto"])
    return dtype, f"{SHORT[DTYPES[word]]} ({why})"


def _measured_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    import torch

    if not _supports(device, torch.bfloat16):
        return torch.float32, f"fp32 ({_name(device)} has no bf16)"
    ratio = _speed_ratio(device)
    if ratio >= WORTH_IT:
        return torch.bfloat16, f"bf16 (matrix test: {ratio:.1f}x fp32 on {_name(device)})"
    return torch.float32, f"fp32 (matrix test: bf16 is only {ratio:.2g}x as fast on {_name(device)})"


def _name(device: torch.device) -> str:
    return {"cpu": "this CPU", "cuda": "this GPU"}.get(device.type, f"this {device.type} device")


def _supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies matrices in this dtype itself, forward and backward (emulation does not count)."""
    import torch

    if device.type == "cuda" and dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        return False
    try:
        x = torch.ones(8, 8, dtype=dtype, device=device, requires_grad=True)
        (x @ x).sum().backward()
    except (RuntimeError, TypeError):
        return False
    return bool(torch.isfinite(x.grad).all()) if x.grad is not None else False


def _speed_ratio(device: torch.device) -> float:
    """Seconds of fp32 over seconds of bf16 for one product: medians of interleaved runs, so that a busy moment hits both."""
    small = _times(device, _PROBE, _TEST_SECONDS / 20)
    if small < 0.3:  # without hardware support bf16 may be a hundred times slower: no need to wait for more of it
        return small
    return _times(device, _SHAPE, _TEST_SECONDS)


def _times(device: torch.device, shape: tuple[int, int, int], budget: float) -> float:
    import torch

    rows, inner, columns = shape
    runs: dict[torch.dtype, Callable[[], None]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        runs[dtype] = _product(torch.ones(rows, inner, dtype=dtype, device=device), torch.ones(inner, columns, dtype=dtype, device=device))
    for run in runs.values():
        run()  # the first call also prepares kernels
    seconds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in runs}
    end = time.perf_counter() + budget
    while len(seconds[torch.bfloat16]) < 3 or (time.perf_counter() < end and len(seconds[torch.bfloat16]) < 25):
        for dtype, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[dtype].append(time.perf_counter() - start)
    return statistics.median(seconds[torch.float32]) / statistics.median(seconds[torch.bfloat16])


def _product(a: torch.Tensor, b: torch.Tensor) -> Callable[[], None]:
    import torch

    def run() -> None:
        with torch.no_grad():
            product = a @ b
        if product.device.type == "cuda":
            torch.cuda.synchronize(product.device)
        else:
            float(product[0, 0])  # waits for the result on any device

    return run


def hardware() -> dict[str, Any]:
    """CPU, cores, memory and GPUs, in plain values that go into environment.json."""
    import psutil
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {"name": properties.name, "memory_mb": properties.total_memory // 2**20, "capability": f"{properties.major}.{properties.minor}"}
        )
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "cores_physical": psutil.cpu_count(logical=False) or 0,
        "threads": torch.get_num_threads(),
        "features": cpu_features(),
        "memory_total_mb": memory_total_mb(),
        "gpus": gpus,
        "mps": torch.backends.mps.is_available(),
    }


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's model name, as the system gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Instruction sets that decide how fast low precision is; empty where the system does not say."""
    words = set(_cpuinfo("flags").split())
    return [word for word in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8") if word in words]


def _cpuinfo(key: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


def memory_total_mb() -> int:
    """Memory this process may use, MiB: the machine's, or its container's limit where that is lower."""
    import psutil

    limits = [int(psutil.virtual_memory().total)]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(file).read_text("ascii")))
    return min(limits) // 2**20
