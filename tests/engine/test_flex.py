"""Flex attention is the same function of a pack as the attention that is written out, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from tunesmith.core.row import Row
from tunesmith.engine.attention import attend
from tunesmith.engine.flex import block_mask, flex_attend
from tunesmith.engine.pack import build_pack


@pytest.fixture(autouse=True)
def reference_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch refuses gradients on the CPU for its kernel's sake; its reference in plain torch has them."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("causal", "unrolled"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_attention_gives_the_values_and_gradients_of_the_packs_own(
    softcap: float | None, window: int | None, causal: bool, unrolled: bool, kv_heads: int, rows: list[Row]
) -> None:
    pack = build_pack(rows, unroll=unrolled)
    drawn = torch.Generator().manual_seed(2)
    leaves = [torch.randn(pack.tokens, heads, 8, generator=drawn).requires_grad_() for heads in (4, kv_heads, kv_heads)]
    weight = torch.randn(pack.tokens, 4, 8, generator=drawn)

    def run(function: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = function(*leaves, pack, 0.4, causal, window, softcap)  # type: ignore[operator]
        return out, torch.autograd.grad((out * weight).sum(), leaves)

    (got, ours), (wanted, theirs) = run(flex_attend), run(attend)
    assert torch.allclose(got, wanted, atol=1e-5)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=2e-5)


def test_a_block_mask_is_made_once_a_pack_and_kind_of_layer_and_anew_on_another_device(rows: list[Row]) -> None:
    pack = build_pack(rows)
    first = block_mask(pack, True, None)
    assert block_mask(pack, True, None) is first
    assert block_mask(pack, True, 4) is not first
    assert not pack.to(torch.device("meta")).kept
