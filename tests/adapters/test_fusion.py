"""AdapterFusion: attention over finished adapters, by hand from the paper's equations, and as runs of two stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import rows
from torch import Tensor

from families import VOCABULARY, build_model
from tunesmith.adapters import Bottleneck, Fusion, attach, find_sublayers, load_adapter, plan, save_adapter
from tunesmith.adapters.bottleneck import Shape
from tunesmith.adapters.sites import Site
from tunesmith.bases import load_base
from tunesmith.core.errors import AdapterError, Interrupted
from tunesmith.core.row import single
from tunesmith.engine.model import attach_to
from tunesmith.engine.probe import probe
from tunesmith.engine.rundir import RunFolder
from tunesmith.engine.sampler import Sampling, generate
from tunesmith.engine.train import Trainer
from tunesmith.spec import make_spec

Finish = Callable[..., Path]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))


def shake(adapter: Any, seed: int = 11, size: float = 0.3) -> None:
    """Other values, as training would give."""
    generator = torch.Generator().manual_seed(seed)
    adapter.load({name: torch.randn(value.shape, generator=generator) * size for name, value in adapter.state().items()})


@pytest.fixture
def finish(tmp_path: Path) -> Finish:
    """A finished run's folder with an adapter of values of its own, and the model bare again."""

    def make(model: Any, name: str, expression: str = "pfeiffer(reduction=4)", fingerprint: str = "", size: float = 0.3) -> Path:
        run = tmp_path / name
        (run / "adapter").mkdir(parents=True)
        adapter = attach(model, expression, name=name)
        shake(adapter, seed=sum(map(ord, name)), size=size)
        save_adapter(adapter, run / "adapter", base="tiny", fingerprint=fingerprint)
        adapter.detach()
        return run

    return make


def fused(model: Any, finish: Finish, *expressions: str, size: float = 0.3) -> Any:
    runs = [finish(model, name, *expressions, size=size) for name in ("a", "b", "c")]
    return attach(model, f"fusion(of=[{', '.join(map(str, runs))}])")


def states(model: Any, ids: Tensor) -> Tensor:
    """Last hidden states, [rows, tokens, width]."""
    return model.base_model(input_ids=ids).last_hidden_state


def passing(model: Any, site: Site, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(what enters a sub-layer, what leaves it before the adapter, what leaves it behind the adapter) in one forward."""
    seen: dict[str, Tensor] = {}
    source = model.get_submodule(site.source)
    handles = [
        source.register_forward_pre_hook(lambda module, args: seen.update(x=args[0])),
        site.module.register_forward_hook(lambda module, args, out: seen.update(h=out), prepend=True),
        site.module.register_forward_hook(lambda module, args, out: seen.update(out=out)),
    ]
    try:
        states(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return seen["x"].detach(), seen["h"].detach(), seen["out"]


def by_hand(h: Tensor, x: Tensor, parts: list[Any], query: Tensor, key: Tensor, value: Tensor, *, scale: float, beside: bool) -> Tensor:
    """h and what is added to it, an adapter at a time as section 3.2 of the paper writes it."""
    z = [scale * (torch.relu((x if beside else h) @ part.down.T + part.down_bias) @ part.up.T + part.up_bias) for part in parts]
    scores = torch.stack([((h @ query.T) * (each @ key.T)).sum(-1) for each in z], -1)
    shares = torch.softmax(scores, -1)
    return h + sum(shares[..., n, None] * (each @ value.T) for n, each in enumerate(z))


@pytest.mark.parametrize(("expression", "scale", "beside"), [("pfeiffer(reduction=4)", 1.0, False), ("scaled_parallel", 4.0, True)])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_outputs_and_gradients_are_those_of_the_equations(
    family: str, expression: str, scale: float, beside: bool, ids: Tensor, finish: Finish
) -> None:
    model = build_model(family)
    adapter = fused(model, finish, expression, size=0.1)
    shake(adapter, size=0.1)
    site = [site for site in find_sublayers(model) if site.name == "ffn"][-1]
    form = adapter.forms[site.path]
    assert isinstance(form, Fusion)
    parameters = [form.query, form.key, form.value]
    weights = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    x, h, ours = passing(model, site, ids)
    theirs = by_hand(h, x, list(form.parts), *parameters, scale=scale, beside=beside)
    assert torch.allclose(ours, theirs, atol=1e-5)
    found, wanted = (torch.autograd.grad((out * weights).sum(), parameters) for out in (ours, theirs))
    for a, b in zip(found, wanted, strict=True):
        assert bool(b.any()) and torch.allclose(a, b, atol=1e-5)


def test_the_numbers_of_a_site_two_wide_worked_by_hand() -> None:
    """h = x = (1, 2); z_1 = 2 relu(h_1 - h_2 + 2) (1, 0) = (2, 0), z_2 = relu(h_2) (0, 1) = (0, 2). Q h = (1, 1), K = I.

    Scores (2, 2), s = (1/2, 1/2), s.z = (1, 1); V = ((2, 1), (0, 1)), V (1, 1) = (3, 1), out = h + (3, 1) = (4, 3).
    With v = dL/d out = (1, 0): dL/ds_n = (V' v) . z_n = (2, 1) . z_n = (4, 2); dL/d scores = s_n (dL/ds_n - 3) = (1/2, -1/2);
    dL/dV = v s.z' = ((1, 1), (0, 0)); dL/dQ = (K' (z_1 - z_2)) / 2 h' = (1, -1) h'; dL/dK = Q h (z_1 - z_2)' / 2 = (1, 1) (1, -1)'.
    """
    linear = torch.nn.Linear(2, 2)
    site = Site("down", 0, "down", linear, 2, 2)
    first, second = (Bottleneck(site, Shape(width=1)) for _ in range(2))
    numbers = [(first, [[1.0, -1.0]], [2.0], [[2.0], [0.0]]), (second, [[0.0, 1.0]], [0.0], [[0.0], [1.0]])]
    for part, down, bias, up in numbers:
        part.down.data, part.down_bias.data, part.up.data = torch.tensor(down), torch.tensor(bias), torch.tensor(up)
    form = Fusion(site, [first, second], 0.01)
    form.query.data, form.key.data = torch.tensor([[1.0, 0.0], [-1.0, 1.0]]), torch.eye(2)
    form.value.data = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    h = torch.tensor([[1.0, 2.0]])
    out = form.leave(h, h)
    assert torch.allclose(out, torch.tensor([[4.0, 3.0]]), atol=1e-5)
    query, key, value = torch.autograd.grad(out[0, 0], [form.query, form.key, form.value])
    assert torch.allclose(value, torch.tensor([[1.0, 1.0], [0.0, 0.0]]), atol=1e-5)
    assert torch.allclose(query, torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), atol=1e-5)
    assert torch.allclose(key, torch.tensor([[1.0, -1.0], [1.0, -1.0]]), atol=1e-5)
    assert float(form.penalty().detach()) == pytest.approx(0.01 * 2)  # (1 - 2)^2 + 1^2


def test_the_penalty_is_the_squared_distance_of_v_from_the_identity(finish: Finish) -> None:
    adapter = fused(build_model("llama"), finish)
    assert float(adapter.penalty().detach()) == 0
    with torch.no_grad():
        adapter.forms["model.layers.0.mlp.down_proj"].value[0, 1] += 3.0
    penalty = adapter.penalty()
    assert float(penalty.detach()) == pytest.approx(0.01 * 9)
    penalty.backward()
    value = adapter.forms["model.layers.0.mlp.down_proj"].value
    assert float(value.grad[0, 1]) == pytest.approx(0.01 * 2 * 3) and int((value.grad != 0).sum()) == 1


def test_it_begins_as_about_the_mean_of_its_adapters_and_is_it_where_nothing_is_asked(ids: Tensor, finish: Finish) -> None:
    model = build_model("llama")
    adapter = fused(model, finish, size=0.1)
    site = next(site for site in find_sublayers(model) if site.name == "ffn")
    form = adapter.forms[site.path]
    with torch.no_grad():
        _, h, out = passing(model, site, ids)
        added = torch.stack([part.addition(h) for part in form.parts])
        assert torch.allclose(out - h, added.mean(0), atol=0.02 * float(added.abs().max()))
        form.query.zero_()
        assert torch.allclose(passing(model, site, ids)[2] - h, added.mean(0), atol=1e-5)


def test_an_adapter_that_is_attended_to_alone_is_that_adapter(ids: Tensor, finish: Finish, tmp_path: Path) -> None:
    model = build_model("llama")
    adapter = fused(model, finish)
    for form in adapter.forms.values():
        form.shares = lambda out, added: torch.eye(3)[1].expand(*added.shape[:-1])  # the second of three
    with torch.no_grad():
        ours = states(model, ids)
        adapter.detach()
        load_adapter(model, tmp_path / "b" / "adapter")
        assert torch.allclose(ours, states(model, ids), atol=1e-5)


def test_only_the_attention_is_trained_and_the_adapters_stay_as_they_were(ids: Tensor, finish: Finish) -> None:
    model = build_model("llama")
    adapter = fused(model, finish)
    assert {name.rsplit(".", 1)[1] for name, _ in adapter.named_parameters()} == {"query", "key", "value"}
    assert adapter.trainable() == 2 * 3 * 32 * 32
    before = [buffer.clone() for buffer in adapter.memory().values()]
    states(model, ids).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for _, p in adapter.named_parameters())
    torch.optim.AdamW([p for _, p in adapter.named_parameters()], lr=0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(before, adapter.memory().values(), strict=True))


def test_each_adapters_values_are_those_that_its_run_left(ids: Tensor, finish: Finish, tmp_path: Path) -> None:
    model = build_model("llama")
    adapter = fused(model, finish)
    alone = load_adapter(build_model("llama"), tmp_path / "b" / "adapter")
    for path, form in alone.forms.items():
        part = adapter.forms[path].parts[1]
        assert all(torch.equal(getattr(part, name), value) for name, value in form.named_parameters())


def test_saved_it_is_loaded_without_its_runs_and_detached_the_base_is_back(ids: Tensor, finish: Finish, tmp_path: Path) -> None:
    model = build_model("llama")
    with torch.no_grad():
        base = states(model, ids)
        adapter = fused(model, finish)
        shake(adapter)
        wanted = states(model, ids)
        save_adapter(adapter, tmp_path, base="tiny", fingerprint="")
        adapter.detach()
        assert torch.equal(states(model, ids), base)
        for name in ("a", "b", "c"):
            shutil.rmtree(tmp_path / name)
        load_adapter(model, tmp_path)
        assert torch.equal(states(model, ids), wanted)


@pytest.mark.parametrize("expression", ["pfeiffer(reduction=4)", "scaled_parallel", "houlsby(reduction=4)"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_rows_in_a_pack_and_branches_of_a_tree_are_as_each_alone(family: str, expression: str, finish: Finish) -> None:
    forward = probe(build_model(family))
    shake(fused(forward.model, finish, expression))
    with torch.no_grad():
        pack = forward.pack(rows())
        together = forward.states(pack, torch.arange(pack.tokens))
        for own, above in pack.spans:  # each with what it continues
            at = torch.tensor([*above, *own])
            assert torch.allclose(together[at], states(forward.model, pack.ids[at][None])[0], atol=5e-5)


def test_cached_greedy_answers_are_the_likeliest_words_of_a_full_forward(tiny_tokenizer: Any, finish: Finish) -> None:
    forward = probe(build_model("llama", vocab_size=len(tiny_tokenizer)))
    shake(fused(forward.model, finish, "scaled_parallel"))
    asked = [[5, 6, 7, 8], [30, 31]]
    for prompt, answer in zip(asked, generate(forward, tiny_tokenizer, asked, Sampling(max_new_tokens=6)), strict=True):
        with torch.no_grad():
            logits = forward.model(input_ids=torch.tensor([[*prompt, *answer.ids]]), use_cache=False).logits[0]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == answer.ids


def test_changing_a_later_token_moves_nothing_before_it(ids: Tensor, finish: Finish) -> None:
    model = build_model("llama")
    shake(fused(model, finish))
    other = ids.clone()
    other[:, 5] = (other[:, 5] + 7) % 90 + 3
    with torch.no_grad():
        before, after = states(model, ids), states(model, other)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.allclose(before[:, 5:], after[:, 5:])


def test_in_training_its_adapters_go_without_their_dropout_and_without_dropped_layers(ids: Tensor, finish: Finish) -> None:
    model = build_model("llama")
    adapter = fused(model, finish, "adapter_drop(reduction=4, dropout=0.5)")
    with torch.no_grad():
        in_use = states(model, ids)
        adapter.train()
        adapter.begin(3, 10, 0)
        assert torch.equal(states(model, ids), in_use)


def test_it_stands_beside_other_methods_in_one_expression(ids: Tensor, finish: Finish) -> None:
    model = build_model("llama")
    runs = [finish(model, name) for name in ("a", "b")]
    adapter = attach(model, f"fusion(of=[{runs[0]}, {runs[1]}]) + lora(rank=2, sites=[down])")
    states(model, ids).square().sum().backward()
    assert {name.rsplit(".", 1)[1] for name, p in adapter.named_parameters() if p.grad is not None} == {"query", "key", "value", "a", "b"}


def test_the_sites_and_layers_of_its_adapters_are_its_own(finish: Finish) -> None:
    adapter = fused(build_model("llama"), finish, "houlsby(reduction=4, layers=[-1])")
    assert sorted(adapter.forms) == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.o_proj"]


def test_adapters_of_different_widths_are_joined(ids: Tensor, finish: Finish) -> None:
    model = build_model("llama")
    thin, wide = finish(model, "a", "pfeiffer(reduction=8)"), finish(model, "b", "pfeiffer(reduction=2, nonlinearity=tanh)")
    adapter = attach(model, f"fusion(of=['{thin}', '{wide}'])")
    parts = adapter.forms["model.layers.0.mlp.down_proj"].parts
    assert [part.down.shape[0] for part in parts] == [4, 16] and [part.shape.nonlinearity for part in parts] == ["relu", "tanh"]


def test_a_run_that_was_interrupted_goes_on_to_the_same_weights(tiny_base_folder: Path, finish: Finish, tmp_path: Path) -> None:
    def trainer(name: str) -> Trainer:
        base = load_base(tiny_base_folder, dtype="fp32", device="cpu")
        runs = [tmp_path / each if (tmp_path / each).exists() else finish(base.model, each, fingerprint=base.fingerprint) for each in "ab"]
        train = {"steps": 6, "batch": 2, "save_every": 3, "lr": 1e-2}
        spec = make_spec({"base": "tiny", "name": name, "adapter": f"fusion(of=[{runs[0]}, {runs[1]}])", "train": train})
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir(exist_ok=True)
        samples = [single(list(range(5, 5 + n)), [False] + [True] * (n - 1)) for n in (6, 9, 4)]
        return Trainer(attach_to(base, spec.adapter), samples, spec, folder)

    whole = trainer("whole")
    begun = whole.adapter.state()
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
    assert not any(torch.equal(theirs[name], begun[name]) for name in theirs)


# Refusals


def test_adapters_that_cannot_be_joined_are_refused_with_the_reason(finish: Finish, tmp_path: Path) -> None:
    model = build_model("llama")
    a, low, both = finish(model, "a"), finish(model, "low", "lora(rank=2)"), finish(model, "both", "houlsby(reduction=4)")
    other = finish(model, "other", "pfeiffer(reduction=4)", "0123456789abcdef")

    def refused(second: Path | str, said: str, **options: Any) -> None:
        with pytest.raises(AdapterError, match=said) as refusal:
            attach(model, f"fusion(of=['{a}', '{second}'])", **options)
        assert refusal.value.hints

    refused(tmp_path / "nowhere", "no finished adapter")
    for number, expression in enumerate(("mam(tokens=3, hidden=8)", "bottleneck(residual=false)", "gate(of='pfeiffer')", "full")):
        refused(finish(model, f"none{number}", expression), "not one method with a bottleneck")
    (peft := tmp_path / "peft" / "adapter").mkdir(parents=True)
    shutil.copy(low / "adapter" / "adapter_model.safetensors", peft)
    refused(peft.parent, "knows no method with a bottleneck")
    refused(low, "not one method with a bottleneck")
    refused(both, r"listen at different sites: only one of them at model\.layers\.0\.self_attn\.o_proj")
    refused(finish(model, "upper", "pfeiffer(reduction=4, layers=[1])"), r"different sites: only one of them at model\.layers\.0")
    refused(other, "made for another base", fingerprint="fedcba9876543210")
    assert not any(getattr(module, "ts_forms", None) for module in model.modules())


def test_adapters_of_a_base_of_another_width_are_refused(finish: Finish) -> None:
    wide = build_model("llama", hidden_size=64)
    other, own = finish(wide, "other", "pfeiffer(bottleneck=4)"), finish(build_model("llama"), "own", "pfeiffer(bottleneck=4)")
    with pytest.raises(AdapterError, match="no adapter of the right size"):
        attach(build_model("llama"), f"fusion(of=[{own}, {other}])")


def test_a_saved_fusion_that_does_not_say_what_it_joins_is_damaged(finish: Finish, tmp_path: Path) -> None:
    model = build_model("llama")
    adapter = fused(model, finish)
    save_adapter(adapter, tmp_path, base="tiny", fingerprint="")
    adapter.detach()
    description = tmp_path / "tunesmith.json"
    values = json.loads(description.read_text())
    assert sorted(values["finished"].values()) == ["pfeiffer(reduction=4)"] * 3
    del values["finished"][str(tmp_path / "b")]
    description.write_text(json.dumps(values))
    with pytest.raises(AdapterError, match="does not say what"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("expression", ["fusion(of=['a'])", "fusion(of=['a', 'a'])", "fusion(of=['a', 'b'], penalty=-1)"])
def test_options_that_make_no_sense_are_refused(expression: str) -> None:
    with pytest.raises(AdapterError, match="fusion: "):
        plan(expression)
