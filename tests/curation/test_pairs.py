"""Pairs from scores, rankings, raters and rated texts: what is made, what is kept, what is told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import DataError, LeakError, SpecError
from tunesmith.curation.building import Recipe, build
from tunesmith.curation.pairs import Answers, Pair, Rules, drawn, merged, mixed, pairs_of, share_above
from tunesmith.curation.reading import read_source, texts_of
from tunesmith.curation.surveying import survey

RATINGS = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12)


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def items(count: int = 40) -> list[dict[str, Any]]:
    return [
        {"id": f"{place // 4}_{place % 4}", "text": f"text number {place}", "ratings": [place % 7, place % 5, 2]} for place in range(count)
    ]


# What pairs are made


def test_scores_make_every_pair_with_its_margin_and_ties_are_soft() -> None:
    found = pairs_of(Answers(("a", "b", "c"), "q", (1.0, 3.0, 1.0)), Rules())
    assert [(p.chosen, p.rejected, p.margin, p.probability) for p in found] == [
        ("b", "a", 2.0, 1.0),
        ("a", "c", 0.0, 0.5),
        ("b", "c", 2.0, 1.0),
    ]
    assert found[0].provenance["chosen"] == {"score": 3.0}


def test_a_ranking_makes_pairs_without_margins() -> None:
    found = pairs_of(Answers(("best", "next", "last"), "q", ranked=True), Rules())
    assert [(p.chosen, p.rejected, p.margin) for p in found] == [("best", "next", None), ("best", "last", None), ("next", "last", None)]


def test_softened_scores_are_bradley_terry_probabilities() -> None:
    found = pairs_of(Answers(("a", "b"), "q", (0.0, 2.0)), Rules(soften=2.0))[0]
    assert found.probability == pytest.approx(1 / (1 + np.exp(-1)))


@given(RATINGS, RATINGS)
def test_raters_apart_make_the_mann_whitney_share(a, b) -> None:
    u = scipy.stats.mannwhitneyu(a, b, method="asymptotic").statistic if len({*a, *b}) > 1 else len(a) * len(b) / 2
    assert share_above(a, b) == pytest.approx(u / (len(a) * len(b)))
    assert share_above(a, b) + share_above(b, a) == pytest.approx(1)


def test_the_same_raters_are_counted_one_by_one() -> None:
    assert share_above([3, 1, 2], [2, 1, 3], "same") == 0.5
    assert share_above([3, 3, 3, 1], [2, 2, 2, 2], "same") == 0.75
    with pytest.raises(ValueError, match="3 and 2 ratings"):
        share_above([1, 2, 3], [1, 2], "same")


def test_the_raters_majority_is_chosen_even_against_the_mean() -> None:
    found = pairs_of(Answers(("a", "b"), "", (), ((1.0, 1.0, 9.0), (2.0, 2.0, 2.0))), Rules(raters="same"))[0]
    assert (found.chosen, found.probability, found.margin) == ("b", pytest.approx(2 / 3), pytest.approx(2 - 11 / 3))


def test_equal_texts_make_no_pair_whatever_their_spaces() -> None:
    assert pairs_of(Answers(("a  b", "a b", "c"), "q", (1.0, 2.0, 2.0)), Rules(ties=False)) == pairs_of(
        Answers(("a  b", "c"), "q", (1.0, 2.0)), Rules(ties=False)
    )


@given(st.integers(2, 30), st.integers(1, 4))
def test_drawn_texts_meet_equally_often_and_never_twice(count, rounds) -> None:
    made = drawn([Answers((f"t{place}",), scores=(float(place),)) for place in range(count)], rounds, seed=3)
    met = [frozenset(pair.texts) for pair in made]
    assert len(set(met)) == len(met) and all(len(pair) == 2 for pair in met)
    often = [sum(f"t{place}" in pair for pair in met) for place in range(count)]
    assert max(often) <= rounds


# Which are kept


def test_margins_bound_and_hard_ones_go_first() -> None:
    answers = Answers(tuple("abcd"), "q", (0.0, 1.0, 3.0, 7.0))
    assert sorted(p.margin for p in pairs_of(answers, Rules(min_margin=2, max_margin=4))) == [2.0, 3.0, 4.0]
    assert [p.margin for p in pairs_of(answers, Rules(hard="smallest", per_prompt=2))] == [1.0, 2.0]
    assert [p.margin for p in pairs_of(answers, Rules(hard="largest", per_prompt=2))] == [7.0, 6.0]
    with pytest.raises(SpecError, match="margins go from 0 up"):
        Rules(min_margin=3, max_margin=1)


def test_a_merged_pair_names_everyone_who_labelled_it() -> None:
    one, two = {"model": "one", "content": ""}, {"model": "two", "content": ""}
    pairs = [Pair("a", "b", provenance={"labelled_by": said}) for said in ([one], [two, one])]
    ((pair,), _, _) = merged([*pairs, Pair("a", "b")])
    assert pair.provenance["labelled_by"] == [one, two]


def test_pairs_that_stand_several_times_are_merged_and_contradictions_become_soft() -> None:
    pairs = [Pair("a", "b", "q"), Pair("a ", "b", "q"), Pair("b", "a", "q"), Pair("a", "b", "other")]
    found, same, disagreed = merged(pairs)
    assert (same, disagreed, len(found)) == (2, 1, 2)
    assert (found[0].chosen, found[0].probability) == ("a", pytest.approx(2 / 3))
    turned, _, _ = merged([Pair("a", "b", margin=1.0), Pair("b", "a", margin=3.0), Pair("b", "a", margin=4.0)])
    assert (turned[0].chosen, turned[0].probability, turned[0].margin) == ("b", pytest.approx(2 / 3), pytest.approx(2.0))


def test_sources_are_mixed_by_weight() -> None:
    first, second = ([Pair(f"{name}{at}", "x", name) for at in range(30)] for name in "pq")
    found = mixed([first, second], [2, 1], None, Rules())
    assert (sum(p.prompt == "p" for p in found), len(found)) == (30, 45)
    assert len(mixed([first, second], [2, 1], 10, Rules())) == 10
    with pytest.raises(SpecError, match="--count 45"):
        mixed([first, second], [2, 1], 60, Rules())


# Files


def test_the_columns_say_what_a_file_holds(tmp_path) -> None:
    rows: dict[str, list[Any]] = {
        "answers": [{"prompt": "q", "answers": ["a", "b"], "scores": [1, 2]}],
        "rated": [{"prompt": "q", "answer": "a", "score": 1}, {"prompt": "q ", "answer": "b", "score": 3}],
        "items": items(4),
        "pairs": [{"chosen": "a", "rejected": "b", "probability": 0.3, "margin": -1.0}],
        "prompts": [{"prompt": "q"}],
    }
    found = {kind: read_source(write(tmp_path / f"{kind}.jsonl", own)) for kind, own in rows.items()}
    assert {kind: source.kind for kind, source in found.items()} == {kind: kind for kind in rows}
    assert found["rated"].answers[0].texts == ("a", "b") and found["rated"].answers[0].scores == (1.0, 3.0)
    assert (found["pairs"].pairs[0].chosen, found["pairs"].pairs[0].probability, found["pairs"].pairs[0].margin) == ("b", 0.7, 1.0)
    ranking = read_source(write(tmp_path / "ranking.jsonl", [{"prompt": "q", "answers": ["a", "b"]}]))
    assert ranking.answers[0].ranked


def test_right_and_wrong_are_scores(tmp_path) -> None:
    found = read_source(write(tmp_path / "r.jsonl", [{"prompt": "q", "answers": ["a", "b", "c"], "scores": [True, False, False]}]))
    assert [(p.chosen, p.probability) for p in pairs_of(found.answers[0], Rules(ties=False))] == [("a", 1.0), ("a", 1.0)]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"chosen": "a b", "rejected": "a  b"}, "the two answers are equal"),
        ({"chosen": "a", "rejected": ""}, "'rejected' is empty"),
        ({"chosen": "a", "rejected": "b", "probability": 1.5}, "lies between 0 and 1"),
        ({"chosen": "a", "rejected": "b", "margin": "much"}, "not a finite number"),
        ({"prompt": "q", "answers": ["a"]}, "a pair takes two"),
        ({"prompt": "q", "answers": ["a", "b"], "scores": [1]}, "has 1 numbers for 2 answers"),
        ({"prompt": "q", "answers": ["a", "b"], "scores": [1, float("nan")]}, "list of numbers"),
        ({"text": "a", "ratings": []}, "list of numbers"),
        ({"text": "a", "ratings": "3, x"}, "list of numbers"),
        ({"word": "a"}, "no preferences that are known"),
    ],
)
def test_a_bad_row_is_told_with_its_line_and_key(tmp_path, row, what) -> None:
    with pytest.raises(DataError, match=what) as caught:
        read_source(write(tmp_path / "bad.jsonl", [row]))
    assert caught.value.where.endswith("bad.jsonl, line 1")


def test_ratings_of_another_table_are_joined_by_id_and_repeated_texts_are_one(tmp_path) -> None:
    (tmp_path / "texts.txt").write_text("1\t0.5\tone text\n2\t-1\tanother\n3\t1.5\tone  text\n", "utf-8")
    (tmp_path / "ratings.txt").write_text("1\t0.5\t0.1\t[0, 1]\n2\t-1\t0\t[-1, -1]\n3\t1.5\t0\t[1, 2]\n", "utf-8")
    found = read_source(
        str(tmp_path / "texts.txt"),
        {"id": "1", "score": "2", "text": "3"},
        ratings=str(tmp_path / "ratings.txt"),
        ratings_columns={"id": "1", "ratings": "4"},
    )
    assert [one.texts[0] for one in found.answers] == ["one text", "another"]
    assert found.answers[0].ratings == ((0.0, 1.0, 1.0, 2.0),) and found.answers[0].scores == (1.0,)
    (tmp_path / "ratings.txt").write_text("1\t0.5\t0.1\t[0, 1]\n", "utf-8")
    with pytest.raises(DataError, match="no ratings of id '2'"):
        read_source(
            str(tmp_path / "texts.txt"),
            {"id": "1", "text": "3"},
            ratings=str(tmp_path / "ratings.txt"),
            ratings_columns={"id": "1", "ratings": "4"},
        )


# Splits, leaks, report


def test_no_text_stands_in_two_splits_nor_does_a_document(tmp_path) -> None:
    source = read_source(write(tmp_path / "items.jsonl", items(80)), up_to="_")
    built = build([source], Recipe(splits={"dev": "20%", "test": "20%"}))
    assert survey(built)["shared"] == {"train and dev": 0, "train and test": 0, "dev and test": 0}
    documents = {name: {int(text.split()[-1]) // 4 for text in texts_of(own)} for name, own in built.splits.items()}
    assert not documents["train"] & documents["test"] and not documents["train"] & documents["dev"]
    assert all(built.splits.values())


def test_two_sources_with_the_same_prompts_are_split_together(tmp_path) -> None:
    rows = [{"prompt": f"q{place}", "answers": ["a", "b"], "scores": [1, 2]} for place in range(40)]
    turned = [{**row, "answers": ["c", "d"]} for row in rows]
    sources = [read_source(write(tmp_path / f"{name}.jsonl", own)) for name, own in (("one", rows), ("two", turned))]
    built = build(sources, Recipe(splits={"test": 20}))
    assert survey(built)["shared"] == {"train and test": 0} and len(built.splits["test"]) == 20


def test_pairs_without_prompts_that_share_a_text_stay_together(tmp_path) -> None:
    rows = [{"chosen": f"t{at}", "rejected": f"t{at + 1}"} for at in range(0, 60) if at % 3 != 2]
    built = build([read_source(write(tmp_path / "pairs.jsonl", rows))], Recipe(splits={"test": "30%"}))
    assert survey(built)["shared"] == {"train and test": 0} and built.splits["test"]


def test_leaks_against_a_held_out_file_are_refused_dropped_or_told(tmp_path) -> None:
    source = read_source(write(tmp_path / "items.jsonl", items(40)))
    known = {"test.jsonl": [Pair("text number 3", "elsewhere")]}
    with pytest.raises(LeakError, match=r"share a prompt or a text with test\.jsonl"):
        build([source], Recipe(), held_out=known)
    dropped = build([source], Recipe(leaks="drop"), held_out=known)
    assert "text number 3" not in texts_of(dropped.splits["train"]) and dropped.leaks["test.jsonl"] == 2
    allowed = build([source], Recipe(leaks="allow"), held_out=known)
    assert "text number 3" in texts_of(allowed.splits["train"])


def test_the_report_tells_margins_lengths_ties_and_the_raters_ceiling(tmp_path) -> None:
    rows = [{"prompt": f"q{at}", "answers": ["long long long", "short"], "scores": [at % 3, 1]} for at in range(9)]
    told = survey(build([read_source(write(tmp_path / "s.jsonl", rows))], Recipe()))["splits"]["train"]
    assert (told["pairs"], told["ties"], told["longer"]) == (9, 3, pytest.approx(6 / 9))
    assert told["margins"]["most"] == 1.0 and told["ceiling"] == pytest.approx((6 + 1.5) / 9)


def test_the_same_seed_makes_the_same_pairs_and_another_one_others(tmp_path) -> None:
    name = write(tmp_path / "items.jsonl", items(40))
    rows = [[pair.row() for pair in build([read_source(name)], Recipe(Rules(seed=seed))).splits["train"]] for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_answers_that_nothing_judges_and_prompts_that_nobody_answers_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="prompts and no answers"):
        build([read_source(write(tmp_path / "p.jsonl", [{"prompt": "q"}]))], Recipe())
    with pytest.raises(DataError, match="nothing says which"):
        build([read_source(write(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "b"}]))], Recipe())
