"""`tunesmith methods` and `tunesmith sites`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def test_methods_are_listed_by_their_place_in_the_space(tunesmith: Any) -> None:
    shown = tunesmith("methods")
    assert shown.exit_code == 0
    lines = {line.split()[0]: line for line in shown.stdout.splitlines() if line.strip()}
    assert "low rank" in lines["lora"] and "LORA" in lines["lora"] and "yes" in lines["lora"]
    assert "among" in lines["prompt"] and "no" in lines["prompt"].split()
    listed = json.loads(tunesmith("methods", "--json").stdout)
    assert {each["name"] for each in listed} >= {"lora", "sparse", "full"}


def test_one_method_is_explained_with_its_equation_paper_and_defaults(tunesmith: Any) -> None:
    shown = tunesmith("methods", "sparse")
    assert shown.stdout.startswith("sparse(share=0.005, mask=fisher, samples=64, sites=all, layers=none)")
    assert "W' = W + d" in shown.stdout and "2111.09839" in shown.stdout and "When to use it" in shown.stdout
    assert json.loads(tunesmith("methods", "modules", "--json").stdout)["options"] == {"names": None}


def test_an_unknown_method_names_the_nearest_ones(tunesmith: Any) -> None:
    shown = tunesmith("methods", "dra")
    assert shown.exit_code == 2 and "unknown adapter method 'dra'" in shown.stderr and "dora" in shown.stderr


def test_sites_of_a_model_are_shown_with_shapes_and_of_a_run_what_its_adapter_amounts_to(
    tunesmith: Any, tiny_base_folder: Path, spec: Path
) -> None:
    shown = tunesmith("sites", tiny_base_folder)
    assert shown.exit_code == 0, shown.output
    (line,) = (line for line in shown.stdout.splitlines() if line.strip().startswith("down "))
    assert line.split()[1:] == ["64", "32", "no", "0-1", "model.layers.*.mlp.down_proj"]
    tunesmith("train", spec, "--quiet")
    counted = json.loads(tunesmith("sites", "runs/spec", "--json").stdout)["adapter"]
    assert counted["trainable"] == 2 * 2 * (32 + 32 + 32 + 16) and set(counted["ranks"].values()) == {2}
    assert "adapter" in json.loads(tunesmith("sites", tiny_base_folder, "--json").stdout)
    text = tunesmith("sites", "runs/spec").stdout
    assert "trained 448" in text and "ranks 2 to 2 of 4 matrices" in text and "merges" in text


def test_sites_of_an_encoder_decoder_are_shown_though_no_command_trains_it(tunesmith: Any, tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4).save_pretrained(tmp_path / "t5")
    shown = json.loads(tunesmith("sites", tmp_path / "t5", "--json").stdout)["sites"]
    assert {each["layers"] for each in shown if each["name"] == "q"} == {"0-1", "2-3"}
    assert any("EncDecAttention" in each["path"] for each in shown)
    told = tunesmith("chat", tmp_path / "t5")
    assert told.exit_code == 2 and "tunesmith.adapters.attach" in told.stderr
