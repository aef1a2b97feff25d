"""Prompts of several finished runs answered in one batch, from the command line and from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tunesmith as ts
from tunesmith.core.errors import AdapterError, SpecError
from tunesmith.engine.model import Model

RUNS = {"first": "lora(rank=2)", "second": "prefix(tokens=4, hidden=none)"}


@pytest.fixture
def trained(tunesmith: Any, spec: Path, tmp_path: Path) -> Path:
    """Two finished runs on one base that answer differently."""
    for name, adapter in RUNS.items():
        shown = tunesmith("train", spec, f"name={name}", f"adapter={adapter}", "train.lr=0.5", "--quiet")
        assert shown.exit_code == 0, shown.output
    return tmp_path / "runs"


def test_each_prompt_is_answered_by_the_run_that_it_names(tunesmith: Any, trained: Path, tiny_base_folder: Path) -> None:
    options = ("--max-tokens", 5, "--json")
    systems = {"first": trained / "first", "second": trained / "second", None: tiny_base_folder}
    wanted = {name: json.loads(tunesmith("generate", system, "I love this", *options).stdout)["answer"] for name, system in systems.items()}
    assert len(set(wanted.values())) == 3
    rows = [{"prompt": "I love this", "adapter": name} for name in ("second", None, "first", "second")]
    given = "".join(json.dumps(row) + "\n" for row in rows) + "I love this\n"
    adapters = [word for name in RUNS for word in ("--adapter", f"{name}={trained / name}")]
    shown = tunesmith("generate", trained / "first", "-", *adapters[2:], *options, stdin=given.replace('"first"', "null"))
    said = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [row["answer"] for row in said] == [wanted["second"], wanted[None], wanted[None], wanted["second"], wanted["first"]]
    assert said[0] == {"prompt": "I love this", "adapter": "second", "answer": wanted["second"]} and "adapter" not in said[4]
    shown = tunesmith("generate", tiny_base_folder, "-", *adapters, *options, stdin=given)
    said = [json.loads(line)["answer"] for line in shown.stdout.splitlines()]
    assert said == [wanted["second"], wanted[None], wanted["first"], wanted["second"], wanted[None]]

    base = ts.load_base(str(tiny_base_folder), dtype="fp32")
    models = [ts.open(str(trained / name), base=base) for name in RUNS]
    asked = ["I love this"] * 4
    assert ts.generate(base, asked, adapters=[models[1], None, "first", models[0]], max_new_tokens=5) == [
        wanted["second"],
        wanted[None],
        wanted["first"],
        wanted["first"],
    ]
    again = ts.open(str(trained / "first"), base=base)
    assert isinstance(again, Model) and again.adapter.name == "first1", "a name of its own beside the other"


def test_what_cannot_be_mixed_is_refused_with_the_way_on(tunesmith: Any, tiny_base_folder: Path, spec: Path) -> None:
    base = ts.load_base(str(tiny_base_folder), dtype="fp32")
    first = ts.attach(base, "lora(rank=2)", name="first")
    with pytest.raises(SpecError, match="1 adapters for 2 prompts"):
        ts.generate(base, ["a", "b"], adapters=["first"])
    with pytest.raises(AdapterError, match=r"unknown adapter 'frist'(.|\n)*first"):
        ts.generate(first, ["a"], adapters=["frist"])
    with pytest.raises(SpecError, match="base= is for a finished run"):
        ts.open(str(tiny_base_folder), base=base)
    for words, said in (
        (["x", "--adapter", "a=nowhere"], "there is no finished run"),
        (["x", "--adapter", "a=nowhere", "--raw"], "--adapter and --raw do not go together"),
        (['{"adapter": "a"}', "--adapter", "a=nowhere"], "no row with a prompt"),
    ):
        shown = tunesmith("generate", tiny_base_folder, *words)
        assert shown.exit_code == 2 and said in shown.stderr and "Traceback" not in shown.output
