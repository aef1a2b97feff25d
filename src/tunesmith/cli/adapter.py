"""`tunesmith adapter` and `tunesmith export`: what can be made of a finished run without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.common import stdout

if TYPE_CHECKING:
    from tunesmith.engine.combining import Made

app = typer.Typer(no_args_is_help=True, help="Convert, resize and combine what runs learned, and write it into the base.")

RunName = Annotated[Path, typer.Argument(metavar="RUN", help="A finished run, such as runs/reviews.", show_default=False)]
Target = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the result goes.", show_default=False)]
Dtype = Annotated[str, typer.Option("--dtype", help="fp32, bf16 or fp16; default: the run's own.")]
Dequantise = Annotated[bool, typer.Option("--dequantise", help="Of a 4-bit base: write it floating-point, which takes its full memory.")]


@app.command("convert")
def convert(
    run: RunName,
    folder: Target,
    rank: Annotated[int | None, typer.Option("--rank", help="Ranks of the LoRA; default: as many as it takes.", show_default=False)] = None,
) -> None:
    """Any method that changes weights, and any full fine-tune, as plain LoRA. What is lost is stated.

    Example:
      tunesmith adapter convert runs/full runs/as-lora --rank 32
    """
    from tunesmith.engine.combining import convert_run

    _show(convert_run(run, folder, rank=rank))


@app.command("resize")
def resize(run: RunName, folder: Target, rank: Annotated[int, typer.Option("--rank", help="Ranks that stay.", show_default=False)]) -> None:
    """A LoRA cut to fewer ranks by SVD, which is the best that so few can do.

    Example:
      tunesmith adapter resize runs/reviews runs/smaller --rank 4
    """
    from tunesmith.engine.combining import convert_run

    _show(convert_run(run, folder, rank=rank))


@app.command("combine")
def combine(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Finished runs on one base.", show_default=False)],
    into: Annotated[Path, typer.Option("--into", metavar="FOLDER", help="The new run.", show_default=False)],
    how: Annotated[str, typer.Option("--how", help="linear, average, stack, subtract, ties, dare or dare-ties.")] = "average",
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="0.7,0.3", help="One for each run, for linear, ties and dare.", show_default=False)
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", help="Share of entries that ties (0.2) and dare (0.5) keep.", show_default=False)
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Cut the result to so many ranks.", show_default=False)] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of what dare drops.")] = 0,
) -> None:
    """Several runs' adapters as one.

    Example:
      tunesmith adapter combine runs/a runs/b --into runs/both --how linear --weights 0.7,0.3
    """
    from tunesmith.engine.combining import combine_runs

    _show(combine_runs(runs, into, how=how, weights=_numbers(weights), density=density, rank=rank, seed=seed))


@app.command("merge")
def merge(run: RunName, folder: Target, dtype: Dtype = "auto", dequantise: Dequantise = False) -> None:
    """The base with the run in its weights, as a transformers model. The same as export --profile merged.

    Example:
      tunesmith adapter merge runs/reviews merged --dtype fp32
    """
    export(run, folder, profile="merged", dtype=dtype, dequantise=dequantise)


def export(
    run: RunName,
    folder: Target,
    profile: Annotated[str, typer.Option("--profile", help="peft, vllm or merged.")] = "peft",
    rank: Annotated[int | None, typer.Option("--rank", help="For vllm: cut to so many ranks.", show_default=False)] = None,
    dtype: Dtype = "auto",
    dequantise: Dequantise = False,
) -> None:
    """Write a finished run in the form that another program reads.

    peft: for the peft library. vllm: plain LoRA of one rank. merged: a model of its own.

    Example:
      tunesmith export runs/reviews for-vllm --profile vllm
    """
    from tunesmith.engine.runs import open_run
    from tunesmith.serve.export import check_profile
    from tunesmith.serve.export import export as write

    check_profile(profile)  # before a base is loaded
    notes = write(open_run(run, dtype=dtype), folder, profile, rank=rank, dequantise=dequantise)
    stdout().print(f"exported  {folder} · " + "\n          ".join(notes), soft_wrap=True)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a list of numbers like 0.7,0.3", param_hint="--weights") from None


def _show(made: Made) -> None:
    low, high = made.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    error = "exact" if made.error == 0 else f"relative error {made.error:.2e}"
    console = stdout()
    console.print(f"made      {made.folder} · plain LoRA, {ranks}, {made.parameters:,} values · {error}", soft_wrap=True)
    if made.left_out:
        left = f"{len(made.left_out)} changed parameters that no LoRA holds, first {made.left_out[0]}"
        console.print(f"left out  {left}; they count in the error", soft_wrap=True)
