"""Predicting a run: its peak memory, the seconds of a step and of the whole, from small measurements of its own steps.

No table of constants: the run's own rows are packed as the run packs them, what a forward keeps for its backward is counted
on the largest pack of a sample of steps, and a pack is run once for its seconds and for what comes on top (gradients on
their way, workspace of kernels, what an allocator does not give back). A pack that might not fit is counted and not run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field
from functools import partial
from statistics import median

import torch
from torch import Tensor

from tunesmith.adapters import states_width
from tunesmith.adapters.sites import blocks
from tunesmith.core.row import Row
from tunesmith.data.sharing import share_prefix
from tunesmith.engine.compiling import compiled, decide
from tunesmith.engine.dealing import deal
from tunesmith.engine.feed import mean_tokens, rows_of_step, total_steps
from tunesmith.engine.losses import Beside, loss_of, parts_of, weight_of
from tunesmith.engine.measuring import (
    Passed,
    Saved,
    bytes_of,
    count_saved,
    held,
    kept,
    last_block,
    room,
    run_once,
    tensors_of,
    update_seconds,
)
from tunesmith.engine.memory import recomputing
from tunesmith.engine.model import Model
from tunesmith.engine.teaching import taught
from tunesmith.engine.units import parted
from tunesmith.spec import Spec

_SAMPLE = 48
"""Steps whose packs are looked at, evenly spread over the run."""

_SECONDS = 6.0
"""A pack that takes longer than this, forward and backward, is not run whole."""

_CAUTION = 1.5
"""A pack is run only where this many times what it keeps would fit."""

_ALIKE = 4
"""Of a range of lengths, kernels of one in so many serve the others too; seen with oneDNN, where growth levels off there."""

FULL = 0.95
"""Share of the memory there is that a run may take."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the parts that make up the peak of a forward and backward. process: libraries, rows and whatever else was held
    before. gradients: those kept beside the activations. workspace: what comes on top while a pack is computed. kernels: what the
    CPU's matrix library keeps for every length of pack that it has met."""

    process: int
    weights: int
    optimizer: int
    gradients: int
    activations: int
    head: int
    workspace: int
    kernels: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


@dataclass(frozen=True, slots=True)
class Option:
    """What a change of the spec would come to: peak bytes and seconds of a step."""

    peak: int
    step_seconds: float


@dataclass(slots=True, kw_only=True)
class Training:
    """The prediction of a run's steps.

    memory: at the peak of a forward and backward. update: bytes at the peak of the optimiser's update. largest_pack: tokens of
    the largest micro-batch. fitting_pack: tokens of the largest that fits, None where not even the longest row does.
    checkpointing: what train.checkpointing=true would come to, None where it is on already or the model cannot.
    measured_tokens: of the pack that was run, 0 where none could be.
    """

    steps: int
    step_tokens: float
    packs_a_step: float
    largest_pack: int
    longest_row: int
    memory: Memory
    update: int
    available: int
    step_seconds: float
    fitting_pack: int | None
    checkpointing: Option | None
    compiled: bool
    compiled_why: str
    measured_tokens: int

    @property
    def peak(self) -> int:
        return max(self.memory.total, self.update)


@dataclass(frozen=True, slots=True)
class _Step:
    """The rows of a step, and the trees and tokens of each of its micro-batches."""

    rows: list[Row]
    batches: list[list[Row]]
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class _Line:
    """A quantity as a line over tokens."""

    start: float
    slope: float

    def __call__(self, tokens: float) -> float:
        return self.start + self.slope * tokens

    @classmethod
    def through(cls, points: Sequence[tuple[int, float]]) -> _Line:
        """Through the two points, neither falling nor starting below zero; through the last one and zero where they forbid it."""
        (x, y), (u, v) = points[0], points[-1]
        slope = (v - y) / (u - x) if u > x else -1.0
        if slope < 0 or v - slope * u < 0:
            return cls(0.0, v / u)
        return cls(v - slope * u, slope)


def plan_training(model: Model, rows: Sequence[Row], spec: Spec, teacher: Model | None = None) -> Training:
    """Predict the steps of a run of `model`, whose last adapter is to be trained, over rows. The weights stay as they are.

    teacher: the model whose probabilities the objective reads, if it does.
    """
    return _Planner(model, rows, spec, teacher).plan()


@dataclass(slots=True)
class _Found:
    """What was measured. before: bytes held before any of it. passing: bytes of gradients in the parameters' own dtype. in_place:
    the base's weights are trained. again: the blocks, where they are computed again. kernels: bytes that stay for each new
    length of pack; making: seconds that making them takes. counted: tokens and saved bytes of packs; counting: tokens and
    seconds of those forwards. run: tokens and what a forward and backward took."""

    before: int
    passing: int
    in_place: bool
    again: _Again | None
    kernels: float = 0.0
    making: float = 0.0
    counted: list[tuple[int, Saved]] = field(default_factory=list)
    counting: list[tuple[int, float]] = field(default_factory=list)
    run: list[tuple[int, Passed]] = field(default_factory=list)

    def saved(self, tokens: int, again: _Again | None) -> Saved:
        """Bytes kept for the backward of a pack of so many tokens."""
        body, head = (_Line.through([(n, getattr(saved, part)) for n, saved in self.counted])(tokens) for part in ("blocks", "head"))
        return Saved(round(body if again is None else again.saved(body, tokens)), round(head))

    def above(self, tokens: int) -> float:
        """Bytes that running a pack takes beyond what it keeps."""
        points = [(n, max(0, one.peak - self.before - self._held(n, self.again))) for n, one in self.run]
        return _Line.through(points)(tokens) if points else self.passing

    def peak(self, tokens: int, again: _Again | None) -> float:
        """Bytes on top of what was held before."""
        return self._held(tokens, again) + self.above(tokens)

    def _held(self, tokens: int, again: _Again | None) -> int:
        """Kept activations go as gradients come."""
        return max(self.saved(tokens, again).total, self.passing)

    def seconds(self, tokens: int) -> float:
        """Of a forward and backward; where none could be run, from the forward alone: a backward has as many products for the
        inputs, and as many again for weights that are trained."""
        forward = 3.0 if self.in_place else 2.0
        points = [(n, one.seconds) for n, one in self.run] or [(n, forward * seconds) for n, seconds in self.counting]
        return _Line.through(points)(tokens)

    def fitting(self, free: float, longest: int, most: int) -> int | None:
        """Tokens of the largest pack that takes no more than `free` bytes, at most `most`; None where the longest row does not fit."""
        if self.peak(longest, self.again) > free:
            return None
        low, high = longest, max(longest, most)
        while high - low > 8:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(middle, self.again) <= free else (low, middle)
        return max(longest, most) if self.peak(max(longest, most), self.again) <= free else low


@dataclass(frozen=True, slots=True)
class _Again:
    """Blocks that are computed again in the backward. row: bytes of a block's input for a token. blocks: how many are trained through."""

    row: int
    blocks: int

    def saved(self, body: float, tokens: int) -> float:
        """Bytes: the inputs of all blocks, and what one of them keeps. body: bytes that all of them keep otherwise."""
        return self.row * self.blocks * tokens + body / self.blocks


class _Planner:
    def __init__(self, model: Model, rows: Sequence[Row], spec: Spec, teacher: Model | None) -> None:
        self.model, self.spec, self.teacher = model, spec, teacher
        self.rows, others = parted(rows)
        self.drifts = bool(others)  # answers to other prompts are read without gradient before each step
        self.device = model.base.device
        self.parts = parts_of(spec.objective)
        self.objective, self.options = self.parts[0].objective, self.parts[0].options
        forward = model.forward
        self.size = forward.size
        self.shares = spec.train.neftune is None and forward.packed and forward.causal
        self.own = [parameter for _, parameter in model.adapter.named_parameters()]
        self.total = total_steps(spec, len(rows))

    def plan(self) -> Training:
        train, steps = self.spec.train, self._steps()
        tokens = int(train.batch * self.total * mean_tokens(self.rows))
        compiles, why = decide(train.compile if train.sharding == "none" else "off", self.model.base.model, tokens)
        found, available = self._measured(steps, compiles)
        packs = [n for step in steps for n in step.tokens]
        largest, longest = max(packs), max(self.size(row) for step in steps for row in step.rows)
        several = any(len(step.tokens) > 1 for step in steps)
        lengths = self._lengths(packs, len(steps))
        kernels = round(found.kernels * max(0.0, lengths - len(found.run)))
        memory, update = self._memory(found, largest, several, kernels)
        seconds = (sum(map(found.seconds, packs)) + found.making * len(packs) * (len(set(packs)) > 1)) / len(steps)
        if self.drifts and found.run:
            seconds *= 1 + found.run[-1][1].forward_seconds / found.run[-1][1].seconds
        seconds += update_seconds(self.own, train)
        fixed = memory.total - round(found.peak(largest, found.again))
        return Training(
            steps=self.total,
            step_tokens=sum(packs) / len(steps),
            packs_a_step=len(packs) / len(steps),
            largest_pack=largest,
            longest_row=longest,
            memory=memory,
            update=update,
            available=available,
            step_seconds=seconds,
            fitting_pack=found.fitting(FULL * available - fixed, longest, max(sum(step.tokens) for step in steps)),
            checkpointing=self._checkpointing(found, largest, fixed, update, seconds),
            compiled=compiles,
            compiled_why=why,
            measured_tokens=max((n for n, _ in found.run), default=0),
        )

    # The run's micro-batches

    def _steps(self) -> list[_Step]:
        """A sample of the steps as the run deals them."""
        train, out = self.spec.train, []
        for step in sorted({round(at * (self.total - 1) / max(1, _SAMPLE - 1)) for at in range(_SAMPLE)}):
            rows = [self.rows[index] for index in rows_of_step(step, len(self.rows), train.batch, train.seed)]
            longest = max(map(self.size, rows))
            dealt = deal(partial(self._trees, rows), self.size, max(train.pack_tokens, longest), longest, 1)
            out.append(_Step(rows, dealt.batches, dealt.tokens))
        return out

    def _trees(self, rows: Sequence[Row], budget: int) -> list[Row]:
        return [shared.row for shared in share_prefix(rows, max_tokens=budget)] if self.shares else list(rows)

    def _part(self, step: _Step, share: float, budget: int) -> list[Row]:
        """Some of a step's rows as a micro-batch of about this share of the largest one's tokens, at least one row."""
        count, rows = len(step.rows), step.rows
        while count > 1 and sum(map(self.size, self._trees(rows[:count], budget))) > share * budget:
            count -= max(1, count // 16)
        return self._trees(rows[:count], budget)

    # Measuring

    def _measured(self, steps: Sequence[_Step], compiles: bool) -> tuple[_Found, int]:
        """Count and run a small pack and the largest one, or as much of it as fits and does not take long."""
        model, train = self.model, self.spec.train
        before, available = held(self.device), room(self.device)
        found = _Found(before, bytes_of(self.own), model.adapter.in_place, self._again() if train.checkpointing else None)
        step, at = max(((step, at) for step in steps for at in range(len(step.tokens))), key=lambda one: one[0].tokens[one[1]])
        whole, tokens = step.batches[at], step.tokens[at]
        small = self._part(step, 0.25, tokens)
        with ExitStack() as stack:
            stack.callback(model.adapter.train, False)
            model.adapter.train()
            for manager in (
                model.active(),
                model.forward.neftune(train.neftune, train.neftune_noise),
                compiled(model.base.model, compiles),
                model.forward.held(),
            ):
                stack.enter_context(manager)
            for batch in [small] if len(small) == len(whole) else [small, whole]:
                began, size = time.perf_counter(), self._tokens(batch)
                found.counted.append((size, count_saved(model.base.model, partial(self._loss, batch))))
                found.counting.append((size, time.perf_counter() - began))
            with recomputing(model.base.model, train.checkpointing):
                self._run(found, small, step, whole, available)
        return found, available

    def _run(self, found: _Found, small: list[Row], step: _Step, whole: list[Row], available: int) -> None:
        """Run what fits: the small pack, then the largest share of the large one."""
        tokens = self._tokens(whole)

        def fits(count: int) -> bool:
            return found.before + _CAUTION * found._held(count, found.again) < FULL * available

        def run(batch: list[Row]) -> None:
            for _ in range(2):  # the first time also prepares kernels and asks the system for memory
                passed = run_once(self.device, partial(self._loss, batch), self._clear)
            found.run.append((self._tokens(batch), passed))

        if not fits(self._tokens(small)):
            return
        run(small)
        share = min(1.0, _SECONDS / max(found.seconds(tokens), 1e-9))
        while share > 0.3 and not fits(round(share * tokens)):
            share *= 0.8
        if share > 0.3 and tokens > self._tokens(small):
            run(whole if share == 1.0 else self._part(step, share, tokens))
        if self.device.type == "cpu":
            found.kernels, found.making = self._kernels(step, found, {n for n, _ in found.run})

    def _kernels(self, step: _Step, found: _Found, met: set[int]) -> tuple[float, float]:
        """Of a pack of a length not met before, for whose shapes oneDNN makes kernels: bytes that stay, seconds that it takes longer."""
        parts = [self._part(step, share, max(met)) for share in (0.96, 0.88, 0.8)]
        fresh = {n: part for part in parts if (n := self._tokens(part)) not in met}
        if not fresh:
            return 0.0, 0.0
        before = kept(self.device)
        longer = [run_once(self.device, partial(self._loss, part), self._clear).seconds - found.seconds(n) for n, part in fresh.items()]
        return max(0, kept(self.device) - before) / len(fresh), max(0.0, median(longer))

    def _lengths(self, packs: Sequence[int], steps: int) -> float:
        """Lengths of pack that the run meets, less as more of them are like those before: kernels of like shapes are shared."""
        span = max(packs) - min(packs) + 1
        met = len(set(packs)) if steps == self.total else span * (1 - math.exp(-len(packs) / steps * self.total / span))
        alike = max(1.0, span / _ALIKE)
        return alike * (1 - math.exp(-met / alike))

    def _loss(self, batch: list[Row]) -> Tensor:
        forward = self.model.forward
        logging = self.spec.train.log_every == 1
        told = None if self.teacher is None else taught(self.teacher, batch)
        beside = Beside(torch.zeros(()), teacher=told, others=self.parts[1:])
        loss = loss_of(forward, self.model.adapter, forward.pack(batch), self.objective, self.options, logging=logging, beside=beside)
        return loss.total / max(1.0, weight_of(batch, self.objective, self.options) or 1.0)

    def _clear(self) -> None:
        for parameter in self.own:
            parameter.grad = None

    def _tokens(self, batch: Sequence[Row]) -> int:
        return sum(map(self.size, batch))

    # What follows

    def _memory(self, found: _Found, largest: int, several: bool, kernels: int) -> tuple[Memory, int]:
        """The parts at the peak of a forward and backward, and the bytes at the peak of the update."""
        values = sum(p.numel() for p in self.own)
        masters = 4 * sum(p.numel() for p in self.own if p.dtype != torch.float32)
        weights = bytes_of(tensors_of(self.model.base.model))
        saved, above = found.saved(largest, found.again), found.above(largest)
        extra = max(0, found.passing - saved.total)  # where gradients outweigh the activations that they replace
        memory = Memory(
            process=max(0, found.before - weights),
            weights=weights,
            optimizer=masters + 8 * values,
            gradients=extra + (4 * values if several else 0),
            activations=saved.blocks,
            head=saved.head,
            workspace=round(above),
            kernels=kernels,
        )
        return memory, memory.process + weights + memory.optimizer + kernels + 8 * values  # fp32 gradients, and a root of every value

    def _again(self) -> _Again:
        """The blocks that computing again concerns: from the first that something trained lies in."""
        _, layers = blocks(self.model.base.model)
        own = {id(parameter) for parameter in self.own}
        first = next((n for n, layer in enumerate(layers) if any(id(p) in own for p in layer.parameters())), len(layers) - 1)
        if any(id(parameter) in own for parameter in self.model.base.model.get_input_embeddings().parameters()):
            first = 0
        return _Again(states_width(self.model.base.model) * self.model.base.dtype.itemsize, len(layers) - first)

    def _checkpointing(self, found: _Found, largest: int, fixed: int, update: int, seconds: float) -> Option | None:
        model = self.model.base.model
        if found.again is not None or not model.supports_gradient_checkpointing or last_block(model) is None or not found.run:
            return None
        passed = found.run[-1][1]
        peak = fixed + round(found.peak(largest, self._again()))
        return Option(max(peak, update), seconds * (1 + passed.forward_seconds / passed.seconds))
