"""Several processes that train as one: who they are, and the few things that they tell one another.

Every process computes its share of a step; gradients and a handful of numbers are summed over all of them. Alone there
is nothing to tell: each of these calls then returns at once. Nothing is pickled: what is told is tensors and JSON.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tunesmith.core.errors import RunError
from tunesmith.engine import launchers

BUCKET = 2**23
"""Values of a gradient that travel together: 32 MB of fp32."""

TIMEOUT = 600.0
"""Seconds that a process waits for the others where nothing else is said."""


class Processes:
    """rank: this process, counted from 0; the first alone writes. count: of all machines. device: this one's, where there
    are several. timeout: seconds that one waits for the others."""

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device | None = None, timeout: float = TIMEOUT) -> None:
        self.rank, self.count, self.device, self.timeout = rank, count, device, timeout

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.count > 1

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes, the same in each of them to the bit."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def sum_named(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sums over all processes of numbers with names, which need not be the same ones in each."""
        out: dict[str, float] = {}
        for part in self.gathered(dict(values)):
            for name, value in part.items():
                out[name] = out.get(name, 0.0) + value
        return out

    def largest(self, value: float) -> float:
        """The largest over all processes."""
        return self._reduced([value], dist.ReduceOp.MAX)[0]

    def meet(self) -> None:
        """Wait until every process is here."""
        self.sum([0.0])

    def told(self, value: Any) -> Any:
        """The first process's value (plain values, as JSON has them), in every process."""
        return self.gathered(value if self.first else None)[0]

    def gathered(self, value: Any) -> list[Any]:
        """Every process's value (plain values, as JSON has them), in the order of ranks."""
        if not self.several:
            return [value]
        own = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(size) for size in self.sum([float(len(own)) if rank == self.rank else 0.0 for rank in range(self.count)])]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(own)] = own
        padded = padded.to(self.device)
        parts = [torch.empty_like(padded) for _ in sizes]
        with self._told_apart():
            dist.all_gather(parts, padded)
        return [json.loads(bytes(part[:size].tolist()).decode()) for part, size in zip(parts, sizes, strict=True)]

    def add_up(self, values: Sequence[Tensor]) -> None:
        """Sum tensors of one dtype over all processes, in place, many of them in one message."""
        if not self.several:
            return
        for bucket in _buckets(values):
            flat = torch.cat([value.reshape(-1) for value in bucket])
            with self._told_apart():
                dist.all_reduce(flat)
            for value, summed in zip(bucket, flat.split([value.numel() for value in bucket]), strict=True):
                value.copy_(summed.view_as(value))

    def same(self, what: str, value: Any, hints: Sequence[str] = ()) -> None:
        """Raises RunError, in every process, unless all hold the same value."""
        held = self.gathered(value)
        odd = [rank for rank, other in enumerate(held) if other != held[0]]
        if odd:
            raise RunError(f"processes 0 and {odd[0]} do not hold the same {what}.", hints=hints)

    def _reduced(self, values: Sequence[float], how: Any) -> list[float]:
        if not self.several:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self._told_apart():
            dist.all_reduce(told, how)
        out: list[float] = told.tolist()
        return out

    @contextmanager
    def _told_apart(self) -> Iterator[None]:
        """Say in our words that another process is gone or late."""
        try:
            yield
        except RuntimeError as cause:
            late = "timed out" in str(cause).lower() or "timeout" in str(cause).lower()
            if late:
                what = f"process {self.rank} waited {self.timeout:,.0f} s for the others."
                hints = ["If they were at work all the time, give them longer:  train.timeout=3600"]
            else:
                what = f"process {self.rank} stops, because another process of this run has ended."
                hints = ["Its own message says why. Then go on with  --resume  from the last whole checkpoint."]
            raise RunError(what, hints=hints) from None


ALONE = Processes()
_current = ALONE


def current() -> Processes:
    """The processes that this one trains with; itself alone until `start` has found others."""
    return _current


def launched() -> int:
    """How many processes a launcher (`accelerate launch`, `torchrun`) started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def start(device: str = "auto", timeout: float = TIMEOUT) -> Processes:
    """Join the others that the launcher started, through accelerate; alone where there are none.

    device: as in a spec; "auto" gives every process a GPU of its own, or the CPU. timeout: seconds that one waits for the
    others. Raises RunError for a device or a configuration of the launcher that this cannot be done with.
    """
    global _current
    if launched() == 1 or _current.several:
        return _current
    launchers.check()
    on_cpu = _on_cpu(device)
    from accelerate import PartialState

    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"  # under it accelerate counts one process on a CPU
    try:
        state = PartialState(cpu=on_cpu, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as cause:
        hints = ["Can every machine reach the first one, under the address and port that the launcher was given?"]
        raise RunError(f"the processes did not find one another: {str(cause).splitlines()[0]}", hints=hints) from None
    if state.num_processes != launched():
        raise RunError(f"the launcher started {launched()} processes, and accelerate made {state.num_processes} of them.")
    found = torch.device("cpu") if on_cpu else state.device
    _current = Processes(state.process_index, state.num_processes, found, timeout)
    atexit.register(_part)
    return _current


def _part() -> None:
    """End the backend's threads before the interpreter does."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> None:
    """The last call of a process that trained with others: it ends here, with this exit code. Alone, nothing happens.

    Whatever still holds a process group keeps its threads alive, and one that wants the interpreter while that is being
    taken down aborts the process (Python before 3.14): a finished run would then be a failed one. So what was registered to
    run at exit runs, what was said is written, and the process ends without taking anything down.
    """
    if not _current.several:
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _on_cpu(device: str) -> bool:
    if device not in ("auto", "cpu", "cuda"):
        raise RunError(
            f"base.device={device} names one device, and every process needs its own.",
            hints=["Leave it to the launcher:  base.device=auto", "Or train on one process."],
        )
    return device == "cpu" or not torch.cuda.is_available()


def _buckets(values: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in order, in groups of about BUCKET values."""
    group: list[Tensor] = []
    size = 0
    for value in values:
        if group and size + value.numel() > BUCKET:
            yield group
            group, size = [], 0
        group.append(value)
        size += value.numel()
    if group:
        yield group
