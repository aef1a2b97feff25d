"""Every method of the catalogue trains in two processes as in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance import EXAMPLES, expression_for

from tunesmith.adapters import attach
from tunesmith.bases import load_base
from tunesmith.core.errors import TunesmithError

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("together")]

TRAIN = {"steps": 3, "batch": 8, "lr": 1e-2, "save_every": 1000, "pack_tokens": 64}
CELLS = [pytest.param(method, "llama", id=method) for method in EXAMPLES]
MORE = {"adalora": ", warmup=1, final=1"}
"""What three steps need beside the example."""


@pytest.fixture(scope="module")
def trained(together: Any, request: pytest.FixtureRequest) -> Any:
    """Each method that a test was chosen for, in two processes under one launcher, and in one."""
    chosen = {item.callspec.params["method"] for item in request.session.items if item.path == request.path}  # type: ignore[attr-defined]
    model = load_base(together.base, dtype="fp32", device="cpu").model
    plans, together.refused = [], {}
    for method in sorted(chosen):
        expression = expression_for(method, model)
        try:
            attach(model, expression).detach()
        except TunesmithError as refusal:
            together.refused[method] = refusal.what
            continue
        if method in MORE:
            expression = expression[:-1] + MORE[method] + ")"
        plans.append({"name": method, "adapter": expression, "train": TRAIN, **({"labels": ["a", "b"]} if method == "head" else {})})
    together.two(*plans)
    together.one(*({**plan, "name": f"{plan['name']}-alone"} for plan in plans))
    return together


@pytest.mark.parametrize(("method", "family"), CELLS)
def test_two_processes_train_it_as_one(method: str, family: str, trained: Any) -> None:
    if method in trained.refused:
        pytest.skip(f"refused: {trained.refused[method]}")
    ours, theirs = trained.gradients(method), trained.gradients(f"{method}-alone")
    assert ours.keys() == theirs.keys() and any(bool(value.abs().max() > 1e-6) for value in theirs.values())
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-6), name
    assert trained.metrics(method) == pytest.approx(trained.metrics(f"{method}-alone"), abs=1e-4)
    ours, theirs = trained.weights(method), trained.weights(f"{method}-alone")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.allclose(ours[name].float(), value.float(), rtol=0, atol=2e-4), name
