"""What a user can make of finished runs: other runs, and files for other programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import Result

from tunesmith.core.errors import AdapterError
from tunesmith.engine.model import Model
from tunesmith.engine.runs import open_run

Tunesmith = Callable[..., Result]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture
def trained(tunesmith: Tunesmith, spec: Path) -> Callable[..., Path]:
    def train(name: str, adapter: str = "lora(rank=2)", **keys: object) -> Path:
        done = tunesmith("train", spec, f"name={name}", f"adapter={adapter}", *(f"train.{key}={value}" for key, value in keys.items()))
        assert done.exit_code == 0, done.output
        return Path("runs") / name

    return train


def logits(model: Model) -> torch.Tensor:
    ids = torch.arange(5, 25)[None]
    with model.active():
        out: torch.Tensor = model.base.model(ids).logits
    return out


def test_a_full_fine_tune_is_converted_to_a_run_that_can_be_evaluated_like_any_other(
    tunesmith: Tunesmith, trained: Callable[..., Path]
) -> None:
    full = trained("full", "modules(names=[self_attn])")
    done = tunesmith("adapter", "convert", full, "runs/as-lora")
    assert done.exit_code == 0 and "plain LoRA" in done.output and "relative error" in done.output
    assert torch.allclose(logits(open_run("runs/as-lora")), logits(open_run(full)), atol=1e-4)
    assert json.loads(Path("runs/as-lora/result.json").read_text())["made_of"] == [str(full)]
    assert tunesmith("evaluate", "runs/as-lora").exit_code == 0
    again = tunesmith("adapter", "convert", full, "runs/as-lora")
    assert again.exit_code != 0 and "holds a finished run" in again.output


def test_resizing_states_what_it_lost(tunesmith: Tunesmith, trained: Callable[..., Path]) -> None:
    run = trained("big", "lora(rank=8)", lr=0.02)
    done = tunesmith("adapter", "resize", run, "runs/small", "--rank", 1)
    assert done.exit_code == 0 and "rank 1," in done.output
    assert 0 < json.loads(Path("runs/small/result.json").read_text())["error"] < 1


def test_combined_runs_are_their_weighted_sum(tunesmith: Tunesmith, trained: Callable[..., Path]) -> None:
    one, two = trained("one", lr=0.02), trained("two", "dora(rank=2)", lr=0.02, seed=3)
    done = tunesmith("adapter", "combine", one, two, "--into", "runs/both", "--how", "linear", "--weights", "1,0")
    assert done.exit_code == 0, done.output
    assert torch.allclose(logits(open_run("runs/both")), logits(open_run(one)), atol=1e-4)
    for how in ("average", "stack", "subtract", "ties", "dare", "dare-ties"):
        assert tunesmith("adapter", "combine", one, two, "--into", f"runs/{how}", "--how", how).exit_code == 0
    for words, message in (
        (["--how", "sum"], "unknown way to combine 'sum'"),
        (["--how", "average", "--weights", "1,2"], "weights change nothing for average"),
        (["--how", "linear", "--weights", "1,2,3"], "need as many weights"),
        (["--how", "linear", "--density", "0.5"], "density changes nothing for linear"),
    ):
        refused = tunesmith("adapter", "combine", one, two, "--into", "runs/none", *words)
        assert refused.exit_code == 2 and message in refused.output
    assert not Path("runs/none").exists()
    assert "needs two runs" in tunesmith("adapter", "combine", one, "--into", "runs/none").output


@pytest.mark.parametrize("adapter", ["lora(rank=2)", "dora(rank=2, sites=all)", "ia3", "full"])
def test_a_merged_export_answers_as_the_run_in_plain_transformers(adapter: str, tunesmith: Tunesmith, trained: Callable[..., Path]) -> None:
    run = trained("run", adapter, lr=0.01)
    done = tunesmith("export", run, "merged", "--profile", "merged")
    assert done.exit_code == 0, done.output
    alone = AutoModelForCausalLM.from_pretrained("merged").eval()
    assert torch.allclose(alone(torch.arange(5, 25)[None]).logits, logits(open_run(run)), atol=1e-4)
    assert Path("merged/tokenizer.json").is_file()
    refused = tunesmith("export", run, "merged", "--profile", "merged")
    assert refused.exit_code == 3 and "not empty" in refused.output


def test_vllm_gets_plain_lora_of_one_rank_and_what_is_none_needs_a_rank(tunesmith: Tunesmith, trained: Callable[..., Path]) -> None:
    run = trained("mixed", "lora(rank=2, sites=[q]) + lora(rank=4, alpha=4, sites=[v])", lr=0.01)
    assert tunesmith("export", run, "served", "--profile", "vllm").exit_code == 0
    config = json.loads(Path("served/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["use_dora"]) == (4, 4.0, {}, False)
    assert {value.shape[0] for key, value in load_file("served/adapter_model.safetensors").items() if "lora_A" in key} == {4}
    turned = trained("turned", "dora(rank=2)", lr=0.01)
    refused = tunesmith("export", turned, "none", "--profile", "vllm")
    assert refused.exit_code == 2 and "vLLM takes plain LoRA" in refused.output and not Path("none").exists()
    done = tunesmith("export", turned, "cut", "--profile", "vllm", "--rank", 4)
    assert done.exit_code == 0 and "relative error of the cut to rank 4" in done.output


def test_what_no_profile_can_hold_is_refused_with_what_can(tunesmith: Tunesmith, trained: Callable[..., Path]) -> None:
    full = trained("full", "full")
    refused = tunesmith("export", full, "none", "--profile", "peft")
    assert refused.exit_code == 2 and "PEFT has no format for 'full'" in refused.output and "--profile merged" in refused.output
    assert "unknown profile 'onnx'" in tunesmith("export", full, "none", "--profile", "onnx").output
    assert "rank changes nothing" in tunesmith("export", full, "none", "--profile", "merged", "--rank", 2).output


def test_peft_profile_is_what_the_run_saved(tunesmith: Tunesmith, trained: Callable[..., Path]) -> None:
    run = trained("run")
    assert tunesmith("export", run, "out").exit_code == 0
    saved, out = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (run / "adapter", "out"))
    assert saved.keys() == out.keys() and all(torch.equal(saved[key], out[key]) for key in saved)


def test_runs_on_different_bases_are_not_combined(tunesmith: Tunesmith, trained: Callable[..., Path]) -> None:
    one, two = trained("one"), trained("two")
    file = two / "adapter" / "tunesmith.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fingerprint": "f" * 64}))
    refused = tunesmith("adapter", "combine", one, two, "--into", "runs/none")
    assert refused.exit_code == 2 and "made for another base" in refused.output
    from tunesmith.engine.combining import combine_runs

    with pytest.raises(AdapterError, match="began with"):
        trained_on_top = trained("top", "lora(rank=2)")
        spec = trained_on_top / "spec.yaml"
        spec.write_text(spec.read_text().replace("model: ", f"model: {one.resolve()} #"))
        combine_runs([trained_on_top, one], Path("runs/none"))
