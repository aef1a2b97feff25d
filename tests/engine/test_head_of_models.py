"""The head as models have it: with low-rank forms on it, tied, with new words, soft-capped or scaled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from tunesmith.adapters import attach, load_adapter, save_adapter, select
from tunesmith.core.errors import AdapterError
from tunesmith.core.row import Row
from tunesmith.engine import forward as forwards
from tunesmith.engine import head
from tunesmith.engine.forward import Forward
from tunesmith.engine.pack import build_pack
from tunesmith.engine.probe import probe
from tunesmith.objectives import Divergence, Wanted

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*is_gradient_checkpointing:FutureWarning")

Build = Callable[..., Any]
Alone = Callable[[Any, Sequence[Row]], Tensor]
Gradients = Callable[..., dict[str, Tensor]]
SITES = "lora(rank=3, alpha=5, sites=[q, head])"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 7 * 96 * 4)


def shaken(adapter: Any) -> Any:
    """The adapter with values of its own everywhere."""
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.1)
    return adapter


@pytest.mark.parametrize("new_words", [(), (7, 60)])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "phi", "gemma2", "gpt2"])
def test_forms_on_the_head_are_read_as_the_model_computes_them_with_their_gradients(
    family: str, new_words: tuple[int, ...], build: Build, rows: list[Row], alone: Alone, gradients: Gradients
) -> None:
    model = build(family)
    sites = "lora(rank=3, alpha=5, sites=[qkv, head])" if family == "gpt2" else SITES
    forward = probe(model)
    adapter = shaken(attach(model, sites, new_words=new_words))
    named = dict(adapter.named_parameters())
    got, wanted = forward(build_pack(rows)).log_probs, alone(model, rows)
    assert torch.allclose(got, wanted, atol=1e-5)
    ours, theirs = gradients(named, got), gradients(named, wanted)
    assert any("head" in name for name in named) and all(bool(value.any()) for value in theirs.values())
    for name in named:
        assert torch.allclose(ours[name], theirs[name], atol=1e-4, rtol=1e-3), name


def test_a_form_on_a_tied_head_leaves_the_embedding_as_it_is_and_comes_off_without_a_trace(build: Build, rows: list[Row]) -> None:
    model = build("llama-tied")
    forward, ids = probe(model), torch.arange(5, 15)
    before, states = forward(build_pack(rows)).log_probs, model.model(ids[None]).last_hidden_state
    adapter = shaken(attach(model, "lora(rank=2, sites=[head])"))
    assert list(adapter.forms) == ["lm_head"] and torch.equal(model.model(ids[None]).last_hidden_state, states)
    assert not torch.allclose(forward(build_pack(rows)).log_probs, before, atol=1e-2)
    with adapter.disabled():
        assert torch.equal(forward(build_pack(rows)).log_probs, before)
    adapter.detach()
    assert torch.equal(forward(build_pack(rows)).log_probs, before)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_the_change_of_the_heads_weight_is_what_its_form_says(family: str, build: Build, rows: list[Row]) -> None:
    model, merged = build(family), build("llama")  # the merged one has a head table of its own
    merged.load_state_dict(model.state_dict())
    adapter = shaken(attach(model, "lora(rank=3, sites=[head])"))
    with torch.no_grad():
        merged.lm_head.weight.add_(adapter.forms["lm_head"].delta())
        got, wanted = (probe_bare(each)(build_pack(rows)).log_probs for each in (model, merged))
    assert torch.allclose(got, wanted, atol=1e-5)


def probe_bare(model: Any) -> Forward:
    return Forward(model, packed=True, direct_head=True)


def test_the_head_is_a_site_that_no_choice_of_layers_touches_and_all_leaves_out(build: Build) -> None:
    model = build("llama")
    assert [site.path for site in select(model, ["q", "head"], [1])] == ["model.layers.1.self_attn.q_proj", "lm_head"]
    assert select(model, ["lm_head"]) == select(model, "head")
    assert "lm_head" not in {site.path for site in select(model, "all")}
    with pytest.raises(AdapterError, match="no projection to a vocabulary"):
        select(model.model, ["head"])


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_an_adapter_on_the_head_is_saved_for_us_and_for_peft(family: str, build: Build, rows: list[Row], tmp_path: Path) -> None:
    model, ids = build(family), torch.arange(5, 25)[None]
    save_adapter(shaken(attach(model, SITES)), tmp_path, base="tiny", fingerprint="")
    again = build(family)
    load_adapter(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)
        theirs = PeftModel.from_pretrained(build(family), tmp_path).eval()
        assert torch.allclose(model(ids).logits, theirs(ids).logits, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_what_peft_trains_on_the_head_we_read_with_its_losses_and_gradients(
    family: str, build: Build, rows: list[Row], alone: Alone, gradients: Gradients, tmp_path: Path
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=["q_proj", "lm_head"])
    theirs: Any = get_peft_model(build(family), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    theirs.save_pretrained(tmp_path)
    model = build(family)
    adapter = load_adapter(model, tmp_path)
    got, wanted = probe_bare(model)(build_pack(rows)).log_probs, alone(theirs, rows)
    assert torch.allclose(got, wanted, atol=1e-5)
    named = {name.removeprefix("base_model.model."): value for name, value in theirs.named_parameters() if "lora_" in name}
    by_peft = gradients(named, wanted)
    for name, value in gradients(dict(adapter.named_parameters()), got).items():
        path, kind = name.rsplit(".", 1)
        assert torch.allclose(value, by_peft[f"{path}.lora_{kind.upper()}.default.weight"], atol=1e-4, rtol=1e-3), name


def test_a_head_table_in_a_file_that_is_not_the_bases_is_refused(build: Build, tmp_path: Path) -> None:
    get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"])).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="a table of its own, unlike the base's"):
        load_adapter(build("llama"), tmp_path)


# Heads that are more than a projection


@pytest.mark.parametrize("packed", [True, False])
def test_a_soft_capped_head_runs_alone_in_chunks_with_all_readings(
    packed: bool, build: Build, rows: list[Row], alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pack = build("gemma2", final_logit_softcapping=2.0), build_pack(rows)
    forward = Forward(model, packed=packed, direct_head=False)
    forward(pack)  # finds out how the head can be run
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(out.shape[-2]))
    with torch.no_grad():
        got = forward(pack, Wanted(mean=True, entropy=True, divergence=Divergence(0.5)), teacher=forward.logits(pack))
    assert torch.allclose(got.log_probs, alone(model, rows), atol=1e-5)
    assert got.mean is not None and got.entropy is not None and got.divergence is not None
    assert float(got.divergence.abs().max()) < 1e-6 and bool((got.entropy > 0).all() and (got.mean < 0).all())
    assert max(sizes[:3]) <= 7


def test_where_the_head_cannot_run_alone_the_models_logits_are_taken_whole(
    build: Build, rows: list[Row], alone: Alone, gradients: Gradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*args: Any) -> Tensor:
        raise TypeError("wants more from its body")

    monkeypatch.setattr("tunesmith.engine.ownhead.through_own_head", refuses)
    monkeypatch.setattr(forwards, "through_own_head", refuses)
    model = build("gemma2", final_logit_softcapping=2.0)
    adapter = shaken(attach(model, SITES))
    got = Forward(model, packed=True, direct_head=False)(build_pack(rows)).log_probs
    wanted = alone(model, rows)
    assert torch.allclose(got, wanted, atol=1e-5)
    named = dict(adapter.named_parameters())
    ours, theirs = gradients(named, got), gradients(named, wanted)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4, rtol=1e-3) for name in named)


def test_teacher_and_student_may_be_one_base_with_and_without_an_adapter(build: Build, rows: list[Row]) -> None:
    model, pack = build("llama"), build_pack(rows)
    forward = probe_bare(model)
    adapter = attach(model, SITES)
    wanted = Wanted(divergence=Divergence(), detached=frozenset({"log_probs"}))

    def distance() -> Tensor:
        with torch.no_grad(), adapter.disabled():
            teacher = forward.logits(pack)
        found = forward(pack, wanted, teacher=teacher).divergence
        assert found is not None
        return found

    assert float(distance().detach().abs().max()) < 1e-6
    shaken(adapter)
    before = distance().sum()
    for (_, parameter), pull in zip(
        adapter.named_parameters(), torch.autograd.grad(before, [p for _, p in adapter.named_parameters()]), strict=True
    ):
        parameter.data.sub_(1e-3 * pull)
    assert 0 < float(distance().sum().detach()) < float(before.detach())
