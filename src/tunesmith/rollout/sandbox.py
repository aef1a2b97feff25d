"""Programs that nobody has read, run apart: no network, their own folder, little time and memory, and nothing left of them.

On Linux a program has namespaces of its own (processes, network, mounts): it sees no network, can write nowhere but to a folder in
memory, and everything that it started ends with it. What it may read is what the user may. Where the kernel grants no namespaces
(macOS, many containers) `isolation="limits"` is left: limits and a watch within Python, which stop accidents and no attacker.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from tunesmith.core.errors import RunError, SpecError

Isolation = Literal["full", "limits"]
ISOLATIONS = get_args(Isolation)

_CELL = Path(__file__).with_name("cell.py")
_GRACE = 1.0
"""Seconds beyond the program's own, for the interpreter to begin and the cell to be taken down."""
_REPORT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """seconds: for all of a program's tests together. megabytes: memory of each of its processes, and of its files together.
    processes: with threads. isolation: see above."""

    seconds: float = 5.0
    megabytes: int = 512
    processes: int = 8
    isolation: Isolation = "full"

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600 or self.megabytes < 64 or self.processes < 1:
            hints = ["seconds: above 0, at most 3600  ·  megabytes: 64 at least  ·  processes: 1 at least"]
            raise SpecError("the limits of a program's cell are out of range.", hints=hints)
        if self.isolation not in ISOLATIONS:
            raise SpecError(f"isolation '{self.isolation}' is not known.", hints=[f"Known: {', '.join(ISOLATIONS)}"])


@dataclass(frozen=True, slots=True)
class Case:
    """program: what is run, and passes where it ends without an exception. With `output`, what it prints has to be that, spaces at
    the ends of lines and of the whole apart. input: what it reads."""

    program: str
    input: str = ""
    output: str | None = None


def run_tests(tests: Sequence[Case], limits: Limits = Limits()) -> list[bool]:
    """Which tests a program passes, in order; those after its time was up are not passed.

    They are run one after another in one process. Raises RunError where the machine cannot keep a program apart.
    """
    check_isolation(limits.isolation)
    passed, _ = _run(tests, limits)
    return passed


@cache
def check_isolation(isolation: Isolation) -> None:
    """Raises RunError, with the reason, where programs cannot be kept apart in this way on this machine."""
    passed, said = _run([Case("print(6 * 7)", output="42")], Limits(seconds=20, isolation=isolation))
    if passed != [True]:
        hints = ["Nearest that works here, against accidents but no attacker:  code(isolation=limits)"] if isolation == "full" else []
        raise RunError(f"this machine cannot run programs apart: {said or 'a trial program did not end well'}.", hints=hints)


def _run(tests: Sequence[Case], limits: Limits) -> tuple[list[bool], str]:
    """(which passed, what the cell said where it could not be made)."""
    key = secrets.token_hex(16)
    task = json.dumps({"key": key, "tests": [asdict(test) for test in tests], "limits": asdict(limits)})
    with tempfile.TemporaryDirectory(prefix="cell-", ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as report:
        with tempfile.TemporaryFile() as told:
            told.write(task.encode("utf-8", "surrogatepass"))
            told.seek(0)
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-S", str(_CELL)],
                stdin=told,
                stdout=report,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
                close_fds=True,
            )
        try:
            _wait(process, limits.seconds + _GRACE)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        report.seek(0)
        return _read(report.read(_REPORT_BYTES), key, len(tests))


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    end = time.monotonic() + seconds
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, end - time.monotonic()))


def _read(report: bytes, key: str, count: int) -> tuple[list[bool], str]:
    passed, said = [False] * count, ""
    for line in report.decode("utf-8", "replace").splitlines():
        mark, _, rest = line.partition(" ")
        if mark == key and rest.isascii() and rest.isdigit() and int(rest) < count:
            passed[int(rest)] = True
        elif mark == "cell":
            said = rest[:300]
    return passed, said
