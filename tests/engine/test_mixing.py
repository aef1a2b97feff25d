"""Rows of several adapters in one batch: each says exactly what it would say through its adapter alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from families import build_model
from tunesmith.adapters import find_sites
from tunesmith.bases import Base
from tunesmith.core.errors import AdapterError
from tunesmith.core.row import Row
from tunesmith.engine.forward import Forward, log_probs_of
from tunesmith.engine.mixing import chosen, mixed, route_of
from tunesmith.engine.model import Model, attach_to
from tunesmith.engine.sampler import PrefixCache, Sampling, generate

KINDS = {
    "lora": "lora(rank=3, sites=[{q}])",
    "bottleneck": "parallel(reduction=4)",
    "ia3": "ia3(sites=[{q}, down])",
    "prefix": "prefix(tokens=3, hidden=none)",
    "mam": "mam(tokens=2, hidden=8)",
}


DECODERS = ("llama", "gpt2", "gemma3", "bloom")


def based(family: str) -> Base:
    """A tiny base of a family."""
    model, cpu = build_model(family), torch.device("cpu")
    kind: Any = "decoder" if family in DECODERS else "encoder"
    return Base(model, None, family, family, kind, Path(), family, torch.float32, "fp32", cpu, None)


def shaken(base: Base, name: str, expression: str) -> Model:
    """An adapter with values as training would give."""
    fused = any(site.name == "qkv" for site in find_sites(base.model))
    model = attach_to(base, expression.replace("{q}", "qkv" if fused else "q, v"), name=name)
    generator = torch.Generator().manual_seed(len(name))
    adapter = model.adapter
    adapter.load({k: v + (torch.randn(v.shape, generator=generator) * 0.3).to(v.dtype) for k, v in adapter.state().items()})
    return model


def crowd(base: Base, kinds: Sequence[str] = tuple(KINDS)) -> list[Model]:
    """The bare base and an adapter of each kind on it."""
    return [Model(base), *(shaken(base, kind, KINDS[kind]) for kind in kinds)]


def dealt(rows: Sequence[Row], models: Sequence[Model]) -> list[tuple[Row, Model]]:
    """Rows with models in turn, so that those of one model do not come together; every model gets rows with branches."""
    return [(rows[number % len(rows)], models[number % len(models)]) for number in range(len(rows) * len(models) + 1)]


def alone(model: Model, rows: Sequence[Row]) -> list[Tensor]:
    """What a model by itself says of each row: of its words, or their hidden states on encoders."""
    with torch.no_grad(), model.active():
        return [said(model, row) for row in rows]


def said(model: Model, row: Row) -> Tensor:
    forward = model.forward
    pack = forward.pack([row])
    return forward(pack).log_probs if forward.speaks else forward.states(pack, states_of(pack, 0))


def states_of(pack: Any, row: int) -> Tensor:
    """Where a row's words lie, segment after segment."""
    own = [pack.words(own) for own, at in zip(pack.own, pack.segment_row, strict=True) if at == row]
    return torch.from_numpy(np.concatenate(own))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert", "gemma3", "gpt2", "bloom"])
def test_in_one_pack_each_row_says_what_its_own_adapter_alone_says(family: str, padded: bool, rows: list[Row]) -> None:
    base = based(family)
    models = crowd(base, [kind for kind in KINDS if family != "bloom" or kind in ("lora", "bottleneck")])
    given = dealt(rows, models)
    wanted = [alone(model, [row])[0] for row, model in given]
    forward = models[0].forward
    if padded:
        forward.packed = False
    with torch.no_grad(), mixed(base, models):
        pack = forward.pack([row for row, _ in given], [route_of(model) for _, model in given])
        assert sorted(pack.order) == list(range(len(given))) and len(pack.parts) == len(models)
        if forward.speaks:
            scored = forward(pack)
            found = [scored.log_probs[row_of(pack) == number] for number in range(len(given))]
        else:
            found = [forward.states(pack, states_of(pack, number)) for number in range(len(given))]
    for place, ours in zip(pack.order, found, strict=True):
        torch.testing.assert_close(ours, wanted[place], atol=2e-5, rtol=1e-5)
    differ = {round(float(value.square().mean()), 4) for value, (row, _) in zip(wanted, given, strict=True) if row is rows[1]}
    assert len(differ) == len(models), "every adapter says something else"


def row_of(pack: Any) -> Tensor:
    """Which row each target belongs to."""
    return torch.tensor(pack.segment_row)[pack.segment]


def test_gradients_reach_each_adapter_from_its_own_rows_alone(rows: list[Row]) -> None:
    base = based("llama")
    models = crowd(base, ["lora", "prefix", "bottleneck"])
    given = dealt(rows, models)
    forward = models[0].forward
    with mixed(base, models):
        forward(forward.pack([row for row, _ in given], [route_of(model) for _, model in given])).log_probs.sum().backward()
    mixed_gradients = {
        f"{model.adapter.name}.{name}": p.grad.clone()
        for model in models[1:]
        for name, p in model.adapter.named_parameters()
        if p.grad is not None
    }
    base.model.zero_grad()
    for model in models[1:]:
        with model.active():
            forward(forward.pack([row for row, own in given if own is model])).log_probs.sum().backward()
        for name, parameter in model.adapter.named_parameters():
            torch.testing.assert_close(mixed_gradients[f"{model.adapter.name}.{name}"], parameter.grad, atol=2e-4, rtol=1e-4)


def test_likelihoods_come_in_the_order_given(rows: list[Row]) -> None:
    base = based("llama")
    models = crowd(base, ["lora", "prefix"])
    given = dealt(rows, models)
    with mixed(base, models):
        found = log_probs_of(models[0].forward, [row for row, _ in given], [route_of(model) for _, model in given])
    for (row, model), value in zip(given, found, strict=True):
        with model.active():
            assert log_probs_of(model.forward, [row]) == pytest.approx([value], abs=1e-4)


PROMPTS = [list(range(5, 5 + length)) for length in (12, 40, 3, 26)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bloom"])
@pytest.mark.parametrize("batch", [32, 3])
def test_greedy_answers_of_one_batch_are_those_of_each_adapter_by_itself(family: str, batch: int, tiny_tokenizer: Any) -> None:
    base = based(family)
    models = crowd(base, [kind for kind in KINDS if family != "bloom" or kind in ("lora", "bottleneck")])
    given = [(prompt, model) for prompt in PROMPTS for model in models]
    forward, sampling = models[0].forward, Sampling(max_new_tokens=7)
    wanted = []
    for prompt, model in given:
        with model.active():
            wanted += generate(forward, tiny_tokenizer, forward.prompts([prompt]), sampling)
    with mixed(base, models):
        routes = [route_of(model) for _, model in given]
        read = forward.prompts([prompt for prompt, _ in given], routes)
        found = generate(forward, tiny_tokenizer, read, sampling, routes=routes, batch=batch, samples=2)
    assert [answer.ids for answer in found[::2]] == [answer.ids for answer in wanted]
    assert [answer.ids for answer in found[1::2]] == [answer.ids for answer in wanted]
    ours, theirs = ([value for answer in answers for value in answer.log_probs] for answers in (found[::2], wanted))
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert len({tuple(answer.ids) for answer in wanted}) > len(PROMPTS), "adapters answer differently"


def test_kept_prompts_are_each_adapters_own(tiny_tokenizer: Any) -> None:
    base = based("llama")
    models = crowd(base, ["lora", "bottleneck"])
    forward, cache, sampling = models[0].forward, PrefixCache(), Sampling(max_new_tokens=4)
    prompt = list(range(5, 45))

    def ask(routes: list[Any]) -> list[list[int]]:
        read = forward.prompts([prompt] * len(routes), routes)
        return [answer.ids for answer in generate(forward, tiny_tokenizer, read, sampling, routes=routes, prefixes=cache)]

    routes = [route_of(model) for model in models]
    with mixed(base, models):
        first = ask(routes[:1])
        assert cache.longest(base.model, prompt, routes[1]) is None
        both = ask(routes)
        assert cache.longest(base.model, [*prompt, 5], routes[1]) is not None
        assert ask(routes) == both and both[0] == first[0]
    with mixed(base, models):
        assert cache.longest(base.model, [*prompt, 5], routes[1]) is not None, "kept from one call to the next"
    models[1].adapter.load({name: value + 1 for name, value in models[1].adapter.state().items()})
    with mixed(base, models):
        assert cache.longest(base.model, [*prompt, 5], routes[1]) is None, "the adapter is another one now"


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("full", "it changed the base's own weights"),
        ("sparse(share=0.1, mask=magnitude, sites=[q])", "it writes into the base's own weights"),
        ("lora(rank=2, sites=[head])", "which is read for all rows at once"),
    ],
)
def test_an_adapter_that_all_rows_would_feel_is_refused_with_the_reason(expression: str, why: str) -> None:
    base = based("llama")
    model = attach_to(base, expression)
    with pytest.raises(AdapterError, match=why), mixed(base, [model, Model(base)]):
        pass
    assert base.model.__dict__["ts_forward"].router is None


def test_a_model_that_reads_more_than_tokens_at_a_site_is_refused(rows: list[Row]) -> None:
    base = based("deberta-v2")
    models = [Model(base), shaken(base, "lora", "lora(rank=2, sites=[q, k])")]
    with pytest.raises(AdapterError, match="something else than the tokens"), mixed(base, models), torch.no_grad():
        pack = models[0].forward.pack([rows[0], rows[3]], [route_of(model) for model in models])
        models[0].forward.states(pack, torch.arange(4))


def test_models_are_named_by_adapter_or_given_and_need_one_base() -> None:
    base, other = based("llama"), based("llama")
    first = shaken(base, "lora", KINDS["lora"])
    second = attach_to(first, KINDS["bottleneck"], name="upon")
    found = chosen(base, ["lora", None, second, "upon"])
    assert [route_of(model) for model in found] == [("lora",), (), ("lora", "upon"), ("upon",)]
    with pytest.raises(AdapterError, match="unknown adapter 'lola'"):
        chosen(base, ["lola"])
    with pytest.raises(AdapterError, match="need one base"):
        chosen(other, [first])


def test_outside_of_a_mix_everything_is_as_before(rows: list[Row]) -> None:
    base = based("llama")
    models = crowd(base, ["lora", "prefix"])
    before = [alone(model, rows[:2]) for model in models]
    with mixed(base, models):
        pack = models[0].forward.pack(rows[:2], [route_of(model) for model in models[:2]])
        with pytest.raises(ValueError, match="within `mixed`"):
            models[0].forward(Forward.pack(models[0].forward, rows[:2]))
    with pytest.raises(ValueError, match="within `mixed`"):
        models[0].forward(pack)
    after = [alone(model, rows[:2]) for model in models]
    assert all(torch.equal(a, b) for one, two in zip(before, after, strict=True) for a, b in zip(one, two, strict=True))
