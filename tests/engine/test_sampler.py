"""Generation says what the model itself would say, whatever shares its batch, and draws what the options describe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.adapters import attach
from tunesmith.core.errors import RunError, SpecError
from tunesmith.engine import decoders
from tunesmith.engine.forward import Forward
from tunesmith.engine.prefill import PrefixCache
from tunesmith.engine.probe import probe
from tunesmith.engine.sampler import Completion, Sampling, generate

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
    "family",
    [
        *["llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "mistral", "phi3", "phi", "gpt_neox", "olmo2"],
        *["bloom", "falcon", "gptj", "mamba"],
    ],
)
def test_greedy_answers_are_the_models_own_for_ragged_prompts_with_and_without_a_common_beginning(
    family: str, shared: int, speak: Callable[..., Forward], tiny_tokenizer: Any
) -> None:
    forward = speak(family)
    asked = prompts(tiny_tokenizer, shared)
    said = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=12), batch=3)
    assert [answer.ids for answer in said] == by_the_model(forward, asked, 12)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Lengths of what is read at each reading of prompts."""
    seen: list[list[int]] = []
    original = decoders.read_prompts

    def noted(forward: Forward, asked: Any, *more: Any) -> Any:
        seen.append([len(ids) for ids, _ in asked])
        return original(forward, asked, *more)

    monkeypatch.setattr(decoders, "read_prompts", noted)
    return seen


def test_a_common_beginning_is_computed_once_and_only_from_a_length_that_pays(
    speak: Callable[..., Forward], tiny_tokenizer: Any, read: list[list[int]]
) -> None:
    forward = speak()
    decoders.keeps_keys(forward)
    for shared, wanted in ((23, [[24, 26, 30, 34, 34]]), (24, [[24], [1, 3, 7, 11, 11]]), (40, [[40], [1, 3, 7, 11, 11]])):
        read.clear()
        generate(forward, tiny_tokenizer, prompts(tiny_tokenizer, shared), Sampling(max_new_tokens=2))
        assert read == wanted
    read.clear()
    generate(forward, tiny_tokenizer, prompts(tiny_tokenizer, 40)[:1], Sampling(max_new_tokens=2))
    assert read == [[43]]


def test_a_prompt_is_read_once_for_all_its_samples_even_when_they_come_in_one_after_another(
    speak: Callable[..., Forward], tiny_tokenizer: Any, read: list[list[int]]
) -> None:
    forward = speak()
    decoders.keeps_keys(forward)
    asked = prompts(tiny_tokenizer)
    read.clear()
    said = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=9, temperature=1.0), samples=7, batch=4)
    assert sorted(length for part in read for length in part) == sorted(map(len, asked)) and len(said) == 35


@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom", "mamba"])
def test_samples_come_prompt_by_prompt_the_first_as_if_it_were_alone_and_all_different(
    family: str, speak: Callable[..., Forward], tiny_tokenizer: Any
) -> None:
    forward, sampling = speak(family), Sampling(max_new_tokens=12, temperature=1.0)
    asked = prompts(tiny_tokenizer)
    several = generate(forward, tiny_tokenizer, asked, sampling, samples=3, batch=6)
    one = generate(forward, tiny_tokenizer, asked, sampling)
    assert [answer.ids for answer in several[::3]] == [answer.ids for answer in one]
    assert len({tuple(answer.ids) for answer in several}) == 15
    greedy = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=5), samples=2)
    assert [answer.ids for answer in greedy[::2]] == [answer.ids for answer in greedy[1::2]] == by_the_model(forward, asked, 5)


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
    assert sum(counts) == 5 and all(counts)
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


# Company, places and sizes


def asked_alone(answers: list[Completion], place: int, samples: int) -> list[tuple[list[int], list[float]]]:
    return [(answer.ids, answer.log_probs) for answer in answers[place * samples : (place + 1) * samples]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompts_answers_are_the_same_to_the_last_bit_alone_in_company_and_in_another_order(
    dtype: torch.dtype, speak: Callable[..., Forward], tiny_tokenizer: Any, build: Build
) -> None:
    forward = probe(build("llama", vocab_size=len(tiny_tokenizer)).to(dtype))
    assert decoders.keeps_keys(forward)
    asked, sampling = prompts(tiny_tokenizer), Sampling(max_new_tokens=40, temperature=1.0)

    def said(order: list[int], batch: int = 8) -> dict[int, Any]:
        out = generate(forward, tiny_tokenizer, [asked[i] for i in order], sampling, samples=4, batch=batch, seeds=order)
        return {i: asked_alone(out, place, 4) for place, i in enumerate(order)}

    everyone = said([0, 1, 2, 3, 4])
    assert everyone == said([4, 2, 0, 3, 1])
    for number in range(5):
        assert said([number])[number] == everyone[number]
    assert said([1, 3]) == {number: everyone[number] for number in (1, 3)}


def test_rows_of_a_step_do_not_feel_their_neighbours_by_one_bit(speak: Callable[..., Forward], tiny_tokenizer: Any) -> None:
    forward = speak()
    asked = prompts(tiny_tokenizer)

    def logits(company: list[list[int]], tokens: list[int]) -> list[torch.Tensor]:
        with torch.no_grad(), forward.attention("tunesmith-decode"):
            decoder = decoders.Shared(forward, [asked[1], *company], list(range(1 + len(company))), 8, None)
            rows = list(range(1 + len(company)))
            return [decoder.enter(rows)[0]] + [decoder.step(rows, [5 + n, *tokens])[0] for n in range(6)]

    assert decoders.keeps_keys(forward)
    first = logits(asked[2:], [7, 8, 9])
    second = logits([asked[0], asked[4], asked[3]], [11, 12, 13])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_places_are_filled_again_as_rows_finish_and_the_batch_shrinks_at_the_end(
    speak: Callable[..., Forward], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = speak()
    asked = prompts(tiny_tokenizer) * 8
    budgets = [3, 40, 5, 9, 4, 7, 6, 8, 30, 3] * 4
    sizes: list[int] = []
    original = decoders.Decoding.step
    monkeypatch.setattr(decoders.Decoding, "step", lambda self, ids: sizes.append(len(ids)) or original(self, ids))
    decoders.keeps_keys(forward)
    sizes.clear()
    said = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=40), budgets=budgets, batch=16)
    batches = -(-len(asked) // 16) * 40
    assert len(sizes) < 0.8 * batches and sizes == sorted(sizes, reverse=True) and {sizes[0], sizes[-1]} == {16, 8}
    whole = by_the_model(forward, asked[:5], 40)
    assert [answer.ids for answer in said] == [whole[at % 5][: budgets[at]] for at in range(40)]


def test_budgets_and_seeds_belong_to_prompts_and_must_fit_them(speak: Callable[..., Forward], tiny_tokenizer: Any) -> None:
    forward, asked = speak(), prompts(tiny_tokenizer)
    said = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=3), budgets=[1, 2, 3, 4, 9], samples=2)
    assert [len(answer.ids) for answer in said] == [1, 1, 2, 2, 3, 3, 4, 4, 9, 9]
    for wrong in ({"budgets": [3]}, {"budgets": [1, 1, 1, 1, 0]}, {"seeds": [1]}, {"samples": 0}):
        with pytest.raises(SpecError, match="do not fit 5 prompts"):
            generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=3), **wrong)  # type: ignore[arg-type]


def test_a_model_whose_attention_is_not_what_it_tells_falls_back_to_its_own_cache(
    build: Build, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [decoders.keeps_keys(probe(build(family))) for family in ("llama", "gemma2", "mistral", "bloom", "mamba")] == [
        *[True, True, True],
        *[False, False],
    ]
    forward = probe(build("llama", vocab_size=len(tiny_tokenizer)))
    original = decoders.Decoding.attend
    monkeypatch.setattr(decoders.Decoding, "attend", lambda self, q, k, v, *rest: original(self, q * 1.2, k, v, *rest))
    assert not decoders.keeps_keys(forward)
    asked = prompts(tiny_tokenizer)
    said = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=6))
    assert [answer.ids for answer in said] == by_the_model(forward, asked, 6)


def test_cancelling_leaves_the_model_whole(speak: Callable[..., Forward], tiny_tokenizer: Any) -> None:
    forward, asked = speak(), prompts(tiny_tokenizer)
    forward.model.to(torch.bfloat16)
    before = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=20))

    def cancel(index: int, piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=20), on_text=cancel)
    assert forward.model.config._attn_implementation == forward.own_attention
    assert not any("forward" in module.__dict__ for module in forward.model.modules())
    assert generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=20)) == before


# Prompts kept over calls


def test_kept_prompts_save_reading_and_change_nothing(speak: Callable[..., Forward], tiny_tokenizer: Any, read: list[list[int]]) -> None:
    forward, kept = speak(), PrefixCache()
    decoders.keeps_keys(forward)
    first = prompts(tiny_tokenizer, 40)[1]
    turns = [first, [*first, 9, 8, 7, 6, 5], [*first, 9, 8, 7, 1], first]
    read.clear()
    said = [generate(forward, tiny_tokenizer, [ids], Sampling(max_new_tokens=6), prefixes=kept)[0].ids for ids in turns]
    assert read == [[51], [5], [1], [1]]
    assert said == by_the_model(forward, turns, 6)
    several = prompts(tiny_tokenizer, 40)
    read.clear()
    together = generate(forward, tiny_tokenizer, several, Sampling(max_new_tokens=6), prefixes=kept)
    assert read == [[1, 3, 7, 11, 11]]  # all begin with the 40 tokens that are known
    assert [answer.ids for answer in together] == by_the_model(forward, several, 6)


@pytest.mark.parametrize("change", ["weights", "adapter trained", "adapter attached", "adapter off", "adapter detached"])
def test_kept_prompts_are_forgotten_when_the_model_changes(change: str, speak: Callable[..., Forward], tiny_tokenizer: Any) -> None:
    forward, kept, asked = speak(), PrefixCache(), prompts(tiny_tokenizer)

    def louder(adapter: Any) -> None:
        with torch.no_grad():
            for _, parameter in adapter.named_parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))

    adapter = attach(forward.model, "lora(rank=4, sites=all)") if change != "adapter attached" else None
    if change in ("adapter off", "adapter detached"):
        louder(adapter)
    generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=8), prefixes=kept)
    if change == "weights":
        with torch.no_grad():
            next(forward.model.model.layers.parameters()).mul_(3)
    elif change == "adapter off":
        assert adapter is not None
        adapter._switch(False)
    elif change == "adapter detached":
        assert adapter is not None
        adapter.detach()
    else:
        louder(adapter or attach(forward.model, "lora(rank=4, sites=all)"))
    said = generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=8), prefixes=kept)
    assert [answer.ids for answer in said] == by_the_model(forward, asked, 8)


def test_kept_prompts_stay_within_their_tokens_and_the_latest_used_stay() -> None:
    from torch import nn

    from tunesmith.engine.prefill import Keys

    cache, model = PrefixCache(tokens=10), nn.Linear(1, 1)
    for start in (0, 100, 200):
        cache.keep(model, range(start, start + 4), Keys([torch.zeros(4, 1, 1)], [torch.zeros(4, 1, 1)]))
        cache.longest(model, [0, 1, 2])
    assert [cache.longest(model, range(start, start + 4)) is not None for start in (0, 100, 200)] == [True, False, True]
