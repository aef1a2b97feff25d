"""A run foreseen: memory, seconds, what fits, and what to do where it does not."""

from __future__ import annotations

import math
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunesmith.adapters.sites import blocks
from tunesmith.bases.fingerprint import weight_files
from tunesmith.bases.hardware import pick_device, pick_dtype
from tunesmith.bases.source import locate
from tunesmith.core.errors import AdapterError, RunError, SpecError
from tunesmith.core.progress import Quiet, Reporter
from tunesmith.engine.measuring import MB, held, peak_of, room
from tunesmith.engine.model import Model
from tunesmith.engine.planning import FULL, Training, plan_training
from tunesmith.engine.rundir import RunFolder
from tunesmith.engine.runs import is_run
from tunesmith.evaluation.evaluate import System, evaluate
from tunesmith.evaluation.prompting import zero_shot
from tunesmith.ladder.data import take
from tunesmith.ladder.job import Job, prepare, trainable_model
from tunesmith.ladder.objective import compares, objective_of
from tunesmith.ladder.preferring import judge_answers
from tunesmith.ladder.teachers import teacher_of
from tunesmith.spec import Spec

_ASKED = 16
"""Dev questions that are asked to see what an evaluation takes."""

_AT_ONCE = 32
"""Questions that are answered at once, so that memory grows with their number up to this."""

_FOUR_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits of a weight in blocks of 64 with doubly quantised scales (Dettmers et al. 2023, QLoRA, sec. 3)."""


_SHARE = 0.2
"""Of the peak, that the weights take before fewer bits of them are proposed."""


@dataclass(slots=True)
class Plan:
    """What a run will take. Bytes and seconds.

    training: the prediction of its steps, with the parts of its memory. evaluation: bytes at the peak of an evaluation on the dev
    samples, 0 without one; evaluation_seconds: of one, and how many there are. advice: lines on what to change, the best
    first, empty where nothing has to be.
    """

    base: str
    device: str
    adapter: str
    trainable: int
    pack_tokens: int
    training: Training
    evaluation: int = 0
    evaluation_seconds: float = 0.0
    evaluations: int = 0
    advice: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Bytes that the run will report as its peak."""
        return max(self.training.peak, self.evaluation)

    @property
    def fits(self) -> bool:
        return self.peak <= FULL * self.training.available

    @property
    def total_seconds(self) -> float:
        """Of all steps and evaluations."""
        return self.training.steps * self.training.step_seconds + self.evaluations * self.evaluation_seconds

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with what follows from them."""
        training = {**asdict(self.training), "peak": self.training.peak}
        return {**asdict(self), "training": training, "peak": self.peak, "fits": self.fits, "total_seconds": self.total_seconds}

    def __str__(self) -> str:
        words = (
            f"peak {gb(self.peak)} of {gb(self.training.available)}, {self.training.step_seconds:.2f} s a step, {clock(self.total_seconds)}"
        )
        return "\n".join([f"{words}; {'fits' if self.fits else 'does not fit'}", *(f"  {line}" for line in self.advice)])


def plan(spec: Spec, *, reporter: Reporter | None = None) -> Plan:
    """Predict peak memory and time of `train(spec)`, by measuring small parts of it. Nothing is written but caches.

    Raises what training would raise for a bad spec or bad data, SpecError for an objective whose answers are sampled, and RunError
    where not even the base's weights fit.
    """
    reporter = reporter or Quiet()
    _refuse_sampling(spec)
    _refuse_too_large(spec, reporter)
    job = prepare(spec, reporter=reporter)
    rows, teacher = job.rows, teacher_of(job)
    model = trainable_model(job)
    training = plan_training(model, rows, spec, teacher)
    out = Plan(
        base=job.base.describe(),
        device=str(job.base.device),
        adapter=model.adapter.expression,
        trainable=model.trainable(),
        pack_tokens=spec.train.pack_tokens,
        training=training,
    )
    _add_evaluation(out, job, model)
    out.advice = _advice(out, job, model)
    return out


def _add_evaluation(out: Plan, job: Job, model: Model) -> None:
    """What judging the dev samples takes, from a few of them."""
    train, steps, memory = job.spec.train, out.training.steps, out.training.memory
    records = [record for record in take(job.splits.dev, train.dev_questions, train.seed) if record.shape != "text"]
    if not records:
        return
    every = train.evaluate_every or max(1, steps // 8)
    out.evaluations = steps // every + (steps % every > 0)
    asked = records[:_ASKED]
    device, rows = job.base.device, job.dev_rows[:_ASKED] if compares(objective_of(job.spec)) else []
    before = held(device)
    with peak_of(device) as peak:
        began = time.perf_counter()
        if rows:
            judge_answers(job, model, rows)
        else:
            evaluate(System("dev", model, zero_shot(job.task)), job.task, asked)
        seconds = time.perf_counter() - began
        rise = peak() - before
    share = min(len(records), _AT_ONCE) / len(asked) if len(records) > len(asked) else 1.0
    kept = before + memory.optimizer if device.type == "cuda" else memory.total  # a CPU's allocator gives little back
    out.evaluation = kept + round(max(0, rise) * share)
    out.evaluation_seconds = seconds * len(records) / len(asked)


# What does not fit, and what cannot be foreseen


def _refuse_sampling(spec: Spec) -> None:
    """Answers that do not exist yet have no length; nor is it known how many of them will be learned from."""
    samples = objective_of(spec).samples
    if not samples and not spec.rollout.own:
        return
    what = f"objective {objective_of(spec).name} learns from answers that the policy samples, and their lengths cannot be foreseen."
    hints = ["Try a few steps; the run says its peak and its seconds:  tunesmith train SPEC name=try train.steps=2"]
    if not samples:
        hints.append("Or plan the steps on the texts of the data:  rollout.own=0")
    raise SpecError(what, where="objective" if samples else "rollout.own", hints=hints)


def _refuse_too_large(spec: Spec, reporter: Reporter) -> None:
    """Raise RunError where the base's weights alone are more than there is memory for: nothing of them is loaded."""
    source = spec.base.model
    while is_run(source):
        source = RunFolder(Path(source)).spec().base.model
    device = pick_device(spec.base.device)
    folder = locate(source, revision=spec.base.revision, remote_code=spec.base.trust_remote_code, reporter=reporter).folder
    values, inside = _values(folder)
    dtype, _ = pick_dtype(device, spec.base.dtype)
    four = values * dtype.itemsize - inside * (dtype.itemsize - _FOUR_BITS / 8)
    weights, available = four if spec.base.quantise else values * dtype.itemsize, room(device)
    if weights <= FULL * available:
        return
    largest = FULL * available * values / weights
    kept_in = spec.base.quantise or str(dtype).removeprefix("torch.")
    raise RunError(
        f"the weights alone take {gb(weights)} in {kept_in}, and there are {gb(available)} of memory.",
        where=source,
        hints=[
            f"Nearest that works here:  a base of less than {_count(largest)} parameters (this one has {_count(values)})",
            *([] if spec.base.quantise else [f"In 4 bits the weights would take about {gb(four)}:  base.quantise=nf4"]),
        ],
    )


def _values(folder: Path) -> tuple[int, int]:
    """Values in the weight files, and how many of them are matrices of repeated layers; only their headers are read."""
    from safetensors import SafetensorError, safe_open

    total = inside = 0
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    shape = opened.get_slice(name).get_shape()
                    total += math.prod(shape)
                    inside += math.prod(shape) if len(shape) == 2 and re.search(r"\.\d+\.", name) else 0
        except (SafetensorError, OSError):
            return 0, 0  # loading says what is wrong with it
    return total, inside


def _advice(out: Plan, job: Job, model: Model) -> list[str]:
    """What to change, the least first: nothing where the run fits."""
    if out.fits:
        return []
    training, memory = out.training, out.training.memory
    free = FULL * training.available
    elsewhere = max(training.update, out.evaluation if out.evaluation > memory.total else 0)  # not a matter of the micro-batch
    lines = []
    if training.fitting_pack is not None and elsewhere <= free:
        lines.append(f"smaller micro-batches, the same step:  train.pack_tokens={training.fitting_pack}")
    again = training.checkpointing
    if again is not None:
        saved = f"peak {gb(again.peak)} instead of {gb(training.peak)}, {again.step_seconds / training.step_seconds - 1:.0%} slower"
        lines.append(f"{'' if again.peak <= free else 'not enough alone: '}activations computed again ({saved}):  train.checkpointing=true")
    if model.adapter.in_place:
        state = memory.optimizer + memory.gradients
        lines.append(f"training an adapter instead of the base ({gb(state)} of its state are gone):  adapter=lora(rank=16)")
    if training.fitting_pack is None:
        lines.append(
            f"shorter rows (the longest has {training.longest_row:,} tokens):  data.max_tokens=...  data.overlong=truncate-left-of-prompt"
        )
    lines += _smaller_base(training, job, free, frozen=not model.adapter.in_place)
    return lines


def _smaller_base(training: Training, job: Job, free: float, *, frozen: bool) -> list[str]:
    """A base that would fit as the spec stands, by the bytes of a parameter, and this one in 4 bits, with their figures."""
    memory, base = training.memory, job.base
    rest = max(training.peak, 1) - memory.process
    count = base.parameters * max(0.0, free - memory.process) / rest
    linear = sum(m.weight.numel() for layer in _layers(base.model) for m in layer.modules() if isinstance(m, torch.nn.Linear))
    smaller = memory.weights - round(linear * (base.dtype.itemsize - _FOUR_BITS / 8))
    peak = training.peak - memory.weights + smaller
    lines = [f"a smaller base of the family, about {_count(count)} parameters or less (this one has {_count(base.parameters)})"]
    if linear and frozen and not job.start.adapters and memory.weights > _SHARE * training.peak:
        lines.append(
            f"{'' if peak <= free else 'not enough alone: '}this base's blocks in 4 bits (weights {gb(smaller)} instead of "
            f"{gb(memory.weights)}, peak {gb(peak)}):  base.quantise=nf4"
        )
    return lines


def _layers(model: Any) -> list[torch.nn.Module]:
    try:
        return list(blocks(model)[1])
    except AdapterError:
        return []


def gb(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GB" if count >= 0.95 * 2**30 else f"{count / MB:,.0f} MB"


def clock(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _count(parameters: float) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M" if parameters >= 1e6 else f"{parameters:,.0f}"
