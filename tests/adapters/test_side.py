"""Ladder Side-Tuning: the side network by hand, and no gradient through the base."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from families import VOCABULARY, build_model
from tunesmith.adapters import Rung, attach, routing
from tunesmith.core.errors import AdapterError
from tunesmith.engine.measuring import count_saved
from tunesmith.engine.memory import recomputing


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))


def shake(adapter: Any) -> None:
    generator = torch.Generator().manual_seed(11)
    adapter.load({name: torch.randn(value.shape, generator=generator) * 0.3 for name, value in adapter.state().items()})


def states(model: Any, ids: Tensor) -> Tensor:
    return model.base_model(input_ids=ids).last_hidden_state


def test_outputs_and_gradients_are_those_of_the_equations(ids: Tensor) -> None:
    model = build_model("llama", num_hidden_layers=3)
    seen: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda module, args, out: seen.extend([args[0], out])) for layer in model.model.layers]
    with torch.no_grad():
        states(model, ids)
    for handle in handles:
        handle.remove()
    embedded, *rest = seen
    hidden = rest[0::2]  # what leaves each block
    adapter = attach(model, "lst(width=5)")
    shake(adapter)
    rungs = list(adapter.forms.values())
    assert all(isinstance(rung, Rung) for rung in rungs) and rungs[0].start is not None and rungs[-1].out is not None
    s = embedded @ rungs[0].start.T
    for rung, h in zip(rungs, hidden, strict=True):
        m = torch.sigmoid(rung.gate / 0.1)
        z = m * (h @ rung.shortcut.T) + (1 - m) * s
        s = z + torch.relu(z @ rung.down.T) @ rung.up.T
    theirs = model.model.norm(hidden[-1] + s @ rungs[-1].out.T)
    ours = states(model, ids)
    assert torch.allclose(ours, theirs, atol=1e-5)
    named = dict(adapter.named_parameters())
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    found, wanted = (torch.autograd.grad((out * weights).sum(), list(named.values())) for out in (ours, theirs))
    for name, a, b in zip(named, found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max()))), name


def test_it_begins_as_the_base_and_detached_the_base_is_back(ids: Tensor) -> None:
    model = build_model("bert")
    with torch.no_grad():
        base = states(model, ids)
        adapter = attach(model, "lst")
        assert torch.equal(states(model, ids), base)
        shake(adapter)
        assert not torch.allclose(states(model, ids), base, atol=1e-3)
        adapter.detach()
        assert torch.equal(states(model, ids), base)


def test_nothing_inside_of_any_layer_of_the_base_takes_part_in_the_backward(ids: Tensor) -> None:
    model = build_model("llama", num_hidden_layers=3)
    shake(attach(model, "lst"))
    needed: dict[str, bool] = {}

    def watch(path: str) -> Any:
        return lambda module, args, out: needed.update(
            {path: any(o.requires_grad for o in (out if isinstance(out, tuple) else (out,)) if o is not None)}
        )

    inside = [(path, module) for path, module in model.model.layers.named_modules() if "." in path and "ts_" not in path]
    for path, module in inside:
        module.register_forward_hook(watch(path))
    states(model, ids).square().sum().backward()
    assert len(needed) >= 3 * 10 and not any(needed.values())


def test_far_less_is_kept_for_the_backward_than_of_an_adapter_inside_of_the_base(ids: Tensor) -> None:
    kept = {}
    for expression in ("lst", "lora(rank=2)"):
        model = build_model("llama", num_hidden_layers=3)
        adapter = attach(model, expression)
        shake(adapter)
        kept[expression] = count_saved(model, partial(states, model, ids)).total
    assert kept["lst"] < 0.4 * kept["lora(rank=2)"]


def test_rows_of_other_adapters_do_not_go_beside_its_own(ids: Tensor) -> None:
    model = build_model("llama")
    with pytest.raises(AdapterError, match="hand their states on"), routing(model, [attach(model, "lst")]):
        pass


def test_activations_computed_again_give_the_same_gradients(ids: Tensor) -> None:
    model = build_model("llama", num_hidden_layers=3)
    adapter = attach(model, "lst")
    shake(adapter)

    def gradients() -> list[Tensor]:
        loss = states(model, ids).square().sum()
        return list(torch.autograd.grad(loss, [p for _, p in adapter.named_parameters()]))

    kept = gradients()
    with recomputing(model, True):
        again = gradients()
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(kept, again, strict=True))


def test_shared_layers_and_layers_left_out_are_refused() -> None:
    with pytest.raises(AdapterError, match="share their weights"):
        attach(build_model("albert"), "lst")
    with pytest.raises(AdapterError, match="stand on one another"):
        attach(build_model("llama"), "lst").drop(1)
