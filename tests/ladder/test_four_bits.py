"""A run on a 4-bit base, from its plan to the model that is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.adapters.forms import LowRank
from tunesmith.bases import load_base
from tunesmith.bases.quantise import FourBit
from tunesmith.core.errors import AdapterError, RunError, SpecError
from tunesmith.engine import planning
from tunesmith.engine.measuring import bytes_of, tensors_of
from tunesmith.engine.runs import open_run
from tunesmith.engine.sampler import Sampling, generate
from tunesmith.engine.sharding import _check
from tunesmith.ladder.plan import plan
from tunesmith.ladder.training import train
from tunesmith.serve.export import export
from tunesmith.spec import Spec, make_spec

pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")


@pytest.fixture
def spec(tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Training the tiny base in 4 bits on sixty texts with labels; keys may be set."""
    rows = [{"text": f"The {thing} is {word}.", "label": label} for thing in range(30) for word, label in (("bad", "no"), ("good", "yes"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)

    def make(*overrides: str) -> Spec:
        base = {"model": str(tiny_base_folder), "dtype": "fp32", "device": "cpu", "quantise": "nf4"}
        values = {"name": "bits", "base": base, "adapter": "qlora(rank=4)", "data": {"train": str(tmp_path / "rows.jsonl"), "dev": 10}}
        return make_spec({**values, "train": {"steps": 4, "batch": 8}}, overrides)

    return make


def test_what_a_run_on_a_4_bit_base_learns_is_there_again_and_is_exported_floating_point(spec: Any, tmp_path: Path) -> None:
    train(spec())
    model = open_run("runs/bits")
    net: Any = model.base.model
    assert sum(isinstance(module, FourBit) for module in net.modules()) == 14
    assert all(isinstance(form, LowRank) and bool(form.b.any()) for form in model.adapter.forms.values())
    ids = torch.arange(5, 25)[None]
    answers = generate(model.forward, model.base.tokenizer, model.forward.prompts([list(range(5, 12))]), Sampling(max_new_tokens=4))
    with torch.no_grad():
        said = net(input_ids=ids).logits
        again = net(input_ids=torch.tensor([[*range(5, 12), *answers[0].ids]])).logits[0, 6:-1]
    assert [int(best) for best in again.argmax(-1)] == list(answers[0].ids)
    with pytest.raises(RunError, match="its codes cannot be spread"):
        _check(model)
    with pytest.raises(AdapterError, match="is quantised"):
        export(model, tmp_path / "merged", "merged")
    notes = export(model, tmp_path / "merged", "merged", dequantise=True)
    assert any("14 maps of the base are floating-point again" in note for note in notes)
    whole = load_base(tmp_path / "merged", dtype="fp32", device="cpu")
    with torch.no_grad():
        assert torch.allclose(whole.model(input_ids=ids).logits, said, atol=1e-4)


def test_a_plan_counts_the_bytes_of_the_codes_and_proposes_them_where_nothing_else_fits(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(spec())
    ours = load_base(spec().base.model, dtype="fp32", device="cpu", quantise="nf4")
    assert found.training.memory.weights == bytes_of(tensors_of(ours.model)) + 4 * found.trainable
    monkeypatch.setattr(planning, "room", lambda device: found.training.memory.process + 1000)
    monkeypatch.setattr("tunesmith.ladder.plan._SHARE", 0.0)
    assert not any("4 bits" in line for line in plan(spec()).advice)
    assert any(line.endswith("base.quantise=nf4") for line in plan(spec("base.quantise=null", "adapter=lora")).advice)
    assert not any("4 bits" in line for line in plan(spec("base.quantise=null", "adapter=full")).advice)


def test_an_unknown_kind_is_refused_with_those_that_there_are(spec: Any) -> None:
    with pytest.raises(SpecError, match=r"base\.quantise.*'nf4' or 'fp4'"):
        spec("base.quantise=int8")
