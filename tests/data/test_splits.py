"""Splits: a partition, whole groups, exact sizes, the same in any order; and no question on both sides."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tunesmith.core.errors import DataError, LeakError, SpecError
from tunesmith.core.record import Record
from tunesmith.data import check_leaks, split


def record(text: str, label: str | None = "a", group: str | None = None, line: int = 1) -> Record:
    return Record("label" if label else "text", text=text, label=label, group=group, where=f"t.csv, line {line}")


def many(count: int, labels: str = "ab") -> list[Record]:
    return [record(f"text {i}", labels[i % len(labels)], line=i) for i in range(count)]


def lines(records: list[Record]) -> list[str]:
    return [r.where for r in records]


ROWS = st.lists(st.tuples(st.integers(0, 60), st.sampled_from("aab"), st.none() | st.integers(0, 12)), min_size=8, max_size=80)


def made(rows: list[tuple[int, str, int | None]]) -> list[Record]:
    return [record(f"text {t}", label, None if g is None else f"g{g}", line) for line, (t, label, g) in enumerate(rows)]


def tried(records: list[Record], sizes: dict[str, Any], **options: Any) -> dict[str, list[Record]]:
    try:
        return split(records, sizes, **options)
    except DataError:
        assume(False)
        raise


@given(ROWS, st.integers(0, 5), st.booleans())
def test_every_record_is_in_one_split_and_no_group_or_question_in_two(rows: list[Any], seed: int, stratify: bool) -> None:
    records = made(rows)
    parts = tried(records, {"dev": "20%", "test": 0.3}, seed=seed, stratify=stratify)
    assert list(parts) == ["train", "dev", "test"] and all(parts.values())
    assert sorted(lines([r for part in parts.values() for r in part])) == sorted(lines(records))
    for of in (lambda r: r.group, lambda r: r.key()):
        places: dict[Any, set[str]] = {}
        for name, part in parts.items():
            for r in part:
                if of(r) is not None:
                    places.setdefault(of(r), set()).add(name)
        assert all(len(names) == 1 for names in places.values())


@given(ROWS, st.integers(0, 5), st.randoms())
def test_the_order_of_the_file_does_not_matter_and_the_seed_decides(rows: list[Any], seed: int, chance: random.Random) -> None:
    records = made(rows)
    shuffled = chance.sample(records, len(records))
    sizes = {"dev": 3, "test": "25%"}
    parts = tried(records, sizes, seed=seed)
    again = split(shuffled, sizes, seed=seed)
    assert {name: set(lines(part)) for name, part in parts.items()} == {name: set(lines(part)) for name, part in again.items()}
    assert all([shuffled.index(r) for r in part] == sorted(shuffled.index(r) for r in part) for part in again.values())


@given(st.integers(10, 80), st.integers(0, 4), st.integers(0, 4), st.integers(1, 4), st.booleans())
def test_numbers_are_exact(count: int, dev: int, test: int, labels: int, stratify: bool) -> None:
    parts = split(many(count, "abcd"[:labels]), {"dev": dev, "test": str(test)}, stratify=stratify)
    assert (len(parts["dev"]), len(parts["test"]), len(parts["train"])) == (dev, test, count - dev - test)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=12), st.data())
def test_a_number_that_whole_groups_can_make_up_is_made_up_and_another_is_refused(sizes: list[int], data: st.DataObject) -> None:
    records = [record(f"text {g} {i}", "ab"[g % 2], f"g{g}") for g, size in enumerate(sizes) for i in range(size)]
    wanted = data.draw(st.integers(1, len(records) - 1))
    reachable = {0}
    for size in sizes:
        reachable |= {total + size for total in reachable}
    if wanted in reachable:
        assert len(split(records, {"test": wanted})["test"]) == wanted
    else:
        with pytest.raises(DataError, match=f"test cannot have {wanted} records") as caught:
            split(records, {"test": wanted})
        below = max(total for total in reachable if total < wanted)
        assert below == 0 or f"data.test={below}" in str(caught.value)


def test_labels_keep_their_proportions() -> None:
    records = [record(f"text {i}", "rare" if i % 10 == 0 else "usual") for i in range(500)]
    parts = split(records, {"dev": "10%", "test": 100}, seed=3)
    assert Counter(r.label for r in parts["test"]) == {"usual": 90, "rare": 10}
    assert Counter(r.label for r in parts["dev"]) == {"usual": 45, "rare": 5}
    free = [Counter(r.label for r in split(records, {"test": 100}, seed=seed, stratify=False)["test"])["rare"] for seed in range(8)]
    assert len(set(free)) > 1


@given(st.lists(st.integers(3, 30), min_size=2, max_size=6), st.integers(0, 20), st.data())
def test_no_label_is_a_whole_record_off_its_share(sizes: list[int], seed: int, data: st.DataObject) -> None:
    records = [record(f"text {label} {i}", f"l{label}") for label, size in enumerate(sizes) for i in range(size)]
    wanted = data.draw(st.integers(1, len(records) - 1))
    counts = Counter(r.label for r in split(records, {"test": wanted}, seed=seed)["test"])
    assert all(abs(counts[f"l{label}"] - wanted * size / len(records)) < 1 for label, size in enumerate(sizes))


def test_shares_are_taken_of_all_records() -> None:
    parts = split(many(200), {"dev": "10 %", "test": 0.25})
    assert (len(parts["dev"]), len(parts["test"])) == (20, 50)
    assert len(split(many(4), {"dev": "1%"})["dev"]) == 1
    assert [len(part) for part in split(many(4), {}).values()] == [4]


def test_another_seed_gives_another_split() -> None:
    assert lines(split(many(100), {"test": 20})["test"]) != lines(split(many(100), {"test": 20}, seed=1)["test"])


def test_more_records_or_another_dev_leave_the_test_questions_nearly_alone() -> None:
    old = set(lines(split(many(1000), {"test": 200}, stratify=False)["test"]))
    assert set(lines(split(many(1000), {"test": 200, "dev": "30%"}, stratify=False)["test"])) == old
    grown = set(lines(split(many(1050), {"test": 200}, stratify=False)["test"]))
    assert len(old - grown) <= 20


def test_a_group_that_grows_stays_in_its_split() -> None:
    records = [record(f"text {i}", "a", f"g{i % 10}", i) for i in range(100)]
    tested = {r.group for r in split(records, {"test": 20})["test"]}
    grown = [*records, *(record(f"another {i}", "a", f"g{i % 10}", 100 + i) for i in range(10))]
    assert {r.group for r in split(grown, {"test": 22})["test"]} == tested


def test_groups_that_share_a_question_are_one() -> None:
    chain = [record("x", group="g1"), record("y", group="g1"), record("y", group="g2"), record("z", group="g2"), record("z")]
    parts = split([*chain, *many(20)], {"test": 7}, seed=2)
    assert len({name for name, part in parts.items() for r in part if r in chain}) == 1


@pytest.mark.parametrize("size", ["ten", "10%%", -1, 1.5, 1.0, 0.0, "0%", "100%", True, None, ""])
def test_a_size_that_cannot_be_read_shows_the_form(size: Any) -> None:
    with pytest.raises(SpecError, match="10%") as caught:
        split(many(20), {"dev": size})
    assert caught.value.where == "data.dev"


def test_what_leaves_nothing_to_train_on_is_refused() -> None:
    for records, sizes in ((many(10), {"test": 10}), (many(10), {"dev": "50%", "test": 6})):
        with pytest.raises(DataError, match="none to train on"):
            split(records, sizes)
    with pytest.raises(DataError, match="no records"):
        split([], {})
    with pytest.raises(SpecError, match="train is the rest"):
        split(many(10), {"train": 5})


def test_one_group_larger_than_any_split_is_refused() -> None:
    with pytest.raises(DataError, match="stay together"):
        split([record(f"text {i}", group="all") for i in range(100)], {"dev": "10%"})


def test_large_data_is_split_quickly() -> None:
    records = [record(f"text {i // 2}", "ab"[i // 2 % 2], line=i) for i in range(40_000)]
    parts = split(records, {"dev": 2000, "test": "10%"})
    assert (len(parts["dev"]), len(parts["test"])) == (2000, 4000)


# --- leaks -----------------------------------------------------------------------------------------------------------


def leaking() -> tuple[list[Record], dict[str, list[Record]]]:
    train = [record(f"text  {i}", "b", line=i) for i in range(10)]
    return train, {
        "test": [record(f"text {i}", line=100 + i) for i in (2, 3, 5, 7, 50)],
        "dev": [record("text 50", line=200), record("text 60")],
    }


def test_questions_on_both_sides_are_refused_with_the_first_pairs_and_counts() -> None:
    train, others = leaking()
    with pytest.raises(LeakError) as caught:
        check_leaks(train, others)
    text = str(caught.value)
    assert "4 of train also in test" in text and "1 of dev also in test" in text
    assert all(f"train: t.csv, line {i}  =  test: t.csv, line {100 + i}" in text for i in (2, 3, 5)) and "line 107" not in text
    assert "data.duplicates=drop" in text


def test_leaks_can_be_dropped_from_train_or_allowed() -> None:
    train, others = leaking()
    kept, report = check_leaks(train, others, policy="drop")
    assert [r.text for r in kept] == [f"text  {i}" for i in (0, 1, 4, 6, 8, 9)] and report.dropped == 4
    assert report.pairs == {("train", "test"): 4, ("dev", "test"): 1}
    assert report.summary() == "4 of train also in test · 1 of dev also in test · 4 dropped from train"
    assert check_leaks(kept, {"test": others["test"]}) == (kept, type(report)())
    same, report = check_leaks(train, others, policy="allow")
    assert same == train and report.dropped == 0 and report.pairs[("train", "test")] == 4
    with pytest.raises(SpecError, match="drop"):
        check_leaks(train, others, policy="dorp")  # type: ignore[arg-type]


@given(ROWS)
def test_our_own_splits_never_leak(rows: list[Any]) -> None:
    parts = tried(made(rows), {"dev": "20%", "test": "20%"})
    train = parts.pop("train")
    assert check_leaks(train, parts)[1].summary() == ""
