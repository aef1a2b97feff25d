"""The three files, the schema, the Markdown and the terminal table."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tunesmith.core.errors import DataError, RunError
from tunesmith.report import Report, json_schema, read_report, to_markdown, to_table, write_report


def test_a_report_written_and_read_back_is_the_same(sample: Report, tmp_path: Path) -> None:
    paths = write_report(sample, tmp_path / "runs" / "demo")
    assert read_report(paths.json) == sample
    assert read_report(tmp_path / "runs" / "demo") == sample
    assert paths.html.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert paths.markdown.read_text(encoding="utf-8").startswith("# Sentiment of tweets")
    assert sorted(path.name for path in paths.json.parent.iterdir()) == ["report.html", "report.json", "report.md"]


def test_the_json_holds_every_figure_that_the_schema_promises(sample: Report, tmp_path: Path) -> None:
    data = json.loads(write_report(sample, tmp_path).json.read_text(encoding="utf-8"))
    assert data["schema_version"].split(".")[0] == "1"
    rung = data["rungs"][-1]
    figures = "name accuracy ci_low ci_high macro_f1 prompt_tokens_per_answer completion_tokens_per_answer seconds_per_answer train_seconds"
    assert set(figures.split()) | {"peak_memory_mb", "trainable_parameters"} <= rung.keys()
    assert {"wins", "losses", "p_value", "verdict", "questions_needed"} <= rung["versus_previous"].keys()
    assert data["recommendation"].keys() == {"rung", "reason"}
    assert json_schema()["properties"].keys() == data.keys()
    assert "description" in json_schema()["$defs"]["Rung"]["properties"]["ci_low"]


def test_settings_of_any_type_are_written(variant: Callable[..., Report], tmp_path: Path) -> None:
    report = variant(settings={"out": tmp_path, "type": int, "sites": ("q", "v")})
    assert read_report(write_report(report, tmp_path).json).settings["sites"] == ["q", "v"]


def test_a_failure_while_writing_leaves_the_former_report_whole_and_no_scraps(
    variant: Callable[..., Report], sample: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(sample, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device") as error:
        write_report(variant(title="another"), tmp_path)
    assert str(tmp_path) in str(error.value) and error.value.hints
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_report_that_could_not_be_read_back_is_never_written(variant: Callable[..., Report], sample: Report, tmp_path: Path) -> None:
    broken = [sample.rungs[0].model_copy(update={"accuracy": float("nan")}), *sample.rungs[1:]]
    with pytest.raises(ValueError, match="accuracy"):
        write_report(sample.model_copy(update={"rungs": broken}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def _changed(**fields: Any) -> Callable[[dict[str, Any]], str]:
    return lambda data: json.dumps({**data, **fields})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_changed(schema_version="2.0"), "schema version 2.0; this Tunesmith reads 1.x"),
        (_changed(schema_version="0.9"), "schema version 0.9; this Tunesmith reads 1.x"),
        (_changed(schema_version=None), "names no schema version"),
        (_changed(n_questions="many"), "'n_questions' does not follow the report schema"),
        (lambda data: json.dumps(data)[:500], "not JSON; the file may be cut short"),
        (lambda data: "[]", "holds no object"),
        (lambda data: "", "not JSON"),
    ],
)
def test_a_file_that_is_no_report_of_ours_is_refused_with_its_reason(
    change: Callable[[dict[str, Any]], str], message: str, sample: Report, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    path.write_text(change(json.loads(sample.model_dump_json())), encoding="utf-8")
    with pytest.raises(DataError, match=message) as error:
        read_report(path)
    assert str(path) in error.value.where and error.value.hints


def test_a_missing_report_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no report here"):
        read_report(tmp_path)


def test_a_report_of_a_later_minor_version_is_read_for_what_we_know(sample: Report, tmp_path: Path) -> None:
    data = json.loads(sample.model_dump_json())
    data |= {"schema_version": "1.7", "carbon": 3}
    data["rungs"][0]["energy_kwh"] = 0.1
    path = tmp_path / "report.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    assert read_report(path).rungs == sample.rungs


def test_the_markdown_has_one_whole_line_a_rung_and_the_verdicts(sample: Report) -> None:
    lines = to_markdown(sample).splitlines()
    assert "**LoRA reaches 83 % where the best prompt reaches 58 %.**" in lines
    table = lines[lines.index("## Rungs") + 2 :]
    table = table[: table.index("")]
    assert len(table) == 2 + len(sample.rungs)
    assert len({line.count("|") for line in table}) == 1
    assert table[-1].startswith("| **LoRA** | 82.9 % | 79.1 to 86.1 |")
    assert any("▼ worse" in line for line in lines) and any("640" in line for line in lines)


def test_text_cannot_break_out_of_the_markdown(variant: Callable[..., Report], sample: Report) -> None:
    attack = "a | b\n\n# <script>x</script> `c` [d](javascript:e) *f*"
    prompt = "````\n``` inside\n````"
    rungs = [{**sample.rungs[0].model_dump(), "title": attack, "prompt": prompt}, *[rung.model_dump() for rung in sample.rungs[1:]]]
    written = to_markdown(variant(title=attack, rungs=rungs, notes=[attack]))
    assert "<script>" not in written
    assert "a \\| b \\# &lt;script&gt;x&lt;/script&gt; \\`c\\` \\[d\\](javascript:e) \\*f\\*" in written
    assert f"`````\n{prompt}\n`````" in written


def test_the_terminal_table_shows_every_rung_and_takes_brackets_in_titles_as_text(variant: Callable[..., Report], sample: Report) -> None:
    rungs = [{**sample.rungs[0].model_dump(), "title": "Zero [red]shot[/red]"}, *[rung.model_dump() for rung in sample.rungs[1:]]]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(to_table(variant(rungs=rungs)))
    shown = console.export_text()
    assert "Zero [red]shot[/red]" in shown and "LoRA ●" in shown
    assert "82.9 %" in shown and "79–86" in shown and "▲ better" in shown and "+24.9, p<0.001" in shown


def test_the_terminal_table_fits_eighty_columns_without_breaking_words(sample: Report) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(to_table(sample))
    shown = console.export_text()
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    for word in ("Zero-shot", "neighbour", "undecided", "better", "4 min", "+24.9, p<0.001", "needs 640 more"):
        assert word in shown
    assert sample.recommendation.reason in " ".join(shown.split()), "nothing is cut off"
