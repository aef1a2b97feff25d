"""Weights laid out for the kernels give the bits of those that are not, in training and in sampling, whatever listens there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tunesmith.adapters import attach
from tunesmith.engine import decoders
from tunesmith.engine import prepacked as prepacking
from tunesmith.engine.prepacked import laid_out, prepacked
from tunesmith.engine.probe import probe
from tunesmith.engine.sampler import Sampling, generate

Build = Callable[..., Any]


def test_frozen_weights_are_laid_out_for_training_with_the_same_bits_forward_and_backward(build: Build) -> None:
    model = build("llama").to(torch.bfloat16).requires_grad_(False)
    own = [module for module in model.modules() if type(module) is torch.nn.Linear]
    states = torch.randn(1, 17, model.config.hidden_size).bfloat16().requires_grad_()

    def read() -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(inputs_embeds=states).logits
        return logits.detach(), torch.autograd.grad(logits.float().square().sum(), states)[0]

    before = read()
    with laid_out(model):
        assert all("forward" in module.__dict__ for module in own)
        assert all(map(torch.equal, read(), before))
        with torch.no_grad(), prepacked(model, 16):
            assert torch.equal(model(inputs_embeds=states).logits, before[0])
        assert all(map(torch.equal, read(), before))
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        changed = read()
        assert torch.equal(changed[0], 2 * before[0]) and all(map(torch.equal, changed, read()))
    assert not any("forward" in module.__dict__ for module in own) and not prepacking._layouts
    assert all(map(torch.equal, read(), changed))


@pytest.mark.parametrize("adapter", ["full()", "sparse(share=0.1)"])
def test_weights_that_are_trained_or_written_into_are_not_laid_out_for_training(build: Build, adapter: str) -> None:
    model = build("llama").to(torch.bfloat16).requires_grad_(False)
    attach(model, adapter)
    changed = {
        module
        for module in model.modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
        or any(form.writes for form in getattr(module, "ts_forms", {}).values())
    }
    assert changed
    with laid_out(model):
        assert not any("forward" in module.__dict__ for module in changed)


@torch.no_grad()
def test_a_low_rank_form_is_part_of_the_laid_out_product_and_every_other_runs_beside_it(build: Build) -> None:
    model = build("llama").to(torch.bfloat16)
    ids = torch.arange(5, 21)[None]
    adapter = attach(model, "lora(rank=4, sites=[q, v, o])", name="plain")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapter.named_parameters():
        if name.endswith(".b"):
            parameter.normal_(std=0.3, generator=generator)
    site = model.model.layers[0].self_attn.q_proj
    (form,) = site.ts_active
    wanted = torch.log_softmax(model(ids).logits.float(), -1)
    x = torch.randn(16, site.in_features, generator=generator).bfloat16()
    exact = x.float() @ (site.weight.float() + form.delta()).T
    plain = site(x)
    twice = (plain.float() - exact).abs().mean()
    with prepacked(model, 16):
        assert "leave" in form.__dict__ and (site(x).float() - exact).abs().mean() <= twice
    assert "leave" not in form.__dict__ and torch.equal(site(x), plain)
    with prepacked(model, 16):
        assert (torch.log_softmax(model(ids).logits.float(), -1) - wanted).abs().max() < 0.1
    with prepacked(model, 16, forms=False):
        assert torch.equal(torch.log_softmax(model(ids).logits.float(), -1), wanted)
    attach(model, "dora(rank=4, sites=[q])", name="other")
    with prepacked(model, 16):  # two at q
        assert "leave" not in form.__dict__ and "leave" in model.model.layers[0].self_attn.v_proj.ts_active[0].__dict__


@pytest.mark.parametrize("samples", [1, 4])
def test_a_short_beginning_that_all_prompts_share_is_copied_to_each_of_them_and_nothing_else_is_said(
    build: Build, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    forward = probe(build("llama"))
    prompts = [[*range(5, 45), 50 + at, 7, 60 + at] for at in range(3)]
    sampling = Sampling(max_new_tokens=9, temperature=0.8, seed=2)
    levels: list[int] = []
    own = decoders.Decoding.open

    def opened(state: Any, keys: Any) -> list[int]:
        groups = own(state, keys)
        levels.append(len(state.levels))
        return groups

    monkeypatch.setattr(decoders.Decoding, "open", opened)
    said, found = {}, []
    for tokens in (0, 1024):
        monkeypatch.setattr(decoders, "_FOLDED", tokens)
        said[tokens] = generate(forward, tiny_tokenizer, prompts, sampling, samples=samples)
        found.append(levels[-1])
    assert found == [3, 2]
    for apart, folded in zip(said[0], said[1024], strict=True):
        assert apart.ids == folded.ids and apart.log_probs == pytest.approx(folded.log_probs, abs=1e-5)
