"""Writing a report to its three files and reading it back."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunesmith.core.errors import DataError, RunError
from tunesmith.report.html import to_html
from tunesmith.report.markdown import to_markdown
from tunesmith.report.schema import SCHEMA_VERSION, Report


@dataclass(frozen=True, slots=True)
class ReportPaths:
    json: Path
    markdown: Path
    html: Path


def write_report(report: Report, folder: Path) -> ReportPaths:
    """Write report.json, report.md and report.html into `folder`, which is made if it is missing.

    All three are composed before the first is written, and each is written beside and renamed: a reader never meets half
    a file, and a failure leaves the former ones. Raises RunError where the folder cannot be written.
    """
    paths = ReportPaths(folder / "report.json", folder / "report.md", folder / "report.html")
    written = {paths.json: to_json(report), paths.markdown: to_markdown(report), paths.html: to_html(report)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in written.items():
            _replace(path, text)
    except OSError as cause:
        hints = ["Free some space, or name another folder; the figures are still in the run's folder."]
        raise RunError(f"the report cannot be written: {cause.strerror or cause}.", where=str(folder), hints=hints) from cause
    return paths


def to_json(report: Report) -> str:
    """The report as JSON, keys in the order of the schema. Raises ValueError where it would not read back (not a number)."""
    text = report.model_dump_json(indent=2, fallback=str) + "\n"
    Report.model_validate_json(text)
    return text


def read_report(path: Path) -> Report:
    """Read report.json, or the one in a run's folder.

    A file of a later minor version is read for what this version knows. Raises DataError for a file that is missing,
    is not JSON, is of another major version, or does not follow the schema.
    """
    path = path / "report.json" if path.is_dir() else path
    data = _load(path)
    _check_version(data.get("schema_version"), path)
    try:
        # A later minor version may only add fields; what we do not know is none of our business.
        return Report.model_validate(data, extra="ignore")
    except ValidationError as cause:
        first = cause.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        more = f" ({cause.error_count() - 1} more)" if cause.error_count() > 1 else ""
        raise DataError(f"'{place}' does not follow the report schema: {first['msg']}{more}.", where=str(path), hints=[_AGAIN]) from None


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of report.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema()}


_AGAIN = "Make it again:  tunesmith climb SPEC"


def _load(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError("there is no report here.", where=str(path), hints=["A finished run has one:  runs/NAME/report.json"]) from None
    except OSError as cause:
        raise DataError(f"the report cannot be read: {cause.strerror or cause}.", where=str(path)) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as cause:
        line = f", line {cause.lineno}" if isinstance(cause, json.JSONDecodeError) else ""
        raise DataError("this is not JSON; the file may be cut short.", where=f"{path}{line}", hints=[_AGAIN]) from None
    if not isinstance(data, dict):
        raise DataError("this is not a report: it holds no object.", where=str(path), hints=[_AGAIN])
    return data


def _check_version(version: Any, path: Path) -> None:
    ours = SCHEMA_VERSION.split(".")[0]
    if not isinstance(version, str) or not version.split(".")[0].isdigit():
        hints = [f'A report names its schema:  "schema_version": "{SCHEMA_VERSION}"']
        raise DataError("this is not a report: it names no schema version.", where=str(path), hints=hints)
    major = version.split(".")[0]
    if int(major) > int(ours):
        hints = ["Update:  pip install --upgrade tunesmith"]
        raise DataError(f"the report has schema version {version}; this Tunesmith reads {ours}.x.", where=str(path), hints=hints)
    if int(major) < int(ours):
        raise DataError(f"the report has schema version {version}; this Tunesmith reads {ours}.x.", where=str(path), hints=[_AGAIN])


def _replace(path: Path, text: str) -> None:
    """Write beside and rename, so that the path holds the old text or the new, never a part."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    beside = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.chmod(0o644)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
