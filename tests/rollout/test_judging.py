"""A judge as a reward: preferences among the answers to one prompt, and what is filled in where not all are compared."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.bases import Base, load_base
from tunesmith.core.errors import SpecError
from tunesmith.engine.model import Model
from tunesmith.rollout.judges import Duel, open_judge
from tunesmith.rollout.judging import JudgeReward, asked, filled, judge, judge_rating, judges_among, rounds_of
from tunesmith.rollout.rewards import REWARDS
from tunesmith.rollout.sample import Sample

GROUP = [
    Sample(({"role": "user", "content": "Why?"},), text, where="rows, line 1") for text in ("So.", "Because it is.", "No idea at all.")
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tiny_base_folder) -> Base:
    return load_base(str(tiny_base_folder), dtype="fp32", device="cpu")


def test_answers_to_one_prompt_are_compared_with_one_another(base) -> None:
    reward = judge(model=str(base.folder))
    assert isinstance(reward, JudgeReward)
    reward.share(base)
    matrix = np.array(reward(GROUP))
    assert matrix.shape == (3, 3) and np.allclose(matrix + matrix.T, 1) and np.allclose(np.diag(matrix), 0.5)
    expected = open_judge(Model(base)).compare([Duel("So.", "No idea at all.", "Why?")])[0].preference
    assert matrix[0, 2] == pytest.approx(expected) and reward.judge.model.base is base


def test_a_rating_reward_gives_each_answer_its_own_number(base) -> None:
    reward = judge_rating(model=str(base.folder))
    assert isinstance(reward, JudgeReward)
    reward.share(base)
    assert reward(GROUP) == open_judge(Model(base)).rate([("Why?", one.completion) for one in GROUP])


def test_both_stand_in_the_table_and_only_one_compares() -> None:
    assert REWARDS["judge"].compares and not REWARDS["judge_rating"].compares


@given(st.integers(2, 12), st.integers(1, 12))
def test_in_a_ring_each_answer_meets_at_least_as_many_others_as_asked(size, rivals) -> None:
    pairs = rounds_of(size, rivals, "x")
    assert len(set(pairs)) == len(pairs) and all(i < j for i, j in pairs)
    met = [sum(place in pair for pair in pairs) for place in range(size)]
    assert min(met) >= min(rivals, size - 1) and max(met) - min(met) <= 1


def test_what_was_not_compared_follows_from_what_was() -> None:
    """0 beats 1 and 1 beats 2, as surely as a Bradley-Terry model with strengths 4, 2, 1 says: so 0 beats 2 more surely."""
    matrix = np.array([[np.nan, 0.9, np.nan], [0.1, np.nan, 0.9], [np.nan, 0.1, np.nan]])
    found = filled(matrix)
    assert found[0, 1] == 0.9 and found[0, 2] > 0.75 and found[0, 2] + found[2, 0] == pytest.approx(1)
    assert np.allclose(filled(np.full((3, 3), np.nan)), 0.5)


def test_options_are_held_when_the_reward_is_made() -> None:
    with pytest.raises(SpecError, match="way of judging"):
        judge(model="x", way="guess")
    with pytest.raises(SpecError, match="no_verdict"):
        judge(model="x", no_verdict="never")
    with pytest.raises(SpecError, match="one other"):
        judge(model="x", rivals=0)
    with pytest.raises(SpecError, match="likelihoods"):
        judge_rating(model="http://127.0.0.1:9/v1#m", way="likelihood")
    with pytest.raises(SpecError, match="rubric cannot be read"):
        judge_rating(model="x", rubric="nowhere.txt")


def test_a_dialogue_is_shown_with_its_speakers() -> None:
    turns = ({"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Why?"})
    assert asked(Sample(turns, "x")) == "User: Hi.\n\nAssistant: Hello.\n\nUser: Why?"


def test_judges_are_found_among_rewards() -> None:
    reward = judge(model="x")
    assert judges_among([reward, REWARDS["length"].make(target=4)]) == [reward]
