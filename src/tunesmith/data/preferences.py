"""Answers held against one another as rows: one tree a prompt, its answers as continuations, the best first."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, tee

import numpy as np

from tunesmith.core.errors import DataError
from tunesmith.core.record import Message, Record, said
from tunesmith.core.row import SECOND, Segment
from tunesmith.data.labelled import Reading, asked_last, labelled_rows
from tunesmith.data.rendering import Renderer
from tunesmith.data.rowcache import RowCache
from tunesmith.data.rows import iter_rows
from tunesmith.data.textrow import TextRow

Answer = tuple[Message, ...]

_SIDES = ("chosen", "rejected")


def preference_rows(renderer: Renderer, records: Iterable[Record], *, cache: RowCache | None = None) -> Iterator[TextRow]:
    """One row a pair or ranking, in order: the prompt, and its answers with the end of a turn, the best first.

    Every path has the ids and the mask of that dialogue rendered alone with its last turn supervised. What all paths begin with,
    as far as it is not supervised, is the root "prompt", of which turns may be shortened; where they have nothing in common each
    answer is a root of its own, with the prompt in it. Answers are named "chosen" and "rejected", or "answer" if there are
    more than two. given, at every token of an answer: rank; soft (1 where the record has none) and margin (0) of the record.

    Raises DataError for a record without answers to compare, RenderError where the template fails; both name the record.
    """
    first, second = tee(map(_compared, records))
    rendered = _rendered(renderer, (one for record in first for one in _dialogues(record, record.answers)), cache)
    for record in second:
        yield _ranked(record, _joined(list(islice(rendered, len(record.answers))), record.where))


def rated_rows(renderer: Renderer, records: Iterable[Record], *, cache: RowCache | None = None, seed: int = 0) -> Iterator[TextRow]:
    """One row a rated answer, in order: the prompt, its answer, and an answer that belongs to another prompt, both supervised.
    A pair is two rated answers, its better one and its worse one; a tie is none.

    given, at every token of an answer: good (1 desirable, 0 undesirable), and other (1 for the one that belongs to another
    prompt, from which KTO reads its KL: Ethayarajh et al. 2024, 2402.01306, section 4.1). All records are held, and drawn from
    as `partners` says. Raises what `preference_rows` raises.
    """
    held = list(unpaired(records))
    for record in held:
        if record.shape != "rated" or not record.answers or record.good is None:
            raise DataError(f"the row reads as '{record.shape}', and has no answer that is marked good or bad.", where=record.where)
    others = [held[place].answers[0] for place in partners(held, seed)]
    pairs = list(zip(held, others, strict=True))
    rendered = _rendered(renderer, (one for record, other in pairs for one in _dialogues(record, (*record.answers[:1], other))), cache)
    for record in held:
        row = _joined(list(islice(rendered, 2)), record.where)
        yield _marked(row, ("answer", "answer"), [{"good": float(bool(record.good)), "other": 0.0}, {"good": 0.0, "other": 1.0}])


def unpaired(records: Iterable[Record]) -> Iterator[Record]:
    """Pairs as answers that are good or bad by themselves, the better one first; other records as they are."""
    for record in records:
        if record.shape != "pair":
            yield record
        elif record.soft != 0.5:
            for answer, good in zip(record.answers, (True, False), strict=True):
                yield replace(record, shape="rated", answers=(answer,), scores=(), soft=None, margin=None, good=good)


def scored_rows(kind: str, renderer: Renderer, records: Iterable[Record], cache: RowCache | None = None) -> Iterator[TextRow]:
    """One row a pair or ranking, in order, as a head scores its answers: each is asked at its last token, nothing is supervised.

    kind: of the base. A decoder reads prompt and answer as the chat template writes them, an encoder as a pair of texts; an answer
    without a prompt is a text alone, and then a root of its own. The label, 0, only says where the head is asked. Names and
    given are those of `preference_rows`. Raises what it raises, and DataError for a dialogue where an encoder needs one text.
    """
    first, second, third = tee(map(_compared, records), 3)
    readings = (one for record in first if not _spoken(kind, record) for one in _readings(record))
    spoken = (one for record in second if _spoken(kind, record) for one in _dialogues(record, record.answers))
    texts, dialogues = labelled_rows(renderer, readings, cache), _rendered(renderer, spoken, cache)
    for record in third:
        if _spoken(kind, record):
            row = _joined(list(islice(dialogues, len(record.answers))), record.where)
            leaves = set(row.leaves())
            parts = (asked_last(part, 0.0) if place in leaves else part for place, part in enumerate(row.segments))
            row = replace(row, segments=tuple(parts))
        elif record.prompt_is_empty:
            alone = list(islice(texts, len(record.answers)))
            row = TextRow(tuple(one.segments[0] for one in alone), record.where, notes=_notes(alone))
        else:
            row = next(texts)
        yield _ranked(record, row)


def partners(records: Sequence[Record], seed: int = 0) -> list[int]:
    """For each record the place of another one, whose question and answer are both different; drawn by content, not by place.

    Records are laid out question by question, in an order drawn by hash, and shifted by the size of the largest question, so
    every answer serves about once. Raises DataError where a record has no such partner.
    """
    keys, answers = [record.key() for record in records], [said(record.answers[0]) for record in records]
    sizes = Counter(keys)
    drawn = [
        hashlib.sha256(f"{seed}:{key}:{answer}".encode("utf-8", "surrogatepass")).digest()
        for key, answer in zip(keys, answers, strict=True)
    ]
    questions = {key: hashlib.sha256(f"{seed}:{key}".encode()).digest() for key in sizes}
    order = sorted(range(len(records)), key=lambda place: (-sizes[keys[place]], questions[keys[place]], drawn[place]))
    shift = max(sizes.values(), default=0)
    found = [0] * len(records)
    for at, place in enumerate(order):
        # The largest question lies first: where it is most of all, its members share the others.
        candidates = order[shift:] if at < shift and 2 * shift > len(order) else order
        start = at if candidates is not order else at + shift
        turned = (candidates[(start + step) % len(candidates)] for step in range(len(candidates)))
        other = next((one for one in turned if keys[one] != keys[place] and answers[one] != answers[place]), None)
        if other is None:
            hints = ["Add rows with other prompts and answers.", "Or learn from pairs:  data.shape=pair  with  objective: dpo"]
            raise DataError(
                "there is no other prompt with another answer, which rated answers are held against.",
                where=records[place].where,
                hints=hints,
            )
        found[place] = other
    return found


def _compared(record: Record) -> Record:
    if len(record.answers) < 2:
        raise DataError(f"the row reads as '{record.shape}', and has no two answers to compare.", where=record.where)
    return record


def _dialogues(record: Record, answers: Sequence[Answer]) -> Iterator[Record]:
    for answer in answers:
        yield Record("messages", messages=(*record.messages, *answer), tools=record.tools, where=record.where)


def _rendered(renderer: Renderer, dialogues: Iterable[Record], cache: RowCache | None) -> Iterator[TextRow]:
    """One row a dialogue: with the last turn supervised there is never another."""
    return iter_rows(renderer.tokenizer, dialogues, supervise="last", renderer=renderer, cache=cache)


def _joined(rows: Sequence[TextRow], where: str) -> TextRow:
    """Paths as a tree of what they begin with and nothing of which is learned, and a leaf each, in order."""
    paths = [row.segments[0] for row in rows]
    shared = min(int(np.argmax(path.supervised)) for path in paths)
    for path in paths[1:]:
        differ = np.flatnonzero(path.ids[:shared] != paths[0].ids[:shared])
        shared = int(differ[0]) if len(differ) else shared
    if not shared:
        return TextRow(tuple(paths), where, notes=_notes(rows))
    root = replace(paths[0].part(slice(0, shared)), name="prompt")
    cuttable = tuple((start, min(end, shared)) for start, end in rows[0].cuttable if start < shared)
    leaves = (path.part(slice(shared, None), 0) for path in paths)
    return TextRow((root, *leaves), where, cuttable=cuttable, notes=_notes(rows))


def _ranked(record: Record, row: TextRow) -> TextRow:
    count = len(record.answers)
    said_of = {"soft": 1.0 if record.soft is None else record.soft, "margin": record.margin or 0.0}
    row = _marked(row, _SIDES if count == 2 else ("answer",) * count, [{"rank": float(rank), **said_of} for rank in range(count)])
    tied = record.soft is None and len(set(record.scores)) < len(record.scores)
    return replace(row, notes=(*row.notes, "answers with equal scores are ranked as they stand in their row")) if tied else row


def _marked(row: TextRow, names: Sequence[str], given: Sequence[dict[str, float]]) -> TextRow:
    """The leaves with their names and numbers."""
    segments: list[Segment] = list(row.segments)
    for leaf, name, numbers in zip(row.leaves(), names, given, strict=True):
        part = segments[leaf].with_given(**numbers)
        segments[leaf] = part if part.name == SECOND else replace(part, name=name)  # which an encoder knows a second text by
    return replace(row, segments=tuple(segments))


def _spoken(kind: str, record: Record) -> bool:
    """Is the record read as a dialogue?"""
    return kind != "encoder" and not record.prompt_is_empty


def _readings(record: Record) -> list[Reading]:
    texts = tuple(_words(record, answer[-1]) for answer in record.answers)
    if record.prompt_is_empty:
        return [Reading(0.0, text=text, where=record.where) for text in texts]
    if len(record.messages) > 1:
        what = f"an encoder reads one text as the prompt, and this row's is a dialogue of {len(record.messages)} turns."
        hints = ["Nearest that works here:  a prompt that is one text, and no  task.system", "Or take a decoder as base."]
        raise DataError(what, where=record.where, hints=hints)
    return [Reading(0.0, text=_words(record, record.messages[0]), others=texts, labels=(0.0,) * len(texts), where=record.where)]


def _words(record: Record, message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise DataError("an answer says nothing, and only text can be scored here.", where=record.where)
    return content


def _notes(rows: Iterable[TextRow]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(note for row in rows for note in row.notes))
