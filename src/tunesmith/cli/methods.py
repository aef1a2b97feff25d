"""`tunesmith methods`."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli.common import AsJson, stdout


def methods(
    name: Annotated[str | None, typer.Argument(metavar="METHOD", help="One of them, to have it explained.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List the adapter methods by their place in the space of sites, forms and compositions, or explain one.

    Example:
      tunesmith methods dora
    """
    from dataclasses import asdict

    from tunesmith.adapters.space import described, ordered
    from tunesmith.cli.show import print_json

    chosen = [described(each) for each in (ordered() if name is None else [name])]
    if as_json:
        print_json([asdict(each) for each in chosen] if name is None else asdict(chosen[0]))
    elif name is None:
        _table([(each.name, each.point) for each in chosen])
    else:
        one = chosen[0]
        options = ", ".join(option if default is None else f"{option}={default}" for option, default in one.options.items())
        console = stdout()
        console.print(f"{one.name}({options})" if options else one.name, style="bold", soft_wrap=True)
        console.print(f"\n{one.text}\n", soft_wrap=True)
        console.print(_place(one.point))


_COLUMNS = ("sites", "form", "insertion", "composition", "share", "merges", "file")
_HEADS = {"share": "trained", "file": "PEFT's file"}


def _table(rows: list[tuple[str, object]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("method", *_COLUMNS):
        table.add_column(_HEADS.get(column, column))
    for name, point in rows:
        table.add_row(Text(name, "bold"), *(Text(_word(point, column)) for column in _COLUMNS))
    stdout().print(table)


def _place(point: object) -> object:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for column in _COLUMNS:
        table.add_row(Text(_HEADS.get(column, column), "dim"), Text(_word(point, column)))
    return table


def _word(point: object, column: str) -> str:
    value = getattr(point, column)
    return ("yes" if value else "no") if isinstance(value, bool) else str(value) or "ours"
