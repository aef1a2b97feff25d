"""Rows to records: every shape, what is ambiguous, what has no answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tunesmith.core.errors import DataError, SpecError, TunesmithError
from tunesmith.core.record import Record
from tunesmith.data import read_records

Row = dict[str, Any]

USER, ASSISTANT = {"role": "user", "content": "你好？"}, {"role": "assistant", "content": "你好！"}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Wien"}'}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def reader(*rows: Row, **options: Any) -> list[Record]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        return list(read_records(path, **options))

    return reader


@pytest.fixture
def refused(read: Any, tmp_path: Path) -> Any:
    def expect(*rows: Row, kind: type[TunesmithError] = DataError, **options: Any) -> TunesmithError:
        with pytest.raises(kind) as caught:
            read(*rows, **options)
        return caught.value

    return expect


def said(record: Record) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in record.messages]


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation", "dialogue", "Messages"])
def test_openai_messages_are_kept_as_they_are(read: Any, column: str) -> None:
    (record,) = read({column: [USER, ASSISTANT], "id": 7})
    assert record.shape == "messages" and record.messages == (USER, ASSISTANT)
    assert record.fields["id"] == 7 and record.where.endswith("rows.jsonl, line 1")


def test_tool_calls_results_and_tools_keep_openais_structure(read: Any) -> None:
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "12 °C"},
        {**ASSISTANT, "weight": 0, "reasoning_content": "hm"},
    ]
    (record,) = read({"messages": turns, "tools": json.dumps([TOOL["function"]])})
    assert record.messages[1] == {"role": "assistant", "tool_calls": [CALL]}
    assert record.messages[2:] == (turns[2], turns[3])
    assert record.tools == (TOOL,)


def test_text_parts_of_a_message_become_one_text_and_other_parts_are_refused(read: Any, refused: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read({"messages": [{"role": "user", "content": parts}, ASSISTANT]})[0].messages[0]["content"] == "ab"
    assert "image_url" in refused({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT]}).what


def test_sharegpt_turns_become_messages_and_function_calls_become_tool_calls(read: Any) -> None:
    call = {"name": "weather", "arguments": {"city": "Wien"}}
    turns = [
        {"from": "human", "value": "天气？"},
        {"from": "function_call", "value": json.dumps([call, {**call, "name": "time"}])},
        {"from": "observation", "value": "12 °C"},
        {"from": "observation", "value": {"hour": 9}},
        {"from": "gpt", "value": "十二度"},
    ]
    (record,) = read({"conversations": turns, "system": "Be brief.", "tools": [TOOL]})
    assert [m["role"] for m in record.messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    calls = record.messages[2]["tool_calls"]
    assert [c["function"] for c in calls] == [call, {**call, "name": "time"}]
    assert [m["tool_call_id"] for m in record.messages[3:5]] == [c["id"] for c in calls] and len({c["id"] for c in calls}) == 2
    assert record.messages[4]["content"] == '{"hour": 9}' and record.answer() == "十二度"


def test_alpaca_joins_instruction_and_input_and_unrolls_the_history(read: Any) -> None:
    rows = read(
        {"instruction": "Translate.", "input": "猫", "output": "cat", "text": "the whole once more"},
        {"instruction": "And?", "input": "", "output": "dog", "history": [["Translate.", "cat"]], "system": "Be brief."},
    )
    assert rows[0].shape == "prompt" and said(rows[0]) == [("user", "Translate.\n猫"), ("assistant", "cat")]
    assert rows[1].shape == "messages"
    assert said(rows[1]) == [
        ("system", "Be brief."),
        ("user", "Translate."),
        ("assistant", "cat"),
        ("user", "And?"),
        ("assistant", "dog"),
    ]


@pytest.mark.parametrize("asked", ["prompt", "question", "query", "input", "instruction"])
@pytest.mark.parametrize("answered", ["completion", "answer", "response", "output", "target"])
def test_prompt_and_completion_go_by_many_names(read: Any, asked: str, answered: str) -> None:
    (record,) = read({asked: "1 + 1?", answered: 2, "reasoning": "count", "system": "Be brief."})
    assert record.shape == "prompt" and said(record) == [("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2")]
    assert record.reasoning == "count" and record.answer() == "2"


def test_prompt_and_completion_may_be_lists_of_messages(read: Any) -> None:
    (record,) = read({"prompt": [{"role": "system", "content": "s"}, USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert record.shape == "messages" and len(record.messages) == 5 and record.answer() == "你好！"
    (mixed,) = read({"prompt": [USER], "completion": "yes"})
    assert said(mixed) == [("user", "你好？"), ("assistant", "yes")]


@pytest.mark.parametrize(("value", "label"), [("good", "good"), (" good ", "good"), (1, "1"), (0, "0"), (True, "true"), (2.0, "2")])
def test_labels_of_any_plain_kind_become_text(read: Any, value: Any, label: str) -> None:
    (record,) = read({"text": " 很好 ", "label": value, "rationale": "so"})
    assert (record.shape, record.text, record.label, record.reasoning) == ("label", " 很好 ", label, "so")


@pytest.mark.parametrize("column", ["text", "content"])
def test_text_alone_is_plain_text(read: Any, column: str) -> None:
    (record,) = read({column: "once upon a time", "url": "x"})
    assert record.shape == "text" and record.text == "once upon a time" and record.label is None


def test_dialogues_in_the_cells_of_a_table_are_parsed(tmp_path: Path) -> None:
    import csv

    with (tmp_path / "t.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["messages"], [json.dumps([USER, ASSISTANT])]])
    assert next(read_records(tmp_path / "t.csv")).messages == (USER, ASSISTANT)


def test_keys_that_arrow_made_up_are_taken_off_again(tmp_path: Path) -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "a", "arguments": {"x": 1}}}]
    more = [{"id": "2", "type": "function", "function": {"name": "b", "arguments": {"y": 2}}}]
    rows = [{"messages": [USER, {"role": "assistant", "tool_calls": each}]} for each in (calls, more)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    records = list(read_records(tmp_path / "t.parquet"))
    assert [record.messages for record in records] == [tuple(row["messages"]) for row in rows]


# --- the user's mapping ----------------------------------------------------------------------------------------------


def test_columns_are_named_by_the_user(read: Any) -> None:
    (record,) = read(
        {"tweet": "hm", "mood": "sad", "why": "tone", "author": 12},
        columns={"text": "tweet", "label": "mood", "reasoning": "why", "group": "author"},
    )
    assert (record.text, record.label, record.reasoning, record.group) == ("hm", "sad", "tone", "12")
    (chat,) = read({"turns": [USER, ASSISTANT], "rules": "s"}, columns={"messages": "turns", "system": "rules"})
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    (part,) = read({"q": "a?", "answer": "b"}, columns={"prompt": "q"})
    assert said(part) == [("user", "a?"), ("assistant", "b")]


def test_an_unknown_column_names_the_nearest(refused: Any) -> None:
    error = refused({"tweet": "a", "sentiment": "b"}, columns={"text": "tweet", "label": "sentimnt"})
    assert "no column 'sentimnt'" in error.what and error.where.endswith("line 1")
    assert "data.columns.label=sentiment" in error.hints[0] and "tweet, sentiment" in error.hints[1]


def test_unknown_roles_and_shapes_and_columns_of_two_shapes_are_refused_at_the_call(tmp_path: Path) -> None:
    for options, part in (
        ({"columns": {"lable": "x"}}, "label"),
        ({"shape": "sharegtp"}, "sharegpt"),
        ({"columns": {"text": "a", "prompt": "b"}}, "prompt: prompt, completion"),
        ({"columns": {"text": "a", "label": "b"}, "shape": "messages"}, "shape 'messages'"),
        ({"columns": {"text": "a", "label": "b", "system": "c"}}, "system"),
    ):
        with pytest.raises(SpecError) as caught:
            read_records(tmp_path / "not looked at", **options)  # type: ignore[arg-type]
        assert part in str(caught.value)


def test_a_row_that_can_be_read_in_two_ways_is_refused_with_the_keys_that_choose(read: Any, refused: Any) -> None:
    row = {"text": "t", "label": "l", "question": "q", "answer": "a"}
    error = refused(row)
    assert "2 ways" in error.what
    assert any("data.columns.prompt=question data.columns.completion=answer" in hint for hint in error.hints)
    assert any("data.columns.text=text data.columns.label=label" in hint for hint in error.hints)
    assert read(row, columns={"prompt": "question", "completion": "answer"})[0].shape == "prompt"
    assert read(row, columns={"text": "question", "label": "label"})[0].text == "q"
    assert read(row, shape="label")[0].label == "l" and read(row, shape="text")[0].shape == "text"


def test_two_columns_for_one_part_are_ambiguous_too(read: Any, refused: Any) -> None:
    row = {"question": "q", "query": "p", "answer": "a"}
    assert "data.columns.prompt=query" in str(refused(row))
    assert said(read(row, columns={"prompt": "query"})[0])[0] == ("user", "p")


def test_a_dialogue_beside_other_columns_is_ambiguous_only_if_they_make_a_whole(read: Any, refused: Any) -> None:
    assert read({"messages": [USER, ASSISTANT], "prompt": "x", "text": "y"})[0].shape == "messages"
    assert "data.columns.messages=messages" in str(refused({"messages": [USER, ASSISTANT], "prompt": "x", "response": "y"}))


# --- rows that are not right -----------------------------------------------------------------------------------------


def test_a_row_without_an_answer_says_what_where_and_what_now(refused: Any, tmp_path: Path) -> None:
    error = refused({"question": "q", "context": "c"})
    path = tmp_path / "rows.jsonl"
    assert str(error) == (
        f"{path}, line 1: the row has no answer to learn from (its keys: question, context).\n"
        "  Name the column:   tunesmith train spec.yaml data.columns.completion=NAME\n"
        f"  Or see the rows:   tunesmith data show {path}"
    )


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ({"question": "q", "answer": "a"}, {"question": "q"}),
        ({"question": "q", "answer": "a"}, {"question": "q", "answer": None}),
        ({"question": "q", "answer": "a"}, {"question": "q", "answer": "  "}),
        ({"text": "t", "label": 1}, {"text": "t"}),
        ({"text": "t", "label": 1}, {"text": "t", "label": None}),
        ({"text": "t", "label": 1}, {"text": "t", "label": float("nan")}),
        ({"messages": [USER, ASSISTANT]}, {"messages": [USER]}),
        ({"messages": [USER, ASSISTANT]}, {"messages": [USER, {"role": "assistant", "content": ""}]}),
    ],
)
def test_a_later_row_without_an_answer_is_named_by_its_line(refused: Any, good: Row, bad: Row) -> None:
    error = refused(good, bad, good)
    assert error.where.endswith("line 2")
    assert "no answer to learn from" in error.what and "tunesmith data show" in error.hints[1]


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_a_null_or_empty_text_is_refused(refused: Any, text: Any) -> None:
    for row, name in (({"text": text, "label": "a"}, "text"), ({"question": text, "answer": "a"}, "question")):
        good = {key: "x" for key in row}
        error = refused(good, row)
        assert error.where.endswith("line 2") and f"the text in '{name}' is" in error.what


@pytest.mark.parametrize(
    "rows",
    [
        ({"text": "t", "label": "l"}, {"question": "q", "answer": "a"}),
        ({"question": "q", "answer": "a"}, {"messages": [USER, ASSISTANT]}),
        ({"messages": [USER, ASSISTANT]}, {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
        ({"messages": [USER, ASSISTANT]}, {"text": "t"}),
    ],
)
def test_the_first_row_decides_the_shape_of_a_file(refused: Any, rows: tuple[Row, Row]) -> None:
    error = refused(rows[0], rows[0], rows[1])
    assert error.where.endswith("line 3") and "first row" in error.what


@pytest.mark.parametrize(
    ("turns", "part"),
    [
        ([USER, {"role": "assistent", "content": "a"}], "assistant"),
        ([USER, {"role": "assistant"}], "message 2 (assistant) has no content"),
        ([{"role": "user", "content": None}, ASSISTANT], "message 1 (user) has no content"),
        ([USER, "assistant: hi"], "message 2"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}], "name no function"),
        ([{"from": "human", "value": "a"}, {"from": "goblin", "value": "b"}], "speaker in turn 2 'goblin'"),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": None}], "turn 2"),
        ([{"from": "human", "value": "a"}, {"from": "function_call", "value": "weather()"}], "function call in turn 2"),
        ([{"from": "human", "value": "a"}, {"speaker": "gpt"}], "turn 2"),
    ],
)
def test_malformed_turns_are_named(refused: Any, turns: list[Any], part: str) -> None:
    assert part in str(refused({"conversations": turns}))


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"messages": "hello"}, "no column is known"),
        ({"messages": ["a", "b"]}, "is no dialogue"),
        ({"a": 1, "b": 2}, "data.columns.text=NAME"),
        ({"tokens": ["a"], "ner_tags": "O"}, "no list of tags"),
        ({"text": "a", "label": [1, 2]}, "several labels"),
        ({"text": "a", "label": 0.37}, "score"),
        ({"text": ["a"], "label": "b"}, "not a text"),
        ({"question": "a", "answer": {"text": "b"}}, "not a text"),
        ({"prompt": "a", "completion": "b", "system": 3}, "system is int"),
        ({"prompt": "a", "completion": "b", "tools": "weather"}, "tools"),
        ({"prompt": "a", "completion": "b", "tools": [{"type": "x"}]}, "no name"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "history"),
        ({"messages": [{"role": "system", "content": "a"}, USER, ASSISTANT], "system": "b"}, "two system texts"),
    ],
)
def test_rows_that_cannot_be_read_say_why(refused: Any, row: Row, part: str) -> None:
    error = refused(row)
    assert part in str(error) and error.where.endswith("line 1")


def test_the_same_system_text_twice_is_one(read: Any) -> None:
    (record,) = read({"messages": [{"role": "system", "content": "a"}, USER, ASSISTANT], "system": "a"})
    assert [m["role"] for m in record.messages] == ["system", "user", "assistant"]


def test_a_row_without_its_group_is_refused(refused: Any) -> None:
    error = refused({"text": "a", "doc": "1"}, {"text": "b", "doc": None}, columns={"group": "doc"})
    assert error.where.endswith("line 2") and "no group" in error.what
