"""The metrics: published and hand-worked values, and properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import DataError, RunError, SpecError
from tunesmith.core.record import Record
from tunesmith.evaluation.metrics import (
    METRICS,
    UNPARSEABLE,
    ConfusionMatrix,
    accuracy,
    chrf,
    confusion,
    exact_match,
    macro_f1,
    metric,
    per_class,
    rouge_l,
    score_all,
    token_f1,
)

GOLD = ["a", "a", "a", "b", "b", "c"]
SAID = ["a", "a", "b", "b", None, "a"]
TEXT = st.text(alphabet="ab cé.,的猫A", max_size=20)


# Classification


def test_classification_scores_by_hand_with_an_unparseable_answer_counted_as_wrong():
    assert accuracy(GOLD, SAID) == 3 / 6
    assert confusion(GOLD, SAID, ["a", "b", "c"]) == ConfusionMatrix(
        labels=["a", "b", "c", UNPARSEABLE], gold=["a", "b", "c"], counts=[[2, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]]
    )
    a, b, c = per_class(GOLD, SAID, ["a", "b", "c"])
    assert (a.precision, a.recall, a.f1, a.support) == pytest.approx((2 / 3, 2 / 3, 2 / 3, 3))
    assert (b.precision, b.recall, b.f1, b.support) == pytest.approx((1 / 2, 1 / 2, 1 / 2, 2))
    assert (c.precision, c.recall, c.f1, c.support) == (0, 0, 0, 1)
    assert macro_f1(GOLD, SAID, ["a", "b", "c"]) == pytest.approx((2 / 3 + 1 / 2) / 3)


def test_dropping_unparseable_answers_would_raise_the_scores_so_they_are_kept():
    assert macro_f1(["a", "b"], ["a", None], ["a", "b"]) == 0.5
    assert accuracy(["a", "b"], ["a", None]) == 0.5


def test_without_unparseable_answers_there_is_no_column_for_them():
    assert confusion(["a", "b"], ["b", "b"], ["a", "b"]).labels == ["a", "b"]


def test_a_label_that_nobody_names_does_not_lower_macro_f1_and_one_wrongly_named_does():
    assert macro_f1(["a", "b"], ["a", "b"], ["a", "b", "never"]) == 1.0
    assert macro_f1(["a", "a"], ["a", "c"], ["a", "c"]) == pytest.approx((2 / 3 + 0) / 2)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["a", "b", "c", None])), min_size=1, max_size=30))
def test_the_confusion_matrix_holds_every_answer_and_agrees_with_the_other_scores(pairs):
    gold, said = map(list, zip(*pairs, strict=True))
    counts = confusion(gold, said, ["a", "b", "c"]).counts
    assert sum(map(sum, counts)) == len(gold)
    assert sum(counts[i][i] for i in range(3)) / len(gold) == pytest.approx(accuracy(gold, said))
    assert [score.support for score in per_class(gold, said, ["a", "b", "c"])] == [sum(row) for row in counts]
    assert 0 <= macro_f1(gold, said, ["a", "b", "c"]) <= 1


def test_a_label_outside_the_list_is_an_error_not_a_lost_answer():
    with pytest.raises(DataError, match="gold label 'd'"):
        confusion(["d"], ["a"], ["a", "b"])
    with pytest.raises(DataError, match="predicted label 'd'"):
        macro_f1(["a"], ["d"], ["a", "b"])
    with pytest.raises(ValueError):
        accuracy([], [])


# Exact match and token F1


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1),
        ("  an  apple ", "Apple!", 1),
        ("Denver Broncos", "Carolina Panthers", 0),
        ("theatre", "atre", 0),
        ("「東京」。", "東京", 1),
        ("ＡＢＣ１２", "abc12", 1),
        ("cafe\u0301", "café", 1),
        ("A", "", 0),
        ("A", "the", 0),
        ("+", "-", 0),
        ("", "", 1),
    ],
)
def test_exact_match_overlooks_case_punctuation_articles_and_spaces_and_nothing_else(prediction, reference, same):
    assert exact_match(prediction, reference) == same


def test_strict_exact_match_tells_minus_five_from_five():
    assert exact_match("-5", "5") == 1
    assert exact_match("-5", "5", strict=True) == 0
    assert exact_match(" -5\n", "-5", strict=True) == 1
    assert exact_match("Yes", "yes", strict=True) == 0


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("the cat sat", "cat sat down", 2 * 1.0 * (2 / 3) / (1 + 2 / 3)),
        ("to be or not to be", "to be", 2 * (2 / 6) * 1 / (2 / 6 + 1)),
        ("我爱猫", "我爱狗", 2 / 3),
        ("在 Paris 吃饭", "在paris", 2 * 2 / 6),
        ("", "", 1),
        ("", "word", 0),
        ("dog", "cat", 0),
    ],
)
def test_token_f1_by_hand(prediction, reference, score):
    assert token_f1(prediction, reference) == pytest.approx(score)


# ROUGE-L and chrF


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        # Lin 2004, section 3.1: LCS of 3 of 4 words and of 2 of 4 words.
        ("police kill the gunman", "police killed the gunman", 3 / 4),
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        # The test suite of Google's rouge_score, and its documentation's example (5 common words of 8 and 9).
        ("testing one", "testing one two", 4 / 5),
        ("testing two", "testing one two", 4 / 5),
        ("", "testing one two", 0),
        ("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog", 2 * 5 / (8 + 9)),
        # By hand.
        ("snake_case U.S.", "snake case u s", 1),
        ("今天天气好", "今天气很好", 2 * 4 / 10),
        ("naïve café", "Naïve Café", 1),
        ("!", "!", 1),
        ("!", "?", 0),
    ],
)
def test_rouge_l_of_published_and_hand_worked_examples(prediction, reference, score):
    assert rouge_l(prediction, reference) == pytest.approx(score)


def longest_by_table(a: str, b: str) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


@given(st.text(alphabet="abcd", min_size=1, max_size=25), st.text(alphabet="abcd", min_size=1, max_size=25))
def test_rouge_ls_common_subsequence_is_the_one_the_textbook_table_finds(a, b):
    assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(2 * longest_by_table(a, b) / (len(a) + len(b)))


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        # Values of sacrebleu 2.6's sentence chrF2 with its defaults.
        (
            "Die Beziehung zwischen Obama und Netanjahu ist nicht gerade freundlich.",
            "Das Verhältnis zwischen Obama und Netanyahu ist nicht gerade freundschaftlich.",
            0.64818123726097,
        ),
        ("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog", 0.525324471643681),
        # sacrebleu's tests with effective order (equal precision and recall, so beta does not matter).
        ("a b c", "abc", 1),
        ("aa", "ab", 0.25),
        ("", "reference", 0),
        ("abcdefg", "hijklmnop", 0),
        # By hand: precision (3/3 + 2/2 + 1/1) / 3 = 1, recall (3/4 + 2/3 + 1/2) / 3 = 23/36, F2 = 5pr / (4p + r).
        ("abc", "abcd", 5 * (23 / 36) / (4 + 23 / 36)),
        ("", "", 1),
    ],
)
def test_chrf_of_published_and_hand_worked_examples(prediction, reference, score):
    assert chrf(prediction, reference) == pytest.approx(score, abs=1e-12)


def test_chrf_with_a_large_beta_is_recall_and_counts_case():
    assert chrf("abc", "abcd", order=1, beta=1000) == pytest.approx(3 / 4, abs=1e-5)
    assert chrf("ABC", "abc") == 0


@given(TEXT, TEXT)
def test_every_text_score_lies_between_0_and_1_and_is_1_for_the_same_text(prediction, reference):
    for name in ("exact_match", "token_f1", "rouge_l", "chrf"):
        score = metric(name)
        assert 0 <= score(prediction, reference, {}) <= 1
        assert score(reference, reference, {}) == pytest.approx(1)
        if name in ("token_f1", "rouge_l"):
            assert score(prediction, reference, {}) == pytest.approx(score(reference, prediction, {}))


# Regular expressions


def test_a_regex_group_is_compared_with_the_gold_answer_and_the_last_match_counts():
    score = metric("regex", pattern=r"[Aa]nswer:\s*(-?\d+)")
    assert score("Answer: 4, no wait, answer: 5", "5", {}) == 1
    assert score("Answer: 5, no wait, answer: 4", "5", {}) == 0
    assert score("answer: -5", "5", {}) == 0
    assert score("five", "5", {}) == 0
    assert metric("regex", pattern=r"(\d+)", take="first")("5 or 4", "5", {}) == 1


def test_a_regex_may_hold_the_gold_answer_which_is_taken_literally():
    score = metric({"regex": {"pattern": r"answer is {gold}\b"}})
    assert score("the answer is 3.5", "3.5", {}) == 1
    assert score("the answer is 345", "3.5", {}) == 0


@pytest.mark.parametrize(("pattern", "says"), [("(", "not a regular expression"), ("yes", "score every question alike")])
def test_a_regex_that_cannot_work_is_refused_before_any_question_is_scored(pattern, says):
    with pytest.raises(SpecError, match=says):
        metric("regex", pattern=pattern)


# Metrics by name


def test_a_metric_is_found_by_name_by_call_or_by_mapping():
    assert metric("chrf(order=1)")("ab", "ba", {}) == 1
    assert metric("chrf", order=1)("ab", "ba", {}) == 1
    assert metric({"chrf": {"order": 1}})("ab", "ba", {}) == 1
    assert metric({"chrf": None})("ab", "ba", {}) == pytest.approx(chrf("ab", "ba")) != 1
    assert metric("exact_match(strict)")("Yes", "yes", {}) == 0
    assert set(METRICS) == {"exact_match", "token_f1", "rouge_l", "chrf", "regex", "function"}


@pytest.mark.parametrize(
    ("spec", "options", "says"),
    [
        ("rouge", {}, "rouge_l"),
        ("exactmatch", {}, "exact_match"),
        ("chrf(ordr=3)", {}, "order"),
        ("chrf(order=3)", {"order": 4}, "twice"),
        ("chrf", {"order": "six"}, "not of type int"),
        ("chrf", {"order": 0}, "at least 1"),
        ("token_f1 + chrf", {}, "2 metrics"),
        ("regex", {}, "needs its option 'pattern'"),
        ("regex", {"pattern": "(a)", "take": "middle"}, "first or last"),
        ({"chrf": 3}, {}, "not a mapping"),
        ({"chrf": {}, "rouge_l": {}}, {}, "not 2"),
    ],
)
def test_a_metric_that_does_not_exist_or_an_option_it_lacks_is_refused_with_what_is_near(spec, options, says):
    with pytest.raises(SpecError, match=says):
        metric(spec, **options)


# A user's function


@pytest.fixture
def functions(tmp_path):
    path = tmp_path / "my_metrics.py"
    path.write_text(
        "def length(prediction, reference):\n    return min(1.0, len(prediction) / len(reference))\n"
        "def close(prediction, reference, fields):\n    return abs(int(prediction) - int(reference)) <= fields['tolerance']\n"
        "def lenient(prediction, reference, threshold=0.5):\n    return float(threshold == 0.5)\n"
        "def lonely(prediction):\n    return 1\n"
        "def demanding(prediction, reference, *, model):\n    return 1\n"
        "def returns(prediction, reference):\n"
        "    return {'nan': float('nan'), 'text': '1', 'none': None, 'big': 55}[prediction]\n"
        "constant = 3\n"
    )
    return path


def test_a_users_function_is_called_with_the_prediction_the_reference_and_the_fields_if_it_takes_them(functions):
    assert metric(f"{functions}:length")("ab", "abcd", {}) == 0.5
    assert metric("function", name=f"{functions}:close")("12", "10", {"tolerance": 2}) == 1.0
    assert metric(f"{functions}:lenient")("x", "y", {"other": 1}) == 1.0
    assert metric("operator:eq")("x", "x", {}) == 1.0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lonely", "must take"),
        ("demanding", "must take"),
        ("lenght", "length"),
        ("constant", "no function"),
    ],
)
def test_a_function_that_cannot_be_a_metric_is_refused_when_it_is_named(functions, name, says):
    with pytest.raises(SpecError, match=says):
        metric(f"{functions}:{name}")


def test_a_file_or_module_that_cannot_be_loaded_is_refused(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:\n")
    for name, says in [(f"{broken}:f", "SyntaxError"), (f"{tmp_path}/none.py:f", "does not exist"), ("no_such_module_here:f", "imported")]:
        with pytest.raises(SpecError, match=says):
            metric(name)


def test_a_function_runs_its_file_only_when_named(tmp_path):
    path = tmp_path / "loud.py"
    path.write_text("from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\ndef f(prediction, reference):\n    return 1\n")
    metric("token_f1")
    assert not path.with_suffix(".ran").exists()
    metric(f"{path}:f")
    assert path.with_suffix(".ran").exists()


@pytest.mark.parametrize("returned", ["nan", "text", "none", "big", "raises"])
def test_a_function_that_raises_or_returns_no_score_names_the_question(functions, returned):
    record = Record("prompt", ({"role": "user", "content": "How high?"}, {"role": "assistant", "content": "9"}), where="test.jsonl, line 7")
    with pytest.raises(RunError) as caught:
        score_all(metric(f"{functions}:returns"), [returned], [record])
    assert caught.value.where == "test.jsonl, line 7"
    assert "How high?" in str(caught.value) and "Gold answer: '9'" in str(caught.value)
    if returned == "raises":
        assert "KeyError" in str(caught.value)


def test_all_answers_are_scored_against_their_records_and_a_record_without_an_answer_is_an_error():
    records = [Record("label", text="2+2", label="4"), Record("label", text="3+3", label="6")]
    assert score_all(metric("exact_match"), ["4", "7"], records) == [1.0, 0.0]
    with pytest.raises(DataError, match="no gold answer"):
        score_all(metric("exact_match"), ["4"], [Record("text", text="once upon a time")])
