"""Small measurements of a model in training: bytes kept for the backward, peak memory and seconds of one micro-batch.

Bytes are counted as tensors are saved and are not kept, so that a micro-batch which would not fit can be counted too.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from tunesmith.adapters.sites import blocks
from tunesmith.bases.memory import PeakMemory
from tunesmith.core.errors import AdapterError
from tunesmith.engine.optimizer import Optimizer
from tunesmith.spec import TrainSpec

MB = 2**20

_OPTIMIZED = 8_000_000
"""Values that the optimiser's time is measured on."""


@dataclass(frozen=True, slots=True)
class Saved:
    """Bytes that a forward keeps for its backward: up to the end of the last block, and after it (the head)."""

    blocks: int
    head: int

    @property
    def total(self) -> int:
        return self.blocks + self.head


@dataclass(frozen=True, slots=True)
class Passed:
    """One micro-batch, forward and backward: seconds of both, and the most memory that was held then, in bytes."""

    forward_seconds: float
    backward_seconds: float
    peak: int

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds


def count_saved(model: PreTrainedModel, forward: Callable[[], object]) -> Saved:
    """What `forward` keeps for a backward, parameters and buffers left out. Nothing is kept, so no backward can follow."""
    own = {tensor.untyped_storage()._cdata for tensor in tensors_of(model)}
    seen: dict[int, StorageWeakRef] = {}
    bytes_seen, at_end = 0, None

    def pack(tensor: Tensor) -> None:
        nonlocal bytes_seen
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in own and (key not in seen or seen[key].expired()):  # an address is taken again once its storage is gone
            seen[key] = StorageWeakRef(storage)
            bytes_seen += storage.nbytes()

    def ended(*_: object) -> None:
        nonlocal at_end
        at_end = bytes_seen

    def unpack(_: object) -> Tensor:
        raise RuntimeError("what was counted was not kept")

    last = last_block(model)
    hook = None if last is None else last.register_forward_hook(ended)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            forward()
    finally:
        if hook is not None:
            hook.remove()
    body = bytes_seen if at_end is None else at_end
    return Saved(body, bytes_seen - body)


def run_once(device: torch.device, forward: Callable[[], Tensor], clear: Callable[[], None]) -> Passed:
    """Run a micro-batch. forward: gives the loss. clear: forgets the gradients."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), peak_of(device) as peak:
        began = time.perf_counter()
        loss = forward()
        wait(device)
        between = time.perf_counter()
        loss.backward()
        wait(device)
        ended = time.perf_counter()
    del loss
    clear()
    return Passed(between - began, ended - between, peak())


@contextmanager
def peak_of(device: torch.device) -> Iterator[Callable[[], int]]:
    """Most bytes held within the block, as a run reports them: of torch's allocator on a GPU, resident ones on a CPU."""
    with PeakMemory() as memory:
        yield lambda: int((memory.gpu_mb if device.type == "cuda" else memory.mb) * MB)


def kept(device: torch.device) -> int:
    """Bytes held now, after the C library was asked to give back what it has free. Other libraries than glibc are not asked."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    return held(device)


def held(device: torch.device) -> int:
    """Bytes held now, by the same measure."""
    with peak_of(device) as peak:
        return peak()


def room(device: torch.device) -> int:
    """Bytes that a run started in place of this process could hold on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    import psutil

    from tunesmith.bases.hardware import memory_total_mb

    return min(psutil.virtual_memory().available + psutil.Process().memory_info().rss, memory_total_mb() * MB)


def update_seconds(parameters: Iterable[nn.Parameter], spec: TrainSpec) -> float:
    """Seconds of one update, from the optimiser itself on copies of some of the parameters."""
    every = list(parameters)
    values = 0
    some: list[nn.Parameter] = []
    for parameter in sorted(every, key=lambda p: p.numel()):
        if some and values + parameter.numel() > _OPTIMIZED:
            break
        values += parameter.numel()
        some.append(nn.Parameter(parameter.detach().clone()))
    optimizer = Optimizer([(str(index), parameter) for index, parameter in enumerate(some)], spec)
    seconds = []
    for _ in range(4):
        for parameter in some:
            parameter.grad = torch.ones_like(parameter)
        wait(parameter.device)
        began = time.perf_counter()
        optimizer.collect()
        optimizer.gradient_norm()
        optimizer.step(0.0, 0.5)
        wait(parameter.device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:]) * sum(p.numel() for p in every) / values


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    return sum({s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


def last_block(model: PreTrainedModel) -> nn.Module | None:
    """The last of the repeated blocks, None where they are not found."""
    try:
        return blocks(model)[1][-1]
    except AdapterError:
        return None


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
