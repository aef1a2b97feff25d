"""Rewards: what each one that comes with the house says, functions of the user's own, and how several become one number."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import SpecError
from tunesmith.rollout.matching import number_in
from tunesmith.rollout.rewarding import RewardError
from tunesmith.rollout.rewards import Rewards, open_reward
from tunesmith.rollout.sample import Sample, ToolCall
from tunesmith.spec import make_spec


def sample(completion: str, answer: str | None = None, group: int = 0, **more: Any) -> Sample:
    prompt = ({"role": "user", "content": f"Question {group}?"},)
    return Sample(prompt, completion, answer=answer, group=group, where=f"rows.jsonl, line {group + 1}", **more)


def scores(reward: Any, *samples: Sample) -> list[float]:
    return Rewards([reward]).score(samples).total


def written(folder: Path, code: str) -> str:
    (folder / "own.py").write_text(code)
    return str(folder / "own.py")


# What comes with the house


@pytest.mark.parametrize(
    ("said", "right", "expected"),
    [
        ("  Paris ", "paris", 1.0),
        ("Paris, France", "Paris", 0.0),
        ("I think so. <answer> Paris\n</answer>", "Paris", 1.0),
        (r"thus \boxed{42}", "42", 1.0),
        ("so 6 * 7\n#### 42", "42", 1.0),
        ("ﬁne", "fine", 1.0),
    ],
)
def test_exact_folds_spaces_case_and_unicode_and_reads_a_marked_result(said: str, right: str, expected: float) -> None:
    assert scores("exact", sample(said, right)) == [expected]


def test_exact_can_ask_for_capitals_for_the_whole_answer_and_for_another_column_with_several_right_answers() -> None:
    assert scores("exact(case=true)", sample("Paris", "paris")) == [0.0]
    assert scores("exact(marked=false)", sample("#### 4", "4")) == [0.0]
    assert scores("exact(field=gold)", sample("six", fields={"gold": ["6", "six"]})) == [1.0]
    with pytest.raises(SpecError, match="no column 'gold'"):
        scores("exact(field=gold)", sample("six", fields={"other": 1}))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 1,234.5 dollars.", 1234.5),
        ("first 3, then -4", -4.0),
        ("5-4", 4.0),
        ("x = −2", -2.0),
        ("1/4 of it", 0.25),
        (".5", 0.5),
        ("2e3", 2000.0),
        ("12 %", 12.0),
        ("about 7.", 7.0),
        ("1/0", None),
        ("none at all", None),
        ("9 <answer>8</answer> 7", 8.0),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, number: float | None) -> None:
    assert number_in(text) == number


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_numeric_rewards_equal_integers_and_no_others(a: int, b: int) -> None:
    assert scores("numeric", sample(f"The answer is {a:,}.", str(b))) == [float(a == b)]


def test_numeric_has_tolerances_and_says_nothing_of_a_row_without_a_number() -> None:
    assert scores("numeric(tolerance=0.5)", sample("3.4", "3"), sample("3.6", "3")) == [1.0, 0.0]
    assert scores("numeric(tolerance=0.1, relative=true)", sample("108", "100"), sample("111", "100")) == [1.0, 0.0]
    assert scores("numeric(last=false)", sample("3 then 4", "3")) == [1.0]
    assert math.isnan(scores("numeric", sample("3", "no number"))[0]) and math.isnan(scores("numeric", sample("3"))[0])
    assert scores("numeric", sample("no idea", "3")) == [0.0]


def test_regex_finds_or_covers_and_a_broken_pattern_is_refused_before_anything_runs() -> None:
    assert scores(r"regex(pattern='\d+')", sample("a 12"), sample("a")) == [1.0, 0.0]
    assert scores(r"regex(pattern='\d+', whole=true)", sample("a 12"), sample("12")) == [0.0, 1.0]
    assert scores("regex(pattern='YES', case=false)", sample("yes")) == [1.0]
    with pytest.raises(SpecError, match="cannot be read"):
        open_reward("regex(pattern='(')")
    with pytest.raises(SpecError, match="needs pattern"):
        open_reward("regex")


def test_format_asks_for_thought_and_answer_once_each_and_filled() -> None:
    good = "<think>2 and 2</think>\n<answer>4</answer>"
    bad = ["4", "<think></think><answer>4</answer>", f"{good} so there", f"<think>a</think>{good}", "<think>a<answer>4</answer></think>"]
    assert scores("format", sample(good), *map(sample, bad)) == [1.0] + [0.0] * len(bad)
    assert scores("format(partial=true)", sample("<think>a</think> 4"), sample(good)) == [0.25, 1.0]
    assert scores("format(pattern='A: .*')", sample("A: 4\nB"), sample("4")) == [1.0, 0.0]


def test_length_falls_evenly_beyond_the_tolerance_on_both_sides() -> None:
    texts = [sample("w " * count, ids=(0,) * count) for count in (10, 12, 17, 8, 3, 22, 40)]
    assert scores("length(target=10, tolerance=2)", *texts) == pytest.approx([1, 1, 0.5, 1, 0.5, 0, 0])
    assert scores("length(target=10, unit=words)", texts[2]) == pytest.approx([0.3])
    for wrong in ("length(target=0)", "length(target=5, unit=pages)"):
        with pytest.raises(SpecError, match="length"):
            open_reward(wrong)


def test_tool_use_is_the_share_of_calls_that_are_json_and_succeed() -> None:
    calls = (
        ToolCall("add", '{"a": 1}'),
        ToolCall("add", '{"a": 1', failed=True),
        ToolCall("add", "[1]"),
        ToolCall("add", "{}", failed=True),
    )
    assert scores("tool_use", sample("", calls=calls), sample("", calls=calls[:1]), sample("")) == [0.25, 1.0, 0.0]
    assert math.isnan(scores("tool_use(need=false)", sample(""))[0])


# Functions of the user's own


def test_a_function_is_called_with_lists_by_the_names_of_its_parameters(tmp_path: Path) -> None:
    code = (
        "def f(prompts, questions, completions, answers, finished, level, completion_ids, strict=True):\n"
        "    assert prompts[0] == [{'role': 'user', 'content': 'Question 0?'}] and questions[0] == 'Question 0?'\n"
        "    assert strict and completion_ids == [[5, 6], []]\n"
        "    return [(a == c) * lv + (f == 'length') for a, c, lv, f in zip(answers, completions, level, finished)]\n"
    )
    some = [sample("x", "x", fields={"level": 3}, ids=(5, 6)), sample("y", "x", fields={"level": 4}, finished="length")]
    assert scores(f"{written(tmp_path, code)}:f", *some) == [3.0, 1.0]


@pytest.mark.parametrize("returned", ["[True, None, 0.5]", "np.array([1.0, np.nan, 0.5])", "torch.tensor([1.0, 2.0, 0.5])"])
def test_a_function_may_return_booleans_none_arrays_and_tensors(tmp_path: Path, returned: str) -> None:
    code = f"import numpy as np, torch\ndef f(completions, **fields):\n    return {returned}\n"
    spec = {"reward": f"{written(tmp_path, code)}:f", "on_error": "skip"}
    found = Rewards([spec]).score([sample(text) for text in "abc"])
    assert (found.total[0], found.total[2]) == (1.0, 0.5)
    assert math.isnan(found.total[1]) == ("tensor" not in returned)


def test_a_function_with_rest_is_given_every_column(tmp_path: Path) -> None:
    code = "def f(completions, **fields):\n    assert sorted(fields) == ['a', 'b']\n    return fields['b']\n"
    assert scores(f"{written(tmp_path, code)}:f", sample("", fields={"a": 1, "b": 2})) == [2.0]


@pytest.mark.parametrize("written_as", ["completion, answer", "*completions", "completions, /", ""])
def test_a_wrong_signature_is_shown_with_the_right_one_before_anything_runs(tmp_path: Path, written_as: str) -> None:
    file = written(tmp_path, f"def f({written_as}):\n    return []\n")
    with pytest.raises(SpecError) as caught:
        Rewards([f"{file}:f"], columns=["answer", "level"])
    assert f"def f({written_as})" in str(caught.value) and "def f(completions, answers, **fields)" in str(caught.value)


def test_a_misspelt_parameter_names_the_one_that_is_meant_also_when_columns_are_not_known_before(tmp_path: Path) -> None:
    file = written(tmp_path, "def f(completion):\n    return []\n")
    with pytest.raises(SpecError, match="did you mean 'completions'"):
        Rewards([{"reward": f"{file}:f", "on_error": "skip"}]).score([sample("a")])


def test_files_functions_rewards_and_options_that_are_not_there_are_refused_with_what_is(tmp_path: Path) -> None:
    file = written(tmp_path, "def polite(completions):\n    return []\n")
    cases = {
        f"{tmp_path}/owm.py:polite": "own.py",
        f"{file}:rude": "Its functions: polite",
        "numerik": "numeric",
        "numeric(tolerence=1)": "tolerance",
        f"{written(tmp_path / '..', 'import nothing_of_that_name')}:f": "cannot be imported",
    }
    for expression, hint in cases.items():
        with pytest.raises(SpecError) as caught:
            open_reward(expression)
        assert hint in str(caught.value)


@pytest.mark.parametrize("returned", ["[1.0]", "3", "'ab'"])
def test_what_is_no_list_of_one_number_an_answer_is_refused(tmp_path: Path, returned: str) -> None:
    with pytest.raises(RewardError, match=r"for 2 answers|not a number"):
        scores(f"{written(tmp_path, f'def f(completions): return {returned}')}:f", sample("a"), sample("b"))


def test_async_functions_run_at_once_within_their_limit_also_inside_a_running_loop(tmp_path: Path) -> None:
    code = (
        "import asyncio\nnow = most = 0\n"
        "async def f(completions):\n"
        "    global now, most\n"
        "    now += 1\n    most = max(most, now)\n    await asyncio.sleep(0.02)\n    now -= 1\n"
        "    return [most for _ in completions]\n"
        "async def g(completions):\n    return [1.0 for _ in completions]\n"
    )
    file = written(tmp_path, code)
    specs = [{"reward": f"{file}:f", "batch": 1, "concurrency": 3}, f"{file}:g"]
    some = [sample(str(number)) for number in range(7)]
    found = Rewards(specs).score(some)
    assert max(found.parts["f"]) == 3 and found.parts["g"] == [1.0] * 7

    async def inside() -> list[float]:
        return Rewards(specs).score(some).parts["g"]

    assert asyncio.run(inside()) == [1.0] * 7


# What fails


RAISING = "def f(completions):\n    return [1 / len(text) for text in completions]\n"


@pytest.mark.parametrize("word", ["def", "async def"])
def test_a_reward_that_raises_is_reported_with_its_row_and_answer_and_stops_or_is_passed_over(tmp_path: Path, word: str) -> None:
    reward = {"reward": f"{written(tmp_path, RAISING.replace('def', word))}:f", "batch": 1 if word != "def" else None}
    some = [sample("ab", group=0), sample("", group=1)]
    with pytest.raises(RewardError) as caught:
        Rewards([reward]).score(some)
    assert "rows.jsonl, line 2" in str(caught.value) and "ZeroDivisionError" in str(caught.value) and "''" in str(caught.value)
    found = Rewards([{**reward, "on_error": "skip"}, "regex(pattern='a')"]).score(some)
    assert found.total == [1.5, 0.0]  # the weight of the one that failed goes to the other
    assert [(problem.where, problem.completion) for problem in found.problems] == [("rows.jsonl, line 2", "")]
    assert "ZeroDivisionError" in str(found.problems[0])


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "-float('inf')", "1e9", "10**400", "'good'"])
def test_what_is_no_finite_number_below_a_million_is_refused_or_missing(tmp_path: Path, value: str) -> None:
    file = written(tmp_path, f"def f(completions): return [{value} for _ in completions]")
    with pytest.raises(RewardError, match=r"the reward f is"):
        scores(f"{file}:f", sample("a"))
    found = Rewards([{"reward": f"{file}:f", "on_error": "skip"}]).score([sample("a")])
    assert math.isnan(found.total[0]) and len(found.problems) == 1


# Several as one


def both(first: Sequence[float | None], second: Sequence[float | None], tmp_path: Path, one: Any = None, other: Any = None) -> list[float]:
    lists = "\n".join(f"def {name}(completions): return {list(values)!r}" for name, values in (("f", first), ("g", second)))
    file = written(tmp_path, lists)
    some = [sample(str(place), group=place // 2) for place in range(len(first))]
    return Rewards([{"reward": f"{file}:f", **(one or {})}, {"reward": f"{file}:g", **(other or {})}]).score(some).total


def test_rewards_are_summed_by_weight_and_weights_of_the_silent_go_to_those_that_speak(tmp_path: Path) -> None:
    found = both([1, 1, None, None], [10, None, 10, None], tmp_path, {"weight": 3}, {"weight": -1})
    assert found[:3] == [-7.0, 4.0, -40.0] and math.isnan(found[3])


def test_normalised_rewards_have_mean_0_and_deviation_1_in_the_group_or_the_batch(tmp_path: Path) -> None:
    values = [1.0, 3.0, 10.0, 14.0, 5.0, 5.0]
    group = both(values, [None] * 6, tmp_path, {"normalise": "group"}, {"weight": 0})
    assert group == pytest.approx([-(0.5**0.5), 0.5**0.5] * 2 + [0, 0])
    batch = both(values, [None] * 6, tmp_path, {"normalise": "batch"}, {"weight": 0})
    assert np.mean(batch) == pytest.approx(0) and np.std(batch, ddof=1) == pytest.approx(1)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8))
def test_normalising_makes_no_nan_of_any_values(values: list[float]) -> None:
    from tunesmith.rollout.rewards import _normalised

    found = _normalised(np.array([*values, np.nan]), [list(range(len(values) + 1))], "group")
    assert np.isfinite(found[:-1]).all() and np.isnan(found[-1]) and abs(found[:-1].sum()) < 1e-6


def test_clipping_comes_before_the_weight_and_an_answer_that_fails_a_gate_has_the_floor(tmp_path: Path) -> None:
    assert both([-5, 0.5], [0, 0], tmp_path, {"clip": [-1, 1], "weight": 2}) == [-2.0, 1.0]
    gated = both([0, 1, None, 0.5], [7, 7, 7, 7], tmp_path, {"gate": 0.5, "floor": -1, "weight": 0})
    assert gated == [-1.0, 7.0, 7.0, -1.0]


def test_parts_are_what_rewards_said_before_anything_was_made_of_them(tmp_path: Path) -> None:
    file = written(tmp_path, "def f(completions): return [4.0, 8.0]")
    spec = {"reward": f"{file}:f", "name": "mine", "clip": [0, 5], "normalise": "group"}
    assert Rewards([spec]).score([sample("a"), sample("b")]).parts == {"mine": [4.0, 8.0]}


def test_no_rewards_two_of_one_name_and_weights_of_nothing_are_refused() -> None:
    for specs, what in (([], "nothing says"), (["exact", "exact"], "called exact"), ([{"reward": "exact", "weight": 0}], "weight 0")):
        with pytest.raises(SpecError, match=what):
            Rewards(specs)
    assert Rewards(["exact", {"reward": "exact(case=true)", "name": "strict"}]).names == ["exact", "strict"]
    assert Rewards(["exact"]).score([]).total == []


# Comparisons


@pytest.mark.parametrize(
    ("returned", "rewards"),
    [
        ("1", [0.0, 1.0, 0.0]),
        ("[2, 0, 1]", [0.5, 0.0, 1.0]),
        ("[[0, 1, 0.5], [0, 0, 0.25], [0.5, 0.75, 0]]", [0.75, 0.125, 0.625]),
        ("None", [math.nan] * 3),
    ],
)
@pytest.mark.parametrize("word", ["def", "async def"])
def test_a_pick_an_order_and_a_matrix_of_preferences_are_rewards(tmp_path: Path, returned: str, rewards: list[float], word: str) -> None:
    code = f"{word} f(completions, questions):\n    assert len(set(questions)) == 1 and len(completions) == 3\n    return {returned}\n"
    some = [sample(str(place), group=place // 3) for place in range(6)]
    found = Rewards([{"reward": f"{written(tmp_path, code)}:f", "compares": True}]).score(some)
    np.testing.assert_allclose(found.total, rewards * 2)


@pytest.mark.parametrize("returned", ["3", "-1", "[0, 1]", "[0, 0, 1]", "'b'", "[[0, 2, 0]] * 3", "[[0, 1]] * 3"])
def test_a_comparison_that_says_none_of_these_is_refused_with_its_row(tmp_path: Path, returned: str) -> None:
    spec = {"reward": f"{written(tmp_path, f'def f(completions): return {returned}')}:f", "compares": True}
    with pytest.raises(RewardError, match=r"rows.jsonl, line 1"):
        Rewards([spec]).score([sample(text) for text in "abc"])


def test_scores_and_comparisons_mix_and_an_answer_alone_is_compared_with_nothing(tmp_path: Path) -> None:
    file = written(tmp_path, "def f(completions): return 0\nf.compares = True\n")
    some = [sample("1", "1"), sample("2", "1"), sample("1", "1", group=1)]
    found = Rewards(["numeric", {"reward": f"{file}:f", "weight": 0.5}]).score(some)
    assert found.total == [1.5, 0.0, 1.5] and math.isnan(found.parts["f"][2])


# In a spec


def test_a_spec_reads_rewards_as_words_or_entries_and_refuses_what_has_another_form() -> None:
    spec = make_spec({"base": "x", "rewards": ["exact", {"reward": "rules.py:polite", "weight": 0.5}]})
    assert [(one.reward, one.weight) for one in spec.rewards] == [("exact", 1.0), ("rules.py:polite", 0.5)]
    assert make_spec({"base": "x"}, ["rewards=numeric(tolerance=1)"]).rewards[0].reward == "numeric(tolerance=1)"
    wrong = {
        "a + b": "2 rewards",
        "rules.py:": "no function",
        "f(": "cannot be read",
    }
    entries = [({"reward": text}, what) for text, what in wrong.items()]
    entries += [
        ({"reward": "exact", "wieght": 1}, "weight"),
        ({"reward": "exact", "clip": [1, 0]}, "lowest"),
        ({"reward": "a", "floor": 1}, "gate"),
    ]
    for entry, what in entries:
        with pytest.raises(SpecError, match=what):
            make_spec({"base": "x", "rewards": [entry]})


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("numeric(tolerance=x)", "the reward numeric: tolerance should be a valid number, not 'x'"),
        ("regex(pattern=42)", "the reward regex: pattern should be a valid string, not 42"),
        ("length(target=3, unit=pages)", "unit should be"),
        ("code(share=1)", "share should be a valid boolean"),
    ],
)
def test_an_option_of_another_type_than_its_reward_takes_is_refused(written: str, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        open_reward(written)
