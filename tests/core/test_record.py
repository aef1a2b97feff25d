"""What identifies a question, and what answers it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tunesmith.core.record import Record, called

ASKED = {"role": "user", "content": "What is  the\nweather?"}


def call(city: str, identity: str = "call_1", text: bool = False) -> dict[str, object]:
    arguments = f'{{"city":  "{city}"}}' if text else {"city": city}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": identity, "function": {"name": "weather", "arguments": arguments}}]}


def dialogue(*messages: dict[str, object]) -> Record:
    return Record("messages", messages=messages)


def test_the_question_is_everything_before_the_last_assistant_turn_with_spaces_folded():
    record = dialogue(ASKED, {"role": "assistant", "content": "Sunny."})
    assert record.question() == "user: What is the weather?"
    assert record.answer() == "Sunny." and record.reply() == record.messages[1] and record.asked() == (ASKED,)
    assert record.key() == replace(record, messages=(ASKED, {"role": "assistant", "content": "Rain."})).key()


def test_turns_after_the_answer_do_not_change_what_is_asked():
    answered = dialogue(ASKED, {"role": "assistant", "content": "Sunny."})
    thanked = dialogue(*answered.messages, {"role": "user", "content": "Thanks"})
    assert (thanked.key(), thanked.answer(), thanked.asked()) == (answered.key(), answered.answer(), answered.asked())


def test_two_dialogues_that_differ_only_in_an_earlier_tool_call_are_two_questions():
    result, said = {"role": "tool", "content": "21"}, {"role": "assistant", "content": "21 degrees"}
    paris, rome = (dialogue(ASKED, call(city), result, said) for city in ("Paris", "Rome"))
    assert paris.key() != rome.key()
    assert 'weather({"city": "Paris"})' in paris.question()


@pytest.mark.parametrize("other", [call("Paris", "call_99"), call("Paris", text=True)])
def test_a_calls_id_and_whether_its_arguments_are_text_or_an_object_say_nothing(other):
    assert called(other) == called(call("Paris"))


def test_a_label_answers_a_text_and_a_dialogue_without_assistant_has_no_answer():
    record = Record("label", text=" so  good ", label="positive")
    assert (record.question(), record.answer(), record.reply()) == ("so good", "positive", {"role": "assistant", "content": "positive"})
    assert Record("label", text="x").reply() is None
    assert dialogue(ASKED).answer() is None and dialogue(ASKED).question() == "user: What is the weather?"
    assert Record("text", text="words").answer() is None


def test_half_a_surrogate_pair_still_has_a_key():
    assert len(Record("text", text="\ud800").key()) == 16
