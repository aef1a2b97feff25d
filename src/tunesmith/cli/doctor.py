"""`tunesmith doctor`."""

from __future__ import annotations

import typer

from tunesmith.cli.common import AsJson, stdout


def doctor(as_json: AsJson = False) -> None:
    """Look at this machine and this installation, and say what is missing.

    Exit code 1 where a part is missing without which nothing works; extras may be missing.

    Example:
      tunesmith doctor
    """
    from dataclasses import asdict

    from rich.table import Table
    from rich.text import Text

    from tunesmith.bases.doctor import diagnose
    from tunesmith.cli.show import print_json

    checks = diagnose()
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        marks = {"ok": Text("ok", "green"), "warn": Text("look", "yellow"), "missing": Text("missing", "red")}
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for check in checks:
            absent_extra = check.status == "missing" and check.name.startswith("extra ")
            detail = Text(check.detail)
            if check.hint:
                detail.append(f"\n{check.hint}", style="cyan")
            table.add_row(Text("absent", "dim") if absent_extra else marks[check.status], Text(check.name), detail)
        stdout().print(table)
    if any(check.status == "missing" and not check.name.startswith("extra ") for check in checks):
        raise typer.Exit(1)
