"""What all cells of a task share, loaded once: base, samples, task, and the general text that forgetting is measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from methods.sources import resolved
from methods.table import General, Task
from tunesmith.adapters import Way
from tunesmith.adapters.sites import blocks
from tunesmith.bases import Base, load_base
from tunesmith.core.record import Record
from tunesmith.core.row import Row
from tunesmith.data import read_records
from tunesmith.data.labelled import Reading, labelled_rows
from tunesmith.data.lengths import fit
from tunesmith.data.rows import iter_rows
from tunesmith.engine.heads import task_logits
from tunesmith.engine.model import Model
from tunesmith.evaluation import task as tasks
from tunesmith.ladder.data import Splits, load_splits, take
from tunesmith.ladder.heads import check_objective
from tunesmith.ladder.job import Job
from tunesmith.spec import Spec, make_spec

PACK_TOKENS = 4096
SCALE = 20.0
"""Factor on cosines before the softmax over texts: the one that sentence encoders are commonly trained with."""

TELLING = 25
"""Characters; a shorter description does not tell a text from others."""


@dataclass(slots=True)
class Ground:
    """base: bare. general: rows of the general text. before: what the bare base makes of it."""

    task: Task
    base: Base
    splits: Splits
    asked: tasks.Task
    general: General
    texts: list[Record]
    before: dict[str, Any]

    def job(self, spec: Spec, rows: int | None) -> Job:
        """A job of this task on `rows` training samples; which ones depends on the spec's seed, labels in proportion."""
        train = list(self.splits.train)
        chosen = train if rows is None or rows >= len(train) else take(train, rows, spec.train.seed)
        return Job(spec, Model(self.base), Splits(chosen, self.splits.dev, self.splits.test), self.asked)

    def forgotten(self, model: Model) -> dict[str, float]:
        """What a model lost of the base. cross_entropy: rise of the base's own kind of loss on the general text, nats. drift: 1 less
        the mean cosine of texts' vectors with what they were, of encoders."""
        with model.active():
            now = general_loss(model, self.texts, self.general)
        lost = {"cross_entropy": float(now["loss"]) - float(self.before["loss"])}
        if "vectors" in now:
            lost["drift"] = 1 - float(torch.cosine_similarity(now["vectors"], self.before["vectors"], dim=-1).mean())
        return lost


def spec_of(task: Task, adapter: str, train: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Spec:
    """A spec of a task with an adapter. changes: further keys, such as {base: {...}}."""
    values: dict[str, Any] = {
        "name": "cell",
        "base": {"model": resolved(task.base), "dtype": task.dtype, "device": "cpu"},
        "data": {**task.data, "train": resolved(task.data["train"])},
        "task": task.task,
        "objective": task.objective,
        "adapter": adapter,
        "train": {"schedule": "linear", "warmup": 0.1, "compile": "off", **task.train, **train},
    }
    for key, value in (changes or {}).items():
        values[key] = {**values[key], **value} if isinstance(value, Mapping) and isinstance(values.get(key), Mapping) else value
    return make_spec(values, where=task.title)


def ground(task: Task, general: General, changes: Mapping[str, Any] | None = None) -> Ground:
    """The ground of a task, kept until another one is asked for. changes: keys of the spec that a method needs otherwise."""
    return _ground(task.model_dump_json(), general.model_dump_json(), json.dumps(changes or {}))


@lru_cache(maxsize=1)
def _ground(task_text: str, general_text: str, changes: str) -> Ground:
    task, general = Task.model_validate_json(task_text), General.model_validate_json(general_text)
    spec = spec_of(task, "head" if task.objective != "sft" else "lora", {"steps": 1}, json.loads(changes))
    base = bare_base(spec, task.keep_layers)
    splits = load_splits(spec.data)
    asked = tasks.make_task(spec.task, splits.train)
    check_objective(spec, Model(base), asked, splits.train)
    texts = general_texts(general)
    model = Model(base)
    with model.active():
        before = general_loss(model, texts, general)
    return Ground(task, base, splits, asked, general, texts, before)


def bare_base(spec: Spec, keep_layers: int | None = None) -> Base:
    """The base of a spec, of so many of its first layers."""
    base = load_base(**spec.base.model_dump(exclude={"model"}), source=spec.base.model)
    if keep_layers is not None:
        _, layers = blocks(base.model)
        del layers[keep_layers:]
        base.model.config.num_hidden_layers = len(layers)
    return base


def general_texts(general: General) -> list[Record]:
    """The general text: a fixed sample of the source's first records that have a telling description, which becomes the label."""
    found = read_records(general.source, columns={"text": general.text}, shape="text")
    described = (replace(record, label=str(record.fields.get(general.description) or "")) for record in found)
    telling = (record for record in described if record.label and len(record.label) > TELLING)
    texts = list(islice(telling, 40 * general.count))
    order = take([replace(record, label=None) for record in texts], general.count, 0)
    kept = {record.where for record in order}
    return [record for record in texts if record.where in kept]


@torch.no_grad()
def general_loss(model: Model, texts: Sequence[Record], general: General) -> dict[str, Any]:
    """The base's own kind of loss on the general text, nats. Decoder: of the next token. Encoder: of finding each text by its
    description among all, by the cosine of mean states (with their vectors, [texts, width])."""
    if model.base.kind == "decoder":
        rows = [_cut(row, general.tokens) for row in iter_rows(model.base.tokenizer, map(_plain, texts), renderer=model.renderer)]
        packs = model.forward.packs(rows, PACK_TOKENS)
        total = sum(float(model.forward(pack).log_probs.double().sum()) for pack in packs)
        return {"loss": -total / sum(row.supervised_tokens for row in rows)}
    vectors = _vectors(model, [record.text for record in texts], general.tokens)
    asked = _vectors(model, [record.label or "" for record in texts], general.tokens)
    cosines = torch.nn.functional.normalize(asked, dim=-1) @ torch.nn.functional.normalize(vectors, dim=-1).T
    loss = torch.nn.functional.cross_entropy(SCALE * cosines, torch.arange(len(texts)))
    return {"loss": float(loss), "vectors": vectors}


def _plain(record: Record) -> Record:
    return Record("text", text=record.text, where=record.where)


def _cut(row: Row, tokens: int) -> Row:
    """The first tokens of a row of one segment."""
    return Row((row.segments[0].part(slice(0, tokens)),))


class _Mean:
    """A head that says the mean state itself."""

    way = Way("mean")

    def __call__(self, states: Tensor) -> Tensor:
        return states


def _vectors(model: Model, texts: Sequence[str], tokens: int) -> Tensor:
    """Mean states of texts, fp32 [texts, width]."""
    made = list(labelled_rows(model.renderer, (Reading(0.0, text=text) for text in texts)))
    rows, _ = fit(made, tokens, "truncate-left-of-prompt", model.base.tokenizer)
    out = torch.zeros(len(rows), model.base.model.config.hidden_size)
    head: Any = _Mean()
    for places, vectors in task_logits(model.forward, head, rows, PACK_TOKENS):
        out[torch.tensor(places)] = vectors.float()
    return out
