"""Training as a user means it: a spec in, a run folder out, resumable at every moment."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.bases.memory import PeakMemory
from tunesmith.core.errors import SpecError
from tunesmith.core.progress import Quiet, Reporter
from tunesmith.engine.launchers import zero_stage
from tunesmith.engine.model import Model
from tunesmith.engine.processes import Processes, start
from tunesmith.engine.rundir import RunFolder, read_metrics
from tunesmith.engine.runs import ADAPTER, open_run, save_run
from tunesmith.engine.train import DevMetric, Trainer
from tunesmith.ladder.heads import give_head
from tunesmith.ladder.job import Job, environment, prepare, run_folder, trainable_model
from tunesmith.ladder.judging import labelling_judges, reward_judges
from tunesmith.ladder.objective import objective_of
from tunesmith.ladder.reinforcing import begin, critic_for
from tunesmith.ladder.teachers import teacher_of
from tunesmith.report.schema import Judge
from tunesmith.rollout.named import LABELLED
from tunesmith.rollout.own import own_answers
from tunesmith.spec import Spec


@dataclass(slots=True)
class Run:
    """A finished run. model: with the best weights on. result: what result.json holds."""

    folder: Path
    model: Model
    result: dict[str, Any]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def adapter(self) -> Path:
        """The folder with the adapter's files."""
        return self.folder / ADAPTER


def train(spec: Spec, *, resume: bool = False, overwrite: bool = False, reporter: Reporter | None = None, root: Path | None = None) -> Run:
    """Train what a spec says, into runs/NAME.

    resume: go on where the folder's run was stopped (its own spec is used; a finished run is returned as it is).
    Raises TunesmithError subclasses for everything a user can mend.
    """
    stage = zero_stage()
    processes = start(spec.base.device, spec.train.timeout)
    reporter = _speaker(reporter, processes)
    spec = _spread_as_asked(spec, stage, reporter)
    with run_folder(spec, root, processes) as folder:
        if overwrite and not resume:
            folder.clear()
        if resume and folder.started:
            spec = _resumed_spec(spec, folder)
            if folder.finished:
                if reporter:
                    reporter.line("resume", f"{folder.path} is finished; nothing to do")
                return Run(folder.path, open_run(folder.path, dtype=spec.base.dtype), folder.result())
        elif folder.started:
            folder.begin(spec, {})  # refuses, with what to do
        return train_job(prepare(spec, reporter=reporter), folder)


_OF_THE_MACHINES = ("sharding", "timeout")
"""Keys of `train` that say how processes work together, and may differ where a run goes on."""


def _resumed_spec(spec: Spec, folder: RunFolder) -> Spec:
    """The spec the run was begun with, on the dtype and threads it was begun with; a different one is refused."""
    begun, facts = folder.spec(), folder.environment()
    begun.train = begun.train.model_copy(update={key: getattr(spec.train, key) for key in _OF_THE_MACHINES})
    given, kept = spec.model_dump(), begun.model_dump()
    changed = [key for key in kept if given[key] != kept[key] and key != "name"]
    if changed:
        raise SpecError(
            f"the run was begun with another spec; it differs in: {', '.join(changed)}.",
            where=str(folder.path),
            hints=["Resume with the spec it was begun with, or give the changed one another name:  name=NAME"],
        )
    if facts.get("processes", 1) == folder.processes.count:
        torch.set_num_threads(facts["threads"])
    return on_dtype_of(begun, facts)


def on_dtype_of(spec: Spec, environment: Mapping[str, Any]) -> Spec:
    """The spec with the dtype that a run was begun in, so that a second matrix test cannot change it under way."""
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[environment["dtype"]]
    return spec.model_copy(update={"base": spec.base.model_copy(update={"dtype": short})})


def train_job(job: Job, folder: RunFolder, *, model: Model | None = None, resume_hint: str = "") -> Run:
    """Train a prepared job into its folder, going on from its last checkpoint if it has one.

    model: the job's start with the adapter to train on it already; by default the spec's adapter is attached.
    resume_hint: what to type to go on after an interruption, where it is not `tunesmith train`.
    """
    samples = objective_of(job.spec).samples
    rows, teacher, critic = () if samples else job.rows, teacher_of(job), critic_for(job)
    if model is None:
        model = trainable_model(job)
    else:
        give_head(job, model)
    if not folder.started:
        folder.begin(job.spec, environment(job.base))
    _say_processes(job, folder.processes)
    began = time.perf_counter()
    with PeakMemory() as memory:
        rollout = begin(job, model, folder, critic) if samples else None
        dev, feed = (rollout.dev, rollout.feed) if rollout else (_dev(job, model), own_answers(model, job.spec, rows, folder.processes))
        trainer = Trainer(
            model, feed, job.spec, folder, dev=dev, reporter=job.reporter, resume_hint=resume_hint, critic=critic, teacher=teacher
        )
        state = trainer.run(resume=True)
    if rollout is not None:
        rollout.save(folder)
    if folder.processes.first:
        save_run(model, folder.path)
    result = {
        "steps": state.step,
        "planned_steps": trainer.total,
        "best_step": state.best_step,
        f"dev_{job.metric_name}": state.best,
        "train_seconds": round(state.train_seconds, 3),
        "dev_seconds": round(state.dev_seconds, 3),
        "wall_seconds": round(time.perf_counter() - began, 3),
        "processes": folder.processes.count,
        "peak_memory_mb": round(folder.processes.largest(memory.gpu_mb or memory.mb), 1),
        "trainable_parameters": model.trainable(),
        "tokens": state.tokens,
        "supervised_tokens": state.supervised,
        "learning_rate": trainer.lr,
        "labels": list(job.task.labels),
        "judges": [judge.model_dump() for judge in _judges(job, folder)],
        LABELLED: job.labellers,
        "state": asdict(state),
    }
    folder.finish(result)
    best = f" · best dev {job.metric_name} {state.best:.3f} at step {state.best_step}" if state.best is not None else ""
    job.reporter.line("done", f"{state.step} steps in {state.train_seconds:.0f} s{best} · {folder.path / ADAPTER}")
    return Run(folder.path, model, result)


def _spread_as_asked(spec: Spec, stage: int, reporter: Reporter | None) -> Spec:
    """The spec with the sharding that a DeepSpeed configuration of this ZeRO stage amounts to."""
    if stage == 0 or spec.train.sharding == "fsdp":
        return spec
    if reporter:
        reporter.line(
            "launcher", f"asks for DeepSpeed ZeRO {stage}: weights, gradients and moments are spread by FSDP2 instead (train.sharding=fsdp)"
        )
    return spec.model_copy(update={"train": spec.train.model_copy(update={"sharding": "fsdp"})})


def _speaker(reporter: Reporter | None, processes: Processes) -> Reporter | None:
    """The first process speaks for all."""
    return reporter if processes.first else Quiet()


def _say_processes(job: Job, processes: Processes) -> None:
    if processes.several:
        holds = "each holds a piece of the base's blocks" if job.spec.train.sharding == "fsdp" else "each holds the whole base"
        job.reporter.line("processes", f"{processes.count} on {job.base.device.type}; {holds}")
    elif job.spec.train.sharding != "none":
        job.reporter.line("processes", "one, which holds the whole base: train.sharding is for several")


def _dev(job: Job, model: Model) -> DevMetric | None:
    if not any(record.shape != "text" for record in job.splits.dev):
        return None
    return lambda: job.judge_dev(model)


def _judges(job: Job, folder: RunFolder) -> list[Judge]:
    """Whoever rewarded the run's answers or labelled its preferences, by judging them."""
    rewarding = reward_judges(job.rewards, root=folder.path.parent) if job.rewards else []
    return [*rewarding, *labelling_judges(job.labellers)]
