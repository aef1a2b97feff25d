"""A task: what is asked, what is trained on, and what cannot be judged."""

from __future__ import annotations

import pytest

from tunesmith.core.errors import DataError, SpecError
from tunesmith.core.record import Record
from tunesmith.evaluation.task import Task, make_task
from tunesmith.spec import TaskSpec


def user(text):
    return {"role": "user", "content": text}


def said(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def label(text, name, where=""):
    return Record("label", text=text, label=name, where=where)


def dialogue(*messages, where=""):
    return Record("messages", messages=messages, where=where)


LABELLED = [label("good", "pos"), label("bad", "neg"), label("fine", "pos")]
SINGLE = dialogue(user("2+2?"), said("4"))
TALK = dialogue(user("Hi"), said("Hello"), user("2+2?"), said("4"), where="talk.jsonl, line 1")
CALL = {"tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]}


# Made from a spec and the training samples


def test_labels_and_kind_are_read_from_the_training_samples():
    task = make_task(TaskSpec(), LABELLED)
    assert (task.kind, task.labels, task.metric, task.name) == ("label", ("neg", "pos"), "accuracy", "classification")
    task = make_task(TaskSpec(), [SINGLE])
    assert (task.kind, task.labels, task.metric, task.name) == ("generate", (), "exact_match", "generation")


def test_labels_that_are_listed_keep_their_order_and_may_judge_dialogues():
    task = make_task(TaskSpec(labels=["4", "5"]), [SINGLE])
    assert (task.kind, task.labels) == ("label", ("4", "5"))


@pytest.mark.parametrize(
    ("labels", "records", "says"),
    [
        ([], [label("a", "only")], r"at least two labels; found \['only'\]"),
        (["a", "a"], [], "distinct"),
        (["a", " a"], [], "distinct"),
        (["a", " "], [], "not empty"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(labels, records, says):
    with pytest.raises(SpecError, match=says):
        make_task(TaskSpec(kind="label", labels=labels), records)


def test_a_training_sample_with_a_label_that_is_not_listed_is_refused_with_its_place():
    with pytest.raises(DataError, match=r"a\.csv, line 2: 'meh' is none of the task's labels \(pos, neg\)"):
        make_task(TaskSpec(labels=["pos", "neg"]), [label("x", "pos"), label("y", "meh", "a.csv, line 2")])


@pytest.mark.parametrize("metric", ["chrf", "macro_f1", {"exact_match": {}}])
def test_a_metric_that_a_label_task_would_ignore_is_refused(metric):
    with pytest.raises(SpecError, match=r"(?s)judged by accuracy.*task.kind=generate"):
        make_task(TaskSpec(metric=metric), LABELLED)
    assert make_task(TaskSpec(metric="accuracy"), LABELLED).metric == "accuracy"


def test_an_unknown_metric_is_refused_before_anything_is_trained():
    with pytest.raises(SpecError, match="unknown metric 'crf'"):
        make_task(TaskSpec(metric="crf"), [SINGLE])
    assert make_task(TaskSpec(metric={"chrf": {"order": 3}}), [SINGLE]).metric == {"chrf": {"order": 3}}


# Asking


def test_a_text_is_put_where_the_instruction_marks_it_and_only_there():
    task = Task("t", "label", ("a", "b"), instruction="One of {labels}: {text}!")
    assert task.ask(label("see {labels} and {text}", "a")) == [user("One of a, b: see {labels} and {text}!")]
    assert Task("t", "label", ("a", "b"), instruction="Judge.").ask(label("x", "a")) == [user("Judge.\n\nx")]


def test_without_an_instruction_a_label_task_names_the_labels_and_a_prompt_is_asked_as_it_stands():
    asked = Task("t", "label", ("a", "b")).ask(label("some text", "a"))
    assert "a, b" in asked[0]["content"] and asked[0]["content"].endswith("Text: some text")
    assert Task("t", "generate").ask(SINGLE) == [user("2+2?")]
    assert Task("t", "generate", instruction="Compute: {text}").ask(SINGLE) == [user("Compute: 2+2?")]


def test_what_is_asked_ends_before_the_gold_answer_even_if_the_dialogue_goes_on():
    assert Task("t", "generate").ask(dialogue(user("2+2?"), said("4"), user("Thanks"))) == [user("2+2?")]
    assert Task("t", "generate").ask(TALK) == [user("Hi"), said("Hello"), user("2+2?")]


def test_the_tasks_system_turn_comes_first_unless_the_dialogue_brings_its_own():
    task = Task("t", "generate", system="Be brief.")
    assert task.ask(SINGLE) == [system("Be brief."), user("2+2?")]
    for role in ("system", "developer"):
        own = {"role": role, "content": "Be long."}
        assert task.ask(dialogue(own, user("x"), said("y"))) == [own, user("x")]


def test_plain_text_asks_nothing():
    with pytest.raises(DataError, match="asks nothing"):
        Task("t", "generate").ask(Record("text", text="words"))


# Training samples


def test_a_training_sample_is_the_question_with_its_answer():
    assert Task("t", "label", ("a", "b"), instruction="{text}").solved(label("x", "a")) == [user("x"), said("a")]
    assert Task("t", "generate", system="S").solved(TALK) == [system("S"), *TALK.messages]


def test_an_answer_that_calls_a_tool_keeps_its_call_in_training_with_an_instruction_too():
    record = dialogue(user("add"), said("", **CALL))
    for instruction in ("", "Do: {text}"):
        assert Task("t", "generate", instruction=instruction).solved(record)[-1] == record.messages[-1]


def test_a_sample_without_an_answer_cannot_be_learnt_from():
    with pytest.raises(DataError, match="no answer to learn from"):
        Task("t", "generate").solved(dialogue(user("x")))


# Judging


def test_a_gold_label_is_read_without_the_spaces_around_it():
    task = Task("t", "label", ("4", "5"))
    task.check([dialogue(user("2+2?"), said(" 4\n"))])
    assert task.gold(dialogue(user("x"), said(" 4"))) == "4"
    assert Task("t", "generate").gold(dialogue(user("x"), said(" 4"))) == " 4"


@pytest.mark.parametrize(
    ("task", "record", "says"),
    [
        (Task("t", "label", ("a", "b")), label("x", None, "f, line 9"), "f, line 9: the question has no gold answer"),
        (Task("t", "label", ("a", "b")), label("x", "c", "f, line 9"), "(?s)f, line 9: the label 'c' never occurs.*task.labels"),
        (Task("t", "generate"), dialogue(user("x"), where="f, line 9"), "f, line 9: the question has no gold answer"),
        (Task("t", "generate"), dialogue(user("x"), said("", **CALL), where="f, line 9"), "f, line 9: the gold answer calls a tool"),
        (Task("t", "generate"), dialogue(user("x"), said(" "), where="f, line 9"), "f, line 9: the gold answer is empty"),
        (Task("t", "generate"), Record("text", text="x", where="f, line 9"), "f, line 9: the question has no gold answer"),
    ],
)  # fmt: skip
def test_a_question_that_cannot_be_judged_names_its_place(task, record, says):
    with pytest.raises(DataError, match=says):
        task.check([record])


def test_an_instruction_is_refused_where_dialogues_would_ignore_it_in_training_and_in_test():
    with pytest.raises(SpecError, match=r"(?s)talk\.jsonl, line 1.*dialogues of several turns.*task\.system"):
        make_task(TaskSpec(instruction="Do: {text}"), [TALK])
    task = make_task(TaskSpec(instruction="Do: {text}"), [SINGLE])
    with pytest.raises(SpecError, match=r"talk\.jsonl, line 1"):
        task.check([TALK])
