"""Streaming: the same records, the same rows and the same weights as from memory, without the memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.core.errors import DataError, LeakError, SpecError, TunesmithError
from tunesmith.core.progress import Quiet
from tunesmith.ladder.data import Splits, load_splits
from tunesmith.ladder.streaming import RecordStream, check_rungs, stream_splits
from tunesmith.ladder.training import Run, train
from tunesmith.spec import DataSpec, Spec, make_spec

GROUPED: dict[str, str | int] = {"text": "text", "label": "label", "group": "group"}
LABELS = ("negative", "neutral", "positive")


def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def samples(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"text number {i}", "label": LABELS[i % 3]} for i in range(start, start + count)]


def told(splits: Splits) -> dict[str, Any]:
    """What was chosen, place by place."""
    return {name: [record.where for record in getattr(splits, name)] for name in ("train", "dev", "test")} | {"notes": splits.notes}


def both(spec: DataSpec) -> tuple[Any, Any]:
    """What memory and stream choose, or the errors they end in."""
    found: list[Any] = []
    for stream in (False, True):
        try:
            found.append(told(load_splits(spec.model_copy(update={"stream": stream}))))
        except TunesmithError as cause:
            found.append((type(cause), cause.what, cause.hints))
    return found[0], found[1]


rows = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.sampled_from("abcdefghijklmnopqrst"),
            "label": st.sampled_from(LABELS),
            "score": st.integers(0, 9),
            "group": st.sampled_from("ABCDEFGHIJ"),
        }
    ),
    min_size=4,
    max_size=40,
)
sizes = st.sampled_from([None, "10%", "30%", 0.2, 1, 2, 5])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=rows,
    dev=sizes,
    test=sizes,
    seed=st.integers(0, 3),
    balance=st.booleans(),
    limit=st.sampled_from([None, 1, 3, 6]),
    conflicts=st.sampled_from([None, "keep", "drop"]),
    kept=st.sampled_from([{}, {"score": ">= 3"}]),
    columns=st.sampled_from([{}, GROUPED]),
)
def test_a_stream_chooses_the_records_that_memory_chooses(tmp_path: Path, rows: list[dict[str, Any]], **keys: Any) -> None:
    keys["filter"] = keys.pop("kept")
    memory, stream = both(DataSpec(train=write(tmp_path / "data.jsonl", rows), **keys))
    assert stream == memory


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(train=rows, dev=rows, test=rows, duplicates=st.sampled_from(["error", "drop", "allow"]))
def test_a_stream_meets_the_leaks_that_memory_meets(tmp_path: Path, duplicates: Any, **parts: list[dict[str, Any]]) -> None:
    files = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in parts.items()}
    memory, stream = both(DataSpec(**files, columns=GROUPED, duplicates=duplicates))
    assert stream == memory


def test_questions_of_one_group_are_never_parted(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": LABELS[i % 3], "group": f"author {i % 20}"} for i in range(200)]
    splits = stream_splits(
        DataSpec(train=write(tmp_path / "data.jsonl", rows), columns=GROUPED, dev="20%", test="20%", stream=True), Quiet()
    )
    groups = [{record.group for record in part} for part in (splits.train, splits.dev, splits.test)]
    assert all(groups) and not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])


def test_a_leak_is_refused_with_the_lines_of_both_files(tmp_path: Path) -> None:
    train_file, test = write(tmp_path / "train.jsonl", samples(30)), write(tmp_path / "test.jsonl", samples(3, 29))
    with pytest.raises(LeakError) as caught:
        load_splits(DataSpec(train=train_file, test=test, stream=True))
    assert "train.jsonl, line 30" in str(caught.value) and "test.jsonl, line 1" in str(caught.value)


def test_a_broken_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write(path, samples(5))
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(DataError, match="line 6"):
        load_splits(DataSpec(train=str(path), stream=True))


def test_records_that_change_between_the_readings_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    splits = load_splits(DataSpec(train=write(path, samples(10)), stream=True))
    write(path, samples(10, 1))
    with pytest.raises(DataError, match="changed while it was being read"):
        list(splits.train)


def test_the_records_of_a_stream_are_never_all_held(tmp_path: Path) -> None:
    def write_many(count: int) -> str:
        return write(
            tmp_path / f"{count}.jsonl", ({"text": f"text number {i} " + "and so on " * 40, "label": LABELS[i % 3]} for i in range(count))
        )

    def peak(count: int, stream: bool) -> int:
        spec = DataSpec(train=write_many(count), test=20, stream=stream)
        tracemalloc.start()
        splits = load_splits(spec)
        assert sum(1 for _ in splits.train) == count - 20
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100, True)
    grown = peak(6000, True) - peak(1000, True)
    assert grown < 5000 * 150  # hashes and the sorting of them
    assert peak(6000, False) > 10 * grown  # the check sees what it is there to see


def a_spec(folder: Path, base: Path, stream: bool, **keys: Any) -> Spec:
    values: dict[str, Any] = {
        "name": "stream" if stream else "memory",
        "base": {"model": str(base), "dtype": "fp32", "device": "cpu"},
        "data": {"train": str(folder / "data.jsonl"), "dev": 6, "test": "10%", "stream": stream},
        "adapter": "lora(rank=2)",
        "train": {"steps": 4, "batch": 5, "evaluate_every": 2},
    }
    return make_spec(values, [f"{key}={value}" for key, value in keys.items()])


class Told(Quiet):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, topic: str, text: str) -> None:
        self.lines.append(f"{topic}: {text}")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "streams"


def weights(run: Run) -> bytes:
    return (run.adapter / "adapter_model.safetensors").read_bytes()


def test_training_from_a_stream_gives_the_weights_of_training_from_memory_bit_for_bit(
    tmp_path: Path, tiny_base_folder: Path, cache: Path
) -> None:
    write(tmp_path / "data.jsonl", samples(60))
    runs = [train(a_spec(tmp_path, tiny_base_folder, stream), root=tmp_path / "runs") for stream in (False, True)]
    assert weights(runs[0]) == weights(runs[1])
    assert [line["loss"] for line in runs[0].metrics if "loss" in line] == [line["loss"] for line in runs[1].metrics if "loss" in line]
    assert runs[0].result["dev_accuracy"] == runs[1].result["dev_accuracy"]


def test_dialogues_and_plain_texts_stream_like_labels(tmp_path: Path, tiny_base_folder: Path, cache: Path) -> None:
    turns = [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "7"}]
    for name, rows in {
        "dialogues": [
            {"messages": [*turns, {"role": "user", "content": f"And {i}?"}, {"role": "assistant", "content": f"{i}."}]} for i in range(20)
        ],
        "texts": [{"text": f"The parcel number {i} arrived."} for i in range(20)],
    }.items():
        write(tmp_path / "data.jsonl", rows)
        keys = {"data.dev": "null", "data.test": "null", "train.steps": 2}
        runs = [
            train(a_spec(tmp_path, tiny_base_folder, stream, name=f"{name}-{stream}", **keys), root=tmp_path / "runs")
            for stream in (False, True)
        ]
        assert weights(runs[0]) == weights(runs[1])


def test_a_second_run_takes_the_rows_of_the_first_and_other_options_make_their_own(
    tmp_path: Path, tiny_base_folder: Path, cache: Path
) -> None:
    write(tmp_path / "data.jsonl", samples(60))

    def rows_said(name: str, **keys: Any) -> bool:
        said = Told()
        train(a_spec(tmp_path, tiny_base_folder, True, name=name, **keys), root=tmp_path / "runs", reporter=said)
        return any("made before" in line for line in said.lines)

    assert not rows_said("first")
    assert rows_said("second", **{"train.lr": 1e-3})
    assert not rows_said("third", **{"task.instruction": "Which mood?"})
    assert not rows_said("fourth", **{"data.limit": 20})
    assert not rows_said("head", objective="classify"), "a head reads labels, and words have none"
    write(tmp_path / "data.jsonl", [*samples(60), {"text": "one more", "label": "neutral"}])
    assert not rows_said("fifth")
    assert len(list(cache.iterdir())) == 5


def test_rows_that_are_too_long_are_counted_over_the_whole_file_before_training(
    tmp_path: Path, tiny_base_folder: Path, cache: Path
) -> None:
    rows = samples(1200)
    for place in (3, 900):  # in two chunks
        rows[place]["text"] = f"{place} " + "a very long text " * 60
    write(tmp_path / "data.jsonl", rows)
    keys = {"data.dev": "null", "data.test": "null", "data.max_tokens": 200, "train.steps": 1}
    with pytest.raises(DataError, match=r"2 of 1200 rows are longer than 200 tokens") as caught:
        train(a_spec(tmp_path, tiny_base_folder, True, **keys), root=tmp_path / "runs")
    assert "line 4" in str(caught.value) and "line 901" in str(caught.value)
    assert not cache.exists() or not list(cache.iterdir())
    said = Told()
    train(a_spec(tmp_path, tiny_base_folder, True, name="b", **keys, **{"data.overlong": "drop"}), root=tmp_path / "runs", reporter=said)
    assert any("1,200 rows, 2 dropped" in line for line in said.lines)


def test_training_reads_rows_from_disk_and_never_holds_them_all(
    tmp_path: Path, tiny_base_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.data.rowstore import RowStore
    from tunesmith.engine import train as engine

    seen: list[Sequence[Any]] = []
    original: Callable[..., None] = engine.Trainer.__init__

    def watched(self: Any, model: Any, rows: Sequence[Any], *rest: Any, **options: Any) -> None:
        seen.append(rows)
        original(self, model, rows, *rest, **options)

    monkeypatch.setattr(engine.Trainer, "__init__", watched)
    monkeypatch.setattr(RecordStream, "__getitem__", None)
    write(tmp_path / "data.jsonl", samples(60))
    train(a_spec(tmp_path, tiny_base_folder, True), root=tmp_path / "runs")
    assert [type(rows) for rows in seen] == [RowStore]


def test_rungs_that_search_all_samples_are_refused_with_those_that_are_left(tmp_path: Path) -> None:
    spec = make_spec({"base": "somewhere", "data": {"train": "data.jsonl", "test": 5, "stream": True}})
    with pytest.raises(SpecError, match="few_shot, nearest, chain_of_thought: demonstrations") as caught:
        check_rungs(spec)
    assert "climb.rungs=[zero_shot, sft]" in str(caught.value)
    spec = make_spec(spec.model_dump(), ["climb.rungs=[zero_shot, chain_of_thought, sft]", "climb.demonstrations=worked.jsonl"])
    check_rungs(spec)  # worked examples from a file need no samples
