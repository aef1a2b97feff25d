"""Rows of a data set on the Hugging Face hub, streamed: `hub:NAME[:CONFIG][@SPLIT]`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tunesmith.core.errors import DataError, nearest
from tunesmith.data.files import RawRow, without_nulls

FORM = "hub:NAME[:CONFIG][@SPLIT]"

_SOURCE = re.compile(r"hub:(?P<name>[\w.\-]+(?:/[\w.\-]+)?)(?::(?P<config>[^@\s]+))?(?:@(?P<split>[^@\s]+))?")


def open_hub(source: str) -> Iterator[RawRow]:
    """Open the data set at once, so that errors come here; then give its rows. Class numbers become their names.

    Raises DataError for a malformed source, no connection, no such data set, configuration or split.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise DataError(f"'{source}' is not a hub source.", hints=[f"Form:  {FORM}", "Example:  hub:stanfordnlp/imdb@train"])
    dataset = _load(source, match["name"], match["config"], match["split"] or "train")
    return _rows(dataset, source)


def _load(source: str, name: str, config: str | None, split: str) -> Any:
    import datasets

    try:
        splits = datasets.load_dataset(name, config, streaming=True)
    except datasets.exceptions.DatasetNotFoundError:
        hints = ["Check the name; it has the form owner/name.", "If access to it is granted by its owner:  hf auth login"]
        raise DataError(f"the hub has no data set '{name}', or it is not open to you.", where=source, hints=hints) from None
    except ConnectionError as cause:
        offline = "Offline" in str(cause)
        why = "HF_HUB_OFFLINE is set" if offline else "no connection"
        hint = "Unset HF_HUB_OFFLINE, or read a file instead." if offline else "Check the connection, or read a file instead."
        raise DataError(f"the hub cannot be reached for '{name}' ({why}).", where=source, hints=[hint]) from None
    except (ValueError, RuntimeError, OSError) as cause:
        raise _unusable(source, name, config, str(cause)) from None
    if split not in splits:
        close = nearest(split, splits)
        hints = [f"It has: {', '.join(splits)}", f"Write:  {source.partition('@')[0]}@{(close or list(splits))[0]}"]
        raise DataError(f"the data set '{name}' has no split '{split}'.", where=source, hints=hints)
    return splits[split]


def _unusable(source: str, name: str, config: str | None, cause: str) -> DataError:
    known = re.findall(r"'([^']+)'", cause[cause.find("[") :]) if "[" in cause else []
    if "onfig" in cause and known:
        what = f"has no configuration '{config}'" if config else "has several configurations"
        best = (nearest(config, known) if config else []) or known
        return DataError(
            f"the data set '{name}' {what}.", where=source, hints=[f"It has: {', '.join(known[:12])}", f"Write:  hub:{name}:{best[0]}"]
        )
    return DataError(f"the data set '{name}' cannot be read: {cause.splitlines()[0] if cause else 'no reason given'}", where=source)


def _rows(dataset: Any, source: str) -> Iterator[RawRow]:
    classes = {column: feature.names for column, feature in (dataset.features or {}).items() if hasattr(feature, "names")}
    rows = iter(dataset)
    number = 0
    while True:
        number += 1
        try:
            fields = next(rows, None)
        except (OSError, ValueError, RuntimeError) as cause:
            first = (str(cause) or type(cause).__name__).splitlines()[0]
            raise DataError(f"the row cannot be read from the hub: {first}", where=f"{source}, row {number}") from None
        if fields is None:
            return
        named = {key: _class_name(value, classes.get(key)) for key, value in fields.items()}
        yield RawRow({key: without_nulls(value) for key, value in named.items()}, f"{source}, row {number}")


def _class_name(value: Any, names: list[str] | None) -> Any:
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None  # -1 marks a hidden label
