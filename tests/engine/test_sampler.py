"""Generation says what the model itself would say, whatever shares its batch, and draws what the options describe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from tunesmith.adapters import attach
from tunesmith.core.errors import RunError, SpecError
from tunesmith.engine import sampler
from tunesmith.engine.forward import Forward
from tunesmith.engine.probe import probe
from tunesmith.engine.sampler import Sampling, choose, generate

Build = Callable[..., Any]


@pytest.fixture
def speak(build: Build, tiny_tokenizer: Any) -> Callable[..., Forward]:
    """A model with the tiny tokenizer's vocabulary, probed."""
    return lambda family="llama", **changes: probe(build(family, vocab_size=len(tiny_tokenizer), **changes))


def prompts(tokenizer: Any, shared: int = 0) -> list[list[int]]:
    """Ragged prompts, after `shared` tokens that all begin with."""
    drawn = np.random.default_rng(3).integers(5, len(tokenizer), 200).tolist()
    own = [drawn[100:103], drawn[110:121], drawn[130:131], drawn[140:147], drawn[150:161]]
    return [drawn[:shared] + part for part in own]


def by_the_model(forward: Forward, asked: list[list[int]], count: int) -> list[list[int]]:
    """Greedy answers of transformers' own generation, one prompt at a time."""
    out = []
    for ids in asked:
        given = torch.tensor([ids])
        made = forward.model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=count, eos_token_id=[2], pad_token_id=0
        )
        out.append(made[0, len(ids) :].tolist())
    return out


@pytest.mark.parametrize("shared", [0, 40])
@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gemma3", "gpt2", "mistral", "qwen3", "phi3", "gpt_neox", "bloom", "falcon", "mamba"]
)
def test_greedy_answers_are_the_models_own_for_ragged_prompts_with_and_without_a_common_beginning(
    family: str, shared: int, speak: Callable[..., Forward], tiny_tokenizer: Any
) -> None:
    forward = speak(family)
    asked = prompts(tiny_tokenizer, shared)
    said = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=12), batch=3)
    assert [answer.ids for answer in said] == by_the_model(forward, asked, 12)


def test_a_common_beginning_is_computed_once_and_only_from_a_length_that_pays(
    speak: Callable[..., Forward], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = speak()
    seen: list[int] = []
    original = sampler._Job.prefill
    monkeypatch.setattr(sampler._Job, "prefill", lambda self, ids: seen.append(len(ids)) or original(self, ids))
    for shared in (23, 24, 40):
        generate(forward, tiny_tokenizer, prompts(tiny_tokenizer, shared), Sampling(max_new_tokens=2))
    generate(forward, tiny_tokenizer, prompts(tiny_tokenizer, 40)[:1], Sampling(max_new_tokens=2))
    assert seen == [24, 40]


def test_identical_prompts_and_prompts_that_continue_one_another_keep_a_token_of_their_own(
    speak: Callable[..., Forward], tiny_tokenizer: Any
) -> None:
    forward = speak()
    long = prompts(tiny_tokenizer, 40)[1]
    asked = [long, long, long[:-3], long]
    said = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=6))
    assert [answer.ids for answer in said] == by_the_model(forward, asked, 6)


def test_sampled_answers_depend_on_the_seed_and_the_row_not_on_batch_size_or_company(
    speak: Callable[..., Forward], tiny_tokenizer: Any
) -> None:
    forward = speak()
    asked = prompts(tiny_tokenizer, 30)

    def said(asked: list[list[int]], batch: int = 32, seed: int = 0) -> list[list[int]]:
        sampling = Sampling(max_new_tokens=20, temperature=1.0, seed=seed)
        return [answer.ids for answer in generate(forward, tiny_tokenizer, asked, sampling, batch=batch)]

    first = said(asked)
    assert first == said(asked) == said(asked, batch=1) == said(asked, batch=2)
    assert first[:2] == said(asked[:2])
    torch.manual_seed(77)
    assert first == said(asked)
    assert first != said(asked, seed=1)
    assert len({tuple(ids) for ids in said([asked[0]] * 4)}) == 4  # the same prompt four times is four draws


def test_an_answer_ends_at_an_end_token_which_is_kept_in_ids_and_left_out_of_the_text(
    speak: Callable[..., Forward], tiny_tokenizer: Any
) -> None:
    forward = speak()
    asked = prompts(tiny_tokenizer)
    free = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=10))
    end = free[0].ids[4]
    first = free[0].ids.index(end)
    ended = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=10), ends=[end])
    assert ended[0].ids == free[0].ids[: first + 1] and ended[0].finished == "end"
    assert ended[0].text == tiny_tokenizer.decode(free[0].ids[:first], skip_special_tokens=True)
    for before, after in zip(free[1:], ended[1:], strict=True):
        assert before.ids[: len(after.ids)] == after.ids
        assert after.finished == ("end" if end in before.ids or before.finished == "end" else "length")
    forward.model.generation_config.eos_token_id = [end, 2]
    assert generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=10)) == ended


def test_stop_strings_cut_the_text_where_the_first_of_them_begins(speak: Callable[..., Forward], tiny_tokenizer: Any) -> None:
    forward = speak()
    asked = prompts(tiny_tokenizer)
    free = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=30))
    whole = free[1].text
    assert len(whole) > 12
    word, later = whole[5:8], whole[9:11]
    stopped = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=30, stop=(later, word)))
    assert stopped[1].finished == "stop"
    assert stopped[1].text == whole[: min(whole.index(word), whole.index(later))]
    assert len(stopped[1].ids) < len(free[1].ids)


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_streamed_pieces_make_up_the_text_with_stop_strings_and_half_characters(
    stops: bool, temperature: float, speak: Callable[..., Forward], tiny_tokenizer: Any
) -> None:
    forward = speak()
    asked = prompts(tiny_tokenizer)
    free = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=40, temperature=temperature))
    assert any("\ufffd" in answer.text for answer in free)  # a random model leaves characters half said
    stop = tuple(answer.text[8:11] for answer in free) if stops else ()
    pieces: list[list[str]] = [[] for _ in asked]
    said = generate(
        forward,
        tiny_tokenizer,
        asked,
        Sampling(max_new_tokens=40, temperature=temperature, stop=stop),
        on_text=lambda index, piece: pieces[index].append(piece),
    )
    assert ["".join(parts) for parts in pieces] == [answer.text for answer in said]
    assert all(len(parts) > 1 for parts in pieces if len("".join(parts)) > 10)
    assert {answer.finished for answer in said} == {"stop"} if stops else all(answer.finished != "stop" for answer in said)


def test_progress_counts_every_answer_and_answers_come_in_the_order_of_their_prompts(
    speak: Callable[..., Forward], tiny_tokenizer: Any
) -> None:
    forward, counts = speak(), []
    asked = prompts(tiny_tokenizer)
    generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=2), batch=2, progress=counts.append)
    assert counts == [2, 2, 1]
    assert generate(forward, tiny_tokenizer, []) == []


def test_prompts_may_be_arrays(speak: Callable[..., Forward], tiny_tokenizer: Any) -> None:
    forward, asked = speak(), prompts(tiny_tokenizer, 30)
    arrays: Any = [np.asarray(ids, np.int32) for ids in asked]
    greedy = Sampling(max_new_tokens=3)
    assert generate(forward, tiny_tokenizer, arrays, greedy) == generate(forward, tiny_tokenizer, asked, greedy)


def test_adapters_speak_in_generation_and_keep_silent_when_disabled(speak: Callable[..., Forward], tiny_tokenizer: Any) -> None:
    forward = speak("llama-tied")
    asked = prompts(tiny_tokenizer, 30)
    base = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=8))
    adapter = attach(forward.model, "lora(rank=4, sites=all)", new_words=[len(tiny_tokenizer) - 1])
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    tuned = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=8))
    assert [answer.ids for answer in tuned] == by_the_model(forward, asked, 8)
    assert tuned != base
    with adapter.disabled():
        assert generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=8)) == base


def test_a_prompt_that_leaves_no_room_or_is_empty_is_refused_by_its_number(speak: Callable[..., Forward], tiny_tokenizer: Any) -> None:
    forward = speak(max_position_embeddings=20)
    with pytest.raises(RunError, match=r"prompt 2 has 15 tokens; with 6 to come it exceeds the context of 20(.|\n)*max_new_tokens"):
        generate(forward, tiny_tokenizer, [[5] * 14, [5] * 15], Sampling(max_new_tokens=6))
    with pytest.raises(RunError, match="prompt 1 is empty"):
        generate(forward, tiny_tokenizer, [[]], Sampling(max_new_tokens=6))
    assert len(generate(forward, tiny_tokenizer, [[5] * 14], Sampling(max_new_tokens=6))[0].ids) <= 6


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1},
        {"max_new_tokens": 0},
        {"stop": ("",)},
    ],
)
def test_sampling_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="out of range"):
        Sampling(**options)


# What is drawn


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
    drawn = choose(logits.expand(count, -1), Sampling(**options), [(seed * 7919, seed % 5) for seed in range(count)])
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
    drawn = choose(torch.tensor([logits] * 64), sampling, [(seed, position) for position in range(64)])
    allowed = kept(np.asarray(logits), 1.0, top_k, min(1.0, top_p + 1e-6), min_p * (1 - 1e-6)) > 0
    assert allowed[drawn.numpy()].all()


def test_temperature_zero_takes_the_likeliest_and_top_one_agrees() -> None:
    logits = torch.randn(50, 30)
    draws = [(row, 0) for row in range(50)]
    assert torch.equal(choose(logits, Sampling(), draws), logits.argmax(-1))
    assert torch.equal(choose(logits, Sampling(temperature=1.0, top_k=1), draws), logits.argmax(-1))


def test_random_numbers_are_uniform_and_those_of_neighbouring_rows_and_places_are_unrelated() -> None:
    grid = np.array([[sampler._uniform(seed, position) for position in range(100)] for seed in range(200)])
    assert grid.min() >= 0 and grid.max() < 1
    assert chisquare(np.histogram(grid, 50, (0, 1))[0]).pvalue > 1e-3
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.03


def test_the_generator_is_splitmix64() -> None:
    """First output for the state 1234567, from the reference implementation (Vigna)."""
    assert sampler._uniform(1234567, 0) == (6457827717110365317 >> 11) / 2**53
