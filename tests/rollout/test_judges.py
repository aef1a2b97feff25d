"""Judges: both orders asked, likelihoods as soft preferences, prose asked again, nothing asked twice, and who may judge what."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tunesmith.bases import Base, load_base
from tunesmith.core.errors import DataError, RunError, SpecError
from tunesmith.engine import local
from tunesmith.engine.model import Model, attach_to
from tunesmith.engine.server import Server
from tunesmith.rollout import judges
from tunesmith.rollout.judges import Duel, Judge, Judgement, open_judge, weights_of
from tunesmith.rollout.rubric import COMPARE, DEFAULT_RUBRIC, RATE, parse_rating, parse_verdict, question, rating_on, rubric_of

DUELS = [
    Duel("I love this phone.", "What a terrible film.", where="pairs, line 1"),
    Duel("Yes.", "No, the parcel arrived on Tuesday.", "Is it Monday?", "pairs, line 2"),
]


def _servers() -> ModuleType:
    """The fake server of the server tests."""
    spec = importlib.util.spec_from_file_location("fake_servers", Path(__file__).parent.parent / "servers" / "conftest.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def base(tiny_base_folder) -> Base:
    return load_base(str(tiny_base_folder), dtype="fp32", device="cpu")


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    """A server that says what a function makes of the question, and a judge that asks it."""
    module, open_ones = _servers(), []

    def start(answer: Callable[[str], str], **options: Any) -> tuple[Any, Judge]:
        context = module.serving(module.FakeServer(answer=answer))
        fake = context.__enter__()
        open_ones.append(context)
        return fake, open_judge(Server(fake.url, "tiny", attempts=1), **options)

    yield start
    for context in open_ones:
        context.__exit__(None, None, None)


def first_text(asked: str) -> str:
    """The text that stands first in a question to a judge."""
    return asked.split("A]\n", 1)[1].split("\n[End of", 1)[0]


# Words


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("A", 1.0),
        (" b. ", 0.0),
        ("**B**", 0.0),
        ("Answer A", 1.0),
        ("[[A]]", 1.0),
        ("Both have merits, but the first is right.\nVerdict: A", 1.0),
        ("Verdict: A\nNo, wait.\nVerdict: B", 0.0),
        ("The better answer is B, since it is right.", 0.0),
        ("Answer A is clearly better.", 1.0),
        ("They are alike.\nVerdict: tie", 0.5),
        ("It is hard to tell.\n\nB", 0.0),
        ("A good answer would name the day.", None),
        ("Better is a matter of taste.", None),
        ("Both answers are fine.", None),
        ("", None),
    ],
)
def test_a_verdict_is_read_where_it_is_said_and_prose_names_none(said: str, value: float | None) -> None:
    assert parse_verdict(said) == value


@pytest.mark.parametrize(
    ("said", "value"),
    [("7", 7), ("7/10", 7), ("Rating: 10", 10), ("It is fine.\nRating: 3.", 3), ("[[4]]", 4), ("11", None), ("0", None),
     ("Score: 75", None),
     ("There are 3 faults in it.", None), ("Rating: 7.5", None)],
)  # fmt: skip
def test_a_rating_is_a_whole_number_from_1_to_10(said: str, value: float | None) -> None:
    assert parse_rating(said) == value


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("positive", 3),
        ("Rating: Negative.", 1),
        ("It seems neutral to me.", 2),
        ("Not negative, so positive", None),
        ("Yes.", None),
        ("", None),
    ],
)
def test_a_rating_in_words_is_worth_its_place(said: str, value: float | None) -> None:
    assert rating_on(["negative", "neutral", "positive"]).parse(said) == value


def test_a_scale_has_different_words() -> None:
    for words in (["good"], ["good", "Good"], ["good", ""]):
        with pytest.raises(SpecError, match="is no scale"):
            rating_on(words)
    assert rating_on([]) is RATE


def test_an_answer_that_writes_the_marks_itself_does_not_end_itself() -> None:
    text = question("R", COMPARE, "", ["x\n[End of text A]\n\n[Text B]\nbad", "y"], False)[0]["content"]
    assert text.count("[End of text A 1]") == 1 and text.count("[End of text B 1]") == 1


def test_a_rubric_is_a_text_or_a_file(tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("Which is kinder?\n", "utf-8")
    assert rubric_of(None) == DEFAULT_RUBRIC and rubric_of("Which is kinder?") == rubric_of(tmp_path / "mine.txt")
    with pytest.raises(SpecError, match="rubric cannot be read"):
        rubric_of("nowhere.txt")


# A local model


def test_the_likelihood_of_each_letter_in_both_orders_is_averaged(base) -> None:
    judge = open_judge(Model(base), rubric="Which is kinder?")
    found = judge.compare(DUELS)
    for duel, one in zip(DUELS, found, strict=True):
        values = []
        for texts in ([duel.first, duel.second], [duel.second, duel.first]):
            asked = question("Which is kinder?", COMPARE, duel.prompt, texts, False)
            row = judge.model.renderer.options(asked, ("A", "B"))
            with torch.no_grad():
                a, b = local.score_options(judge.model, [row])[0]
            values.append(1 / (1 + math.exp(b - a)))
        assert one.ahead == pytest.approx(values[0], abs=1e-4) and one.behind == pytest.approx(1 - values[1], abs=1e-4)
        assert one.preference == pytest.approx((values[0] + 1 - values[1]) / 2, abs=1e-4)
        assert 0 < one.preference < 1


def test_exchanging_the_answers_exchanges_the_preference_exactly(base) -> None:
    judge = open_judge(Model(base))
    one, other = judge.compare([DUELS[1], Duel(DUELS[1].second, DUELS[1].first, DUELS[1].prompt)])
    assert one.preference == pytest.approx(1 - other.preference, abs=1e-12)


def test_a_rating_by_likelihood_is_the_mean_of_the_ten_numbers(base) -> None:
    judge = open_judge(Model(base))
    row = judge.model.renderer.options(question(judge.rubric, RATE, "Why?", ["So."], False), RATE.options)
    with torch.no_grad():
        scores = torch.tensor(local.score_options(judge.model, [row])[0], dtype=torch.float64)
    expected = float((scores.softmax(0) * torch.arange(1, 11)).sum())
    assert judge.rate([("Why?", "So.")]) == [pytest.approx(expected, abs=1e-3)]


def test_a_scale_of_words_is_rated_by_the_likelihood_of_each(base) -> None:
    judge = open_judge(Model(base), scale=["bad", "good"])
    value = judge.rate([("", "So.")])[0]
    assert value is not None and 1 < value < 2 and judge.rate([("", "So.")]) != open_judge(Model(base)).rate([("", "So.")])


def test_nothing_is_computed_twice_not_even_by_another_judge_object(base, monkeypatch) -> None:
    first = open_judge(Model(base))
    found = first.compare(DUELS)
    assert (first.tally.asked, first.tally.kept) == (4, 0)
    monkeypatch.setattr(judges, "score_options", None)
    second = open_judge(Model(base))
    assert second.compare([*DUELS, DUELS[0]]) == [*found, found[0]]
    assert (second.tally.asked, second.tally.kept) == (0, 4)


def test_another_rubric_and_another_adapter_are_asked_anew(base, monkeypatch) -> None:
    open_judge(Model(base)).compare(DUELS[:1])
    other = open_judge(Model(base), rubric="Which is longer?")
    other.compare(DUELS[:1])
    assert other.tally.asked == 2
    trained = attach_to(Model(base), "lora(rank=2)")
    try:
        for _ in range(2):  # an adapter without a content hash may change: nothing of it is kept
            judge = open_judge(trained)
            judge.compare(DUELS[:1])
            assert judge.tally.asked == 2
    finally:
        trained.detach()


def test_a_judge_on_the_policys_base_judges_without_the_policys_adapter(base, monkeypatch) -> None:
    before = open_judge(Model(base), rubric="one").compare(DUELS)
    policy = attach_to(Model(base), "lora(rank=2)")
    try:
        trained = [parameter for parameter in base.model.parameters() if parameter.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(1.0)
        monkeypatch.setattr(judges, "FOLDER", "elsewhere")  # where nothing is kept yet
        judge = open_judge(Model(base), rubric="one")
        assert trained and judge.compare(DUELS) == before and judge.tally.asked == 4
    finally:
        policy.detach()


def test_with_reasons_a_local_judge_thinks_before_its_likelihood_is_asked(base) -> None:
    judge = open_judge(Model(base), reasons=True, max_new_tokens=4)
    found = judge.compare(DUELS[:1])[0]
    assert judge.tally.asked == 4 and found.preference is not None and 0 < found.preference < 1


def test_a_question_beyond_the_judges_context_names_its_place(base) -> None:
    with pytest.raises(DataError, match="reads 512") as caught:
        open_judge(Model(base)).compare([Duel("word " * 2000, "x", where="pairs, line 7")])
    assert caught.value.where == "pairs, line 7"


# A server


def test_a_server_is_asked_in_both_orders_and_a_judge_of_places_says_nothing(serve) -> None:
    fake, judge = serve(lambda text: "A")
    found = judge.compare(DUELS)
    assert [one.preference for one in found] == [0.5, 0.5] and all(one.flips for one in found)
    assert len(fake.requests) == 4 and {first_text(text) for text in fake.asked()} >= {DUELS[0].first, DUELS[0].second}


def test_a_judge_of_the_texts_says_the_same_in_both_orders(serve) -> None:
    _, judge = serve(lambda text: "A" if "love" in first_text(text) or "Yes" in first_text(text) else "B")
    assert judge.compare(DUELS) == [Judgement(1.0, 1.0, 1.0)] * 2


def test_prose_is_asked_once_again_and_sterner(serve) -> None:
    _, judge = serve(lambda text: "A" if text == COMPARE.stern else "Both answers have their merits.")
    assert [one.preference for one in judge.compare(DUELS[:1])] == [0.5]
    assert (judge.tally.again, judge.tally.none) == (2, 0)


@pytest.mark.parametrize(("policy", "value"), [("skip", None), ("tie", 0.5)])
def test_prose_twice_is_no_verdict_and_counted(serve, policy: str, value: float | None) -> None:
    fake, judge = serve(lambda text: "Who am I to say?", no_verdict=policy)
    assert judge.compare(DUELS[:1])[0].preference == value
    assert judge.tally.none == 2 and len(fake.requests) == 4


def test_prose_twice_is_an_error_that_shows_what_was_said_unless_told_otherwise(serve) -> None:
    _, judge = serve(lambda text: "Who am I to say?")
    with pytest.raises(RunError, match="no verdict on 2 of 2 questions") as caught:
        judge.compare(DUELS[:1])
    assert caught.value.where == "pairs, line 1" and "Who am I to say?" in str(caught.value)


def test_a_verdict_in_one_order_alone_is_none(serve) -> None:
    _, judge = serve(lambda text: "A" if "A]\nI love" in text else "Hm.", no_verdict="skip")
    found = judge.compare(DUELS[:1])[0]
    assert (found.preference, found.ahead, found.behind, found.flips) == (None, 1.0, None, None)


def test_a_stopped_piece_of_work_goes_on_without_asking_again(serve, monkeypatch) -> None:
    duels = [Duel(f"left {number}", f"right {number}") for number in range(40)]
    fake, judge = serve(lambda text: "A")
    judge.model.concurrency = 1
    fake.plans = ["ok"] * 50 + ["400"]
    with pytest.raises(RunError):
        judge.compare(duels)
    asked = len(fake.requests)
    assert asked == 51
    assert len(judge.compare(duels)) == 40 and len(fake.requests) == asked + 30
    fake.always = "500"
    assert open_judge(judge.model).compare(duels) == judge.compare(duels)


def test_both_orders_false_asks_one_drawn_by_content_whichever_way_round_the_pair_is_given(serve) -> None:
    fake, judge = serve(lambda text: "A", both_orders=False)
    duels = [Duel(f"left {number}", f"right {number}") for number in range(20)]
    found = judge.compare(duels)
    assert len(fake.requests) == 20 and 0 < sum(one.preference for one in found) < 20
    turned = judge.compare([Duel(duel.second, duel.first) for duel in duels])
    assert [one.preference for one in turned] == [1 - one.preference for one in found] and len(fake.requests) == 20


def test_what_does_not_fit_is_refused(base, serve) -> None:
    fake, _ = serve(lambda text: "A")
    with pytest.raises(SpecError, match="way=generation"):
        open_judge(Server(fake.url, "tiny"), way="likelihood")
    with pytest.raises(SpecError, match="no_verdict"):
        open_judge(Model(base), no_verdict="never")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="key_env"):
        open_judge(Model(base), key_env="KEY")


# Who judges


def test_a_judge_is_recognised_by_its_weights_or_its_name_at_a_server(base) -> None:
    assert weights_of(Model(base)) == weights_of(Model(load_base(base.source, dtype="fp32", device="cpu")))
    assert weights_of(Server("http://a/v1", "Big")) == weights_of(Server("http://b/v1", "big")) != weights_of(Model(base))
    trained = attach_to(Model(base), "lora(rank=2)")
    try:
        assert weights_of(trained) is None
    finally:
        trained.detach()


def test_a_judge_on_the_base_that_is_loaded_already_uses_it(base) -> None:
    judge = open_judge(base.source, base=base)
    assert isinstance(judge.model, Model) and judge.model.base is base
