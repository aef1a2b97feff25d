"""What a climb found, drawn for reading: one self-contained HTML page, Markdown, JSON, and a table for the terminal."""

from __future__ import annotations

from tunesmith.report.files import ReportPaths, json_schema, read_report, write_report
from tunesmith.report.html import to_html
from tunesmith.report.markdown import to_markdown
from tunesmith.report.schema import Report
from tunesmith.report.terminal import to_table

__all__ = ["Report", "ReportPaths", "json_schema", "read_report", "to_html", "to_markdown", "to_table", "write_report"]
