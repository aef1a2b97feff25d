"""Tiny random models of many families, and what each row is worth when it is computed alone, by the model itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import FAMILIES, VOCABULARY, build_model
from tunesmith.bases import Base, load_base
from tunesmith.core.row import Row, segment, single
from tunesmith.engine.model import Model, attach_to
from tunesmith.engine.rundir import RunFolder
from tunesmith.engine.train import DevMetric, Trainer
from tunesmith.spec import make_spec


@pytest.fixture
def families() -> list[str]:
    """All names that `build` knows."""
    return list(FAMILIES)


@pytest.fixture
def build() -> Callable[..., Any]:
    """A frozen random model of a family in fp32, its weights large enough that its answers are not all alike."""
    return build_model


@pytest.fixture
def rows() -> list[Row]:
    """Flat rows of several lengths, a pair under one prompt, and a tree three deep; answers begin anywhere but at the first token."""
    ids = torch.randint(3, VOCABULARY, (400,), generator=torch.Generator().manual_seed(5)).tolist()
    flat = [single(ids[:17], [False] * 6 + [True] * 11), single(ids[17:26], [False, True] * 4 + [True])]
    pair = Row((segment(ids[30:41]), segment(ids[41:49], True, 0, "chosen"), segment(ids[50:55], True, 0, "rejected")))
    deep = Row(
        (
            segment(ids[60:70], [False] * 8 + [True] * 2),
            segment(ids[70:75], True, 0),
            segment(ids[75:79], [False, True, False, True], 0),
            segment(ids[80:86], True, 1),
            segment(ids[86:87], True, 1),
            segment(ids[90:97], True, 3),
        )
    )
    return [flat[0], pair, deep, flat[1], single(ids[100:102], [False, True])]


@pytest.fixture
def alone() -> Callable[[Any, Sequence[Row]], Tensor]:
    """Log-probabilities of all targets in a pack's order, each path computed by the model itself with nothing beside it."""

    def compute(model: Any, rows: Sequence[Row]) -> Tensor:
        out = []
        for row in rows:
            for index, part in enumerate(row.segments):
                ids = torch.cat([torch.from_numpy(row.segments[i].ids.astype("int64")) for i in row.path(index)])
                logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
                start = len(ids) - len(part)
                at = torch.from_numpy(part.supervised.nonzero()[0]) + start
                out.append(torch.log_softmax(logits[at - 1], -1).gather(1, ids[at][:, None])[:, 0])
        return torch.cat(out)

    return compute


@pytest.fixture
def gradients() -> Callable[..., dict[str, Tensor]]:
    """Gradients by name of a weighted sum of log-probabilities, the same weights whenever the count is the same."""

    def compute(named: dict[str, Tensor], log_probs: Tensor) -> dict[str, Tensor]:
        weights = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(3))
        found = torch.autograd.grad((weights * log_probs).sum(), list(named.values()), allow_unused=True)
        return {name: torch.zeros_like(named[name]) if g is None else g for name, g in zip(named, found, strict=True)}

    return compute


@pytest.fixture
def base(tiny_base_folder: Path) -> Base:
    """The tiny base, loaded in fp32."""
    return load_base(tiny_base_folder, dtype="fp32", device="cpu")


@pytest.fixture
def samples() -> list[Row]:
    """Twenty rows of two kinds: half of them begin with the same twenty tokens; their answers are of several lengths."""
    drawn = torch.randint(5, 400, (20, 40), generator=torch.Generator().manual_seed(9)).tolist()
    out = []
    for number, ids in enumerate(drawn):
        prompt = (drawn[0][:20] if number % 2 else []) + ids[20:26]
        answer = ids[26 : 28 + number % 9]
        out.append(single(prompt + answer, [False] * len(prompt) + [True] * len(answer), f"rows.jsonl, line {number + 1}"))
    return out


@pytest.fixture
def make_trainer(base: Base, samples: list[Row], tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer on the tiny base, in a run folder of its own."""

    def make(
        name: str = "run",
        *,
        adapter: str = "lora(rank=4)",
        on: Base | Model | None = None,
        rows: list[Row] | None = None,
        track: Sequence[str] = (),
        dev: DevMetric | None = None,
        objective: str = "sft",
        **train: Any,
    ) -> Trainer:
        values = {"steps": 8, "batch": 6, "lr": 1e-2, "save_every": 2, **train}
        spec = make_spec({"base": "tiny", "name": name, "adapter": adapter, "objective": objective, "train": values, "track": list(track)})
        folder = RunFolder(tmp_path / "runs" / name, keep=spec.train.keep)
        folder.path.mkdir(parents=True, exist_ok=True)
        model = attach_to(on or load_again(base), adapter, seed=spec.train.seed)
        return Trainer(model, rows or samples, spec, folder, dev=dev)

    def load_again(base: Base) -> Base:
        return load_base(base.source, dtype="fp32", device="cpu")

    return make
