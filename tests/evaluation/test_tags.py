"""Tags mark spans: schemes are told apart, checked with the word's own line, converted, and read as seqeval reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import DataError, SpecError
from tunesmith.core.record import Record
from tunesmith.evaluation.tags import Span, by_type, count, further, illegal, names_of, recognise, spans, strict_spans, written
from tunesmith.evaluation.tagsets import own_tags, tag_set

ANY = st.lists(st.sampled_from(["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("X", "Y"))]), max_size=8)


def sentence(tags: str, where: str = "a.jsonl, line 3", **fields: object) -> Record:
    names = tuple(tags.split())
    return Record("tokens", tokens=tuple(f"w{n}" for n in range(len(names))), tags=names, where=where, fields=fields)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-X I-X O", ["1-2 X"]),
        ("B-X B-X", ["0-0 X", "1-1 X"]),
        ("B-X I-Y", ["0-0 X", "1-1 Y"]),  # another type ends a span, and begins one
        ("O I-X I-X", ["1-2 X"]),  # an I that continues nothing begins a span
        ("I-X B-X", ["0-0 X", "1-1 X"]),
        ("B-X E-X E-X", ["0-1 X", "2-2 X"]),
        ("S-X I-X", ["0-0 X", "1-1 X"]),
        ("B-geo-loc I-geo-loc", ["0-1 geo-loc"]),
        ("B I O B", ["0-1 ", "3-3 "]),
        ("U-X B-X L-X", ["0-0 X", "1-2 X"]),
        ("O O", []),
    ],
)
def test_spans_are_found_as_by_seqevals_default_mode(tags: str, found: list[str]) -> None:
    assert [f"{span.first}-{span.last} {span.type}" for span in spans(tags.split())] == found


@pytest.mark.parametrize(
    ("tags", "scheme", "found"),
    [
        ("B-X I-X O", "IOB2", [Span(0, 1, "X")]),
        ("O I-X I-X", "IOB2", []),
        ("B-X I-Y I-Y", "IOB2", [Span(0, 0, "X")]),
        ("B-X I-X B-X", "IOB2", [Span(0, 1, "X"), Span(2, 2, "X")]),
        ("B-X I-X E-X S-X", "BIOES", [Span(0, 2, "X"), Span(3, 3, "X")]),
        ("B-X I-X O", "BIOES", []),
        ("B-X E-Y", "BIOES", []),
        ("I-X E-X", "BIOES", []),
    ],
)
def test_spans_are_found_as_by_seqevals_strict_mode(tags: str, scheme: str, found: list[Span]) -> None:
    assert strict_spans(tags.split(), scheme) == found  # type: ignore[arg-type]


@given(ANY)
def test_seqeval_itself_finds_the_same_spans(tags: list[str]) -> None:
    seqeval = pytest.importorskip("seqeval.metrics.sequence_labeling")
    assert [(span.type, span.first, span.last) for span in spans(tags)] == [tuple(each) for each in seqeval.get_entities(tags)]


@pytest.mark.parametrize(
    ("sentences", "scheme"),
    [
        (["O B-X I-X"], "IOB2"),
        (["I-X I-X O I-Y", "I-X B-X"], "IOB1"),
        (["B-X I-X", "O I-X"], "IOB2"),  # as IOB1 the first B would be wrong too, so one of them is a mistake
        (["B-X E-X O S-Y"], "BIOES"),
        (["B-X L-X O U-Y"], "BIOES"),
        (["NOUN VERB"], "plain"),
        (["O O"], "IOB2"),
    ],
)
def test_the_scheme_is_told_from_the_tags(sentences: list[str], scheme: str) -> None:
    assert recognise([tags.split() for tags in sentences]) == scheme


@pytest.mark.parametrize(
    ("tags", "scheme", "place"),
    [
        ("O I-X", "IOB2", 1),
        ("B-X I-Y", "IOB2", 1),
        ("B-X I-X", "IOB1", 0),
        ("I-X B-X I-X", "IOB1", None),
        ("O E-X", "BIOES", 1),
        ("B-X O", "BIOES", 1),
        ("B-X I-X", "BIOES", 1),
        ("S-X B-X E-X", "BIOES", None),
        ("O X", "IOB2", 1),
        ("S-X", "IOB2", 0),
    ],
)
def test_the_first_tag_that_breaks_its_scheme_is_found(tags: str, scheme: str, place: int | None) -> None:
    assert illegal(tags.split(), scheme) == place  # type: ignore[arg-type]


@given(ANY, st.sampled_from(["IOB2", "BIOES"]))
def test_spans_written_anew_are_legal_and_the_same_spans_in_either_reading(tags: list[str], scheme: str) -> None:
    found = spans(tags)
    made = written(found, len(tags), scheme)  # type: ignore[arg-type]
    assert illegal(made, scheme) is None  # type: ignore[arg-type]
    assert spans(made) == strict_spans(made, scheme) == found  # type: ignore[arg-type]


def test_counts_are_of_spans_whose_words_and_type_are_right() -> None:
    gold, found = spans(["B-X", "I-X", "O", "B-Y"]), spans(["B-X", "I-X", "O", "B-X"])
    counts = count(gold, found)
    assert (counts.hits, counts.found, counts.gold) == (1, 2, 2)
    assert {kind: (c.hits, c.found, c.gold) for kind, c in by_type([(gold, found)]).items()} == {"X": (1, 2, 1), "Y": (0, 0, 1)}


def test_further_pieces_of_a_word_are_inside_of_the_span_that_it_begins() -> None:
    assert [further(tag) for tag in ("B-X", "I-X", "S-X", "O", "B", "NOUN")] == ["I-X", "I-X", "I-X", "O", "I", "NOUN"]


def test_a_task_has_all_tags_of_the_types_that_occur() -> None:
    assert tag_set((), None, [sentence("O B-Y"), sentence("B-X I-X")]) == (("O", "B-X", "I-X", "B-Y", "I-Y"), "IOB2")
    assert tag_set((), None, [sentence("S-X O")])[0] == names_of(["X"], "BIOES") == ("O", "B-X", "I-X", "E-X", "S-X")
    assert tag_set((), None, [sentence("VERB NOUN")]) == (("NOUN", "VERB"), "plain")


def test_tags_in_other_schemes_are_written_as_the_task_has_them() -> None:
    assert own_tags(sentence("I-X I-X B-X O"), names_of(["X"], "IOB2"), "IOB1") == ("B-X", "I-X", "B-X", "O")
    assert own_tags(sentence("B-X L-X U-X O"), names_of(["X"], "BIOES"), "BIOES") == ("B-X", "E-X", "S-X", "O")
    assert own_tags(sentence("B-X I-X O"), names_of(["X"], "BIOES"), "IOB2") == ("B-X", "E-X", "O")


def test_numbers_stand_for_the_names_that_are_given() -> None:
    names = ("O", "B-X", "I-X")
    assert own_tags(sentence("0 1 2"), names, "IOB2") == ("O", "B-X", "I-X")
    assert tag_set(names, None, [sentence("0 1 2")]) == (names, "IOB2")
    assert tag_set((), "plain", [sentence("0 1 2")]) == (("0", "1", "2"), "plain")
    with pytest.raises(DataError, match="the tag 3 of 'w1' stands for nothing"):
        own_tags(sentence("0 3"), names, "IOB2")
    with pytest.raises(SpecError, match="nothing says what they stand for"):
        tag_set((), None, [sentence("0 1 2")])


def test_an_illegal_tag_is_refused_with_the_line_of_its_word_or_begins_a_span_where_repair_is_asked_for() -> None:
    labels = names_of(["X"], "IOB2")
    with pytest.raises(DataError, match=r"a\.jsonl, line 3, word 2: 'I-X' of 'w1', after 'O', breaks IOB2"):
        own_tags(sentence("O I-X I-X"), labels, "IOB2")
    lines = sentence("O I-X", "a.txt, line 40", words=[], ner_tags=[], line=40)
    with pytest.raises(DataError, match=r"a\.txt, line 41: "):
        own_tags(lines, labels, "IOB2")
    assert own_tags(sentence("O I-X I-X"), labels, "IOB2", repair=True) == ("O", "B-X", "I-X")
    with pytest.raises(DataError, match="word 1: 'NOUN' of 'w0' is no tag of IOB2"):
        own_tags(sentence("NOUN O"), labels, "IOB2", repair=True)
    with pytest.raises(DataError, match="'B-Y' of 'w0' never occurs"):
        own_tags(sentence("B-Y O"), labels, "IOB2")
