"""Rows: trees of segments that cannot be built wrongly."""

from __future__ import annotations

import numpy as np
import pytest

from tunesmith.core.row import ROOT, Row, segment, single


def test_a_tree_counts_shared_tokens_once_and_knows_its_paths_and_leaves():
    row = Row((segment([1, 2, 3]), segment([4, 5], True, 0, "chosen"), segment([6], True, 0, "rejected"), segment([7], [True], 1)))
    assert (row.tokens, row.supervised_tokens) == (7, 4)
    assert row.path(3) == [0, 1, 3] and row.leaves() == [2, 3]


def test_a_target_needs_a_token_before_it_on_its_path():
    with pytest.raises(ValueError, match="nothing predicts it"):
        single([1, 2], [True, False])
    with pytest.raises(ValueError, match="nothing predicts it"):
        Row((segment([]), segment([1], True, 0)))
    assert Row((segment([]), segment([1], False, 0), segment([2], True, 1))).supervised_tokens == 1


@pytest.mark.parametrize("parent", [0, 1, -2])
def test_a_segment_continues_one_that_stands_before_it(parent):
    with pytest.raises(ValueError, match="parents come first"):
        Row((segment([1], parent=parent),))


def test_a_mask_has_one_value_a_token_and_arrays_do_as_well_as_lists():
    with pytest.raises(ValueError, match="one mask value a token"):
        segment([1, 2], [True])
    made = segment(np.array([1, 2]), np.array([False, True]))
    assert made.ids.dtype == np.int32 and made.supervised.dtype == np.bool_ and made.parent == ROOT and len(made) == 2
