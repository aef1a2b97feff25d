"""Hub data sets: read as a stream, and every way in which one may not be there. The hub itself is stood in for."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from tunesmith.core.errors import DataError
from tunesmith.data import read_records


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What load_dataset was asked for, and ("raises") what it answers with instead of data."""
    seen: dict[str, Any] = {}
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    data = datasets.Dataset.from_dict({"text": ["awful", "很好", "unknown"], "label": [0, 1, -1]}, features=features)

    def load(name: str, config: str | None = None, **options: Any) -> Any:
        seen.update(name=name, config=config, **options)
        if "raises" in seen:
            raise seen["raises"]
        return {"train": data.select(range(2)).to_iterable_dataset(), "test": data.to_iterable_dataset()}

    monkeypatch.setattr(datasets, "load_dataset", load)
    return seen


def test_rows_are_streamed_and_class_numbers_become_names(hub: dict[str, Any]) -> None:
    records = list(read_records("hub:owner/reviews"))
    assert [(r.text, r.label, r.where) for r in records] == [
        ("awful", "neg", "hub:owner/reviews, row 1"),
        ("很好", "pos", "hub:owner/reviews, row 2"),
    ]
    assert hub["streaming"] is True and hub["name"] == "owner/reviews" and hub["config"] is None


def test_configuration_and_split_are_part_of_the_source(hub: dict[str, Any]) -> None:
    assert len(list(read_records("hub:owner/reviews:zh@test", limit=2))) == 2
    assert hub["config"] == "zh"


def test_a_hidden_label_is_no_label(hub: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"row 3: the row has no answer"):
        list(read_records("hub:owner/reviews@test"))


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't exist"), "has no data set 'owner/x'"),
        (ConnectionError("Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)"), "HF_HUB_OFFLINE"),
        (ConnectionError("Couldn't reach 'x' on the Hub (LocalEntryNotFoundError)"), "no connection"),
        (ValueError("BuilderConfig 'zz' not found. Available: ['en', 'zh']"), "hub:owner/x:"),
        (ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'zh']"), "several configurations"),
        (RuntimeError("Dataset scripts are no longer supported, but found x.py"), "scripts are no longer supported"),
    ],
)
def test_what_cannot_be_opened_says_why_at_the_call(hub: dict[str, Any], cause: Exception, said: str) -> None:
    hub["raises"] = cause
    with pytest.raises(DataError) as caught:
        read_records("hub:owner/x")
    assert said in str(caught.value) and caught.value.where == "hub:owner/x"


def test_an_unknown_split_names_the_nearest(hub: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        read_records("hub:owner/x:zh@tset")
    assert "no split 'tset'" in caught.value.what and caught.value.hints[-1] == "Write:  hub:owner/x:zh@test"


@pytest.mark.parametrize("source", ["hub:", "hub:a/b/c", "hub:a b", "hub:a@"])
def test_a_malformed_source_shows_the_form(source: str) -> None:
    with pytest.raises(DataError, match=r"hub:NAME\[:CONFIG\]\[@SPLIT\]"):
        read_records(source)


def test_without_the_hub_the_real_library_gives_our_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="cannot be reached"):
        read_records("hub:tunesmith-tests/does-not-exist")
