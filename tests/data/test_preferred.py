"""Pairs, rankings, rated answers and questions are read from every usual form, and what cannot be one is refused by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.core.errors import DataError, LeakError, SpecError
from tunesmith.core.record import Record, said
from tunesmith.data import BadRows, check_leaks, read_records, select, split
from tunesmith.data.comparing import compared, shared_answers
from tunesmith.data.survey import Survey

Row = dict[str, Any]

USER = {"role": "user", "content": "A colour?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def reader(*rows: Row, **options: Any) -> list[Record]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return list(read_records(path, **options))

    return reader


def words(record: Record) -> list[str]:
    return [said(answer) for answer in record.answers]


# --- forms -----------------------------------------------------------------------------------------------------------

PAIRS: list[Row] = [
    {"prompt": "A colour?", "chosen": "Red.", "rejected": "Seven."},
    {"question": "A colour?", "chosen": "Red.", "rejected": "Seven.", "id": 3},
    {"prompt": [USER], "chosen": [assistant("Red.")], "rejected": [assistant("Seven.")]},
    {"prompt": "A colour?", "chosen": assistant("Red."), "rejected": assistant("Seven.")},
    {"chosen": [USER, assistant("Red.")], "rejected": [USER, assistant("Seven.")]},
    {"prompt": "A colour?", "chosen": [USER, assistant("Red.")], "rejected": [USER, assistant("Seven.")], "prompt_id": "x"},
    {"prompt": [{"from": "human", "value": "A colour?"}],
     "chosen": {"from": "gpt", "value": "Red."}, "rejected": {"from": "gpt", "value": "Seven."}},
]  # fmt: skip


@pytest.mark.parametrize("row", PAIRS)
def test_a_pair_is_one_record_in_whatever_form_it_is_written(read: Any, row: Row) -> None:
    (record,) = read(row)
    assert record.shape == "pair" and record.messages == (USER,) and words(record) == ["Red.", "Seven."]
    assert record.asked() == (USER,) and record.answer() == "Red." and record.key() == read(PAIRS[0])[0].key()
    assert (record.soft, record.margin, record.good, record.scores) == (None, None, None, ())


def test_answers_may_begin_with_the_prompts_turns_without_its_system_turn_or_with_one(read: Any) -> None:
    both = {"chosen": [USER, assistant("Red.")], "rejected": [USER, assistant("Seven.")]}
    assert read({"prompt": [SYSTEM, USER], **both})[0].messages == (SYSTEM, USER)
    assert read({"system": "Be brief.", **both})[0].messages == (SYSTEM, USER)
    led = {side: [SYSTEM, *turns] for side, turns in both.items()}
    assert read({"prompt": "A colour?", **led})[0].messages == (SYSTEM, USER)


def test_a_prompt_of_several_turns_stays_whole_and_is_what_is_asked(read: Any) -> None:
    turns = [USER, assistant("Blue."), {"role": "user", "content": "Another?"}]
    (record,) = read({"prompt": turns, "chosen": "Red.", "rejected": "Blue, again."})
    assert record.asked() == tuple(turns) and record.reply() == assistant("Red.")


def test_answers_without_a_prompt_are_their_own_question_in_any_order(read: Any) -> None:
    first, second, third = read({"chosen": "a  b", "rejected": "c"}, {"chosen": "c", "rejected": "a b"}, {"chosen": "a b", "rejected": "d"})
    assert first.prompt_is_empty and first.messages == ()
    assert first.key() == second.key() != third.key()
    under_one = read({"chosen": "a", "rejected": "c", "system": "s"}, {"chosen": "b", "rejected": "c", "system": "s"})
    assert under_one[0].key() != under_one[1].key()


def test_probability_and_margin_are_kept_and_the_likelier_answer_comes_first(read: Any) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    first, tie, turned = read(
        {**row, "probability": 0.75, "margin": 2}, {**row, "probability": 0.5}, {**row, "probability": "0.25", "margin": "0.5"}
    )
    assert (first.soft, first.margin, words(first)) == (0.75, 2.0, ["a", "b"])
    assert (tie.soft, words(tie)) == (0.5, ["a", "b"])
    assert (turned.soft, turned.margin, words(turned)) == (0.75, -0.5, ["b", "a"])


def test_scored_answers_are_ranked_the_best_first_and_two_equal_ones_are_a_tie(read: Any) -> None:
    (record,) = read({"prompt": "q", "answers": ["a", "b", "c"], "scores": [1, 3, 2.5]})
    assert record.shape == "ranking" and words(record) == ["b", "c", "a"] and record.scores == (3, 2.5, 1)
    assert read({"prompt": "q", "answers": ["a", "b"], "scores": [1, 1]})[0].soft == 0.5
    (objects,) = read({"instruction": "q", "completions": [{"response": "a", "overall_score": 1}, {"response": "b", "overall_score": 4}]})
    assert objects.messages == ({"role": "user", "content": "q"},) and words(objects) == ["b", "a"] and objects.scores == (4, 1)


def test_a_list_of_answers_is_a_ranking_only_where_scores_or_the_user_say_so(read: Any) -> None:
    row = {"prompt": "q", "answers": ["a", "b"]}
    assert words(read(row, shape="ranking")[0]) == ["a", "b"] == words(read(row, columns={"answers": "answers"})[0])
    with pytest.raises(DataError, match="no answer to learn from"):  # several good answers are as likely as a ranking
        read(row)


def test_rated_answers_are_read_where_the_shape_or_the_column_is_named(read: Any) -> None:
    rows = [{"prompt": "q", "completion": "a", "label": mark} for mark in (True, False, 1, "no")]
    for options in ({"shape": "rated"}, {"columns": {"good": "label"}}):
        records = read(*rows, **options)
        assert [record.good for record in records] == [True, False, True, False]
        assert records[0].answer() == "a" and records[1].answer() is None  # a bad answer is no answer to learn from
        assert all(record.shape == "rated" and words(record) == ["a"] for record in records)
    assert read(rows[0])[0].shape == "prompt"


def test_questions_need_no_answer_and_keep_one_that_is_there(read: Any) -> None:
    known, number, bare = read(
        {"prompt": "1+1?", "answer": "2", "level": 1}, {"prompt": "p", "answer": 7}, {"prompt": "p2"}, shape="question"
    )
    assert [record.answer() for record in (known, number, bare)] == ["2", "7", None]
    assert known.asked() == ({"role": "user", "content": "1+1?"},) and known.fields["level"] == 1
    turns = [USER, assistant("Blue."), {"role": "user", "content": "Another?"}, assistant("Red.")]
    whole, open_end = read({"messages": turns}, {"messages": turns[:3]}, shape="question")
    assert whole.asked() == open_end.asked() == tuple(turns[:3])
    assert (whole.answer(), open_end.answer(), whole.shape) == ("Red.", None, "question")


# --- bad input -------------------------------------------------------------------------------------------------------

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "options", "part"),
    [
        ({**PAIR, "rejected": " a "}, {}, "the two answers are equal"),
        ({"chosen": [USER, assistant("a")], "rejected": [USER, assistant("a")]}, {}, "the two answers are equal"),
        ({**PAIR, "probability": 1.5}, {}, "not within 0 to 1"),
        ({**PAIR, "probability": "high"}, {}, "the probability is 'high', not a finite number"),
        ({**PAIR, "margin": float("nan")}, {}, "the margin is nan"),
        ({**PAIR, "margin": "inf"}, {}, "the margin is 'inf'"),
        ({**PAIR, "margin": True}, {}, "the margin is True"),
        ({**PAIR, "chosen": ""}, {}, "'chosen' is empty"),
        ({**PAIR, "rejected": None}, {}, "'rejected' is empty"),
        ({**PAIR, "prompt": ""}, {}, "'prompt' is empty"),
        ({**PAIR, "chosen": 3}, {}, "holds a int, not a text"),
        ({**PAIR, "rejected": [USER]}, {}, "an answer is one turn of the assistant"),
        ({**PAIR, "chosen": [assistant("x"), USER, assistant("y")]}, {}, "is 3 (assistant, user, assistant)"),
        ({"chosen": [USER, assistant("a")], "rejected": [SYSTEM, assistant("b")]}, {}, "do not begin alike"),
        ({"prompt": "another", "chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]}, {}, "two prompts"),
        ({"chosen": [USER, assistant("a")], "rejected": [USER]}, {}, "an answer is one turn"),
        ({"prompt": "q", "answers": ["a"], "scores": [1]}, {}, "the ranking has 1 answer; a comparison needs two"),
        ({"prompt": "q", "answers": []}, {"shape": "ranking"}, "the ranking has 0 answers"),
        ({"prompt": "q", "answers": "a"}, {"shape": "ranking"}, "holds no list of answers"),
        ({"prompt": "q", "answers": ["a", "b", "a "]}, {"shape": "ranking"}, "'a' stands there twice"),
        ({"prompt": "q", "answers": ["a", "b", "c"], "scores": [1, 2]}, {}, "3 answers and 2 scores"),
        ({"prompt": "q", "answers": ["a", "b"], "scores": [1, None]}, {}, "score 2 is None"),
        ({"prompt": "q", "answers": ["a", ""], "scores": [1, 2]}, {}, "'answers' is empty"),
        ({"prompt": "q", "completion": "a", "good": "maybe"}, {"shape": "rated"}, "neither true nor false"),
        ({"prompt": "q", "completion": "a", "good": 0.5}, {"shape": "rated"}, "neither true nor false"),
        ({"prompt": "q", "completion": "", "good": True}, {"shape": "rated"}, "'completion' is empty"),
        ({"messages": [SYSTEM, assistant("a")]}, {"shape": "question"}, "asks nothing"),
        ({"prompt": "q", "query": "p", "chosen": "a", "rejected": "b"}, {}, "2 ways"),
        ({**PAIR, "completion": "c"}, {}, "data.columns.chosen=chosen data.columns.rejected=rejected"),
        ({**PAIR, "margin": 1}, {"columns": {"scores": "margin"}, "shape": "ranking"}, "no column"),
    ],
)  # fmt: skip
def test_rows_that_are_no_preference_say_why(read: Any, row: Row, options: Row, part: str) -> None:
    with pytest.raises(DataError) as caught:
        read(row, **options)
    assert part in str(caught.value) and caught.value.where.endswith("line 1")


def test_a_later_row_without_its_other_answer_is_named_by_its_line_and_may_be_skipped(read: Any) -> None:
    with pytest.raises(DataError, match="no answer to learn from") as caught:
        read(PAIR, {"prompt": "q", "chosen": "a"})
    assert caught.value.where.endswith("line 2") and any("data.columns.rejected" in hint for hint in caught.value.hints)
    skipped = BadRows()
    assert len(read(PAIR, {**PAIR, "rejected": "a"}, {**PAIR, "margin": "x"}, bad_rows=skipped)) == 1 and skipped.count == 2


def test_such_rows_are_not_streamed_and_the_error_says_what_to_do(read: Any) -> None:
    with pytest.raises(SpecError, match=r"reads as 'pair'[\s\S]*data\.stream=false"):
        Survey().add(read(PAIR)[0])


# --- choosing, splitting, leaks --------------------------------------------------------------------------------------


def test_pairs_of_one_prompt_never_straddle_a_split_and_leaks_are_found_by_the_prompt(read: Any) -> None:
    records = read(*({"prompt": f"q{n % 10}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(40)))
    parts = split(records, {"dev": "20%"}, seed=1)
    assert {r.key() for r in parts["dev"]}.isdisjoint(r.key() for r in parts["train"]) and len(parts["dev"]) == 8
    with pytest.raises(LeakError, match="4 of train also in test"):
        check_leaks(records, {"test": records[:1]})


def test_of_pairs_only_what_is_the_same_is_a_duplicate_and_only_what_is_turned_a_conflict(read: Any) -> None:
    turned = {"prompt": "q", "chosen": "b", "rejected": "a"}
    another = {"prompt": "q", "chosen": "a", "rejected": "c"}
    records = read(PAIR, {**PAIR, "chosen": "a "}, turned, another)
    kept, report = select(records, drop_conflicts=False)
    assert [words(record) for record in kept] == [["a", "b"], ["b", "a"], ["a", "c"]] and report.duplicates == 1
    kept, report = select(records, drop_conflicts=True)
    assert [words(record) for record in kept] == [["a", "c"]] and report.conflicts == 3
    marked = read(*({"prompt": "q", "completion": "a", "good": mark} for mark in (True, False, True)), shape="rated")
    assert len(select(marked, drop_conflicts=False)[0]) == 2


def test_the_report_tells_ties_margins_lengths_and_repeats(read: Any) -> None:
    records = read(
        {"prompt": "q1", "chosen": "a long answer", "rejected": "short", "margin": 1, "probability": 0.9},
        {"prompt": "q1", "chosen": "short", "rejected": "a long answer", "margin": 3, "probability": 1},
        {"prompt": "q2", "chosen": "a longer one", "rejected": "brief", "probability": 1, "margin": 2},
        {"prompt": "q3", "chosen": "a much longer answer", "rejected": "x", "probability": 0.5},
    )
    found = compared(records)
    assert (found.records, found.questions, found.ties, found.unsure, found.repeated, found.turned) == (4, 3, 1, 1, 1, 1)
    assert found.margins == (1, 2, 3) and found.longer == (2 / 3, 3) and found.chosen == (1, 3, 4)  # ties say nothing of length
    told = "\n".join(found.lines())
    assert "4 pairs · different questions: 3" in told and "longer one in 66.7% of 3" in told and "margins: 2 (1 to 3)" in told


def test_texts_that_stand_in_two_splits_in_other_pairs_are_counted(read: Any) -> None:
    train = read({"chosen": "a", "rejected": "b"}, {"chosen": "c", "rejected": "d"})
    test = read({"chosen": "a", "rejected": "c"}, {"chosen": "x", "rejected": "y"})
    assert check_leaks(train, {"test": test})[1].summary() == ""
    assert shared_answers(train, {"test": test, "dev": []}) == ["test: 2 answers without a prompt stand in train as well, in other pairs"]
    assert shared_answers(read(PAIR), {"test": read(PAIR)}) == []  # those are questions, which leaks are about
