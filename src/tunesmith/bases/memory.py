"""Peak memory of this process, over its life or over one block."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_INTERVAL = 0.02
_open: list[PeakMemory] = []
_lock = threading.Lock()


def peak_memory_mb() -> float:
    """Highest resident memory of this process so far, MiB (on Linux: since the last `PeakMemory` block began)."""
    if sys.platform == "linux" and (mark := _high_water_mark()) is not None:
        return mark
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


class PeakMemory:
    """Peak memory within a block: `with PeakMemory() as peak: ...`, then `peak.mb` and `peak.gpu_mb`.

    mb: resident memory of the process at its highest, MiB, including what was there before the block. gpu_mb: highest
    memory that torch held on the current CUDA device, MiB; 0 without one. Both can be read during the block, and blocks
    may be nested. On Linux the kernel counts, so nothing is missed; elsewhere memory is sampled every 20 ms.
    """

    def __init__(self) -> None:
        self._mb = 0.0
        self._gpu_mb = 0.0
        self._done = threading.Event()
        self._guard = threading.Lock()
        self._sampler: threading.Thread | None = None

    @property
    def mb(self) -> float:
        if not self._done.is_set():
            self._fold()
        return self._mb

    @property
    def gpu_mb(self) -> float:
        if not self._done.is_set():
            self._gpu_mb = max(self._gpu_mb, _gpu_peak())
        return self._gpu_mb

    def __enter__(self) -> Self:
        with _lock:
            for outer in _open:  # the counters start anew below: what they showed belongs to the blocks around this one
                outer._fold()
                outer._gpu_mb = max(outer._gpu_mb, _gpu_peak())
            if not _reset_high_water_mark():
                self._sampler = threading.Thread(target=self._sample, daemon=True)
                self._sampler.start()
            _reset_gpu_peak()
            _open.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._fold()
        self._gpu_mb = max(self._gpu_mb, _gpu_peak())
        self._done.set()
        with _lock:
            _open.remove(self)
        if self._sampler is not None:
            self._sampler.join()

    def _fold(self) -> None:
        self._raise_to(_resident_mb() if self._sampler is not None else _high_water_mark() or 0.0)

    def _raise_to(self, mark: float) -> None:
        """The sampler and the reader both come here: a higher mark is never written over."""
        with self._guard:
            self._mb = max(self._mb, mark)

    def _sample(self) -> None:
        while not self._done.wait(_INTERVAL):
            self._raise_to(_resident_mb())


def _high_water_mark() -> float | None:
    """VmHWM in MiB; None where the system does not tell."""
    try:
        for line in _STATUS.read_text("ascii", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def _reset_high_water_mark() -> bool:
    """Set VmHWM to what is resident now; False where the system does not allow it."""
    try:
        _CLEAR.write_text("5", "ascii")  # proc(5): 5 resets the peak resident set size
    except OSError:
        return False
    return _high_water_mark() is not None


def _resident_mb() -> float:
    import psutil

    return float(psutil.Process(os.getpid()).memory_info().rss) / 2**20


def _gpu_peak() -> float:
    torch = sys.modules.get("torch")  # where torch was never imported, no GPU was used
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0.0
    return float(torch.cuda.max_memory_allocated()) / 2**20


def _reset_gpu_peak() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
