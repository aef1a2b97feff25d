"""Rows on disk: what was written comes back, whole or not at all."""

from __future__ import annotations

import errno
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.core.errors import RunError
from tunesmith.core.row import Row, Segment, segment, single
from tunesmith.data.rowstore import RowStore, write_store


def stored(folder: Path, rows: list[Row], key: str = "key") -> RowStore:
    with write_store(folder, key) as writer:
        writer.extend(rows)
    found = RowStore.find(folder, key)
    assert found is not None
    return found


def plain(row: Row) -> Any:
    return row.where, [(s.ids.tolist(), s.supervised.tolist(), s.parent, s.name) for s in row.segments]


@st.composite
def trees(draw: st.DrawFn) -> Row:
    parts: list[Segment] = []
    for index in range(draw(st.integers(1, 4))):
        ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6))
        parent = draw(st.integers(0, index - 1)) if index else -1
        supervised = [False, *draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1))]
        parts.append(segment(ids, supervised, parent, draw(st.sampled_from(["", "prompt", "chosen"]))))
    return Row(tuple(parts), draw(st.text(max_size=8)))


@settings(max_examples=40)
@given(rows=st.lists(trees(), min_size=1, max_size=6))
def test_every_row_comes_back_as_it_was_written(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> None:
    store = stored(tmp_path_factory.mktemp("store"), rows)
    assert len(store) == len(rows)
    assert [plain(row) for row in store] == [plain(row) for row in rows]
    assert plain(store[-1]) == plain(rows[-1])
    assert store.tokens == sum(row.tokens for row in rows)
    assert store.supervised_tokens == sum(row.supervised_tokens for row in rows)


def test_a_row_that_is_not_there_is_an_index_error_and_slices_are_refused(tmp_path: Path) -> None:
    store = stored(tmp_path, [single([1, 2], [False, True])])
    for index in (1, -2):
        with pytest.raises(IndexError):
            store[index]
    with pytest.raises(TypeError, match="one at a time"):
        store[:1]


def test_a_row_can_be_changed_without_changing_the_store(tmp_path: Path) -> None:
    store = stored(tmp_path, [single([1, 2], [False, True])])
    store[0].segments[0].ids[:] = 9
    assert store[0].segments[0].ids.tolist() == [1, 2]


def test_facts_are_kept_beside_the_rows(tmp_path: Path) -> None:
    with write_store(tmp_path, "key") as writer:
        writer.append(single([1, 2], [False, True], "a.jsonl, line 1"))
        writer.facts = {"notes": {"shortened": 3}}
    found = RowStore.find(tmp_path, "key")
    assert found is not None and found.facts == {"notes": {"shortened": 3}}


def test_a_store_whose_making_failed_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), write_store(tmp_path, "key") as writer:
        writer.append(single([1, 2], [False, True]))
        raise ZeroDivisionError
    assert RowStore.find(tmp_path, "key") is None
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_not_found_under_another_key(tmp_path: Path) -> None:
    stored(tmp_path, [single([1, 2], [False, True])])
    assert RowStore.find(tmp_path, "other") is None
    (tmp_path / "key").rename(tmp_path / "other")
    assert RowStore.find(tmp_path, "other") is None


@pytest.mark.parametrize("file", ["ids.bin", "supervised.bin", "row_ends.bin", "where_ends.bin", "store.json"])
def test_a_store_with_a_file_cut_short_counts_as_absent_and_is_written_anew(tmp_path: Path, file: str) -> None:
    stored(tmp_path, [single([1, 2, 3], [False, True, True], "here")])
    os.truncate(tmp_path / "key" / file, 2)
    assert RowStore.find(tmp_path, "key") is None
    assert plain(stored(tmp_path, [single([4, 5], [False, True])])[0])[1][0][0] == [4, 5]


def test_the_store_that_another_process_finished_first_stays(tmp_path: Path) -> None:
    with write_store(tmp_path, "key") as late:
        late.append(single([4, 5], [False, True]))
        stored(tmp_path, [single([1, 2], [False, True])])
    found = RowStore.find(tmp_path, "key")
    assert found is not None and found[0].segments[0].ids.tolist() == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_what_a_killed_process_left_is_removed_after_a_day_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    for name, age in (("old", 2 * 24 * 3600), ("new", 60)):
        folder = tmp_path / f".{name}-x.writing"
        folder.mkdir()
        (folder / "ids.bin").write_bytes(b"1234")
        os.utime(folder / "ids.bin", (time.time() - age,) * 2)
    stored(tmp_path, [single([1, 2], [False, True])])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new-x.writing", "key"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no space left") as caught, write_store(tmp_path, "key"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "TUNESMITH_CACHE" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_in_a_store_is_a_pickle(tmp_path: Path) -> None:
    stored(tmp_path, [single([1, 2], [False, True])])
    assert {path.suffix for path in (tmp_path / "key").iterdir()} == {".bin", ".json"}


def test_memory_does_not_grow_with_the_rows_written_and_read(tmp_path: Path) -> None:
    ids, mask = np.arange(200, dtype=np.int32), np.r_[False, np.ones(199, np.bool_)]

    def peak(count: int) -> int:
        tracemalloc.start()
        with write_store(tmp_path, f"rows-{count}") as writer:
            for number in range(count):
                writer.append(single(ids, mask, f"file, line {number}"))
        store = RowStore.find(tmp_path, f"rows-{count}")
        assert store is not None and sum(row.tokens for row in store) == 200 * count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)
    assert peak(4000) < peak(200) + 200_000  # the rows alone take 4 MB
