"""Selection: what is dropped, why, and that every record is accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import DataError, SpecError
from tunesmith.core.record import Record
from tunesmith.data import select


def labelled(text: str, label: str = "a", line: int = 1, **fields: Any) -> Record:
    return Record("label", text=text, label=label, fields={"text": text, "label": label, **fields}, where=f"t.csv, line {line}")


def asked(question: str, answer: str) -> Record:
    return Record("prompt", messages=({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        (">= 0.8", ["b", "c"]),
        ("> 0.8", ["c"]),
        ("<= .8", ["a", "b"]),
        ("<8e-1", ["a"]),
        ("== 0.80", ["b"]),
        ("!= 0.8", ["a", "c"]),
        (0.8, ["b"]),
        (["0.5", "> 0.85"], ["a", "c"]),
    ],
)
def test_conditions_compare_numbers_also_where_a_table_has_them_as_text(condition: Any, kept: list[str]) -> None:
    records = [labelled("a", confidence="0.5"), labelled("b", confidence=0.8), labelled("c", confidence="0.9")]
    chosen, report = select(records, filter={"confidence": condition})
    assert [r.text for r in chosen] == kept and report.filtered == 3 - len(kept)


def test_words_lists_and_truth_compare_as_written_and_all_conditions_must_hold() -> None:
    records = [
        labelled("a", lang="en", source="x", ok=True),
        labelled("b", lang="en", source="y", ok="True"),
        labelled("c", lang="zh", source="x", ok=False),
        labelled("d", lang=None, source="x", ok=True),
    ]
    assert [r.text for r in select(records, filter={"lang": "en"})[0]] == ["a", "b"]
    assert [r.text for r in select(records, filter={"lang": ["en", "zh"], "source": "== x"})[0]] == ["a", "c"]
    assert [r.text for r in select(records, filter={"ok": True, "lang": "!= zh"})[0]] == ["a", "b"]


def test_a_condition_is_never_evaluated_and_one_that_cannot_be_read_is_refused() -> None:
    for condition in ("=> 0.8", "= 1", ">= high", "~ x", "> ", {}, None, []):
        with pytest.raises(SpecError) as caught:
            select([labelled("a", confidence=1)], filter={"confidence": condition})
        assert caught.value.where == "data.filter.confidence"
    record = labelled("a", confidence="__import__('os')")
    assert select([record], filter={"confidence": "__import__('os')"})[0] == [record]


def test_a_value_that_is_no_number_is_named_by_its_line() -> None:
    with pytest.raises(DataError, match=r"t.csv, line 7: 'n/a' in column 'confidence' is no number"):
        select([labelled("a", line=7, confidence="n/a")], filter={"confidence": ">= 0.8"})


def test_a_column_that_no_record_has_names_the_nearest() -> None:
    with pytest.raises(DataError, match="Did you mean:  confidence"):
        select([labelled("a", confidence=1)], filter={"confidance": ">= 0.8"})


def test_duplicates_are_found_after_folding_spaces_and_the_first_stays() -> None:
    first = labelled("so  good\n", line=1)
    records = [first, labelled("so good", line=2), labelled("So good", line=3), first]
    chosen, report = select(records)
    assert [r.where for r in chosen] == ["t.csv, line 1", "t.csv, line 3"] and report.duplicates == 2
    assert len(select(records, drop_duplicates=False)[0]) == 4


def test_a_question_with_different_answers_is_dropped_whole() -> None:
    records = [labelled("x", "a"), labelled("x ", "b"), labelled("x", "a"), labelled("y", "a")]
    chosen, report = select(records)
    assert [r.text for r in chosen] == ["y"] and (report.conflicts, report.duplicates) == (3, 0)
    kept, report = select(records, drop_conflicts=False)
    assert len(kept) == 3 and report.duplicates == 1


def test_answers_that_differ_only_in_the_tool_they_call_are_in_conflict() -> None:
    def calling(name: str) -> Record:
        call = {"type": "function", "function": {"name": name, "arguments": {}}}
        return Record("messages", messages=({"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}))

    assert select([calling("a"), calling("b"), asked("r", "s")])[1].conflicts == 2
    assert select([calling("a"), calling("a")])[1].duplicates == 1


def test_balance_takes_as_many_of_each_label_and_a_limit_keeps_it_so() -> None:
    records = [labelled(f"t{i}", "abc"[0 if i < 60 else 1 if i < 90 else 2]) for i in range(100)]
    chosen, report = select(records, balance=True)
    assert report.labels == {"a": 10, "b": 10, "c": 10} and report.unbalanced == 70 and len(chosen) == 30
    chosen, report = select(records, balance=True, limit=20)
    assert report.labels == {"a": 6, "b": 6, "c": 6} and (report.unbalanced, report.over_limit) == (70, 12)
    with pytest.raises(SpecError, match="leaves none"):
        select(records, balance=True, limit=2)
    with pytest.raises(DataError, match="balance needs a label"):
        select([asked("q", "a")], balance=True)


def test_a_limit_draws_from_the_whole_file_by_seed_and_not_by_order() -> None:
    records = [labelled(f"t{i}", str(i // 50)) for i in range(100)]
    chosen = select(records, limit=30)[0]
    assert len(chosen) == 30 and len({r.label for r in chosen}) == 2
    assert [records.index(r) for r in chosen] == sorted(records.index(r) for r in chosen)
    assert {r.text for r in select(records[::-1], limit=30)[0]} == {r.text for r in chosen}
    assert {r.text for r in select(records, limit=30, seed=1)[0]} != {r.text for r in chosen}
    assert {r.text for r in chosen} < {r.text for r in select(records, limit=31)[0]}


def test_nothing_left_is_an_error_that_says_where_everything_went() -> None:
    with pytest.raises(DataError, match="2 read · 0 kept · 2 filtered out"):
        select([labelled("a", n=1), labelled("b", n=2)], filter={"n": "> 5"})
    with pytest.raises(SpecError):
        select([labelled("a")], limit=0)


def test_the_summary_is_one_line_with_every_reason() -> None:
    records = [labelled("a", n=0), labelled("b"), labelled("b"), labelled("c", "x"), labelled("c", "y"), labelled("d")]
    records = [r if "n" in r.fields else labelled(r.text, r.label or "", n=1) for r in records]
    assert select(records, filter={"n": 1}, limit=1)[1].summary() == (
        "6 read · 1 kept · 1 filtered out · 2 in conflict (same question, different answers) · 1 duplicates · 1 over the limit"
    )


def test_records_are_taken_from_a_stream() -> None:
    def stream() -> Iterator[Record]:
        yield from (labelled(f"t{i}", n=i) for i in range(1000))

    assert len(select(stream(), filter={"n": "< 3"})[0]) == 3


@given(
    st.lists(st.tuples(st.integers(0, 8), st.sampled_from("ab"), st.integers(0, 3)), min_size=1, max_size=40),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(2, 10),
)
def test_every_record_is_kept_or_counted_once(
    rows: list[tuple[int, str, int]], duplicates: bool, conflicts: bool, balance: bool, limit: int | None
) -> None:
    records = [labelled(f"text {text}", label, n=n) for text, label, n in rows]
    try:
        kept, report = select(
            records, filter={"n": "<= 2"}, drop_duplicates=duplicates, drop_conflicts=conflicts, balance=balance, limit=limit
        )
    except DataError as error:
        assert "no record is left" in error.what
        return
    dropped = report.filtered + report.duplicates + report.conflicts + report.unbalanced + report.over_limit
    assert report.read == len(records) == len(kept) + dropped and report.kept == len(kept)
    assert limit is None or len(kept) <= limit
    if balance:
        assert len(set(Counter(r.label for r in kept).values())) == 1
    if conflicts:
        assert max(Counter(key for key, _ in {(r.key(), r.label) for r in kept}).values()) == 1
    if duplicates:
        assert max(Counter((r.key(), r.label) for r in kept).values()) == 1
