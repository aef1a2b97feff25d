"""Ways of asking: demonstrations come from training samples, and never are the question itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import DataError
from tunesmith.core.record import Record
from tunesmith.evaluation.prompting import ANSWER, chain_of_thought, draw_balanced, few_shot, final_answer, nearest_shots, zero_shot
from tunesmith.evaluation.task import Task

TASK = Task("mood", "label", ("neg", "pos"), instruction="{text}", system="S")
POOL = [Record("label", text=f"sample number {i}", label="pos" if i % 3 else "neg", where=f"train, line {i}") for i in range(12)]
QUESTION = Record("label", text="a new question", label="pos", where="test, line 1")


def shown(messages):
    """(question, answer) of each demonstration."""
    turns = [m for m in messages if m["role"] != "system"]
    return [(turns[i]["content"], turns[i + 1]["content"]) for i in range(0, len(turns) - 1, 2)]


def ways(pool, shots=4):
    return [
        few_shot(TASK, pool, shots=shots),
        few_shot(TASK, pool, shots=shots, choose="random"),
        nearest_shots(TASK, pool, shots=shots),
    ]


def test_zero_shot_is_the_bare_question():
    assert zero_shot(TASK)(QUESTION) == [{"role": "system", "content": "S"}, {"role": "user", "content": "a new question"}]


def test_demonstrations_stand_between_the_system_turn_and_the_question_each_with_its_gold_answer():
    gold = {record.text: record.label for record in POOL}
    for ask in ways(POOL):
        messages = ask(QUESTION)
        assert messages[0] == {"role": "system", "content": "S"} and messages[-1] == {"role": "user", "content": "a new question"}
        assert [m["role"] for m in messages[1:]] == ["user", "assistant"] * 4 + ["user"]
        assert all(gold[question] == answer for question, answer in shown(messages)) and len(set(shown(messages))) == 4


@given(st.integers(0, 11), st.integers(1, 12), st.integers(0, 5))
def test_a_question_is_never_among_its_own_demonstrations(place, shots, seed):
    copy = replace(POOL[place], text=f"  {POOL[place].text.replace(' ', '  ')}", where="elsewhere")
    pool = [*POOL, copy]
    for way in (
        few_shot(TASK, pool, shots=shots, seed=seed),
        few_shot(TASK, pool, shots=shots, choose="random", seed=seed),
        nearest_shots(TASK, pool, shots=shots),
    ):
        found = [question for question, _ in shown(way(POOL[place]))]
        assert " ".join(POOL[place].text.split()) not in [" ".join(question.split()) for question in found]
        assert len(found) == min(shots, 11)


def test_demonstrations_come_from_the_pool_only_whatever_else_is_asked():
    texts = {record.text for record in POOL}
    for ask in ways(POOL):
        for number in range(5):
            assert {question for question, _ in shown(ask(replace(QUESTION, text=f"test {number}")))} <= texts


def test_fixed_demonstrations_are_the_same_for_every_question_and_random_ones_are_not():
    fixed, random, _ = ways(POOL)
    questions = [replace(QUESTION, text=f"test {n}", where="") for n in range(6)]
    assert len({str(shown(fixed(q))) for q in questions}) == 1
    assert len({str(shown(random(q))) for q in questions}) > 3
    assert [shown(random(q)) for q in questions] == [shown(few_shot(TASK, POOL, shots=4, choose="random")(q)) for q in reversed(questions)][
        ::-1
    ]
    assert shown(few_shot(TASK, POOL, shots=4, seed=1)(QUESTION)) != shown(fixed(QUESTION))


@given(st.integers(1, 8), st.integers(0, 20))
def test_labels_are_in_balance_however_unbalanced_the_pool(shots, seed):
    counts = Counter(record.label for record in draw_balanced(POOL, shots, np.random.default_rng(seed)))
    assert sum(counts.values()) == shots and max(counts.values()) - min(counts[name] for name in ("neg", "pos")) <= 1


def test_labels_that_stand_in_answers_of_prompts_are_balanced_too():
    pool = [
        Record("prompt", messages=({"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "neg" if i == 7 else "pos"}))
        for i in range(40)
    ]
    answers = [answer for _, answer in shown(few_shot(Task("t", "label", ("neg", "pos")), pool, shots=2)(QUESTION))]
    assert sorted(answers) == ["neg", "pos"]


def test_labels_do_not_come_in_the_same_order_every_time():
    first = {draw_balanced(POOL, 4, np.random.default_rng(seed))[0].label for seed in range(20)}
    assert first == {"neg", "pos"}


def test_the_nearest_samples_are_shown_and_the_most_alike_stands_last():
    pool = [Record("label", text=text, label="pos") for text in ("blue sky today", "the red car drives fast", "red car", "soup")]
    found = [question for question, _ in shown(nearest_shots(TASK, pool, shots=2)(Record("label", text="the red car drives", label="pos")))]
    assert found == ["red car", "the red car drives fast"]


def test_a_demonstration_that_is_a_dialogue_is_shown_whole_with_its_calls():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    turns = (
        {"role": "system", "content": "own"},
        {"role": "user", "content": "u"},
        call,
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "done"},
    )
    late = (*turns, {"role": "user", "content": "thanks"})
    asked = few_shot(Task("t", "generate"), [Record("messages", messages=late)], shots=1)(
        Record("messages", messages=({"role": "user", "content": "q"},))
    )
    assert asked == [*turns[1:], {"role": "user", "content": "q"}]


@pytest.mark.parametrize("way", [few_shot, nearest_shots])
def test_too_few_samples_and_no_shots_are_refused(way):
    with pytest.raises(DataError, match=r"(?s)13 demonstrations were asked for, but only 12.*shots=12"):
        way(TASK, [*POOL, Record("label", text="no label")], shots=13)
    with pytest.raises(DataError, match="at least 1"):
        way(TASK, POOL, shots=0)


WORKED = [replace(POOL[0], reasoning=" It sounds sad. "), replace(POOL[1], reasoning="It sounds happy.")]


def test_worked_examples_reason_first_and_end_with_their_answer_in_the_form_that_is_asked_for():
    messages = chain_of_thought(TASK, WORKED)(QUESTION)
    assert [answer for _, answer in shown(messages)] == [f"It sounds sad. {ANSWER} neg", f"It sounds happy. {ANSWER} pos"]
    users = [m["content"] for m in messages if m["role"] == "user"]
    assert all("Think step by step" in text and ANSWER in text for text in users) and users[-1].startswith("a new question\n")
    assert [final_answer(answer) for _, answer in shown(messages)] == ["neg", "pos"]


def test_a_worked_example_is_left_out_where_it_is_the_question_itself():
    assert len(shown(chain_of_thought(TASK, WORKED)(WORKED[0]))) == 1


def test_in_a_dialogue_only_the_turn_to_be_answered_asks_to_think():
    talk = Record(
        "messages",
        messages=(
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yes?"},
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4"},
        ),
    )
    worked = Record(
        "messages", messages=({"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}), reasoning="One more."
    )
    users = [m["content"] for m in chain_of_thought(Task("t", "generate"), [worked])(talk) if m["role"] == "user"]
    assert ["Think" in text for text in users] == [True, False, True]


@pytest.mark.parametrize(
    ("worked", "says"),
    [
        ([], r"(?s)at least one worked example.*climb\.demonstrations"),
        ([replace(POOL[0], where="d, line 1")], "d, line 1: the worked example has no reasoning"),
        ([replace(WORKED[0], label=None, where="d, line 1")], "d, line 1: .*no gold answer"),
        ([replace(WORKED[0], label="meh", where="d, line 1")], "d, line 1: the label 'meh'"),
    ],
)
def test_examples_without_reasoning_answer_or_a_known_label_are_refused(worked, says):
    with pytest.raises(DataError, match=says):
        chain_of_thought(TASK, worked)


@pytest.mark.parametrize(
    ("text", "answer"),
    [("I think so. Answer: pos", "pos"), ("Answer: no wait. Answer: neg.", "neg."), ("pos", "pos"), ("So Answer:", ""), (" x \n", "x")],
)
def test_the_final_answer_follows_the_last_mark(text, answer):
    assert final_answer(text) == answer
