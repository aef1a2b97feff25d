"""Reward models: our own runs with a head of one value, and any sequence classifier with one output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from tunesmith.bases import Base
from tunesmith.bases.hardware import pick_device, pick_dtype
from tunesmith.bases.kinds import decide_kind, first_line, read_config
from tunesmith.bases.load import check_weights, context_length
from tunesmith.bases.quiet import quiet
from tunesmith.bases.source import locate
from tunesmith.bases.tokens import load_tokenizer
from tunesmith.core.errors import BaseError, DataError, SpecError
from tunesmith.core.record import Record
from tunesmith.data.labelled import Reading, labelled_rows
from tunesmith.data.lengths import fit
from tunesmith.data.preferences import scored_rows
from tunesmith.data.textrow import TextRow
from tunesmith.engine.heads import task_answers
from tunesmith.engine.memory import in_mode
from tunesmith.engine.model import Model
from tunesmith.engine.rundir import RunFolder
from tunesmith.engine.runs import is_run, open_run
from tunesmith.rollout.named import head_of
from tunesmith.rollout.sample import Sample, groups_of_samples

READS = ("dialogue", "pair", "answer")
_FORMS = ("A reward model is:  runs/NAME (objective: reward)  ·  a sequence classifier with one output",)
Read = Callable[[Sequence[Sample]], Sequence[float | None]]


class RewardModel:
    """Says one number of each answer. It is loaded at the first call.

    source: a run's folder, or a model. reads: one of `READS`, "" for "dialogue" or what the run was trained on. tokens: of a batch,
    with padding. Raises SpecError for a run that is asked to read something else.
    """

    def __init__(self, source: str, reads: str = "", device: str = "auto", dtype: str = "auto", tokens: int = 4096) -> None:
        self.source, self.reads, self.device, self.dtype, self.tokens = source, reads, device, dtype, tokens
        self._ready: Read | None = None
        self._base: Base | None = None
        if is_run(source) and reads:
            raise SpecError(f"'{source}' is a run, which reads what it was trained on.", hints=["Leave out:  reads"])

    def share(self, base: Base) -> None:
        """Use this base, which is loaded already, where the run was trained on it."""
        if is_run(self.source) and RunFolder(Path(self.source)).spec().base.model == base.source:
            self._base = base

    def check(self) -> None:
        """Raise for a model that says no one number of an answer, by what its files tell: SpecError for a run, BaseError for another
        model, RunError for a run that has not ended."""
        if not is_run(self.source):
            _check_config(read_config(locate(self.source).folder, self.source, remote_code=False), self.source)
            return
        head = head_of(self.source)
        if head is None or len(head.get("labels", ())) != 1 or head.get("says") not in ("choice", "value"):
            raise _no_score(self.source, None if head is None else str(head.get("says")))

    def __call__(self, samples: Sequence[Sample]) -> Sequence[float | None]:
        """The value of each answer, in order; None for one without words that the model cannot read."""
        if self._ready is None:
            self._ready = self._of_run() if is_run(self.source) else self._of_classifier()
        return self._ready(samples)

    def _of_run(self) -> Read:
        model = open_run(self.source, dtype=self.dtype, device=self.device, base=self._base)
        head = model.head
        if head is None or len(head.labels) != 1 or head.way.says not in ("choice", "value"):
            raise _no_score(self.source, None if head is None else head.way.says)
        return lambda samples: read_with_head(model, samples, self.tokens)

    def _of_classifier(self) -> Read:
        folder = locate(self.source).folder
        config = read_config(folder, self.source, remote_code=False)
        network, tokenizer = _classifier(folder, self.source, config, self.device, self.dtype)
        reads = self.reads or "dialogue"
        limit = context_length(config, tokenizer, decide_kind(config, "auto", self.source))
        return lambda samples: _read(network, tokenizer, [_encoded(tokenizer, each, reads, limit) for each in samples], self.tokens)


def _no_score(source: str, says: str | None) -> SpecError:
    """says: what the run's head says; None where it has none."""
    what = "the run has no head that scores answers." if says is None else f"the run's head says a {says}."
    return SpecError(what, where=source, hints=["Train one:  objective: reward  (from pairs or rankings), or  objective: regress"])


def read_with_head(model: Model, samples: Sequence[Sample], budget: int) -> list[float | None]:
    """The value of a model's head of one output: of answers to prompts ("choice"), or of answers as texts of their own ("value").

    budget: tokens of a pack. Texts are rendered and tokenised as the model's own base has it, and shortened where they were in training;
    a prompt is read once for all its answers. None for an answer without words, where words are what the head reads.
    """
    head = model.head
    assert head is not None
    own: list[float | None] = [None] * len(samples)
    if head.way.says == "value" or model.base.kind == "encoder":
        worded = [place for place, each in enumerate(samples) if each.completion.strip()]
        if len(worded) < len(samples):
            for place, value in zip(worded, read_with_head(model, [samples[place] for place in worded], budget), strict=True):
                own[place] = value
            return own
    asked: list[_Asked] = []
    if head.way.says == "value":
        made = list(labelled_rows(model.renderer, (Reading(0.0, text=each.completion, where=each.where) for each in samples)))
        asked = [_Asked([[place]], Record("text")) for place in range(len(samples))]
    else:
        asked = [_of_group(samples, places) for places in groups_of_samples(samples)]
        made = list(scored_rows(model.base.kind, model.renderer, [each.record for each in asked]))
    limit = head.way.limit or model.context_length
    if limit:
        kept, _ = fit(made, limit, "truncate-left-of-prompt" if head.way.limit else "error", model.base.tokenizer)
        made = cast(list[TextRow], list(kept))
    if len(made) != len(asked):
        raise DataError("an answer leaves the reward model nothing to read within its length.", where=samples[0].where)
    with model.active(), in_mode(model.base.model, training=False):
        for rows, said in task_answers(model.forward, head, made, budget):
            waiting = {at: iter(asked[row].places) for at, row in enumerate(rows)}
            for row, value in zip(said.rows, said.logits[:, 0].tolist(), strict=True):
                for place in next(waiting[row]):
                    own[place] = value * head.way.deviation + head.way.mean
    return own


@dataclass(frozen=True, slots=True)
class _Asked:
    """A row for the head. places: of the samples that each of its answers is of. record: the prompt with the answers, all different."""

    places: list[list[int]]
    record: Record


def _of_group(samples: Sequence[Sample], places: Sequence[int]) -> _Asked:
    found: dict[str, list[int]] = {}
    for place in places:
        found.setdefault(samples[place].completion, []).append(place)
    texts, owners = list(found), list(found.values())
    if len(texts) == 1:  # rows that are scored have two answers at least; what is said of the second is not read
        texts, owners = texts * 2, [*owners, []]
    answers = tuple(({"role": "assistant", "content": text},) for text in texts)
    first = samples[places[0]]
    return _Asked(owners, Record("ranking", messages=first.prompt, answers=answers, where=first.where))


def _classifier(folder: Any, source: str, config: Any, device: str, dtype: str) -> tuple[Any, Any]:
    """(network, tokenizer) of a sequence classifier with one output. Raises BaseError for another model."""
    from transformers import AutoModelForSequenceClassification

    _check_config(config, source)
    check_weights(folder, source)
    tokenizer = load_tokenizer(folder, source, remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise BaseError("the reward model's tokenizer has no token to pad with.", where=source)
    chosen = pick_device(device)
    number, _ = pick_dtype(chosen, dtype)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            network, info = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=number, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except Exception as cause:  # model classes raise whatever they like
        raise BaseError(f"the reward model cannot be loaded: {first_line(cause)}", where=source) from cause
    if info["missing_keys"]:
        raise BaseError(f"its checkpoint lacks {sorted(info['missing_keys'])[0]}, which would be random.", where=source, hints=_FORMS)
    network.config.pad_token_id = tokenizer.pad_token_id  # decoders read the last token before it
    network.requires_grad_(False).eval()
    return network.to(chosen), tokenizer


def _check_config(config: Any, source: str) -> None:
    """Raise BaseError for what is no sequence classifier with one output."""
    names = getattr(config, "architectures", None) or []
    if not any("SequenceClassification" in name for name in names):
        raise BaseError(f"it is no sequence classifier ({', '.join(names) or 'it does not say what it is'}).", where=source, hints=_FORMS)
    if config.num_labels != 1:
        raise BaseError(f"the classifier has {config.num_labels} outputs, and a reward is one number.", where=source, hints=_FORMS)


def _encoded(tokenizer: Any, sample: Sample, reads: str, limit: int | None) -> dict[str, list[int]]:
    """An answer as the reward model's tokenizer writes it; too long a text loses its beginning."""
    cut: dict[str, Any] = {"truncation": "only_first" if reads == "pair" else True, "max_length": limit} if limit else {}
    tokenizer.truncation_side = "left"
    if reads == "pair":
        return dict(tokenizer(_as_text(sample), sample.completion, **cut))
    if reads == "dialogue" and tokenizer.chat_template:
        turns = [*map(dict, sample.prompt), {"role": "assistant", "content": sample.completion}]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as cause:  # templates raise what they like
            raise DataError(f"the reward model's template refuses the dialogue: {first_line(cause)}.", where=sample.where) from cause
        return dict(tokenizer(text, add_special_tokens=False, **cut))
    return dict(tokenizer(sample.completion if reads == "answer" else _as_text(sample) + sample.completion, **cut))


def _as_text(sample: Sample) -> str:
    return "\n".join(str(message.get("content") or "") for message in sample.prompt)


@torch.no_grad()
def _read(network: Any, tokenizer: Any, encoded: Sequence[dict[str, list[int]]], budget: int) -> list[float]:
    """Values in order; texts of like length lie in a batch of at most `budget` tokens with padding."""
    out = [0.0] * len(encoded)
    order = sorted(range(len(encoded)), key=lambda place: len(encoded[place]["input_ids"]))
    while order:
        longest, places = 0, list[int]()
        for place in order:
            longest = max(longest, len(encoded[place]["input_ids"]))
            if places and longest * (len(places) + 1) > budget:
                break
            places.append(place)
        order = order[len(places) :]
        batch = tokenizer.pad([encoded[place] for place in places], padding=True, padding_side="right", return_tensors="pt")
        values = network(**batch.to(network.device)).logits[:, 0].float().tolist()
        for place, value in zip(places, values, strict=True):
            out[place] = value
    return out
