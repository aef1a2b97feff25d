"""Answers in free words scored by a judge: ratings and comparisons as graded scores, verdicts, silence, and who may judge whom."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunesmith.bases import Base, load_base
from tunesmith.core.errors import DataError, RunError, SpecError
from tunesmith.core.record import Record
from tunesmith.engine.model import Model
from tunesmith.engine.server import Server
from tunesmith.evaluation.answering import System
from tunesmith.evaluation.evaluate import evaluate
from tunesmith.evaluation.judging import Measure, open_measure
from tunesmith.evaluation.prompting import zero_shot
from tunesmith.evaluation.results import aligned, compare_all
from tunesmith.evaluation.task import Task
from tunesmith.ladder.judging import with_judge
from tunesmith.rewardspec import JudgeSpec, judge_spec
from tunesmith.rollout.judges import Judge, open_judge
from tunesmith.rollout.named import same_model
from tunesmith.spec import make_spec, set_key

NUMBERS = ("one", "two", "three", "four")
RECORDS = [
    Record("question", ({"role": "user", "content": f"Say {word}."},), where=f"questions.jsonl, line {at}")
    for at, word in enumerate(NUMBERS, 1)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str], str]], Any]]:
    """A server that says what a function makes of the last message."""
    spec = importlib.util.spec_from_file_location("fake_servers", Path(__file__).parent.parent / "servers" / "conftest.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    contexts = []

    def start(answer: Callable[[str], str]) -> Any:
        context = module.serving(module.FakeServer(answer=answer))
        contexts.append(context)
        return context.__enter__()

    yield start
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def base(tiny_base_folder: Path) -> Base:
    return load_base(str(tiny_base_folder), dtype="fp32", device="cpu")


def system(fake: Any, name: str = "asked") -> System:
    return System(name, Server(fake.url, name, attempts=1), zero_shot(Task("t", "generate")))


def judged(fake: Any, **options: Any) -> Task:
    """A task that a fake server judges."""
    compares = options.pop("compares", False)
    return replace(Task("t", "generate"), judge=Measure(open_judge(Server(fake.url, "judge", attempts=1), **options), compares))


def answer_in(asked: str, name: str = "Answer") -> str:
    return asked.split(f"[{name}]\n")[-1].split("\n[End of")[0]


def test_ratings_are_graded_scores_from_0_to_1_and_need_no_gold_answers(serve) -> None:
    fake = serve(lambda asked: {"one": "1", "two": "4", "three": "10", "four": "7"}[answer_in(asked)])
    speaker = serve(lambda asked: asked.removeprefix("Say ").rstrip("."))
    found = evaluate(system(speaker), judged(fake), RECORDS)
    assert found.scores == pytest.approx([0, 1 / 3, 1, 2 / 3]) and found.task.measure == "judge_rating"
    assert found.interval().low < found.score < found.interval().high
    assert all(f"[Question]\nSay {word}." in asked for word, asked in zip(NUMBERS, sorted(fake.asked(), key=order), strict=True))
    with pytest.raises(DataError, match="no gold answer"):
        evaluate(system(speaker), replace(found.task, judge=None), RECORDS)


def order(asked: str) -> int:
    return NUMBERS.index(answer_in(asked))


def test_a_scale_of_words_is_spread_from_0_to_1(serve) -> None:
    fake = serve(lambda asked: "fair" if "one" in answer_in(asked) else "good")
    found = evaluate(system(serve(lambda asked: asked[4:])), judged(fake, scale=("bad", "fair", "good")), RECORDS)
    assert found.scores == [0.5, 1, 1, 1]


def test_comparisons_score_how_surely_an_answer_beats_the_one_in_the_data_in_both_orders(serve) -> None:
    """The judge likes whatever says gold but for question two, where it sticks to the place."""

    def verdict(asked: str) -> str:
        return "A" if "two" in asked or "gold" in answer_in(asked, "Answer A") else "B"

    records = [replace(record, answers=(({"role": "assistant", "content": "gold"},),)) for record in RECORDS]
    fake = serve(verdict)
    found = evaluate(system(serve(lambda asked: f"it is {asked}")), judged(fake, compares=True), records)
    assert found.scores == [0, 0.5, 0, 0] and found.task.measure == "win_rate" and len(fake.requests) == 8
    with pytest.raises(DataError, match="no gold answer"):
        evaluate(system(serve(str)), judged(fake, compares=True), RECORDS)


def test_two_systems_are_compared_question_by_question(serve) -> None:
    fake = serve(lambda asked: "9" if "good" in answer_in(asked) else "2")
    task = judged(fake)
    good, poor = (evaluate(system(serve(lambda asked, word=word: f"{word} {asked}"), word), task, RECORDS * 5) for word in ("good", "poor"))
    (verdict,) = compare_all([good, poor], [(0, 1)])
    assert verdict.verdict == "better" and verdict.difference == pytest.approx(7 / 9) and verdict.wins == 20


def test_answers_are_judged_once_however_often_they_are_evaluated(serve) -> None:
    fake, speaker = serve(lambda asked: "5"), serve(lambda asked: asked)
    first = evaluate(system(speaker), judged(fake), RECORDS)
    again = evaluate(system(speaker), judged(fake), RECORDS)
    assert len(fake.requests) == 4 and first.scores == again.scores


def test_prose_stops_the_evaluation_or_leaves_the_question_out_of_every_system(serve) -> None:
    def prose(asked: str) -> str:
        return "Hm, well." if "bad two" in asked or "names no rating" in asked else "8"

    fake = serve(prose)
    with pytest.raises(RunError, match="no verdict on 1 of 4"):
        evaluate(system(serve(lambda asked: f"bad {asked[4:]}")), judged(fake), RECORDS)
    skipping = judged(fake, no_verdict="skip")
    one = evaluate(system(serve(lambda asked: f"bad {asked[4:]}"), "one"), skipping, RECORDS)
    other = evaluate(system(serve(lambda asked: asked[4:]), "other"), skipping, RECORDS)
    assert (one.n, other.n) == (3, 4) and "no verdict on 1 of 4 answers" in one.notes[0]
    both = aligned([one, other])
    assert [each.n for each in both] == [3, 3] and compare_all(both, [(0, 1)])
    with pytest.raises(RunError, match="on any of 4 answers"):
        evaluate(system(serve(lambda asked: "bad two")), skipping, RECORDS)


def test_an_answer_beyond_the_judges_context_is_no_verdict(base: Base, serve) -> None:
    long = serve(lambda asked: "word " * 600 if "two" in asked else "short")
    for way in ("likelihood", "generation"):
        judge = {"rubric": "R", "way": way, "max_new_tokens": 2, "no_verdict": "skip"}
        found = open_judge(Model(base), **judge).rate([("q", "short"), ("q", "word " * 600)])
        assert found[1] is None
        with pytest.raises(DataError, match=r"takes .* tokens, and .* reads 512"):
            open_judge(Model(base), **{**judge, "no_verdict": "error"}).rate([("q", "word " * 600)], ["file, line 3"])
    task = replace(Task("t", "generate"), judge=Measure(open_judge(Model(base), rubric="R", no_verdict="skip")))
    assert evaluate(system(long), task, RECORDS).n == 3


def test_dialogues_are_judged_turn_by_turn(serve) -> None:
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    fake = serve(lambda asked: "10" if "User: c" in asked else "1")
    found = evaluate(system(serve(str)), judged(fake), [Record("messages", tuple(turns), where="x")])
    assert found.scores == [0.5] and "User: a\n\nAssistant: b\n\nUser: c" in fake.asked()[-1]


def test_a_local_judge_shares_the_base_and_its_likelihoods_are_the_score(base: Base) -> None:
    measure = open_measure(judge_spec({"model": base.source, "rubric": "R", "scale": ["bad", "good"]}), base=base)
    assert isinstance(measure.judge.model, Model) and measure.judge.model.base is base
    (score,) = measure.scores(Task("t", "generate"), ["yes"], RECORDS[:1])
    (rating,) = measure.judge.rate([("Say one.", "yes")])
    assert rating is not None and score == pytest.approx(rating - 1) and 0 < score < 1


def test_only_free_words_are_judged() -> None:
    with pytest.raises(SpecError, match="kind label"):
        with_judge(Task("t", "label", ("a", "b")), JudgeSpec(model="x"))
    assert with_judge(Task("t", "label", ("a", "b")), None).judge is None


# The spec


def test_a_judge_is_named_by_its_model_or_by_its_keys() -> None:
    spec = make_spec({"base": "b", "evaluate": {"judge": "http://a/v1#m"}}, ["evaluate.judge.rubric=Which is kinder?"])
    assert spec.evaluate.judge == JudgeSpec(model="http://a/v1#m", rubric="Which is kinder?")
    values: dict[str, Any] = {}
    set_key(values, "evaluate.judge=x")
    assert make_spec({"base": "b", **values}).evaluate.judge == JudgeSpec(model="x")
    with pytest.raises(SpecError, match=r"evaluate\.judge\.rubric"):
        make_spec({"base": "b", "evaluate": {"judge": {"model": "x", "rubrik": "y"}}})


@pytest.mark.parametrize(
    ("given", "said"),
    [({"asks": "comparison", "scale": ["a", "b"]}, "no scale"), ({"both_orders": False}, "no order"), ({"way": "guess"}, "way")],
)
def test_keys_that_nothing_would_read_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        judge_spec({"model": "x", **given})


# Who may judge whom


def test_a_model_is_the_same_by_its_files_and_at_servers_by_its_name(tiny_base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_base_folder)
    assert same_model(str(tiny_base_folder), str(tmp_path / "link")) and not same_model(str(tiny_base_folder), "other/model")
    assert same_model("http://a/v1#Big", "http://b/v1#big") and not same_model("http://a/v1#big", "http://a/v1#small")
    assert same_model("http://a/v1", "http://a/v1/#big") and not same_model("http://a/v1", "big")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"objective": "grpo", "rewards": ["judge(model=JUDGE, rubric=kind)"]}, "gives the reward judge,"),
        ({"objective": "grpo", "rewards": ["length(target=3)", "judge_rating(model=JUDGE)"]}, "gives the reward judge_rating"),
        ({"objective": "distil", "teacher": "JUDGE"}, "is the teacher"),
    ],
)
def test_a_judge_that_rewards_or_teaches_cannot_judge_the_result_whatever_its_rubric(
    keys: dict[str, Any], said: str, tiny_base_folder: Path, tmp_path: Path
) -> None:
    from tunesmith.ladder.job import prepare

    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    (tmp_path / "judge").symlink_to(tiny_base_folder)  # another name for the same weights
    values = json.loads(json.dumps(keys).replace("JUDGE", "judge"))
    judge = {"model": str(tiny_base_folder), "rubric": "other"}
    given = {"base": str(tiny_base_folder), "data": "rows.jsonl", "evaluate": {"judge": judge}}
    with pytest.raises(SpecError, match=said) as refused:
        prepare(make_spec({**given, **values}))
    assert refused.value.where == "evaluate.judge" and "another rubric" in refused.value.hints[0]


def test_judges_that_cannot_judge_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    from tunesmith.core.errors import BaseError
    from tunesmith.ladder.judging import check_judge

    with pytest.raises(BaseError, match="no such file"):
        check_judge(make_spec({"base": "b", "evaluate": {"judge": "./nowhere"}}))


def test_a_judge_keeps_its_options(serve) -> None:
    fake = serve(lambda asked: "7")
    spec = judge_spec({"model": f"{fake.url}#m", "rubric": "R", "reasons": True, "no_verdict": "tie"})
    judge: Judge = open_measure(spec).judge
    assert (judge.rubric, judge.reasons, judge.no_verdict, judge.way, judge.max_new_tokens) == ("R", True, "tie", "generation", 512)
