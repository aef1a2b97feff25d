"""Two processes sample the same answers as one, and learn the same from them."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tunesmith.engine.rundir import read_metrics

SCRIPT = Path(__file__).with_name("sample_together.py")
SOURCES = Path(__file__).resolve().parents[2] / "src"
TRAIN = {"steps": 5, "lr": 1e-2, "save_every": 5, "evaluate_every": 5, "schedule": "constant", "warmup": 0}
ROLLOUT = {"prompts": 5, "samples": 4, "max_new_tokens": 8, "show": 0}
PLANS = [
    {"name": "dapo", "objective": "dapo", "train": TRAIN, "rollout": {**ROLLOUT, "tries": 3, "truncated": "keep"}},
    {"name": "ppo", "objective": "ppo", "train": TRAIN, "rollout": {**ROLLOUT, "epochs": 2, "minibatches": 2, "kl_target": 0.1}},
    {
        "name": "normalised",
        "objective": "dr_grpo(max_tokens=8)",
        "train": TRAIN,
        "rollout": ROLLOUT,
        "rewards": [{"reward": f"{SCRIPT}:letters", "normalise": "batch"}],
    },
]


@pytest.mark.slow
def test_two_processes_sample_the_same_answers_as_one_and_learn_the_same_from_them(tiny_base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLANS))
    runs = {name: tmp_path / name for name in ("one", "two")}
    runpy.run_path(str(SCRIPT))["main"](str(tiny_base_folder), str(runs["one"]), str(tmp_path / "plan.json"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    done = subprocess.run(
        [*launcher, str(tiny_base_folder), str(runs["two"]), str(tmp_path / "plan.json")],
        env={**os.environ, "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("dapo", "ppo", "normalised"):
        told = [json.loads((runs[which] / name / "samples.jsonl").read_text().splitlines()[-1]) for which in ("one", "two")]
        assert told[0] == told[1]
        one, two = (read_metrics(runs[which] / name / "metrics.jsonl") for which in ("one", "two"))
        assert len(one) == len(two) == 6
        for ours, theirs in zip(one, two, strict=True):
            same = [key for key in ours if "seconds" not in key and "per_second" not in key]
            assert ours.keys() == theirs.keys()
            assert [theirs[key] for key in same] == pytest.approx([ours[key] for key in same], rel=1e-3, abs=1e-5)
        weights = [load_file(runs[which] / name / "adapter" / "adapter_model.safetensors") for which in ("one", "two")]
        assert all(torch.allclose(weights[0][key], value, atol=1e-4) for key, value in weights[1].items())
