"""Sampling answers, rewriting prompts and labelling by a judge or a reward, on a tiny model; stopped work goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tunesmith.bases import Base, load_base
from tunesmith.core.errors import SpecError
from tunesmith.curation import sampling
from tunesmith.curation.building import Recipe, build
from tunesmith.curation.labels import JudgeLabels, RewardLabels, as_text
from tunesmith.curation.pairs import Answers, Rules
from tunesmith.curation.reading import read_source
from tunesmith.curation.sampling import REWRITES, Sampled
from tunesmith.engine.model import Model
from tunesmith.engine.sampler import Sampling
from tunesmith.rollout.judges import open_judge
from tunesmith.rollout.sample import Sample

HOT = Sampling(max_new_tokens=6, temperature=1.0, seed=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def base(tiny_base_folder) -> Base:
    return load_base(str(tiny_base_folder), dtype="fp32", device="cpu")


def prompts(tmp_path: Path, count: int = 5) -> Any:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"What is {at} + {at}?", "answer": str(2 * at)}) + "\n" for at in range(count)), "utf-8")
    return read_source(str(file))


class Longest:
    """Scores an answer by its length; odd lengths get nothing."""

    names = ("longest",)
    rewards = ()

    def __init__(self) -> None:
        self.seen: list[Sample] = []

    def parts(self, samples: Sequence[Sample]) -> tuple[dict[str, list[float]], list[Any]]:
        self.seen += samples
        return {"longest": [float(len(one.completion)) if len(one.completion) % 7 else math.nan for one in samples]}, []

    def totals(self, samples: Sequence[Sample], parts: dict[str, list[float]]) -> list[float]:
        return parts["longest"]


def test_every_prompt_gets_the_samples_of_every_system_with_their_provenance(base, tmp_path) -> None:
    sampled = Sampled({"one": Model(base), "two": Model(base)}, 2, HOT)
    found = sampled(prompts(tmp_path).answers)
    assert len(found) == 5
    told = [(own["system"], own["sample"], own["seed"]) for own in found[0].about]
    assert told == [("one", 0, 1), ("one", 1, 1), ("two", 0, 1), ("two", 1, 1)]


def test_stopped_sampling_goes_on_to_the_same_answers_without_asking_again(base, tmp_path, monkeypatch) -> None:
    whole = [one.texts for one in Sampled({"m": Model(base)}, 3, HOT)(prompts(tmp_path).answers)]
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(sampling, "CHUNK", 2)
    asked, real = list[int](), sampling._answers

    def failing(model: Any, messages: Any, *rest: Any) -> Any:
        if sum(asked) >= 4 and not resumed:
            raise KeyboardInterrupt
        asked.append(len(messages))
        return real(model, messages, *rest)

    monkeypatch.setattr(sampling, "_answers", failing)
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        Sampled({"m": Model(base)}, 3, HOT)(prompts(tmp_path).answers)
    resumed = True
    again = Sampled({"m": Model(base)}, 3, HOT)
    assert [one.texts for one in again(prompts(tmp_path).answers)] == whole and asked == [2, 2, 1]
    again.done()
    assert not list((tmp_path / "other" / "samples").glob("*.jsonl"))


def test_rewritten_prompts_stand_beside_their_originals_and_in_the_same_split(base, tmp_path, monkeypatch) -> None:
    real = sampling._answers

    def rewriting(model: Any, messages: Any, keys: Any, where: Any, samples: int, how: Sampling) -> Any:
        said = [str(one[-1]["content"]) for one in messages]
        if all(REWRITES["terse"] in text for text in said):
            return [
                [
                    sampling.Reply(
                        text.splitlines()[-1].replace("What is ", "") if "0 + 0" not in text else text.splitlines()[-1], "end", 0, 3
                    )
                ]
                for text in said
            ]
        return real(model, messages, keys, where, samples, how)

    monkeypatch.setattr(sampling, "_answers", rewriting)
    sampled = Sampled({"m": Model(base)}, 3, HOT, ("m", Model(base)), ["terse"])
    rewards = Longest()
    built = build([prompts(tmp_path)], Recipe(splits={"test": 4}), labels=RewardLabels(rewards, ("longest",)), sampler=sampled)
    assert "1 rewritten prompts were left out" in sampled.notes[0]
    sides = {name: {pair.prompt.replace("What is ", "") for pair in own} for name, own in built.splits.items()}
    assert not sides["train"] & sides["test"]
    told = [pair.provenance["chosen"].get("rewritten") for own in built.splits.values() for pair in own if "What is" not in pair.prompt]
    assert told and all(one["how"] == "terse" and one["from"].startswith("What is") for one in told)


def test_a_reward_sees_the_prompt_the_gold_answer_and_the_row_and_scores_make_the_pairs(base, tmp_path) -> None:
    rewards = Longest()
    built = build(
        [prompts(tmp_path)],
        Recipe(Rules(ties=False)),
        labels=RewardLabels(rewards, ("longest",)),
        sampler=Sampled({"m": Model(base)}, 4, HOT),
    )
    assert rewards.seen[0].answer == "0" and rewards.seen[0].fields["prompt"] == "What is 0 + 0?" and rewards.seen[0].group == 0
    for pair in built.splits["train"]:
        assert pair.margin == len(pair.chosen) - len(pair.rejected) > 0 and pair.provenance["reward"] == ["longest"]
        assert pair.provenance["chosen"]["system"] == "m"


def test_a_judge_writes_soft_preferences_on_texts_that_nobody_rated(base, tmp_path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {at}"}) + "\n" for at in range(8)), "utf-8")
    judge = open_judge(Model(base))
    built = build([read_source(str(file))], Recipe(per_item=1), labels=JudgeLabels(judge))
    assert len(built.splits["train"]) == 4
    for pair in built.splits["train"]:
        assert 0.5 <= pair.probability < 1 and pair.margin == pytest.approx(2 * pair.probability - 1)
        assert pair.provenance["kind"] == "judge" and pair.provenance["judge"] == judge.name


def test_a_rating_judge_makes_scores(base) -> None:
    labels = JudgeLabels(open_judge(Model(base)), rate=True)
    found = labels([Answers(("one", "another one", "a third"), "q")], Rules())[0]
    assert len(found) == 3 and all(pair.provenance["kind"] == "scores" and 1 <= pair.provenance["chosen"]["score"] <= 10 for pair in found)


def test_per_prompt_bounds_what_a_judge_is_asked(base) -> None:
    judge = open_judge(Model(base))
    found = JudgeLabels(judge)([Answers(tuple("abcde"), "q")], Rules(per_prompt=3))
    assert len(found[0]) == 3 and judge.tally.asked == 6


def test_what_makes_no_pair_is_refused_before_anything_is_sampled(base) -> None:
    with pytest.raises(SpecError, match="makes no pair"):
        Sampled({"m": Model(base)}, 1, HOT)
    with pytest.raises(SpecError, match="all samples of a model are the same"):
        Sampled({"m": Model(base)}, 2, Sampling(temperature=0.0))
    with pytest.raises(SpecError, match="an instruction and a model"):
        Sampled({"m": Model(base)}, 2, HOT, None, ["terse"])


def test_a_dialogue_is_judged_as_its_turns() -> None:
    assert as_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]) == "System: Be brief.\n\nUser: Why?"
