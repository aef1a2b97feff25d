"""The label parser on what models really say."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.evaluation.labels import parse_label

MOOD = ["positive", "negative", "neutral"]
LETTERS = ["A", "B", "C", "D"]


@pytest.mark.parametrize(
    ("text", "labels", "label"),
    [
        ("positive", MOOD, "positive"),
        (' **"Positive"**.\n', MOOD, "positive"),
        ("positive\n\nReview: awful.\nAnswer: negative", MOOD, "positive"),
        ("At first it seems positive.\nAnswer: negative", MOOD, "negative"),
        ("Answer: positive? No.\nFinal answer: negative.", MOOD, "negative"),
        ("Answer: negative, though parts are positive", MOOD, "negative"),
        ("**Label:**\n- neutral", MOOD, "neutral"),
        ('{"label": "neutral", "second": "positive"}', MOOD, "neutral"),
        ("<answer>\nnegative\n</answer>", MOOD, "negative"),
        ("The category is most likely negative here.", MOOD, "negative"),
        ("I would call this one negative. Yes, negative!", MOOD, "negative"),
        ("It is negative, not positive.", MOOD, "negative"),
        ("Answer: neutral\n\nAnswer:", MOOD, "neutral"),
        ("Answer: positive or negative", MOOD, None),
        ("positive and negative", MOOD, None),
        ("It is not positive.", MOOD, None),
        ("positively unsure", MOOD, None),
        ("no idea", MOOD, None),
        ("  \n", MOOD, None),
        ("This is very positive", ["positive", "very positive"], "very positive"),
        ("this_is_not_entailment", ["entailment", "not_entailment"], "not_entailment"),
        ("That is New\nYork to me", ["York", "New York", "Newark"], "New York"),
        ("The genre: sci fi", ["sci-fi", "drama"], "sci-fi"),
        ("C++.", ["C", "C++"], "C++"),
        ("Answer: us", ["US", "us"], "us"),
        ("Answer: Us", ["US", "us"], None),
        ("The answer is (c).", LETTERS, "C"),
        ("A good question, it is a hard one. I choose D", LETTERS, "D"),
        ("Answer: A because it is", LETTERS, "A"),
        ("Answer: A or B", LETTERS, None),
        ("\\boxed{-1}", ["1", "-1"], "-1"),
        ("-1", ["1", "2"], None),
        ("1.5", ["1", "5"], None),
        ("so it is 2.\n#### 2", ["1", "2"], "2"),
        ("答案是正面。", ["正面", "负面"], "正面"),
        ("我觉得这是不满意的评价", ["满意", "不满意"], "不满意"),
        ("答案：Ｂ", LETTERS, "B"),
        ("可能是正面，也可能是负面", ["正面", "负面"], None),
    ],
)
def test_a_generated_answer_names_the_label_a_reader_would_hear(text, labels, label):
    assert parse_label(text, labels) == label


LABELS = st.lists(
    st.text(alphabet="abz 12-_好坏", min_size=1, max_size=6).filter(lambda s: re.search(r"[^\W_]", s)), min_size=1, max_size=6
)


@settings(deadline=None)
@given(LABELS, st.data())
def test_any_label_written_alone_or_after_a_marker_is_found_again(labels, data):
    folded = {re.sub(r"[\s_-]+", " ", label).strip() for label in labels}
    label = data.draw(st.sampled_from(labels))
    if len(folded) == len(labels):
        for text in (label, f" {label}.", f"Well.\nAnswer: {label}"):
            assert parse_label(text, labels) == label


@given(st.text(max_size=60))
def test_any_text_at_all_gives_one_of_the_labels_or_none(text):
    assert parse_label(text, MOOD) in {*MOOD, None}


def test_many_labels_and_a_long_answer_are_parsed_in_no_time():
    labels = [f"intent number {i}" for i in range(150)]
    assert parse_label("so " * 5000 + "\nAnswer: Intent Number 14", labels) == "intent number 14"


def test_no_labels_at_all_is_a_mistake():
    with pytest.raises(ValueError):
        parse_label("yes", [])
