"""What an adapter trains, what of the base it changes, and at which rank, told apart."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.adapters import METHODS, attach, save_adapter
from tunesmith.adapters.counting import counts, rank_of
from tunesmith.adapters.sitetable import ranges, site_table
from tunesmith.adapters.space import POINTS, described, ordered
from tunesmith.core.errors import AdapterError

Build = Callable[..., Any]
Shake = Callable[[Any], None]


def test_lora_trains_few_values_and_changes_all_of_a_matrix_at_its_rank(build: Build, shake: Shake, tmp_path: Path) -> None:
    model = build()
    adapter = attach(model, "lora(rank=3, sites=[q])")
    found = counts(adapter)
    assert (found.trainable, found.changed, set(found.ranks.values())) == (2 * 3 * 64, 0, {0})
    shake(adapter)
    found = counts(adapter)
    assert (found.trainable, found.changed, set(found.ranks.values())) == (2 * 3 * 64, 2 * 32 * 32, {3})
    assert (found.flops, found.merges) == (2 * 2 * 3 * 64, "")
    save_adapter(adapter, tmp_path, base="", fingerprint="")
    assert found.stored == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert found.of == sum(p.numel() for name, p in model.named_parameters() if ".ts_" not in name)


def test_diff_pruning_trains_more_than_all_and_changes_few(build: Build) -> None:
    adapter = attach(build(), "diff_pruning(sites=[q])")
    with torch.no_grad():
        for form in adapter.forms.values():
            form.w.normal_()
            form.gate.fill_(-6.0)
            form.gate[:10] = 6.0
    found = counts(adapter)
    assert (found.trainable, found.changed, found.flops) == (2 * 2 * 1024, 20, 2 * 2 * 1024)
    assert set(found.ranks.values()) == {1}  # ten entries of one row


def test_what_is_trained_in_place_changes_as_many_values_and_costs_nothing(build: Build, shake: Shake) -> None:
    model = build()
    for expression, ranks in (("sparse(share=0.05, mask=random, sites=[q])", 2), ("norms", 0), ("layers(last=1)", 7)):
        adapter = attach(model, expression)
        shake(adapter)
        adapter.settle()
        found = counts(adapter)
        assert (found.changed, found.flops, found.merges) == (found.trainable, 0, "")
        assert len(found.ranks) == ranks
        adapter.detach()


def test_what_does_not_merge_says_so_and_counts_no_change_of_the_base(build: Build) -> None:
    found = counts(attach(build(), "prompt(tokens=4)"))
    assert found.changed == 0 and not found.ranks and found.flops > 0
    assert "cannot be merged" in found.merges


def test_the_numerical_rank_is_that_of_the_product() -> None:
    generator = torch.Generator().manual_seed(1)
    made = torch.randn(60, 5, generator=generator) @ torch.randn(5, 40, generator=generator)
    assert (rank_of(made), rank_of(made * 1e-6), rank_of(torch.zeros(4, 4))) == (5, 5, 0)


def test_every_method_has_its_point_in_the_space_and_a_docstring_that_says_what_it_is(build: Build) -> None:
    assert sorted(POINTS) == sorted(METHODS) == sorted(ordered())
    for name, function in METHODS.items():
        text = inspect.getdoc(function) or ""
        assert "When to use it" in text or name in ("head",), f"{name} does not say when to use it"
        assert described(name).options.keys() == {p.name for p in inspect.signature(function).parameters.values()}
    with pytest.raises(AdapterError, match=r"unknown adapter method 'lorra'(.|\n)*lora"):
        described("lorra")


def test_sites_are_listed_by_kind_with_their_layers_as_ranges(build: Build) -> None:
    table = {shape.name: shape for shape in site_table(build("gpt2"))}
    assert (table["qkv"].inputs, table["qkv"].outputs, table["qkv"].bias, table["qkv"].layers) == (32, 96, True, "0-1")
    assert table["qkv"].path == "transformer.h.*.attn.c_attn" and table["qkv"].values == 2 * (32 * 96 + 96)
    assert table["ffn"].values == 0 and table["head"].layers == ""
    assert ranges([5, 0, 1, 2, 7, 8]) == "0-2, 5, 7-8"
