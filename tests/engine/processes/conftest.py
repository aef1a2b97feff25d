"""Starting runs of train_together.py: in two processes of a launcher, or in this one."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.engine.rundir import read_metrics

SCRIPT = Path(__file__).with_name("train_together.py")
SOURCES = Path(__file__).resolve().parents[3] / "src"
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@dataclass
class Together:
    """Runs in one folder, on one base."""

    base: Path
    folder: Path

    def arguments(self, plans: tuple[dict[str, Any], ...]) -> list[str]:
        file = self.folder / "plan.json"
        file.write_text(json.dumps(plans))
        return [str(self.base), str(self.folder / "rows.json"), str(self.folder), str(file)]

    def start(self, *plans: dict[str, Any]) -> subprocess.Popen[str]:
        """Two processes under a launcher."""
        env = {**os.environ, "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1"}
        command = [*LAUNCHER, str(SCRIPT), *self.arguments(plans)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)

    def two(self, *plans: dict[str, Any]) -> str:
        """Two processes, to the end; what they said."""
        process = self.start(*plans)
        said, _ = process.communicate(timeout=150)
        assert process.returncode == 0, said
        return said

    def one(self, *plans: dict[str, Any]) -> None:
        """This process alone."""
        runpy.run_path(str(SCRIPT))["main"](*self.arguments(plans))

    def gradients(self, name: str) -> dict[str, Tensor]:
        """Whole gradients of a run's first step, from the pieces of its processes."""
        pieces: dict[str, list[Tensor]] = {}
        spread: set[str] = set()
        for file in sorted(self.folder.glob(f"{name}.*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                spread |= set(json.loads(opened.metadata()["spread"]))
                for key in opened.keys():  # noqa: SIM118 (not a dict)
                    pieces.setdefault(key, []).append(opened.get_tensor(key))
        return {key: torch.cat(parts) if key in spread else parts[0] for key, parts in pieces.items()}

    def weights(self, name: str) -> dict[str, Tensor]:
        """What a run saved in the end."""
        return load_file(self.folder / name / "adapter" / "adapter_model.safetensors")

    def metrics(self, name: str, key: str = "loss") -> list[float]:
        """A column of a run's metrics."""
        return [line[key] for line in read_metrics(self.folder / name / "metrics.jsonl") if key in line]


@pytest.fixture(scope="module")
def together(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Together:
    """Twenty rows of two kinds, half of them with the same beginning, and an empty folder of runs."""
    folder = tmp_path_factory.mktemp("together")
    drawn = torch.randint(5, 400, (20, 40), generator=torch.Generator().manual_seed(9)).tolist()
    rows = []
    for number, ids in enumerate(drawn):
        prompt, answer = (drawn[0][:20] if number % 2 else []) + ids[20:26], ids[26 : 28 + number % 9]
        mask = [False] * len(prompt) + [True] * len(answer)
        rows.append({"ids": prompt + answer, "mask": mask, "where": f"rows.jsonl, line {number + 1}"})
    (folder / "rows.json").write_text(json.dumps(rows))
    return Together(tiny_base_folder, folder)
