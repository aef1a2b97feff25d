"""Bottleneck adapters, gates and the unions of methods: the papers' equations by hand, on every family's sub-layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import rows
from torch import Tensor, nn

from families import VOCABULARY, build_model
from tunesmith.adapters import Bottleneck, Gate, attach, find_sublayers, load_adapter, plan, save_adapter, select
from tunesmith.bases import load_base
from tunesmith.core.errors import AdapterError, Interrupted
from tunesmith.core.row import single
from tunesmith.engine.memory import recomputing
from tunesmith.engine.model import attach_to
from tunesmith.engine.probe import probe
from tunesmith.engine.rundir import RunFolder
from tunesmith.engine.sampler import Sampling, generate
from tunesmith.engine.train import Trainer
from tunesmith.spec import make_spec

DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "olmo", "mixtral", "phi", "olmo2", "opt"]
ENCODERS = ["bert", "roberta", "electra", "distilbert", "albert", "modernbert", "deberta-v2", "t5-encoder"]
MEETS_NORM_LAST = ["bert", "roberta", "electra", "distilbert", "deberta-v2"]
"""Families whose sub-layers end in norm(x + what the sub-layer adds)."""


def shake(adapter: Any, size: float = 0.2) -> None:
    """Other values, as training would give."""
    generator = torch.Generator().manual_seed(11)
    adapter.load({name: torch.randn(value.shape, generator=generator) * size for name, value in adapter.state().items()})


def states(model: Any, ids: Tensor) -> Tensor:
    """Last hidden states, [rows, tokens, width]."""
    body = getattr(model, "base_model", model)
    return body(input_ids=ids).last_hidden_state


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))


def passing(model: Any, ids: Tensor, *modules: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """What enters and leaves each module in one forward."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        seen.setdefault(module, (x, out[0] if isinstance(out, tuple) else out))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        states(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return [seen[module] for module in modules]


# Sites


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_what_leaves_attn_and_ffn_is_what_a_block_adds_to_the_residual_stream(family: str, ids: Tensor) -> None:
    model = build_model(family)
    first = [site for site in find_sublayers(model) if site.layer == 0]
    assert [site.name for site in first] == ["attn", "ffn", "block"]
    modules = [site.module for site in first]
    with torch.no_grad():
        (_, attn), (_, ffn), (x, out) = passing(model, ids, *modules)
        if family in MEETS_NORM_LAST:
            layer: Any = modules[2]
            norms = [m for path, m in layer.named_modules() if path.lower().endswith(("layernorm", "layer_norm"))]
            assert torch.allclose(norms[1](norms[0](x + attn) + ffn), out, atol=1e-5)
        elif family == "albert":
            layer = modules[2].albert_layers[0]
            assert torch.allclose(layer.full_layer_layer_norm(layer.attention.LayerNorm(x + attn) + ffn), out, atol=1e-5)
        else:
            assert torch.allclose(x + attn.view_as(x) + ffn.view_as(x), out, atol=1e-5)


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_a_sub_layers_source_is_where_its_input_enters(family: str, ids: Tensor) -> None:
    model = build_model(family)
    for site in find_sublayers(model):
        if site.source:
            ((x, _),) = passing(model, ids, model.get_submodule(site.source))
            assert x.view(-1, site.inputs).shape == (ids.numel(), site.inputs)  # some families lay rows end to end
        assert site.inputs == site.outputs == 32


def test_experts_are_refused_with_the_reason_and_the_mixture_as_a_whole_is_not() -> None:
    model = build_model("mixtral")
    with pytest.raises(AdapterError, match="mixture of experts"):
        attach(model, "lora(sites=[down])")
    assert attach(model, "pfeiffer").forms


def test_a_method_of_linear_maps_is_refused_at_a_sub_layer_with_what_works() -> None:
    with pytest.raises(AdapterError, match="sub-layer") as refusal:
        attach(build_model("llama"), "lora(rank=2, sites=[ffn])")
    assert "bottleneck" in str(refusal.value)


def test_block_out_is_the_block_and_layers_choose_among_sub_layers() -> None:
    model = build_model("llama")
    assert [site.path for site in select(model, ["block.out"], sublayers=True)] == ["model.layers.0", "model.layers.1"]
    assert list(attach(model, "pfeiffer(layers=[-1])").forms) == ["model.layers.1.mlp.down_proj"]


# The papers' equations


def by_hand(z: Tensor, form: Bottleneck, f: Callable[[Tensor], Tensor], s: float = 1.0) -> Tensor:
    """s (U f(D z + d) + u), in plain products."""
    return s * (f(z @ form.down.T + form.down_bias) @ form.up.T + form.up_bias)


def llama_by_hand(model: Any, ids: Tensor, ffn: Callable[[int, Tensor, Tensor], Tensor], attn: Callable[[int, Tensor], Tensor]) -> Tensor:
    """A Llama's last states from its parts; attn(layer, h) and ffn(layer, x, h) change what the sub-layers add."""
    body = model.model
    x = body.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    turns = body.rotary_emb(x, positions)
    mask = torch.full((ids.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    for number, layer in enumerate(body.layers):
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), position_embeddings=turns, attention_mask=mask)
        x = x + attn(number, attended)
        into = layer.post_attention_layernorm(x)
        x = x + ffn(number, into, layer.mlp(into))
    return body.norm(x)


CASES: list[tuple[str, bool, bool, Callable[[Tensor], Tensor], float]] = [
    ("houlsby(reduction=4)", True, False, lambda a: a * torch.sigmoid(a), 1.0),
    ("pfeiffer(reduction=4)", False, False, lambda a: a.clamp(min=0), 1.0),
    ("parallel(reduction=2)", False, True, lambda a: a.clamp(min=0), 1.0),
    ("scaled_parallel(reduction=2)", False, True, lambda a: a.clamp(min=0), 4.0),
    ("bottleneck(sites=[ffn], parallel, scale=4, bottleneck=5, nonlinearity=tanh)", False, True, torch.tanh, 4.0),
    ("bottleneck(sites=[ffn], scale=0.5, bottleneck=5, nonlinearity=gelu)", False, False, nn.functional.gelu, 0.5),
]


@pytest.mark.parametrize(("expression", "attends", "beside", "f", "s"), CASES, ids=[case[0].split("(")[0] for case in CASES])
def test_outputs_and_gradients_are_those_of_the_equation(
    expression: str, attends: bool, beside: bool, f: Callable[[Tensor], Tensor], s: float, ids: Tensor
) -> None:
    model = build_model("llama", attn_implementation="eager")
    adapter = attach(model, expression)
    shake(adapter)
    weights = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    named = dict(adapter.named_parameters())
    ours = states(model, ids)
    found = torch.autograd.grad((ours * weights).sum(), list(named.values()))
    forms = {name: form for name, form in adapter.forms.items() if isinstance(form, Bottleneck)}
    with adapter.disabled():

        def ffn(layer: int, x: Tensor, h: Tensor) -> Tensor:
            return h + by_hand(x if beside else h, forms[f"model.layers.{layer}.mlp.down_proj"], f, s)

        def attn(layer: int, h: Tensor) -> Tensor:
            return h + by_hand(h, forms[f"model.layers.{layer}.self_attn.o_proj"], f, s) if attends else h

        theirs = llama_by_hand(model, ids, ffn, attn)
        wanted = torch.autograd.grad((theirs * weights).sum(), list(named.values()))
    assert torch.allclose(ours, theirs, atol=1e-5)
    for name, a, b in zip(named, found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max()))), name


@pytest.mark.parametrize("family", ["bert", "gemma2", "gpt_neox", "t5-encoder"])
def test_a_parallel_adapter_reads_what_enters_the_sub_layer_on_every_kind_of_block(family: str, ids: Tensor) -> None:
    model = build_model(family)
    site = next(site for site in find_sublayers(model) if site.name == "ffn")
    with torch.no_grad():
        (x, _), (_, h) = passing(model, ids, model.get_submodule(site.source), site.module)
        adapter = attach(model, "scaled_parallel(reduction=4, layers=[0])")
        shake(adapter)
        ((_, out),) = passing(model, ids, site.module)
        assert torch.allclose(out, h + by_hand(x, adapter.forms[site.path], torch.relu, 4.0), atol=1e-5)


def test_without_the_residual_what_leaves_is_the_bottlenecks_alone(ids: Tensor) -> None:
    model = build_model("llama")
    module = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        ((_, h),) = passing(model, ids, module)
        adapter = attach(model, "bottleneck(sites=[ffn], residual=false, layers=[0])")
        shake(adapter)
        ((_, out),) = passing(model, ids, module)
        assert torch.allclose(out, by_hand(h, adapter.forms["model.layers.0.mlp.down_proj"], torch.relu), atol=1e-6)


def test_a_gate_lets_through_a_share_of_what_its_form_adds_token_by_token(ids: Tensor) -> None:
    model = build_model("llama")
    down, q = model.model.layers[0].mlp.down_proj, model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        ((_, h), (x, asked)) = passing(model, ids, down, q)
        adapter = attach(model, "gate(of='lora(rank=2, alpha=6, sites=[q], layers=[0]) + pfeiffer(reduction=4, layers=[0])')")
        shake(adapter)
        low, thin = adapter.forms["model.layers.0.self_attn.q_proj"], adapter.forms["model.layers.0.mlp.down_proj"]
        assert isinstance(low, Gate) and isinstance(thin, Gate)
        ((into, out), (_, projected)) = passing(model, ids, down, q)
        h = into @ down.weight.T  # LoRA has changed what reaches it
        opened = torch.sigmoid(x @ low.weight.T + low.bias)
        assert torch.allclose(projected, asked + opened * 3 * (x @ low.inner.a.T @ low.inner.b.T), atol=1e-5)
        assert torch.allclose(out, h + torch.sigmoid(h @ thin.weight.T + thin.bias) * by_hand(h, thin.inner, torch.relu), atol=1e-5)


def test_mam_is_a_prefix_and_a_scaled_parallel_adapter_and_unipelt_three_methods_behind_gates() -> None:
    mam = attach(build_model("llama"), "mam(tokens=3, hidden=8)")
    assert {type(form).__name__ for form in mam.forms.values()} == {"Bottleneck", "Input"} and mam.virtual["prefix"].count == 3
    three = attach(build_model("llama"), "unipelt(tokens=4, hidden=8, rank=2)")
    assert {type(form.inner).__name__ for form in three.forms.values()} == {"Bottleneck", "LowRank"}
    prefix: Any = three.virtual["prefix"]
    with torch.no_grad():
        prefix.gates.copy_(torch.tensor([-100.0, 100.0]))
        of_layer = prefix.flat().view(4, 2, -1)
        assert not of_layer[:, 0].any() and torch.allclose(of_layer[:, 1], prefix.mlp(prefix.table).view(4, 2, -1)[:, 1])


# What all of them promise

EXPRESSIONS = ["houlsby(reduction=4)", "scaled_parallel", "parallel(sites=[attn])", "gate(of='pfeiffer(reduction=4) + parallel')"]


@pytest.mark.parametrize("expression", ["parallel", "scaled_parallel", "bottleneck(init=lora)", "gate(of='lora(rank=2)')"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_with_lora_weights_it_begins_as_the_base_to_the_last_bit(family: str, expression: str, ids: Tensor) -> None:
    model = build_model(family)
    with torch.no_grad():
        base = states(model, ids)
        attach(model, expression)
        assert torch.equal(states(model, ids), base)


@pytest.mark.parametrize("expression", ["houlsby", "pfeiffer", "bottleneck"])
def test_with_berts_weights_it_begins_near_the_base(expression: str, ids: Tensor) -> None:
    model = build_model("llama")
    with torch.no_grad():
        base = states(model, ids)
        attach(model, expression)
        assert 0 < float((states(model, ids) - base).abs().max()) < 0.02 * float(base.abs().max())


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("family", ["llama", "bert", "gemma2", "t5-encoder"])
def test_detached_the_base_is_back_to_the_last_bit_and_loaded_it_says_the_same(
    family: str, expression: str, ids: Tensor, tmp_path: Path
) -> None:
    model = build_model(family)
    with torch.no_grad():
        base = states(model, ids)
        adapter = attach(model, expression)
        shake(adapter)
        changed = states(model, ids)
        save_adapter(adapter, tmp_path, base="tiny", fingerprint="")
        adapter.detach()
        assert torch.equal(states(model, ids), base) and not torch.allclose(changed, base, atol=1e-3)
        load_adapter(model, tmp_path)
        assert torch.equal(states(model, ids), changed)


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_rows_in_a_pack_and_branches_of_a_tree_are_as_each_alone(family: str, expression: str) -> None:
    forward = probe(build_model(family))
    shake(attach(forward.model, expression))
    with torch.no_grad():
        pack = forward.pack(rows())
        together = forward.states(pack, torch.arange(pack.tokens))
        for own, above in pack.spans:  # each with what it continues
            at = torch.tensor([*above, *own])
            assert torch.allclose(together[at], states(forward.model, pack.ids[at][None])[0], atol=2e-5)


@pytest.mark.parametrize("expression", [*EXPRESSIONS, "adapter_drop"])
def test_cached_greedy_answers_are_the_likeliest_words_of_a_full_forward(expression: str, tiny_tokenizer: Any) -> None:
    forward = probe(build_model("llama", vocab_size=len(tiny_tokenizer)))
    shake(attach(forward.model, expression))
    asked = [[5, 6, 7, 8], [30, 31]]
    for prompt, answer in zip(asked, generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=6)), strict=True):
        with torch.no_grad():
            logits = forward.model(input_ids=torch.tensor([[*prompt, *answer.ids]]), use_cache=False).logits[0]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == answer.ids


@pytest.mark.parametrize("expression", EXPRESSIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_changing_a_later_token_moves_nothing_before_it(family: str, expression: str, ids: Tensor) -> None:
    model = build_model(family)
    shake(attach(model, expression))
    other = ids.clone()
    other[:, 5] = (other[:, 5] + 7) % 90 + 3
    with torch.no_grad():
        before, after = states(model, ids), states(model, other)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_activations_computed_again_give_the_same_gradients(expression: str, ids: Tensor) -> None:
    model = build_model("llama")
    adapter = attach(model, expression)
    shake(adapter)

    def gradients() -> list[Tensor]:
        loss = states(model, ids).square().sum()
        return list(torch.autograd.grad(loss, [p for _, p in adapter.named_parameters()]))

    kept = gradients()
    with recomputing(model, True):
        again = gradients()
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(kept, again, strict=True))


def test_a_base_in_bf16_keeps_its_dtype_and_the_adapter_its_own(ids: Tensor) -> None:
    model = build_model("llama").bfloat16()
    adapter = attach(model, "houlsby + scaled_parallel + gate(of='lora')")
    shake(adapter)
    out = states(model, ids)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32 for _, p in adapter.named_parameters())


@pytest.mark.parametrize("order", ["lora(rank=2, sites=[down]) + pfeiffer", "pfeiffer + lora(rank=2, sites=[down])"])
def test_an_adapter_behind_a_sub_layer_sees_what_lora_made_of_it_in_either_order(order: str, ids: Tensor) -> None:
    model = build_model("llama")
    adapter = attach(model, order)
    generator = torch.Generator().manual_seed(3)
    kinds = {type(form).__name__: path for path, form in adapter.forms.items() if path.startswith("model.layers.0.")}
    with torch.no_grad():
        for kind in ("LowRank", "Bottleneck"):
            for parameter in adapter.forms[kinds[kind]].parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        down = model.model.layers[0].mlp.down_proj
        ((x, out),) = passing(model, ids, down)
        h = x @ (down.weight + adapter.forms[kinds["LowRank"]].delta()).T
        assert torch.allclose(out, h + by_hand(h, adapter.forms[kinds["Bottleneck"]], torch.relu), atol=1e-5)


# AdapterDrop


def test_each_step_draws_its_layers_from_seed_and_step_and_never_drops_them_all(ids: Tensor) -> None:
    model = build_model("llama", num_hidden_layers=5)
    adapter = attach(model, "adapter_drop")
    adapter.train()

    def dropped(step: int, seed: int) -> int:
        adapter.begin(step, 100, seed)
        skipped = [form.skipped for form in adapter.forms.values()]
        assert skipped == sorted(skipped, reverse=True)  # the lowest ones
        return sum(skipped)

    drawn = [dropped(step, 0) for step in range(60)]
    assert set(drawn) == {0, 1, 2, 3, 4}
    assert drawn == [dropped(step, 0) for step in range(60)] != [dropped(step, 1) for step in range(60)]


def test_dropped_layers_compute_the_base_in_training_and_all_take_part_in_use(ids: Tensor) -> None:
    model = build_model("llama")
    adapter = attach(model, "adapter_drop")
    shake(adapter)
    step = next(step for step in range(50) if adapter.begin(step, 50, 0) or adapter.forms["model.layers.0.mlp.down_proj"].skipped)  # type: ignore[func-returns-value]
    with torch.no_grad():
        whole = states(model, ids)
        adapter.train()
        in_training = states(model, ids)
        adapter.train(False)
        assert torch.equal(states(model, ids), whole)
        adapter.drop(1)
        assert torch.equal(states(model, ids), in_training) and not torch.allclose(in_training, whole, atol=1e-3)
        adapter.drop(0)
        assert torch.equal(states(model, ids), whole)
    adapter.begin(step, 50, 0)


def test_no_gradient_is_taken_for_layers_that_a_step_drops(ids: Tensor) -> None:
    model = build_model("llama")
    adapter = attach(model, "adapter_drop")
    adapter.train()
    for form in adapter.forms.values():
        form.skipped = form.layer == 0
    states(model, ids).square().sum().backward()
    assert [p.grad is None for name, p in adapter.named_parameters()] == [".0." in name for name, _ in adapter.named_parameters()]


def test_a_fixed_number_leaves_the_lowest_layers_without_an_adapter() -> None:
    model = build_model("llama", num_hidden_layers=4)
    adapter = attach(model, "houlsby(drop=3)")
    assert {form.layer for form in adapter.forms.values()} == {3}
    with pytest.raises(AdapterError, match="reach up to layer 3"):
        adapter.drop(4)


def test_a_run_with_dropped_layers_resumes_to_the_same_weights(tiny_base_folder: Path, tmp_path: Path) -> None:
    def trainer(name: str) -> Trainer:
        base = load_base(tiny_base_folder, dtype="fp32", device="cpu")
        train = {"steps": 6, "batch": 2, "save_every": 3, "lr": 1e-2}
        spec = make_spec({"base": "tiny", "name": name, "adapter": "adapter_drop(reduction=4)", "train": train})
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir(exist_ok=True)
        samples = [single(list(range(5, 5 + n)), [False] + [True] * (n - 1)) for n in (6, 9, 4)]
        return Trainer(attach_to(base, spec.adapter), samples, spec, folder)

    whole = trainer("whole")
    whole.run()
    cut = trainer("cut")
    batch = cut.feed.batch
    cut.feed.batch = lambda step: (cut._ask_to_stop() if step == 3 else None, batch(step))[1]  # type: ignore[method-assign]
    with pytest.raises(Interrupted):
        cut.run()
    resumed = trainer("cut")
    resumed.run(resume=True)
    ours, theirs = resumed.adapter.state(), whole.adapter.state()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


# Refusals


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("bottleneck(parallel, residual=false)", "beside the sub-layer"),
        ("pfeiffer(reduction=0)", "reduction must be a number above 0"),
        ("pfeiffer(bottleneck=0)", "bottleneck must be a whole number"),
        ("pfeiffer(nonlinearity=reluu)", "relu"),
        ("pfeiffer(init=zero)", "lora"),
        ("pfeiffer(drop=sometimes)", "drop must be"),
        ("pfeiffer(drop=1, layers=[0])", "both say which layers"),
        ("scaled_parallel(scale=0)", "scale must be a number other than 0"),
        ("gate(of='prefix')", "no form at sites"),
        ("gate(of='full')", "no form at sites"),
    ],
)
def test_options_that_make_no_sense_are_refused(expression: str, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        plan(expression)


def test_single_rows_of_every_length_reach_the_adapter() -> None:
    forward = probe(build_model("mixtral"))
    shake(attach(forward.model, "scaled_parallel"))
    rows = [single([5, 6, 7], False), single([8], False)]
    with torch.no_grad():
        pack = forward.pack(rows)
        together = forward.states(pack, torch.arange(4))
        alone = torch.cat([forward.states(forward.pack([row]), torch.arange(row.tokens)) for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)
