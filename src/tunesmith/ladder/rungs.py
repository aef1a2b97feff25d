"""Rungs: the ways of reaching the task that a ladder tries, from a bare question to a trained model.

A rung is a name with options, `few_shot(shots=8)`; its options are checked against its function's signature. Prompt
rungs build a way of asking; training rungs train first. Every rung answers the same questions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tunesmith.adapters import load_adapter
from tunesmith.core.errors import SpecError
from tunesmith.core.record import Record
from tunesmith.core.registry import Registry, check_options, parse_calls
from tunesmith.data import read_records
from tunesmith.engine.model import Model, add_adapter
from tunesmith.engine.rundir import RunFolder
from tunesmith.engine.runs import ADAPTER, TRAINED
from tunesmith.evaluation.evaluate import System
from tunesmith.evaluation.prompting import chain_of_thought, few_shot, nearest_shots, zero_shot
from tunesmith.ladder.job import Job
from tunesmith.ladder.rationales import write_rationales
from tunesmith.ladder.training import Run, train_job


@dataclass(slots=True)
class Rung:
    """A rung that is ready to be asked. run: what was trained for it, if anything. settings: for the report."""

    name: str
    title: str
    description: str
    system: System
    settings: dict[str, Any] = field(default_factory=dict)
    run: Run | None = None


Maker = Callable[..., Rung]
RUNGS: Registry[Maker] = Registry("rung")


def rung(name: str) -> Callable[[Maker], Maker]:
    """Enter a rung into the table under its name."""
    return lambda maker: RUNGS.add(name, maker)


@rung("zero_shot")
def _zero_shot(job: Job, folder: Path) -> Rung:
    """The bare question."""
    system = System("zero-shot", job.start, zero_shot(job.task))
    return Rung("zero-shot", "Zero-shot", "The bare question, as the base understands it.", system)


@rung("few_shot")
def _few_shot(job: Job, folder: Path, *, shots: int = 6, choose: Literal["fixed", "random"] = "fixed", seed: int = 0) -> Rung:
    """Demonstrations from the training samples, the same for every question or drawn for each."""
    if choose not in ("fixed", "random"):
        raise SpecError(f"few_shot: choose is 'fixed' or 'random', not '{choose}'.", where="climb.rungs")
    ask = few_shot(job.task, job.splits.train, shots=shots, choose=choose, seed=seed)
    name = "few-shot" if choose == "fixed" else "few-shot-random"
    how = "the same for every question" if choose == "fixed" else "drawn anew for every question"
    said = f"{shots} solved training samples before the question, {how}."
    return Rung(name, "Few-shot", said, System(name, job.start, ask), {"shots": shots, "choose": choose, "seed": seed})


@rung("nearest")
def _nearest(job: Job, folder: Path, *, shots: int = 6) -> Rung:
    """The training samples most like the question as demonstrations."""
    ask = nearest_shots(job.task, job.splits.train, shots=shots)
    said = f"The {shots} training samples most like the question (BM25), solved, before it."
    system = System("nearest-few-shot", job.start, ask)
    return Rung(system.name, "Nearest-neighbour few-shot", said, system, {"shots": shots, "by": "BM25"})


@rung("chain_of_thought")
def _chain_of_thought(job: Job, folder: Path, *, shots: int = 6, seed: int = 0) -> Rung:
    """Worked examples that reason before they answer; from a file, from the data, or written by the base itself."""
    worked, origin = _worked(job, shots, seed)
    system = System("chain-of-thought", job.start, chain_of_thought(job.task, worked), reasons=True)
    said = f"{len(worked)} worked examples that reason before they answer ({origin})."
    return Rung(system.name, "Chain-of-thought few-shot", said, system, {"shots": len(worked), "reasoning": origin})


@rung("sft")
def _sft(job: Job, folder: Path) -> Rung:
    """The spec's adapter, trained on the answers of the training samples, asked as in zero-shot."""
    return _fine_tuned(job, folder, "asked as in zero-shot")


@rung("classify")
def _classify(job: Job, folder: Path) -> Rung:
    """The spec's adapter with a task head, trained on the labels of the training samples; the head answers."""
    return _fine_tuned(job, folder, "its task head answers")


@rung("tag")
def _tag(job: Job, folder: Path) -> Rung:
    """The spec's adapter with a task head, trained on the tags of the training samples' words; the head answers."""
    return _fine_tuned(job, folder, "its task head answers")


@rung("regress")
def _regress(job: Job, folder: Path) -> Rung:
    """The spec's adapter with a task head, trained on the numbers of the training samples; the head answers."""
    return _fine_tuned(job, folder, "its task head answers")


@rung("choose")
def _choose(job: Job, folder: Path) -> Rung:
    """The spec's adapter with a task head, trained on the right candidates of the training samples; the head answers."""
    return _fine_tuned(job, folder, "its task head answers")


@rung("reward")
def _reward(job: Job, folder: Path) -> Rung:
    """The spec's adapter with a task head, trained on answers held against one another; the head says which is better."""
    return _fine_tuned(job, folder, "its task head answers")


def _fine_tuned(job: Job, folder: Path, how: str) -> Rung:
    run = _trained(job, folder / TRAINED)
    adapter = run.model.adapter.expression
    name = adapter.split("(")[0]
    said = f"{adapter}, trained on {len(job.rows):,} samples; {how}."
    settings = {"adapter": adapter, "steps": run.result["steps"], "learning_rate": run.result["learning_rate"]}
    return Rung(name, f"{_TITLES.get(name, name)} fine-tuning", said, System(name, run.model, zero_shot(job.task)), settings, run)


_TITLES = {"lora": "LoRA", "rslora": "rsLoRA", "full": "Full", "layers": "Last-layers", "modules": "Chosen-modules", "head": "Head-only"}


def _trained(job: Job, path: Path) -> Run:
    """The training rung's run; one that is finished already is taken as it is."""
    with RunFolder(path, keep=job.spec.train.keep) as folder:
        if folder.finished:
            return reopened(job, folder)
        return train_job(job, folder, resume_hint=f"the same command again with --resume (it continues {path.parent})")


def reopened(job: Job, folder: RunFolder) -> Run:
    """A finished training rung, its adapter put on the base that is loaded already."""
    job.reporter.line("resume", f"{folder.path} is finished; its adapter is taken")
    _ = job.rows  # counted and reported as in training
    adapter = load_adapter(job.base.model, folder.path / ADAPTER, fingerprint=job.base.fingerprint, name="sft")
    add_adapter(job.base, adapter)
    return Run(folder.path, Model(job.base, [*job.start.adapters, adapter]), folder.result())


def _worked(job: Job, shots: int, seed: int) -> tuple[Sequence[Record], str]:
    """Examples with reasoning: the file that the spec names, else the data's own, else written by the base."""
    if source := job.spec.climb.demonstrations:
        worked = list(read_records(source, limit=shots))
        leaked = {record.key() for record in job.splits.test} & {record.key() for record in worked}
        if leaked:
            raise SpecError("a demonstration is one of the test questions.", where=source)
        return worked, "hand-written"
    own = [record for record in job.splits.train if record.reasoning][:shots]
    if len(own) == shots:
        return own, "from the training samples"
    return write_rationales(job.start, job.task, job.splits.train, shots, seed), "written by the base, given the right answer"


def make_rungs(expressions: Sequence[str]) -> list[tuple[str, Callable[[Job, Path], Rung]]]:
    """Read rung expressions. Raises SpecError for an unknown rung or option, before anything heavy starts."""
    out: list[tuple[str, Callable[[Job, Path], Rung]]] = []
    for expression in expressions:
        calls = parse_calls(expression, kind="rung")
        if len(calls) != 1:
            raise SpecError(f"'{expression}' is not one rung.", where="climb.rungs", hints=["A list holds one rung an entry."])
        maker, options = RUNGS[calls[0].name], calls[0].options
        check_options(_options_of(maker), options, kind=f"rung {calls[0].name}")
        out.append((expression, partial(maker, **options)))
    if not out:
        raise SpecError("there are no rungs to climb.", where="climb.rungs", hints=[f"Known: {', '.join(RUNGS)}"])
    return out


def _options_of(maker: Maker) -> Callable[..., Any]:
    """The maker's signature without what the ladder passes itself."""
    signature = inspect.signature(maker)
    own = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]

    def shape() -> None:
        """Only its signature is used."""

    shape.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return shape
