"""A job: a spec made real. The base is loaded, the records are read and split, the task is known, rows can be made."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tunesmith.adapters import plan
from tunesmith.bases import Base, load_base
from tunesmith.bases.hardware import hardware, pick_device, pick_dtype
from tunesmith.core.errors import DataError, SpecError
from tunesmith.core.packages import cache_dir
from tunesmith.core.progress import Quiet, Reporter
from tunesmith.core.record import Record
from tunesmith.core.row import Row
from tunesmith.data.lengths import LengthReport, fit
from tunesmith.data.rowcache import RowCache
from tunesmith.data.rows import iter_rows, notes_of
from tunesmith.data.rowstore import RowStore
from tunesmith.engine.model import Model, attach_to
from tunesmith.engine.processes import ALONE, Processes, current
from tunesmith.engine.rundir import RunFolder
from tunesmith.engine.runs import is_run, open_run
from tunesmith.evaluation.classifying import head_rows
from tunesmith.evaluation.evaluate import System, evaluate
from tunesmith.evaluation.prompting import zero_shot
from tunesmith.evaluation.task import Task, make_task
from tunesmith.ladder.data import Splits, as_messages, load_splits, take
from tunesmith.ladder.heads import check_objective, give_head, labels_of, scale_of
from tunesmith.ladder.judging import check_judge, rates_alone, refuse_unjudged
from tunesmith.ladder.objective import compares, objective_of
from tunesmith.ladder.preferring import judge_answers, made_answers, referred
from tunesmith.ladder.reinforcing import check_rewards
from tunesmith.ladder.streaming import Making, RecordStream, stored_rows
from tunesmith.ladder.teachers import check_teaching
from tunesmith.rollout.named import labellers_among, labellers_of, refuse_labeller
from tunesmith.rollout.rewards import Rewards
from tunesmith.spec import Spec


@dataclass
class Job:
    """spec: what is to be done. start: the base, with the adapters of the run it goes on from, if any. notes: what a reader
    of the report must know, collected on the way."""

    spec: Spec
    start: Model
    splits: Splits
    task: Task
    reporter: Reporter = field(default_factory=Quiet)
    notes: list[str] = field(default_factory=list)
    rewards: Rewards | None = None
    keep_base: bool = False  # the bare base is asked again after training, so what training overwrites must be kept

    @property
    def base(self) -> Base:
        return self.start.base

    @property
    def limit(self) -> int:
        """Tokens that a row may have at most. Raises DataError where the spec allows more than the base reads."""
        context, virtual = self.start.context_length, 0
        if context and self.spec.adapter != "continue":
            virtual = sum(part.tokens for part in plan(self.spec.adapter))
            context -= virtual
        limit = self.spec.data.max_tokens or context or 2**31
        if context and limit > context:
            beside = f" beside {virtual} virtual tokens" if virtual else ""
            raise DataError(
                f"data.max_tokens={limit:,} is more than {self.base.name} reads{beside} ({context:,}).",
                hints=[f"Nearest that works here:  data.max_tokens={context}"],
            )
        return limit

    @property
    def labels(self) -> tuple[str, ...]:
        """What the outputs of a task head are called, in order."""
        return labels_of(self.spec, self.start, self.task)

    @cached_property
    def labellers(self) -> list[dict[str, str]]:
        """The models that labelled the preferences that are learned from; see `named.labellers_among`."""
        train = self.splits.train
        return [] if isinstance(train, RecordStream) else labellers_among(train)  # streams hold no preferences

    @cached_property
    def scale(self) -> tuple[float, float]:
        """(mean, deviation) that a head's numbers are measured by; see `heads.scale_of`."""
        return scale_of(self.spec, self.start, self.splits.train)

    @cached_property
    def rows(self) -> Sequence[Row]:
        """Training rows, tokenised once and cached by content, none over the limit. Raises DataError as the policy says."""
        if isinstance(self.splits.train, RecordStream):
            return self._rows_on_disk(self.splits.train)
        rows, lengths = self._fitting(self.splits.train)
        self._say_rows(
            len(rows),
            sum(row.tokens for row in rows),
            sum(row.supervised_tokens for row in rows),
            str(lengths) if lengths.dropped or lengths.truncated else "",
            notes_of(rows),
        )
        return list(referred(self, rows))

    @cached_property
    def dev_rows(self) -> Sequence[Row]:
        """Rows of the dev samples, of an objective that is judged by what it says of them."""
        records = take(self.splits.dev, self.spec.train.dev_questions, self.spec.train.seed)
        return list(referred(self, self._fitting(records)[0]))

    def _fitting(self, records: Iterable[Record]) -> tuple[list[Row], LengthReport]:
        made = list(self.made(records, RowCache(cache_dir() / "rows")))
        return fit(made, self.limit, self.spec.data.overlong, self.base.tokenizer)

    def made(self, records: Iterable[Record], cache: RowCache | None = None) -> Iterator[Row]:
        """Records as the objective learns from them: texts with what a head shall say of them, or dialogues with their answers."""
        tokenizer, renderer = self.base.tokenizer, self.start.renderer
        if compares(objective_of(self.spec)):
            return made_answers(self, records, cache)
        if objective_of(self.spec).reads_labels:
            return head_rows(self.base.kind, renderer, self.task, self.labels, records, cache, scale=self.scale)
        return iter_rows(tokenizer, map(self.sample, records), supervise=self.spec.data.supervise, renderer=renderer, cache=cache)

    def _rows_on_disk(self, stream: RecordStream) -> RowStore:
        spec = self.spec.data
        mark: list[object] = [repr(self.task), spec.supervise, self.base.kind]
        if objective_of(self.spec).reads_labels:
            mark += [self.labels, self.scale]
        making = Making(self.base.tokenizer, self.start.renderer, self.made, json.dumps(mark), self.limit, spec.overlong)
        store = stored_rows(stream, making, cache_dir() / "streams", self.reporter)
        self._say_rows(len(store), store.tokens, store.supervised_tokens, store.facts["lengths"], store.facts["notes"])
        return store

    def sample(self, record: Record) -> Record:
        """The record as training sees it: with the task's system turn and instruction, like every question."""
        return record if record.shape == "text" else as_messages(record, self.task.solved(record))

    def _say_rows(self, rows: int, tokens: int, supervised: int, lengths: str, notes: Mapping[str, int]) -> None:
        counts = [f"{len(part):,} {name}" for name, part in (("dev", self.splits.dev), ("test", self.splits.test)) if part]
        share = f"supervised {supervised / tokens:.1%} of {tokens:,} tokens" if supervised else f"{tokens:,} tokens"
        self.reporter.line("data", " · ".join([f"{rows:,} train", *counts, share]))
        for note in [*([lengths] if lengths else []), *(f"{note} ({count} rows)" for note, count in notes.items())]:
            self.reporter.line("", note)
            self.notes.append(note)

    def judge_dev(self, model: Model) -> Mapping[str, float]:
        """The task's metric on the dev samples, asked as in training; of answers held against one another the objective's own figures."""
        if compares(objective_of(self.spec)):
            return judge_answers(self, model, self.dev_rows)
        records = take(self.splits.dev, self.spec.train.dev_questions, self.spec.train.seed)
        processes = current()
        records = records[processes.rank :: processes.count]
        sums = evaluate(System("dev", model, zero_shot(self.task)), self.task, records).sums() if records else (0.0, 0.0)
        total, count = processes.sum(list(sums)) if processes.several else sums
        return {self.metric_name: total / count if count else 0.0}

    @property
    def metric_name(self) -> str:
        """What training is judged by on dev."""
        if compares(objective_of(self.spec)):
            return "accuracy"
        if objective_of(self.spec).samples:
            return "reward"
        return self.asked_metric

    @property
    def asked_metric(self) -> str:
        """What answers to questions are judged by, whatever was trained on."""
        return self.task.measure


def prepare(spec: Spec, *, reporter: Reporter | None = None, base: Base | Model | None = None) -> Job:
    """Load what a spec names. base: one that is loaded already (the spec's is then not loaded again)."""
    reporter = reporter or Quiet()
    check_teaching(spec)
    check_judge(spec)
    splits = load_splits(spec.data, reporter)
    rewards = check_rewards(spec, splits.train)
    start = base if isinstance(base, Model) else Model(base) if base is not None else load_start(spec, reporter)
    witnesses = splits.witnesses or splits.train
    job = Job(spec, start, splits, make_task(spec.task, witnesses), reporter, notes=[*splits.notes], rewards=rewards)
    check_objective(spec, start, job.task, witnesses)
    if spec.evaluate.judge is not None:
        refuse_unjudged(job.task)
        refuse_labeller(spec.evaluate.judge.model, [*job.labellers, *labellers_of(spec.base.model)])
    unasked = objective_of(spec).samples or compares(objective_of(spec))
    for part, rated in () if unasked else ((splits.dev, False), (splits.test, rates_alone(spec))):
        if any(record.shape != "text" for record in part):
            job.task.check([record for record in part if record.good is not False], rated=rated)
    return job


def load_start(spec: Spec, reporter: Reporter | None = None) -> Model:
    """The spec's base: a model, or a finished run with its adapters on."""
    reporter = reporter or Quiet()
    dtype, device, reason = _place(spec)
    if is_run(spec.base.model):
        told = spec.base.model_dump(exclude={"model", "dtype", "device"}, exclude_defaults=True)
        if told:
            raise SpecError(
                f"base.{next(iter(told))} cannot be changed for {spec.base.model}: a run keeps the base it was trained on.",
                where="base",
                hints=["Leave it out, or start from the model itself."],
            )
        start = open_run(spec.base.model, dtype=dtype, device=device)
        reporter.line("base", f"{start.base.describe()} · as {spec.base.model} left it")
        return start
    base = load_base(**spec.base.model_dump(exclude={"model", "dtype", "device"}), source=spec.base.model, dtype=dtype, device=device)
    base.dtype_reason = reason or base.dtype_reason
    reporter.line("base", base.describe())
    for decision in base.decisions:
        if not decision.startswith("dtype"):
            reporter.line("", decision)
    start = Model(base)
    if not start.forward.packed:
        reporter.line("", f"rows are padded, not packed: {start.forward.why}")
    return start


def _place(spec: Spec) -> tuple[str, str, str]:
    """dtype and device of the base, and why this dtype if that is known here. All processes take what the first one's
    matrix test shows, each on a device of its own."""
    processes = current()
    if not processes.several:
        return spec.base.dtype, spec.base.device, ""
    device = str(processes.device)
    found = pick_dtype(pick_device(device), spec.base.dtype) if processes.first else None
    dtype, reason = processes.told([str(found[0]).removeprefix("torch."), found[1]] if found else None)
    return dtype, device, reason


def trainable_model(job: Job) -> Model:
    """The job's start with the spec's adapter on it: a new one, or with `adapter: continue` the start's own, trained on."""
    spec = job.spec
    if spec.adapter == "continue":
        for _, parameter in job.start.adapter.named_parameters():
            parameter.requires_grad_(True)
        model = job.start
    else:
        model = attach_to(job.start, spec.adapter, keep_original=job.keep_base, seed=spec.train.seed)
    give_head(job, model)
    share = model.trainable() / model.base.parameters
    said = [model.adapter.expression, f"trainable {model.trainable():,} ({share:.2%})"]
    if model.virtual_tokens:
        said.append(f"{model.virtual_tokens} virtual tokens a text, which counts of tokens leave out")
    job.reporter.line("adapter", " · ".join(said))
    return model


def environment(base: Base) -> dict[str, Any]:
    """Versions, hardware, dtype and why: what a result depends on besides the spec."""
    names = ("tunesmith", "torch", "transformers", "tokenizers", "numpy", "safetensors")
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "processes": current().count,
        "dtype": str(base.dtype).removeprefix("torch."),
        "dtype_reason": base.dtype_reason,
        "device": str(base.device),
        "base_fingerprint": base.fingerprint,
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except Exception:  # run from a checkout that was never installed
        return "unknown"


def run_folder(spec: Spec, root: Path | None = None, processes: Processes = ALONE) -> RunFolder:
    """Where the run of this spec lives: runs/NAME. processes: that use it together."""
    return RunFolder((root or Path("runs")) / (spec.name or "run"), keep=spec.train.keep, processes=processes)
