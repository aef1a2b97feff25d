"""Training in bf16 follows training in fp32: the same rows, the same start, losses within a stated distance."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tunesmith.bases import Base, load_base
from tunesmith.engine.rundir import read_metrics
from tunesmith.engine.train import Trainer

DISTANCE = 0.05
"""Nats a token, at any step. docs/performance.md has the distance on a real base."""


@pytest.mark.parametrize(("adapter", "lr"), [("lora(rank=16)", 5e-2), ("full", 1e-3)])
def test_the_loss_curve_in_bf16_stays_within_the_stated_distance_of_fp32(
    adapter: str, lr: float, base: Base, make_trainer: Callable[..., Trainer]
) -> None:
    curves = {}
    for dtype in ("fp32", "bf16"):
        trainer = make_trainer(dtype, adapter=adapter, on=load_base(base.source, dtype=dtype, device="cpu"), steps=40, lr=lr)
        trainer.run()
        curves[dtype] = [line["loss"] for line in read_metrics(trainer.folder.path / "metrics.jsonl") if "loss" in line]
    assert curves["fp32"][-1] < curves["fp32"][0] - 0.15  # something was learned
    assert max(abs(a - b) for a, b in zip(curves["fp32"], curves["bf16"], strict=True)) < DISTANCE
