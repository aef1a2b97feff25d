"""Compiled layers compute what uncompiled ones do, whatever is attached to them, and give way where they cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.adapters import Adapter, attach
from tunesmith.core.row import Row
from tunesmith.engine import compiling
from tunesmith.engine.compiling import REPAYS, compiled, decide
from tunesmith.engine.forward import Forward
from tunesmith.engine.memory import recomputing
from tunesmith.engine.pack import Pack, build_pack
from tunesmith.engine.probe import probe

Build = Callable[..., Any]


@pytest.fixture(autouse=True)
def without_inductor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are captured, differentiated and guarded as always, but their operations run one by one: no C++ compiler needed."""
    if not request.node.name.startswith("test_with_the_real_compiler"):
        monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def random_b(adapter: Adapter, seed: int = 0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.named_parameters():
        if name.endswith(".b"):
            parameter.data.normal_(std=0.1, generator=generator)
    return adapter


def step(forward: Forward, adapter: Adapter, pack: Pack) -> list[Tensor]:
    """Log-probabilities and the gradients of their sum."""
    parameters = [p for _, p in adapter.named_parameters()]
    for parameter in parameters:
        parameter.grad = None
    log_probs = forward(pack).log_probs
    log_probs.sum().backward()
    return [log_probs.detach(), *(p.grad for p in parameters if p.grad is not None)]


def same(got: Sequence[Tensor], wanted: Sequence[Tensor], atol: float = 2e-4) -> bool:
    """To the order of sums: gradients of a sum over the whole pack are of size 10 and more."""
    return len(got) == len(wanted) and all(torch.allclose(a, b, rtol=1e-4, atol=atol) for a, b in zip(got, wanted, strict=True))


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


WIDE = [pytest.param(family, marks=pytest.mark.wide) for family in ("qwen3", "gemma2", "mistral", "phi3", "gpt_neox", "olmo2", "bloom")]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", *WIDE])
def test_compiled_layers_compute_the_same_with_adapters_everywhere(family: str, build: Build, rows: list[Row]) -> None:
    model = build(family)
    sites = "qkv, down" if family in ("gpt2", "phi3", "gpt_neox", "bloom") else "q, v, down"
    forward, adapter, pack = probe(model), random_b(attach(model, f"lora(rank=4, sites=[{sites}])")), build_pack(rows)
    wanted = step(forward, adapter, pack)
    with forward.held(), compiled(model, True, pytest.fail):
        before = graphs()
        got = step(forward, adapter, pack)
        assert graphs() > before
    assert same(got, wanted)
    assert all(layer._compiled_call_impl is None for layer in model.modules())


@pytest.mark.parametrize("expression", ["lora(rank=4, layers=[1])", "layers(last=1)"])
def test_adapters_on_some_layers_only_are_seen(expression: str, build: Build, rows: list[Row]) -> None:
    model = build("llama", num_hidden_layers=3)
    forward, adapter, pack = probe(model), random_b(attach(model, expression)), build_pack(rows)
    wanted = step(forward, adapter, pack)
    with forward.held(), compiled(model, True, pytest.fail):
        assert same(step(forward, adapter, pack), wanted)


def test_adapters_attached_switched_and_detached_after_compiling_are_seen(build: Build, rows: list[Row]) -> None:
    model = build("llama", num_hidden_layers=3)
    forward, pack = probe(model), build_pack(rows)
    first = random_b(attach(model, "lora(rank=4, sites=[q])", name="first"), 1)
    with forward.held(), compiled(model, True, pytest.fail):
        alone = step(forward, first, pack)
        second = random_b(attach(model, "lora(rank=4, sites=[q, down], layers=[1, 2])", name="second"), 2)
        both = step(forward, first, pack)
        with first.disabled():
            other = step(forward, second, pack)
        second.detach()
        again = step(forward, first, pack)
    assert same(again, alone)
    assert not torch.allclose(both[0], alone[0], atol=1e-2) and not torch.allclose(other[0], alone[0], atol=1e-2)
    second = random_b(attach(model, "lora(rank=4, sites=[q, down], layers=[1, 2])", name="second"), 2)
    assert same(step(forward, first, pack), both)
    with first.disabled():
        assert same(step(forward, second, pack), other)


def test_five_models_in_one_process_all_stay_exact(build: Build, rows: list[Row]) -> None:
    pack = build_pack(rows)
    for family in ("llama", "gpt2", "llama", "qwen2", "llama"):
        model = build(family)
        forward, adapter = probe(model), random_b(attach(model, "lora(rank=4, sites=[down])"))
        wanted = step(forward, adapter, pack)
        with forward.held(), compiled(model, True, pytest.fail):
            assert same(step(forward, adapter, pack), wanted)


def test_one_set_of_graphs_serves_all_layers_all_pack_lengths_and_switched_adapters(build: Build, rows: list[Row]) -> None:
    model = build("llama", num_hidden_layers=6)
    forward, adapter = probe(model), attach(model, "lora(rank=4)")
    with forward.held(), compiled(model, True, pytest.fail):
        before = graphs()
        step(forward, adapter, build_pack(rows))
        found = graphs() - before
        assert found <= 8  # two halves of a block around attention, for the first block, whose input needs no gradient, and the others
        for count in range(1, len(rows)):
            step(forward, adapter, build_pack(rows[:count]))
        other = attach(model, "lora(rank=4)", name="other")
        with adapter.disabled():
            step(forward, other, build_pack(rows))
    assert graphs() - before <= found + 4


def test_activations_computed_again_are_compiled_too(build: Build, rows: list[Row]) -> None:
    model = build("qwen3")
    forward, adapter, pack = probe(model), random_b(attach(model, "lora(rank=4)")), build_pack(rows)
    wanted = step(forward, adapter, pack)
    with forward.held(), recomputing(model, True), compiled(model, True, pytest.fail):
        assert same(step(forward, adapter, pack), wanted)


def test_nothing_is_compiled_where_no_gradient_is_taken(build: Build, rows: list[Row]) -> None:
    model = build("llama")
    forward = probe(model)
    with compiled(model, True, pytest.fail), torch.no_grad():
        before = graphs()
        forward(build_pack(rows))
        assert graphs() == before


def test_a_compiler_that_fails_is_reported_once_and_the_step_goes_on(
    build: Build, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    forward, adapter, pack = probe(model), random_b(attach(model, "lora(rank=4)")), build_pack(rows)
    wanted = step(forward, adapter, pack)

    def broken(*args: Any) -> Any:
        raise RuntimeError("no room for the compiler")

    monkeypatch.setattr(compiling, "BACKEND", broken)
    said: list[str] = []
    with forward.held(), compiled(model, True, said.append):
        got = step(forward, adapter, pack)
        step(forward, adapter, pack)
    assert same(got, wanted, atol=0)
    assert len(said) == 1 and "uncompiled" in said[0] and "no room for the compiler" in said[0]


def test_an_error_of_the_model_itself_is_not_taken_for_the_compilers(build: Build, rows: list[Row]) -> None:
    model = build("llama")
    forward = probe(model)
    attach(model, "lora(rank=4)")

    def refuse(module: Any, args: Any) -> None:
        raise ValueError("a hook's own error")

    model.get_decoder().layers[1].register_forward_pre_hook(refuse)
    with compiled(model, True, pytest.fail), pytest.raises(ValueError, match="a hook's own error"):
        forward(build_pack(rows))


def test_it_is_decided_from_the_planned_work_and_the_compiler_at_hand(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    size = sum(p.numel() for layer in model.get_decoder().layers for p in layer.parameters())
    monkeypatch.setattr(compiling, "_no_compiler", lambda: "")
    assert decide("auto", model, int(REPAYS / size) - 1) == (False, "too few tokens to repay it")
    assert decide("auto", model, int(REPAYS / size) + 1)[0]
    assert decide("on", model, 1)[0] and not decide("off", model, 10**15)[0]
    monkeypatch.setattr(compiling, "_no_compiler", lambda: "no C++ compiler")
    assert decide("auto", model, 10**15) == (False, "no C++ compiler")


@pytest.mark.wide
def test_with_the_real_compiler_too_and_in_bf16_within_its_rounding(build: Build, rows: list[Row]) -> None:
    if compiling._no_compiler():
        pytest.skip("no C++ compiler here")
    model = build("llama")
    forward, adapter, pack = probe(model), random_b(attach(model, "lora(rank=4)")), build_pack(rows)
    wanted = step(forward, adapter, pack)
    with forward.held(), compiled(model, True, pytest.fail):
        assert same(step(forward, adapter, pack), wanted)
    model.to(torch.bfloat16)
    with forward.held(), compiled(model, True, pytest.fail):
        assert torch.allclose(step(forward, adapter, pack)[0], wanted[0], atol=0.25)
