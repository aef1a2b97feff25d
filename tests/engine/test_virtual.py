"""Virtual tokens in packs, trees, padding, generation, training, compiled layers and activations computed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import build_model
from tunesmith.adapters import TaskHead, Way, attach, find_sites
from tunesmith.bases import Base
from tunesmith.core.row import Row, segment, single
from tunesmith.engine.compiling import compiled
from tunesmith.engine.forward import Forward, log_probs_of
from tunesmith.engine.heads import read_task_head
from tunesmith.engine.memory import recomputing
from tunesmith.engine.model import attach_to
from tunesmith.engine.pack import build_pack
from tunesmith.engine.probe import probe
from tunesmith.engine.sampler import Sampling, generate
from tunesmith.engine.virtual import extra_of, inserted, prompt_with


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bloom", "bert-bare", "modernbert"])
@pytest.mark.parametrize(
    "expression",
    [
        "prompt(tokens=4)",
        "ptuning(tokens=6, hidden=8, places=[0, 3, end])",
        "prefix(tokens=4, hidden=8)",
        "prefix(tokens=3, hidden=none) + prompt(tokens=4) + lora(rank=2)",
    ],
)
def test_packed_rows_with_virtual_tokens_compute_what_each_row_computes_alone(family: str, expression: str, rows: list[Row]) -> None:
    model = build_model(family)
    speaks = family not in ("bert-bare", "modernbert")
    forward = probe(model, speaks=speaks)
    fused = any(site.name == "qkv" for site in find_sites(model))
    adapter = attach(model, expression.replace("rank=2", "rank=2, sites=[qkv]") if fused else expression)
    assert forward.extra.tokens == sum(tokens.count for tokens in adapter.virtual.values())
    if speaks:
        together = log_probs_of(forward, rows)
        assert together == pytest.approx([log_probs_of(forward, [row])[0] for row in rows], abs=2e-4)
        path = _words(rows[0])
        logits = model(input_ids=torch.tensor([prompt_with_row(rows[0], model)])).logits[0].log_softmax(-1).detach()
        own = forward(forward.pack(rows[:1])).log_probs.detach()
        assert float(own[-1]) == pytest.approx(float(logits[-2, path[-1]]), abs=1e-4)
    else:
        pack = forward.pack(rows)
        states = forward.states(pack, pack.path(len(pack.own) - 1))
        alone = forward.pack(rows[-1:])
        torch.testing.assert_close(states, forward.states(alone, alone.path(0)), atol=2e-5, rtol=1e-4)


def _words(row: Row) -> list[int]:
    return [int(token) for part in row.segments for token in part.ids]


def prompt_with_row(row: Row, model: Any) -> list[int]:
    extra = extra_of(model)
    laid = inserted(row, extra)
    return [*extra.root.tolist(), *_words(laid)]


def test_a_pack_holds_the_tokens_at_the_start_once_on_decoders_and_a_path_on_encoders(rows: list[Row]) -> None:
    model = build_model("llama")
    attach(model, "prompt(tokens=4)")
    words = sum(row.tokens for row in rows)
    assert build_pack(rows, extra=extra_of(model)).tokens == words + 4
    paths = sum(len(row.leaves()) for row in rows)
    unrolled = build_pack(rows, unroll=True)
    assert build_pack(rows, unroll=True, extra=extra_of(model)).tokens == unrolled.tokens + 4 * paths


def test_a_pack_made_with_the_tokens_is_read_without_them_when_they_are_switched_off(rows: list[Row]) -> None:
    model = build_model("llama")
    forward = probe(model, speaks=True)
    before = forward(forward.pack(rows)).log_probs
    adapter = attach(model, "prompt(tokens=4)")
    pack = forward.pack(rows)
    assert not torch.allclose(forward(pack).log_probs, before)
    with adapter.disabled():
        assert torch.equal(forward(pack).log_probs, before)
    adapter.detach()
    assert torch.equal(forward(pack).log_probs, before), "detached, the base is what it was"


@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=7), min_size=1, max_size=4),
    st.sampled_from([(0,), (2, "end"), ("end",), (0, 1, 4), (9,)]),
)
@settings(max_examples=60, deadline=None)
def test_every_path_gets_each_token_once_and_before_what_is_learned(masks: list[list[bool]], places: tuple[Any, ...]) -> None:
    model = build_model("llama")
    attach(model, f"ptuning(tokens={2 * len(places)}, hidden=4, places={list(places)})")
    extra = extra_of(model)
    parts = [segment([7] * 3)]
    parts += [segment([8] * len(mask), mask, 0 if index % 2 else len(parts) - 1) for index, mask in enumerate(masks, 1) for _ in (0,)]
    row = Row(tuple(parts))
    laid = inserted(row, extra)
    for leaf in row.leaves():
        pieces = [laid.segments[index] for index in laid.path(leaf)]
        ids = [*extra.root.tolist(), *(int(token) for part in pieces for token in part.ids)]
        assert sorted(token for token in ids if token >= extra.vocabulary) == [extra.vocabulary + n for n in range(extra.tokens)]
        assert [token for token in ids if token < extra.vocabulary] == [int(t) for index in row.path(leaf) for t in row.segments[index].ids]
        learned = [False] * len(extra.root) + [bool(flag) for part in pieces for flag in part.supervised]
        if any(learned):
            assert max(at for at, token in enumerate(ids) if token >= extra.vocabulary) < learned.index(True)


def test_the_end_is_the_same_place_in_training_and_in_generation() -> None:
    model = build_model("llama")
    attach(model, "prompt(tokens=2, places=[end])")
    extra = extra_of(model)
    laid = inserted(single([5, 6, 7, 8], [False, False, True, True]), extra)
    assert laid.segments[0].ids.tolist()[:4] == prompt_with([5, 6], extra)


def test_batch_company_changes_nothing_and_padding_neither() -> None:
    model = build_model("bloom")
    forward = probe(model, speaks=True)
    attach(model, "prompt(tokens=3)")
    short, long = single([5, 6, 7], [False, True, True]), single([9] * 12, [False] * 6 + [True] * 6)
    assert log_probs_of(forward, [short, long])[0] == pytest.approx(log_probs_of(forward, [short])[0], abs=1e-5)


BOTH = ["prompt(tokens=4, init=normal)", "prefix(tokens=4, hidden=8)"]


@pytest.mark.parametrize("expression", BOTH)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "bloom", "qwen3"])
def test_greedy_generation_with_caches_says_what_reading_everything_again_says(family: str, expression: str, tiny_tokenizer: Any) -> None:
    model = build_model(family)
    forward = probe(model, speaks=True)
    attach(model, expression)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [11] * 3]
    done = generate(forward, tiny_tokenizer, forward.prompts(prompts), Sampling(max_new_tokens=7), samples=2)
    for number, prompt in enumerate(prompts):
        ids = forward.prompts([prompt])[0]
        for said in done[2 * number].ids:
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            assert float(logits.max() - logits[said]) < 1e-4
            ids.append(said)
        assert done[2 * number + 1].ids == done[2 * number].ids


def test_a_long_prefix_is_read_once_for_all_prompts(tiny_tokenizer: Any) -> None:
    model = build_model("llama")
    forward = probe(model, speaks=True)
    attach(model, "prefix(tokens=30, hidden=none)")
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].numel()))
    generate(forward, tiny_tokenizer, forward.prompts([[5, 6], [7, 8, 9], [4]]), Sampling(max_new_tokens=2))
    assert max(seen) <= 48, "30 and 6 tokens, rounded up, not 96"


@pytest.mark.parametrize("pool", ["first", "last", "mean"])
@pytest.mark.parametrize("expression", [*BOTH, "prompt(tokens=4, init=normal, places=[2, end])"])
def test_a_head_reads_the_text_s_own_tokens_beside_virtual_ones(expression: str, pool: str) -> None:
    model = build_model("bert-bare")
    forward = probe(model, speaks=False)
    adapter = attach(model, expression)
    head = TaskHead(32, ["a", "b"], Way(pool))  # type: ignore[arg-type]
    ids = [5, 6, 7, 8, 9]
    row = _asked(ids)
    said = read_task_head(forward, forward.pack([row, _asked([4, 4])]), head).logits[0]
    read = prompt_with_row(row, model)
    words = [at for at, token in enumerate(read) if token < 96]
    states = model(input_ids=torch.tensor([read])).last_hidden_state[0][words]
    expected = head({"first": states[0], "last": states[-1], "mean": states.mean(0)}[pool][None])[0]
    assert len(read) == 5 + sum(tokens.count for tokens in adapter.virtual.values())
    torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-4)


def _asked(ids: list[int]) -> Row:
    labels = torch.full((len(ids),), float("nan"))
    labels[-1] = 1.0
    plain = single(ids, False)
    part = plain.segments[0]
    return Row((type(part)(part.ids, part.supervised, labels=labels.numpy()),))


@pytest.mark.parametrize("expression", [*BOTH, "prefix(tokens=4, hidden=none) + lora(rank=2)"])
@pytest.mark.parametrize("way", ["again", "compiled", "both"])
def test_compiled_layers_and_activations_computed_again_give_the_same_gradients(
    expression: str, way: str, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.engine.compiling.BACKEND", "aot_eager")  # graphs and guards as always, no C++ compiler
    model = build_model("llama")
    forward = probe(model, speaks=True)
    adapter = attach(model, expression)
    expected = _gradients(forward, adapter, rows)
    lines: list[str] = []
    with compiled(model, way != "again", lines.append), recomputing(model, way != "compiled"), forward.held():
        got = _gradients(forward, adapter, rows, between=lambda: forward(forward.pack(rows[:1])))
    assert lines == []
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=2e-5, rtol=1e-4, msg=name)


def _gradients(forward: Forward, adapter: Any, rows: list[Row], between: Any = None) -> dict[str, torch.Tensor]:
    """Gradients of every parameter. between: what happens before the backward, such as another forward."""
    for _, parameter in adapter.named_parameters():
        parameter.grad = None
    loss = -forward(forward.pack(rows)).log_probs.mean()
    if between is not None:
        with torch.no_grad():
            between()
    loss.backward()
    out = {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}
    assert (
        all(bool(value.abs().max() > 0) for value in out.values() if "lora" not in value.__class__.__name__) or "lora" in adapter.expression
    )
    return out


@pytest.mark.parametrize(
    "expression", ["prompt(tokens=4)", "ptuning(tokens=4, hidden=8, encoder=lstm, dropout=0.1)", "prefix(tokens=4, hidden=8)"]
)
def test_a_stopped_run_goes_on_to_the_same_weights(expression: str, make_trainer: Any, base: Base) -> None:
    def trainer(name: str, *said: float) -> Any:
        asked = iter(said)
        return make_trainer(name, adapter=expression, steps=6, evaluate_every=1, dev=lambda: {"dev": next(asked)})

    whole = trainer("whole", 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    whole.run()
    with pytest.raises(StopIteration):
        trainer("cut", 0.1, 0.2, 0.3, 0.4).run()
    again = trainer("cut", 0.5, 0.6)
    assert again.run(resume=True).step == 6
    assert all(torch.equal(value, again.adapter.state()[name]) for name, value in whole.adapter.state().items())


def test_the_context_that_is_left_counts_virtual_tokens(base: Base) -> None:
    model = attach_to(base, "prompt(tokens=5) + lora(rank=2)")
    assert base.context_length is not None
    assert model.context_length == base.context_length - 5
    assert model.virtual_tokens == 5
    with model.active():
        assert model.forward.extra.tokens == 5
    model.detach()
    assert model.forward.extra.tokens == 0


def test_noise_on_embeddings_leaves_virtual_tokens_alone_and_its_size_is_the_text_s() -> None:
    model = build_model("llama")
    forward = probe(model, speaks=True)
    attach(model, "prompt(tokens=4)")
    seen: list[torch.Tensor] = []
    row = single([5, 6, 7, 8], [False, True, True, True])
    with forward.neftune(10.0):
        handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.detach()))
        forward(forward.pack([row]))
        with torch.no_grad():
            forward(forward.pack([row]))
        handle.remove()
    noise = (seen[0] - seen[1])[0]
    assert noise[:4].abs().max() == 0
    assert 0.5 * 10 / (4 * 32) ** 0.5 < noise[4:].abs().max() <= 10 / (4 * 32) ** 0.5 + 1e-6
