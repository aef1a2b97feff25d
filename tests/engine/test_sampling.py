"""What is drawn is what the options describe, with its log-probability, and one of the given answers where some are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from tunesmith.core.errors import SpecError
from tunesmith.core.row import single
from tunesmith.engine import choosing
from tunesmith.engine.choosing import Sampling, choose
from tunesmith.engine.forward import Forward
from tunesmith.engine.prepacked import prepacked
from tunesmith.engine.probe import probe
from tunesmith.engine.sampler import generate

Build = Callable[..., Any]


def kept(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The distribution after each cut in turn, by its definition, fp64: the k likeliest, those at least min_p times as likely
    as the likeliest, and of these the fewest that hold top_p of what is left."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    if top_k:
        p = np.where(p >= np.sort(p)[::-1][min(top_k, len(p)) - 1], p, 0)
    p = np.where(p >= min_p * p.max(), p, 0)
    p /= p.sum()
    order, total, chosen = np.argsort(-p, kind="stable"), 0.0, np.zeros_like(p)
    for index in order:
        if total >= top_p or p[index] == 0:
            break
        chosen[index] = p[index]
        total += p[index]
    return chosen / chosen.sum()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.3, "min_p": 0.2},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_draws_follow_the_distribution_that_the_options_describe(options: dict[str, Any]) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 1.5
    wanted = kept(
        logits.double().numpy(), options["temperature"], options.get("top_k", 0), options.get("top_p", 1), options.get("min_p", 0)
    )
    count = 20_000
    drawn, _ = choose(logits.expand(count, -1), Sampling(**options), [(seed * 7919, seed % 5) for seed in range(count)])
    seen = np.bincount(drawn.numpy(), minlength=12)
    assert set(np.flatnonzero(seen)) == set(np.flatnonzero(wanted * count > 5)) | set(np.flatnonzero(seen * (wanted > 0)))
    assert chisquare(seen[wanted > 0], wanted[wanted > 0] * count).pvalue > 1e-3


@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=20, unique=True),
    top_k=st.integers(0, 25),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
    seed=st.integers(0, 2**64 - 1),
)
def test_no_cut_word_is_ever_drawn(logits: list[float], top_k: int, top_p: float, min_p: float, seed: int) -> None:
    sampling = Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    drawn, _ = choose(torch.tensor([logits] * 64), sampling, [(seed, position) for position in range(64)])
    allowed = kept(np.asarray(logits), 1.0, top_k, min(1.0, top_p + 1e-6), min_p * (1 - 1e-6)) > 0
    assert allowed[drawn.numpy()].all()


def test_temperature_zero_takes_the_likeliest_and_top_one_agrees() -> None:
    logits = torch.randn(50, 30)
    draws = [(row, 0) for row in range(50)]
    assert torch.equal(choose(logits, Sampling(), draws)[0], logits.argmax(-1))
    assert torch.equal(choose(logits, Sampling(temperature=1.0, top_k=1), draws)[0], logits.argmax(-1))


@pytest.mark.parametrize("size", [1, 30, 256, 1000])
def test_the_likeliest_of_equals_is_the_first(size: int) -> None:
    logits = torch.randint(-3, 3, (40, size)).float()
    drawn, _ = choose(logits, Sampling(), [(0, 0)] * 40)
    assert drawn.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]


def test_random_numbers_are_uniform_and_those_of_neighbouring_rows_and_places_are_unrelated() -> None:
    grid = np.array([[choosing._uniform(seed, position) for position in range(100)] for seed in range(200)])
    assert grid.min() >= 0 and grid.max() < 1
    assert chisquare(np.histogram(grid, 50, (0, 1))[0]).pvalue > 1e-3
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.03


def test_the_generator_is_splitmix64() -> None:
    """First output for the state 1234567, from the reference implementation (Vigna)."""
    assert choosing._uniform(1234567, 0) == (6457827717110365317 >> 11) / 2**53


@pytest.mark.parametrize("size", [300, 9001])
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.02, "top_p": 0.9}, {"top_p": 0.99999}, {"top_k": 4500}])
def test_shortcuts_for_large_vocabularies_keep_the_distribution(size: int, options: dict[str, Any]) -> None:
    """Both a peaked distribution, whose head is short, and a flat one, whose head is long."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.stack([torch.randn(size, generator=generator) * 4, torch.randn(size, generator=generator) * 0.3])
    count = 4000 if size < 1000 else 800
    for row in logits:
        wanted = kept(row.double().numpy(), 1.0, options.get("top_k", 0), options.get("top_p", 1), options.get("min_p", 0))
        drawn, _ = choose(row.expand(count, -1), Sampling(temperature=1.0, **options), [(seed * 7919, 1) for seed in range(count)])
        assert (wanted[drawn.numpy()] > 0).mean() > 0.999
        bins = np.argsort(np.argsort(-wanted)) * 20 // size if not options else np.minimum(np.argsort(np.argsort(-wanted)), 19)
        seen, mass = (np.bincount(bins, weights=w, minlength=20) for w in (np.bincount(drawn.numpy(), minlength=size), wanted))
        common = mass * count > 5
        if common.sum() > 1:
            expected = mass[common] / mass[common].sum() * seen[common].sum()
            assert chisquare(seen[common], expected).pvalue > 1e-4


@given(seed=st.integers(0, 2**64 - 1), size=st.integers(1, 700), scale=st.floats(0, 30))
def test_any_word_drawn_from_all_is_a_word_that_can_be_drawn(seed: int, size: int, scale: float) -> None:
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(seed % 1000)) * scale
    logits[:, ::3] = -torch.inf if size > 1 else 0.0
    drawn, log_probs = choose(logits, Sampling(temperature=1.0), [(seed, place) for place in range(3)])
    assert bool(((drawn >= 0) & (drawn < size)).all()) and bool(torch.isfinite(log_probs).all())


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.7])
def test_log_probabilities_are_those_before_any_cut(temperature: float) -> None:
    logits = torch.randn(20, 1000, dtype=torch.float64) * 3
    draws = [(row, 2) for row in range(20)]
    drawn, log_probs = choose(logits, Sampling(temperature=temperature, top_k=3, top_p=0.8), draws)
    wanted = torch.log_softmax(logits / (temperature or 1), -1).gather(1, drawn[:, None])[:, 0]
    assert torch.allclose(log_probs.double(), wanted, atol=2e-5)


def test_a_row_draws_the_same_whatever_is_drawn_beside_it() -> None:
    logits = torch.randn(40, 700)
    draws = [(row * 31, row) for row in range(40)]
    for options in ({}, {"top_p": 0.7}, {"top_k": 9}):
        sampling = Sampling(temperature=0.8, **options)  # type: ignore[arg-type]
        together = choose(logits, sampling, draws)
        for row in (0, 13, 39):
            alone = choose(logits[row : row + 1], sampling, draws[row : row + 1])
            assert together[0][row] == alone[0][0] and together[1][row] == alone[1][0]


# Log-probabilities and training


@pytest.fixture
def speak(build: Build, tiny_tokenizer: Any) -> Callable[..., Forward]:
    """A model with the tiny tokenizer's vocabulary, probed, in a dtype."""
    return lambda family="llama", dtype=torch.float32: probe(build(family, vocab_size=len(tiny_tokenizer)).to(dtype))


def asked_of(tokenizer: Any) -> list[list[int]]:
    drawn = np.random.default_rng(3).integers(5, len(tokenizer), 200).tolist()
    return [drawn[40:43], drawn[50:61], drawn[:30] + drawn[70:75], drawn[:30] + drawn[80:81]]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2", "qwen3", "phi3", "bloom"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
def test_recorded_log_probabilities_agree_with_the_training_forward(
    family: str, dtype: torch.dtype, bound: float, speak: Callable[..., Forward], tiny_tokenizer: Any
) -> None:
    forward = speak(family, dtype)
    asked = asked_of(tiny_tokenizer)
    said = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=20, temperature=1.0), samples=3, batch=8)
    for at, answer in enumerate(said):
        prompt = asked[at // 3]
        row = single(prompt + answer.ids, [False] * len(prompt) + [True] * len(answer.ids))
        with torch.no_grad():
            trained = forward(forward.pack([row])).log_probs
        apart = (trained - torch.tensor(answer.log_probs)).abs()
        assert len(answer.log_probs) == len(answer.ids) and float(apart.mean()) < bound and float(apart.max()) < 5 * bound


# Weights laid out for the kernels


def test_laid_out_weights_give_the_same_bits_run_hooks_and_are_put_back(build: Build) -> None:
    model = build("llama").to(torch.bfloat16)
    ids, called = torch.arange(5, 21)[None], []
    hook = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, out: called.append(1) or out + 1)
    with torch.no_grad():
        before = model(ids).logits
        called.clear()
        with prepacked(model, 16):
            assert "forward" in model.lm_head.__dict__ and torch.equal(model(ids).logits, before) and called == [1]
        assert not any("forward" in module.__dict__ for module in model.modules())
        model.lm_head.weight.mul_(2)
        with pytest.raises(KeyError), prepacked(model, 16):
            assert torch.equal(model(ids).logits, model.lm_head.weight.new_tensor(2.0) * before)
            raise KeyError
    hook.remove()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_weights_in_other_precision_are_left_as_they_are(build: Build) -> None:
    model = build("llama")
    with prepacked(model, 8):
        assert not any("forward" in module.__dict__ for module in model.modules())


# A choice among given answers


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_an_answer_is_one_of_those_given(family: str, temperature: float, speak: Callable[..., Forward], tiny_tokenizer: Any) -> None:
    forward, given = speak(family), [[7, 8, 9], [7, 8], [12], [7, 20, 21, 22]]
    sampling = Sampling(max_new_tokens=6, temperature=temperature)
    said = generate(forward, tiny_tokenizer, asked_of(tiny_tokenizer), sampling, samples=20, choices=given, ends=[2])
    answers = [answer.ids[:-1] if answer.ids[-1] == 2 else answer.ids for answer in said]
    assert all(answer in given for answer in answers) and {answer.finished for answer in said} == {"end"}
    if temperature == 3:
        assert {tuple(answer) for answer in answers} == set(map(tuple, given))


def test_the_first_token_of_a_choice_follows_the_models_own_odds(speak: Callable[..., Forward], tiny_tokenizer: Any) -> None:
    forward, asked, words = speak(), asked_of(tiny_tokenizer)[:1], [11, 30, 45]
    with torch.no_grad():
        logits = forward.model(torch.tensor(asked)).logits[0, -1, words].double()
    said = generate(
        forward, tiny_tokenizer, asked, Sampling(max_new_tokens=1, temperature=2.0), samples=2000, batch=64, choices=[[w] for w in words]
    )
    seen = np.bincount([words.index(answer.ids[0]) for answer in said], minlength=3)
    assert chisquare(seen, (logits / 2).softmax(-1).numpy() * 2000).pvalue > 1e-3
    wanted = forward.model(torch.tensor(asked)).logits[0, -1].div(2).log_softmax(-1)
    assert all(abs(answer.log_probs[0] - float(wanted[answer.ids[0]])) < 1e-4 for answer in said[:20])


@pytest.mark.parametrize(
    ("given", "message"), [([], "answers to choose among"), ([[1], []], "none of them empty"), ([[4] * 9], "has 9 tokens")]
)
def test_choices_that_cannot_be_made_are_refused(
    given: list[list[int]], message: str, speak: Callable[..., Forward], tiny_tokenizer: Any
) -> None:
    with pytest.raises(SpecError, match=message):
        generate(speak(), tiny_tokenizer, [[5, 6]], Sampling(max_new_tokens=8), choices=given)
    with pytest.raises(SpecError, match="one answer begins another"):
        choosing.choices_of([[4], [4, 5]], [], 8)
