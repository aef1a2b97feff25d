"""A finished run is a model again, and may be the start of the next one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.bases import load_base
from tunesmith.core.errors import AdapterError, RunError, SpecError
from tunesmith.core.row import Row
from tunesmith.engine.model import Model, attach_to, forward_of
from tunesmith.engine.pack import build_pack
from tunesmith.engine.rundir import RunFolder
from tunesmith.engine.runs import is_run, open_run, save_run
from tunesmith.engine.train import Trainer
from tunesmith.spec import make_spec

Run = Callable[..., Model]


@pytest.fixture
def heard(samples: list[Row]) -> Callable[[Model], Tensor]:
    def compute(model: Model) -> Tensor:
        with model.active(), torch.no_grad():
            return model.forward(build_pack(samples)).log_probs

    return compute


@pytest.fixture
def run(tiny_base_folder: Path, samples: list[Row], tmp_path: Path) -> Run:
    """Train a run to its end, on the tiny base or on an earlier run; the model as training left it."""

    def train(name: str, on: str = "", adapter: str = "lora(rank=4)", **base: Any) -> Model:
        model = str(tmp_path / on) if on else str(tiny_base_folder)
        values = {"base": {"model": model, "dtype": "fp32", **base}, "name": name, "adapter": adapter}
        spec = make_spec({**values, "train": {"steps": 3, "batch": 6, "lr": 1e-2, "seed": len(name)}})
        start = open_run(model) if on else Model(load_base(model, **spec.base.model_dump(exclude={"model", "trust_remote_code"})))
        if adapter == "continue":
            for _, parameter in start.adapter.named_parameters():
                parameter.requires_grad_(True)
            trained = start
        else:
            trained = attach_to(start, adapter, seed=spec.train.seed)
        with RunFolder(tmp_path / name) as folder:
            folder.begin(spec, {})
            Trainer(trained, samples, spec, folder).run()
            save_run(trained, folder.path)
            folder.finish({})
        return trained

    return train


@pytest.mark.parametrize("adapter", ["lora(rank=4)", "rslora(rank=4, dropout=0.3)", "full", "layers(last=1)"])
def test_a_finished_run_opens_to_the_model_that_training_left(
    adapter: str, run: Run, heard: Callable[[Model], Tensor], tmp_path: Path
) -> None:
    trained = run("one", adapter=adapter)
    opened = open_run(tmp_path / "one")
    assert torch.equal(heard(opened), heard(trained))
    assert (opened.name, opened.base.source) == ("one", trained.base.source)
    assert not any(parameter.requires_grad for parameter in opened.base.model.parameters())
    opened.detach()
    assert torch.equal(heard(opened), heard(Model(load_base(trained.base.source, dtype="fp32"))))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("lora(rank=4)", "lora(rank=2, sites=[o])"),
        ("lora(rank=4)", "lora(rank=4)"),
        ("full", "lora(rank=4)"),
        ("full", "layers(last=1)"),
        ("lora(rank=4)", "full"),
        ("lora(rank=4)", "continue"),
        ("full", "continue"),
    ],
)
def test_a_run_on_top_of_a_run_keeps_what_the_first_learned_and_trains_only_the_second(
    first: str, second: str, run: Run, heard: Callable[[Model], Tensor], tmp_path: Path
) -> None:
    one = heard(run("one", adapter=first))
    trained = run("two", on="one", adapter=second)
    assert len(trained.adapters) == (1 if second == "continue" else 2)
    opened = open_run(tmp_path / "two")
    assert torch.equal(heard(opened), heard(trained))
    assert not torch.allclose(heard(opened), one, atol=1e-3)
    assert torch.equal(heard(open_run(tmp_path / "one")), one)  # its files are as they were
    if second != "continue":
        below = Model(opened.base, opened.adapters[:1])
        assert torch.equal(heard(below), one)


def test_a_chain_of_three_runs_opens_whole(run: Run, heard: Callable[[Model], Tensor], tmp_path: Path) -> None:
    run("one")
    run("two", on="one", adapter="continue")
    trained = run("three", on="two", adapter="lora(rank=2, sites=[down])")
    opened = open_run(tmp_path / "three")
    assert len(opened.adapters) == 2 and torch.equal(heard(opened), heard(trained))


def test_new_words_are_trained_saved_and_come_back(run: Run, heard: Callable[[Model], Tensor], tmp_path: Path) -> None:
    trained = run("one", new_tokens=["<good>", "<bad>"])
    (rows,) = trained.adapter.rows.values()
    assert rows.words.tolist() == trained.base.new_token_ids and len(rows.words) == 2
    opened = open_run(tmp_path / "one")
    assert opened.base.tokenizer.convert_tokens_to_ids(["<good>", "<bad>"]) == trained.base.new_token_ids
    assert torch.equal(heard(opened), heard(trained))
    again = open_run(tmp_path / "one")
    assert attach_to(again, "lora(rank=2)").adapter.rows == {}  # the first run's words stay with the first run


def test_a_run_whose_base_has_changed_is_refused(run: Run, tmp_path: Path, tiny_base_folder: Path) -> None:
    run("one")
    file = tmp_path / "one" / "spec.yaml"
    file.write_text(file.read_text().replace("new_tokens: []", "new_tokens: ['<new>']"))
    with pytest.raises(AdapterError, match="made for another base"):
        open_run(tmp_path / "one")


def test_going_on_with_another_spec_is_refused_by_the_part_that_differs(tmp_path: Path) -> None:
    from tunesmith.ladder.training import train

    begun = make_spec({"base": "x", "name": "run", "train": {"lr": 1e-3}})
    with RunFolder(tmp_path / "run") as folder:
        folder.begin(begun, {"threads": 1, "dtype": "float32"})
    changed = make_spec({"base": "x", "name": "run", "train": {"lr": 1e-4}})
    with pytest.raises(SpecError, match=r"begun with another spec; it differs in: train(.|\n)*name=NAME"):
        train(changed, resume=True, root=tmp_path)


def test_an_unfinished_run_is_no_model(tmp_path: Path) -> None:
    assert not is_run(tmp_path)
    with RunFolder(tmp_path) as folder:
        folder.begin(make_spec({"base": "x"}), {})
    assert is_run(tmp_path)
    with pytest.raises(RunError, match="no finished run"):
        open_run(tmp_path)


def test_a_bare_base_has_nothing_to_save(tiny_base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no adapter to save"):
        save_run(Model(load_base(tiny_base_folder, dtype="fp32")), tmp_path)


def test_a_base_is_probed_once_and_bare_whatever_hangs_on_it(tiny_base_folder: Path, heard: Callable[[Model], Tensor]) -> None:
    base = load_base(tiny_base_folder, dtype="fp32")
    first = attach_to(base, "lora")
    assert forward_of(base) is first.forward is attach_to(base, "lora").forward
    assert {adapter.name for adapter in base.model.__dict__["ts_attached"]} == {"adapter0", "adapter1"}
    with pytest.raises(AdapterError, match="attached already"):
        attach_to(base, "lora", name="adapter0")
    assert first.trainable() == first.adapter.trainable() > 0 == Model(base).trainable()
