"""A pack computes what each of its rows computes alone: values and gradients, for every family, shape of row and path of code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tunesmith.adapters import attach
from tunesmith.core.errors import BaseError, RunError
from tunesmith.core.row import ROOT, Row, Segment, segment, single
from tunesmith.engine import attention
from tunesmith.engine.forward import Forward, log_probs_of
from tunesmith.engine.pack import best_fit, build_pack, pack_rows
from tunesmith.engine.probe import probe

PACKED = [
    "llama",
    "llama-tied",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "mistral",
    "phi3",
    "phi",
    "gpt2",
    "gpt_neox",
    "olmo",
    "olmo2",
    "granite",
    "cohere",
    "olmo3",
    "cohere2",
    "starcoder2",
    "smollm3",
    "mixtral",
    "opt",
]
NO_INTERFACE = "its attention does not go through transformers' attention interface"
PADDED = {
    "bloom": NO_INTERFACE,
    "falcon": NO_INTERFACE,
    "gptj": NO_INTERFACE,
    "mamba": NO_INTERFACE,
    "gpt_oss": "packed attention has no s_aux",
    "stablelm": "the model does not hand packs to its attention",
    "llama4": "some of its layers attend within chunks",
    "qwen3_5": "a pack differs from rows alone by",
}

Build = Callable[..., Any]
Alone = Callable[[Any, list[Row]], Tensor]
Gradients = Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]


def trained(model: nn.Module, kind: str) -> dict[str, Tensor]:
    """What receives gradients: LoRA on every linear site (none of its matrices zero), or all parameters of the model."""
    adapter = attach(model, "lora(rank=3, sites=all)" if kind == "lora" else "full")
    named = dict(adapter.named_parameters())
    if kind == "lora":
        with torch.no_grad():
            for parameter in named.values():
                parameter.normal_(std=0.05)
    return named


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    size = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert size > 0.1
    for name, gradient in wanted.items():
        assert torch.allclose(got[name], gradient, rtol=0, atol=1e-5 * max(1.0, size)), (name, float((got[name] - gradient).abs().max()))


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_compute_exactly_what_each_row_computes_alone(
    family: str, kind: str, build: Build, rows: list[Row], alone: Alone, gradients: Gradients
) -> None:
    model = build(family)
    forward = probe(model)
    assert (forward.packed, forward.why) == (True, "")
    named = trained(model, kind)
    got, wanted = forward(build_pack(rows)).log_probs, alone(model, rows)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-5)
    assert float(wanted.detach().std()) > 0.3  # the model is no coin, or equality would mean little
    assert_same(gradients(named, got), gradients(named, wanted))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("block", [3, 8, 256])
def test_long_segments_are_trained_in_blocks_and_compute_the_same(
    family: str, block: int, build: Build, rows: list[Row], alone: Alone, gradients: Gradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    forward = probe(model)
    named = trained(model, "lora")
    monkeypatch.setattr("tunesmith.engine.buckets.LONG", 20)
    monkeypatch.setattr(attention, "_BLOCK", block)
    spans: list[int] = []
    original = attention._spans
    monkeypatch.setattr(attention, "_spans", lambda *args: spans.append(len(original(*args))) or original(*args))
    got, wanted = forward(build_pack(rows)).log_probs, alone(model, rows)
    assert len(spans) > 2 and (max(spans) > 1 or block == 256)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-5)
    assert_same(gradients(named, got), gradients(named, wanted))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3"])
def test_long_segments_take_the_fused_kernel_where_nothing_is_trained_and_compute_the_same(
    family: str, build: Build, rows: list[Row], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    forward = probe(model)
    fused = []
    original = attention._fused
    monkeypatch.setattr("tunesmith.engine.buckets.LONG", 20)
    monkeypatch.setattr(attention, "_fused", lambda *args: fused.append(args[3]) or original(*args))
    with torch.no_grad():
        got, wanted = forward(build_pack(rows)).log_probs, alone(model, rows)
    assert any(bucket.pad.numel() for bucket in fused) and len(fused) > 2
    assert torch.allclose(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", PADDED)
def test_a_family_that_cannot_be_packed_is_padded_says_why_and_computes_the_same(
    family: str, build: Build, rows: list[Row], alone: Alone, gradients: Gradients
) -> None:
    model = build(family)
    forward = probe(model)
    assert not forward.packed and forward.why.startswith(PADDED[family])
    assert model.config._attn_implementation == forward.own_attention != attention.NAME
    named = trained(model, "full" if family == "mamba" else "lora")
    got, wanted = forward(build_pack(rows)).log_probs, alone(model, rows)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-5)
    assert_same(gradients(named, got), gradients(named, wanted))


def test_the_padded_path_of_a_family_that_packs_computes_the_same(build: Build, rows: list[Row]) -> None:
    model = build("qwen3")
    pack = build_pack(rows)
    padded = Forward(model, packed=False, direct_head=True)(pack).log_probs
    assert torch.allclose(probe(model)(pack).log_probs, padded, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "direct"),
    [("llama", True), ("phi", True), ("gpt2", True), ("gemma3", True), ("gemma2", False), ("granite", False), ("cohere", False)],
)
def test_a_head_that_is_more_than_a_matrix_falls_back_to_the_models_own(family: str, direct: bool, build: Build) -> None:
    assert probe(build(family)).direct_head is direct


def test_a_logit_scale_outside_of_the_head_is_noticed(build: Build, rows: list[Row], alone: Alone) -> None:
    class Scaled(type(build("llama"))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits / 3
            return out

    model = build("llama")
    model.__class__ = Scaled
    forward = probe(model)
    assert not forward.direct_head and forward.packed
    assert torch.allclose(forward(build_pack(rows)).log_probs, alone(model, rows), atol=1e-5)


def test_a_model_with_broken_weights_is_refused_before_anything_is_trained(build: Build) -> None:
    model = build("llama")
    model.model.norm.weight[3] = float("nan")
    with pytest.raises(BaseError, match="NaN or infinite"):
        probe(model)


def test_layers_that_rely_on_a_mask_of_their_own_are_not_packed(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    model.config.layer_types = ["chunked_attention", "full_attention"]
    assert "within chunks" in probe(model).why
    model.config.layer_types = ["sliding_attention", "full_attention"]
    assert "sliding window" in probe(model).why


def test_the_model_keeps_its_own_attention_outside_of_a_packed_forward(build: Build, rows: list[Row]) -> None:
    model = build("llama")
    before = model.config._attn_implementation
    forward = probe(model)
    forward(build_pack(rows))
    assert model.config._attn_implementation == before == "sdpa"


@st.composite
def trees(draw: st.DrawFn) -> Row:
    """Any tree of up to six segments, some of them empty, with any targets but the first token of a path."""
    segments: list[Segment] = []
    for index in range(draw(st.integers(1, 6))):
        parent = draw(st.integers(ROOT, index - 1))
        size = draw(st.integers(1 if parent == ROOT else 0, 9))
        ids = draw(st.lists(st.integers(3, 95), min_size=size, max_size=size))
        mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        if parent == ROOT:
            mask[0] = False
        segments.append(segment(ids, mask, parent))
    return Row(tuple(segments))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(trees(), min_size=1, max_size=5), family=st.sampled_from(["llama", "mistral"]))
def test_any_trees_packed_together_compute_what_they_compute_alone(rows: list[Row], family: str, build: Build, alone: Alone) -> None:
    if not any(row.supervised_tokens for row in rows):
        return
    model = build(family)
    with torch.no_grad():
        for packed in (True, False):
            got = Forward(model, packed=packed, direct_head=True)(build_pack(rows)).log_probs
            assert torch.allclose(got, alone(model, rows), rtol=0, atol=1e-5)


@given(rows=st.lists(trees(), min_size=0, max_size=12), spare=st.integers(0, 40))
def test_packing_loses_no_row_keeps_the_budget_and_every_token_attends_once(rows: list[Row], spare: int) -> None:
    budget = max([row.tokens for row in rows], default=1) + spare
    packs = pack_rows(rows, budget)
    assert sorted(map(id, rows)) == sorted(id(row) for pack in packs for row in pack.rows)
    for pack in packs:
        assert pack.tokens <= budget
        assert sorted(pack.back.tolist()) == sorted(set(pack.back.tolist())) and len(pack.back) == pack.tokens
        queries = torch.cat([bucket.query.flatten() for bucket in pack.buckets])
        assert torch.equal(queries[pack.back], torch.arange(pack.tokens))
        assert len(pack.target) == sum(row.supervised_tokens for row in pack.rows)


def pairs_of(rows: list[Row], unroll: bool, causal: bool, window: int | None) -> set[tuple[int, int]]:
    """Who sees whom, token by token along every path: (query, key) by their places in the pack."""
    found, end = set(), 0
    for row in rows:
        lies: dict[int, list[int]] = {}
        for index in row.leaves() if unroll else range(len(row.segments)):
            above = [] if unroll else [token for i in row.path(index)[:-1] for token in lies[i]]
            own = sum(len(row.segments[i]) for i in row.path(index)) if unroll else len(row.segments[index])
            lies[index] = list(range(end, end + own))
            end += own
            path = above + lies[index]
            for i in range(len(above), len(path)):
                keys = path[: i + 1] if causal else path
                found |= {(path[i], key) for j, key in enumerate(keys) if window is None or abs(i - j) < window}
    return found


@given(rows=st.lists(trees(), min_size=1, max_size=5), unroll=st.booleans(), causal=st.booleans(), window=st.none() | st.integers(1, 9))
def test_buckets_hold_each_pair_of_a_token_and_one_on_its_path_exactly_once_and_no_other(
    rows: list[Row], unroll: bool, causal: bool, window: int | None
) -> None:
    pack = build_pack(rows, unroll=unroll)
    met: list[tuple[int, int]] = []
    for bucket in pack.buckets:
        real = torch.ones(bucket.query.numel(), dtype=torch.bool).index_fill_(0, bucket.pad, False).view(*bucket.query.shape, 1)
        at, i, j = (real & bucket.allowed(causal, window)).nonzero().T
        met += zip(bucket.query[at, i].tolist(), bucket.key[at, j].tolist(), strict=True)
    assert len(met) == len(set(met)) and set(met) == pairs_of(rows, unroll, causal, window)


@given(sizes=st.lists(st.integers(1, 50), max_size=60), budget=st.integers(50, 120))
def test_best_fit_needs_few_bins_and_holds_every_item_once(sizes: list[int], budget: int) -> None:
    bins = best_fit(sizes, budget)
    assert sorted(index for items in bins for index in items) == list(range(len(sizes)))
    loads = sorted(sum(sizes[index] for index in items) for items in bins)
    assert all(load <= budget for load in loads)
    assert len(loads) < 2 or loads[0] + loads[1] > budget  # the two emptiest would not fit into one


def test_a_row_larger_than_a_pack_is_refused_with_the_option_to_change() -> None:
    with pytest.raises(RunError, match=r"row of 11 tokens does not fit in a pack of 10(.|\n)*train.pack_tokens"):
        pack_rows([single(range(11), False)], 10)


def test_padding_within_a_bucket_is_bounded_for_rows_of_very_different_lengths() -> None:
    pack = build_pack([single(range(3, 3 + n), False) for n in (2, 3, 50, 51, 52, 53, 54, 4, 5)])
    padded = sum(bucket.query.shape[0] * bucket.query.shape[1] * bucket.key.shape[1] for bucket in pack.buckets)
    assert padded <= 1.3 * sum(n * n for n in (2, 3, 50, 51, 52, 53, 54, 4, 5))
    assert len(pack.buckets) < 6


def test_a_target_that_nothing_predicts_is_refused_rather_than_read_from_the_future() -> None:
    empty = Segment(np.zeros(0, np.int32), np.zeros(0, np.bool_))
    with pytest.raises(ValueError, match="nothing predicts it"):
        build_pack([Row((empty, segment([5, 6, 7], True, 0)))])


def test_a_pack_moves_to_a_device_whole_and_stays_itself_where_it_is(rows: list[Row]) -> None:
    pack = build_pack(rows)
    moved = pack.to(torch.device("meta"))
    holders = [(pack, moved), *zip(pack.buckets, moved.buckets, strict=True)]
    tensors = [(a, b, name) for a, b in holders for name in type(a).__slots__ if isinstance(getattr(a, name), Tensor)]
    assert len(tensors) == 9 + 5 * len(pack.buckets)
    for before, after, name in tensors:
        assert getattr(after, name).device.type == "meta" and getattr(after, name).shape == getattr(before, name).shape
    assert pack.to(torch.device("cpu")) is pack


def test_a_row_stays_the_same_to_the_last_bit_whatever_its_neighbours_say(build: Build, rows: list[Row]) -> None:
    forward = probe(build("llama"))
    other = single(rows[0].segments[0].ids[::-1].copy(), rows[0].segments[0].supervised)
    with torch.no_grad():
        one, two = (forward(build_pack([first, *rows[1:]])).log_probs[11:] for first in (rows[0], other))
    assert torch.equal(one, two)


def test_sums_by_segment_and_by_row_add_up_the_tokens(build: Build, rows: list[Row], alone: Alone) -> None:
    model = build("llama")
    forward = probe(model)
    with torch.no_grad():
        scored, wanted = forward(build_pack(rows)), alone(model, rows)
        sums = log_probs_of(forward, rows)
    assert torch.allclose(scored.by_segment().sum(), wanted.sum(), atol=1e-4)
    assert sums[0] == pytest.approx(float(wanted[:11].sum()), abs=1e-4)
    assert sums[-1] == pytest.approx(float(wanted[-1]), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral", "gpt2"])
def test_bf16_models_are_packed_too(family: str, build: Build, rows: list[Row], alone: Alone) -> None:
    model = build(family).to(torch.bfloat16)
    forward = probe(model)
    assert forward.packed and forward.direct_head == (family != "gemma2")
    with torch.no_grad():
        assert (forward(build_pack(rows)).log_probs - alone(model, rows)).abs().max() < 0.15


def test_arguments_that_packed_attention_does_not_know_are_refused_not_ignored() -> None:
    module, x = nn.Identity(), torch.zeros(1, 1, 3, 4)
    pack = build_pack([single([3, 4, 5], False)])
    for unknown in ({"s_aux": torch.zeros(1)}, {"position_bias": torch.zeros(1)}, {"dropout": 0.1}):
        with pytest.raises(NotImplementedError):
            attention.packed_attention(module, x, x, x, None, pack=pack, **unknown)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="needs the pack"):
        attention.packed_attention(module, x, x, x, None)
    seeing = attention.packed_attention(module, x, x, torch.rand(1, 1, 3, 4), None, pack=pack, is_causal=False)[0]
    assert torch.allclose(seeing[0, 0], seeing[0, 2])  # nothing is causal: with equal keys all tokens see the same
