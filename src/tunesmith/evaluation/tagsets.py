"""The tags of a task: which there are, how samples write them, and a sample's tags as the task has them."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.core.errors import DataError, SpecError
from tunesmith.core.record import Record
from tunesmith.evaluation.tags import Scheme, illegal, names_of, parted, recognise, spans, written


def tag_set(given: Sequence[str], scheme: Scheme | None, records: Sequence[Record]) -> tuple[tuple[str, ...], Scheme]:
    """(the tags of a task, the scheme that its samples are written in). given: tags in the order of the numbers that stand for
    them, or in any order; empty: those of the samples. scheme: None to recognise it.

    Tags of the task are those of IOB2, of BIOES where the samples are, or the plain ones. Raises SpecError for numbers without
    names, and where there are less than two tags.
    """
    sentences = [named(record, given) for record in records]
    if scheme is None and not given and any(tag.isdigit() for tags in sentences for tag in tags):
        hints = ["Name them in the order of their numbers:  task.labels=[O, B-PER, I-PER]", "Or take them as they are:  task.scheme=plain"]
        raise SpecError("the tags are numbers, and nothing says what they stand for.", where="task.labels", hints=hints)
    found = scheme or recognise(sentences)
    if given:
        labels = tuple(given) if found == "plain" else tuple(_own(label) for label in given)
    elif found == "plain":
        labels = tuple(sorted({tag for tags in sentences for tag in tags}))
    else:
        pairs = [pair for tags in sentences for tag in tags if (pair := parted(tag)) and pair[0] != "O"]
        labels = names_of({kind for _, kind in pairs}, "BIOES" if found == "BIOES" else "IOB2")
    if len(labels) < 2 or len(set(labels)) < len(labels):
        what = f"a task of tags needs at least two different ones; found {list(labels)}."
        raise SpecError(what, where="task.labels", hints=["Name them:  task.labels=[O, B-PER, I-PER]"])
    return labels, found


def _own(label: str) -> str:
    """A tag as tasks spell it: BILOU's L and U are E and S."""
    pair = parted(label)
    if pair is None or pair[0] == "O":
        return label
    return f"{pair[0]}-{pair[1]}" if pair[1] else pair[0]


def scheme_of(labels: Sequence[str], scheme: Scheme) -> Scheme:
    """The scheme that a task's own tags are in."""
    if scheme == "plain":
        return "plain"
    return "BIOES" if any(label[:1] in "ES" for label in labels) else "IOB2"


def named(record: Record, labels: Sequence[str]) -> tuple[str, ...]:
    """The tags as written, numbers replaced by the names they stand for. Raises DataError for a number beyond the names."""
    if not labels or not all(tag.isdigit() for tag in record.tags) or set(record.tags) <= set(labels):
        return record.tags
    for place, tag in enumerate(record.tags):
        if int(tag) >= len(labels):
            what = f"the tag {tag} of '{record.tokens[place]}' stands for nothing: task.labels names {len(labels)}, counted from 0."
            raise DataError(what, where=word_place(record, place))
    return tuple(labels[int(tag)] for tag in record.tags)


def own_tags(record: Record, labels: Sequence[str], scheme: Scheme, *, repair: bool = False) -> tuple[str, ...]:
    """A sample's tags in the task's own scheme. scheme: that they are written in. repair: a tag that continues nothing begins a
    span and one left open ends, as seqeval's default mode and conlleval read them.

    Raises DataError, naming the word's line, for a tag that breaks the scheme, and for one that the task does not have.
    """
    tags = named(record, labels)
    if scheme != "plain":
        for place, tag in enumerate(tags):
            if parted(tag) is None:
                raise DataError(f"'{tag}' of '{record.tokens[place]}' is no tag of {scheme}.", where=word_place(record, place))
        broken = None if repair else illegal(tags, scheme)
        if broken is not None:
            raise _broken(record, tags, broken, scheme)
        tags = written(spans(tags), len(tags), scheme_of(labels, scheme))
    for place, tag in enumerate(tags):
        if tag not in labels:
            what = f"the tag '{tag}' of '{record.tokens[place]}' never occurs in the training samples (tags: {', '.join(labels)})."
            hints = ["Correct it, add training samples of it, or list it:  task.labels=[...]"]
            raise DataError(what, where=word_place(record, place), hints=hints)
    return tags


def _broken(record: Record, tags: Sequence[str], place: int, scheme: Scheme) -> DataError:
    before = f"after '{tags[place - 1]}'" if place else "at the beginning of a sentence"
    what = f"'{tags[place]}' of '{record.tokens[place]}', {before}, breaks {scheme}."
    hints = ["To read such a tag as the beginning of a span:  task.illegal_tags=repair"]
    hints += ["Other schemes:  task.scheme=IOB1  ·  BIOES  ·  plain"]
    return DataError(what, where=word_place(record, place), hints=hints)


def word_place(record: Record, place: int) -> str:
    """File and line of a word, where each has its own; else the row and the number of the word."""
    file, comma, line = record.where.rpartition(", line ")
    if comma and len(record.fields) == 3 and str(record.fields.get("line")) == line:
        return f"{file}, line {int(line) + place}"
    return f"{record.where}, word {place + 1}"
