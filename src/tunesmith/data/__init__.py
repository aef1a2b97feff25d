"""Data: sources to records, records chosen and split. No model is needed here."""

from __future__ import annotations

from tunesmith.data.badrows import BadRows
from tunesmith.data.select import SelectionReport, select
from tunesmith.data.sources import data_files, read_records
from tunesmith.data.splits import LeakReport, check_leaks, split

__all__ = ["BadRows", "LeakReport", "SelectionReport", "check_leaks", "data_files", "read_records", "select", "split"]
