"""`tunesmith objectives`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.common import AsJson, stdout

if TYPE_CHECKING:
    from tunesmith.objectives.described import Described


def objectives(
    name: Annotated[str | None, typer.Argument(metavar="OBJECTIVE", help="One of them, to have it explained.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List the objectives by what they learn from, or explain one.

    Example:
      tunesmith objectives dpo
    """
    from dataclasses import asdict

    from tunesmith.cli.show import print_json
    from tunesmith.objectives.described import by_family, described

    if name is not None:
        one = described(name)
        print_json(asdict(one)) if as_json else _explain(one)
    elif as_json:
        print_json([asdict(each) for entries in by_family().values() for each in entries])
    else:
        _list(by_family())


def _list(families: dict[str, list[Described]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("objective", "unit", "sum divided by", "reads"):
        table.add_column(column)
    for family, entries in families.items():
        table.add_row(Text(family, "italic"))
        for each in entries:
            table.add_row(Text(f"  {each.name}", "bold"), each.unit, each.denominator, _short(each.reads))
        table.add_section()
    stdout().print(table)


def _short(reads: tuple[str, ...]) -> str:
    """The readings in a line: what is read of both answers of a pair is named once."""
    once = (name.rpartition("_")[2] if name.endswith(("_reference", "_length")) else name for name in reads)
    return " ".join(dict.fromkeys(once))


def _explain(one: Described) -> None:
    from rich.table import Table
    from rich.text import Text

    console = stdout()
    console.print(Text(one.written, "bold"), soft_wrap=True)
    console.print(Text(f"\n{one.text}\n"), soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    links = ", ".join(f"https://arxiv.org/abs/{paper}" for paper in one.papers)
    rows = (("learns from", one.family), ("unit", one.unit), ("reads", " ".join(one.reads)), ("sum divided by", one.denominator))
    for head, value in (*rows, *([("papers", links)] if links else [])):
        table.add_row(Text(head, "dim"), Text(value))
    console.print(table)
