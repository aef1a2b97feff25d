"""Low-rank methods and IA3 compute what their equations say and what the peft library computes, and their files go both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.adapters import Directed, Principal, Triplets, attach, load_adapter, save_adapter, select
from tunesmith.adapters.adalora import Schedule, allocate
from tunesmith.core.errors import AdapterError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

Build = Callable[..., Any]
Shake = Callable[[Any], None]

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "dora": lambda: LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, use_dora=True, target_modules=ALL),
    "adalora": lambda: AdaLoraConfig(task_type="CAUSAL_LM", init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=ALL),
    "ia3": lambda: IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "pissa": lambda: LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"]),
    "dora gpt2": lambda: LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True, fan_in_fan_out=True, target_modules=["c_attn", "c_proj"]),
    "ia3 gpt2": lambda: IA3Config(
        task_type="CAUSAL_LM", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
    ),
}


def shaken(model: Any) -> Any:
    """PEFT's model with values as training would give them."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("lora_" in name or "ia3_" in name) and "ranknum" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def loss_of(model: Any, ids: Tensor) -> Tensor:
    out: Tensor = -model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).mean()
    return out


# The start, and the equations


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("expression", ["lora_plus", "pissa(rank=4)", "dora(rank=4)", "adalora", "ia3"])
def test_every_one_starts_as_the_base_and_comes_off_without_a_trace(
    family: str, expression: str, build: Build, ids: Tensor, shake: Shake
) -> None:
    if family == "gpt2":
        sites = "[qkv, down]" if expression == "ia3" else "[qkv]"
        expression = f"{expression.rstrip(')')}{', ' if '(' in expression else '('}sites={sites})"
    model = build(family)
    before = model(ids).logits
    adapter = attach(model, expression)
    assert torch.equal(model(ids).logits, before)
    shake(adapter)
    assert not torch.allclose(model(ids).logits, before, atol=1e-2)
    adapter.detach()
    assert torch.equal(model(ids).logits, before)


def test_pissa_begins_with_the_largest_singular_triplets_and_adds_what_it_moved_away_from_them(build: Build) -> None:
    model = build()
    site = select(model, "q", [0])[0]
    adapter = attach(model, "pissa(rank=4, alpha=8, sites=[q])")
    form = adapter.forms[site.path]
    assert isinstance(form, Principal)
    u, s, v = torch.linalg.svd(site.module.weight.detach(), full_matrices=False)
    assert torch.allclose(2 * form.b0 @ form.a0, (u[:, :4] * s[:4]) @ v[:4], atol=1e-5)
    x = torch.randn(3, 32)
    plain = torch.nn.functional.linear(x, site.module.weight)
    with torch.no_grad():
        form.a += 0.1 * torch.randn_like(form.a)
        form.b += 0.1 * torch.randn_like(form.b)
    expected = plain + 2 * x @ (form.b @ form.a - form.b0 @ form.a0).T
    assert torch.allclose(site.module(x), expected, atol=1e-5)


def test_the_fast_svd_of_pissa_comes_near_the_exact_one(build: Build) -> None:
    model = build()
    exact, fast = (attach(model, f"pissa(rank=2, sites=[q], iterations={n})", name=f"n{n}") for n in (0, 16))
    for path, form in exact.forms.items():
        other = fast.forms[path]
        assert isinstance(form, Principal) and isinstance(other, Principal)
        assert torch.allclose(form.b0 @ form.a0, other.b0 @ other.a0, atol=1e-2)


def test_dora_gives_each_row_the_length_that_it_learned(build: Build) -> None:
    model = build("phi")  # its projections have biases
    site = select(model, "q", [0])[0]
    with torch.no_grad():
        site.module.bias.normal_()
    adapter = attach(model, "dora(rank=4, alpha=8, sites=[q])")
    form = adapter.forms[site.path]
    assert isinstance(form, Directed)
    with torch.no_grad():
        form.low.b.normal_(std=0.1)
        form.m.mul_(1.5)
    x = torch.randn(3, 32)
    turned = site.module.weight + 2 * form.low.b @ form.low.a
    expected = x @ (form.m[:, None] * turned / turned.norm(dim=1, keepdim=True)).T + site.module.bias
    assert torch.allclose(site.module(x), expected, atol=1e-5)
    assert torch.allclose(form.norms(), turned.norm(dim=1), atol=1e-5)


def test_the_b_of_lora_plus_learns_faster(build: Build) -> None:
    adapter = attach(build(), "lora_plus(rank=2, ratio=8)")
    assert set(adapter.rates()) == {f"{path}.b" for path in adapter.forms}
    assert set(adapter.rates().values()) == {8.0}


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("dora(rank=33)", r"dora: rank 33 is larger than site q allows(.|\n)*rank=32"),
        ("pissa(rank=0)", "pissa: rank must be"),
        ("pissa(iterations=-1)", "iterations must be"),
        ("lora_plus(ratio=0)", "ratio must be"),
        ("adalora(rank=8, initial=4)", "initial=4 is less than rank=8"),
        ("adalora(beta1=1)", "beta1 must lie between"),
        ("adalora(every=0)", "every must be"),
        ("adalora(warmup=-1)", "warmup must be"),
        ("ia3(sites=[k, v], inputs=[o])", "'o' is among inputs, but not among sites"),
        ("dora(sites=[head])", "dora cannot listen at the vocabulary head"),
    ],
)
def test_options_that_cannot_work_are_refused(expression: str, message: str, build: Build) -> None:
    with pytest.raises(AdapterError, match=message):
        attach(build(), expression)


def test_what_needs_the_weight_refuses_a_quantised_one_and_lora_does_not(build: Build) -> None:
    model = build()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight = torch.nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    for method in ("dora", "pissa"):
        with pytest.raises(AdapterError, match=r"quantised(.|\n)*lora"):
            attach(model, f"{method}(sites=[q])")
    attach(model, "lora(sites=[q])")


# Against PEFT


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_pefts_files_are_read_to_its_outputs_and_its_gradients(kind: str, build: Build, ids: Tensor, tmp_path: Path) -> None:
    family = "gpt2" if "gpt2" in kind else "llama"
    theirs = shaken(get_peft_model(build(family), CONFIGS[kind]()))
    theirs.save_pretrained(tmp_path)
    ours = build(family)
    adapter = load_adapter(ours, tmp_path)
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)
    loss_of(ours, ids).backward()
    (theirs.model if kind == "adalora" else theirs).zero_grad()
    loss_of(theirs, ids).backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    parts = {
        "a": "lora_A",
        "b": "lora_B",
        "low.a": "lora_A",
        "low.b": "lora_B",
        "m": "lora_magnitude_vector",
        "e": "lora_E",
        "scale": "ia3_l",
    }
    for path, form in adapter.forms.items():
        for name, parameter in form.named_parameters():
            found = [g for key, g in grads.items() if f".{path}.{parts[name]}." in key]
            assert len(found) == 1 and parameter.grad is not None
            assert torch.allclose(parameter.grad.flatten(), found[0].flatten(), atol=1e-5), f"{path}.{name}"


@pytest.mark.parametrize(
    ("family", "expression"),
    [
        ("llama", "dora(rank=4, sites=all)"),
        ("llama", "dora(rank=2, sites=[q]) + dora(rank=3, alpha=4, sites=[v])"),
        ("llama", "pissa(rank=4, sites=[q, down])"),
        ("llama", "lora_plus(rank=4)"),
        ("llama", "adalora(rank=2, initial=4)"),
        ("llama", "ia3"),
        ("llama", "ia3(sites=[o, down], inputs=[o, down])"),
        ("gpt2", "dora(rank=4, sites=[qkv, down])"),
        ("gpt2", "pissa(rank=4, sites=[qkv])"),
        ("gpt2", "ia3(sites=[qkv, down])"),
        ("gpt2", "adalora(rank=2, initial=4, sites=[qkv])"),
    ],
)
def test_what_we_save_peft_reads_and_we_read_it_back_bit_for_bit(
    family: str, expression: str, build: Build, ids: Tensor, shake: Shake, tmp_path: Path
) -> None:
    model, again = build(family), build(family)
    adapter = attach(model, expression)
    shake(adapter)
    save_adapter(adapter, tmp_path, base="tiny", fingerprint="")
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(build(family), tmp_path).eval()(ids).logits
        assert torch.allclose(model(ids).logits, theirs, atol=2e-5)
        load_adapter(again, tmp_path)
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_fast_pissa_of_peft_is_refused_since_its_start_is_not_in_its_file(build: Build, tmp_path: Path) -> None:
    get_peft_model(build(), CONFIGS["dora"]()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": False, "init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(AdapterError, match="init_lora_weights='pissa_niter_4' cannot be read"):
        load_adapter(build(), tmp_path)


# AdaLoRA


def test_budget_and_importance_are_pefts_on_the_same_gradients(build: Build, ids: Tensor) -> None:
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=2, lora_alpha=6, total_step=12, target_modules=ALL
    )
    theirs = shaken(get_peft_model(build(), config)).train()
    allocator = theirs.base_model.rankallocator
    ours = build()
    adapter = attach(ours, "adalora(rank=2, initial=4, alpha=6, warmup=2, final=3, every=2, sites=all)")
    copy = {"a": "lora_A", "b": "lora_B", "e": "lora_E"}
    named = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
    adapter.load({f"{path}.{n}": named[f"base_model.model.{path}.{copy[n]}.default"] for path in adapter.forms for n in copy})
    generator = torch.Generator().manual_seed(9)
    for step in range(1, 13):
        for path, form in adapter.forms.items():
            for n, parameter in form.named_parameters():
                other = named[f"base_model.model.{path}.{copy[n]}.default"]
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                other.grad = parameter.grad.clone()
        adapter.graded(step, 12)
        theirs.base_model.update_and_allocate(step)
        adapter.updated(step, 12)
        forms = [form for form in adapter.forms.values() if isinstance(form, Triplets)]
        budget, now = forms[0].schedule.budget(step, 12, 4 * len(forms), 2 * len(forms))
        expected, masked = allocator.budget_schedule(step)
        assert budget == expected and now == (masked or step == 9)
        for path, form in adapter.forms.items():
            for n, parameter in form.named_parameters():
                assert torch.allclose(parameter, named[f"base_model.model.{path}.{copy[n]}.default"], atol=1e-6), (step, path, n)
    assert sum(int((form.e != 0).sum()) for form in forms) == 2 * len(forms)


def test_the_penalty_is_pefts(build: Build, ids: Tensor) -> None:
    theirs = shaken(get_peft_model(build(), CONFIGS["adalora"]())).train()
    ours = build()
    adapter = attach(ours, "adalora(rank=2, initial=4, alpha=6, sites=all)")
    named = dict(theirs.named_parameters())
    copy = {"a": "lora_A", "b": "lora_B", "e": "lora_E"}
    adapter.load({f"{path}.{n}": named[f"base_model.model.{path}.{copy[n]}.default"] for path in adapter.forms for n in copy})
    with_penalty = theirs(ids, labels=ids).loss
    theirs.peft_config["default"].orth_reg_weight = 0.0
    penalty = adapter.penalty()
    plain = theirs(ids, labels=ids).loss
    assert penalty is not None and float(penalty.detach()) == pytest.approx(float((with_penalty - plain).detach()), abs=1e-5)


def test_where_nothing_is_to_be_taken_away_nothing_is(build: Build) -> None:
    adapter = attach(build(), "adalora(rank=4, initial=4, warmup=0, final=0, sites=[q])")
    forms = [form for form in adapter.forms.values() if isinstance(form, Triplets)]
    for step in (1, 2, 3):
        for form in forms:
            for parameter in form.parameters():
                parameter.grad = torch.randn_like(parameter)
            form.e.data.add_(0.1)
        adapter.graded(step, 3)
        adapter.updated(step, 3)
    assert all(bool((form.e != 0).all()) for form in forms)


def test_triplets_that_matter_as_much_as_the_last_one_stay(build: Build) -> None:
    adapter = attach(build(), "adalora(rank=1, initial=4, sites=[q])")
    forms = [form for form in adapter.forms.values() if isinstance(form, Triplets)]
    allocate(forms, 2)  # nothing has been seen: all are worth nothing
    assert all(bool(form.chosen.all()) for form in forms)


def test_steps_too_few_for_the_schedule_are_refused() -> None:
    schedule = Schedule(2, 5, 5, 1, 0.5, 0.85, 0.85)
    assert schedule.phases(11) == (5, 6)
    with pytest.raises(AdapterError, match="10 steps leave none"):
        schedule.phases(10)


def test_an_allocated_adapter_is_saved_without_what_it_lost_and_comes_back_the_same(
    build: Build, ids: Tensor, shake: Shake, tmp_path: Path
) -> None:
    model = build()
    adapter = attach(model, "adalora(rank=2, initial=4, sites=[q, v])")
    shake(adapter)
    forms = [form for form in adapter.forms.values() if isinstance(form, Triplets)]
    with torch.no_grad():
        forms[0].e[1:] = 0
        forms[1].e[[0, 2]] = 0
        forms[2].e[:] = 0  # a site may lose everything
    save_adapter(adapter, tmp_path, base="tiny", fingerprint="")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert [tensors[f"base_model.model.{path}.lora_A"].shape[0] for path in list(adapter.forms)[:3]] == [1, 2, 0]
    again = build()
    load_adapter(again, tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(build(), tmp_path).eval()
    assert torch.allclose(theirs(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("pattern", [[True, False], [1, 1, 0, 0], "all", [True] * 4])
def test_a_rank_pattern_that_does_not_fit_the_tensors_is_refused(pattern: Any, build: Build, shake: Shake, tmp_path: Path) -> None:
    adapter = attach(build(), "adalora(rank=2, initial=4, sites=[q], layers=[0])")
    shake(adapter)
    with torch.no_grad():
        next(form for form in adapter.forms.values() if isinstance(form, Triplets)).e[0] = 0
    save_adapter(adapter, tmp_path, base="tiny", fingerprint="")
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    config["rank_pattern"] = dict.fromkeys(config["rank_pattern"], pattern)
    file.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"rank_pattern of|has shape"):
        load_adapter(build(), tmp_path)
