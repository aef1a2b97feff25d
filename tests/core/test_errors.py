"""An error tells what, where, and what now; and survives a trip between processes."""

from __future__ import annotations

import copy

import pytest

from tunesmith.core.errors import DataError, Interrupted, RunError, SpecError, TunesmithError, nearest, unknown


def test_an_error_reads_as_where_what_and_one_hint_a_line():
    error = DataError("the row is empty.", where="a.csv, line 3", hints=["See it:  tunesmith data show a.csv", "Or remove it."])
    assert str(error) == "a.csv, line 3: the row is empty.\n  See it:  tunesmith data show a.csv\n  Or remove it."
    assert str(SpecError("wrong.")) == "wrong."


@pytest.mark.parametrize("kind", [TunesmithError, DataError, Interrupted])
def test_an_error_is_the_same_after_it_was_handed_to_another_process(kind):
    error = kind("what", where="where", hints=["now"])
    same = copy.copy(error)  # by __reduce__, as between processes
    assert (type(same), same.what, same.where, same.hints) == (kind, "what", "where", ("now",))


def test_exit_codes_tell_mistakes_failed_runs_and_interruptions_apart():
    assert (SpecError("").exit_code, RunError("").exit_code, Interrupted("").exit_code) == (2, 3, 130)


def test_the_nearest_names_come_first_and_nothing_is_suggested_for_something_else():
    assert nearest("lerning_rate", ["rank", "learning_rate", "learn"])[0] == "learning_rate"
    assert "Did you mean" not in str(unknown("key", "zzz", ["rank"]))
    assert "Known: none" in str(unknown("option", "x", []))
