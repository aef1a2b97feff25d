"""`tunesmith plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from tunesmith.cli.common import AsJson, Overrides, SpecFile, session, stdout

if TYPE_CHECKING:
    from tunesmith.ladder.plan import Plan


def plan(ctx: typer.Context, spec: SpecFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Predict a run's peak memory and time before it starts, and say what fits.

    Small parts of the run are measured; nothing is trained. Exit code 1 where the run would not fit.

    Example:
      tunesmith plan reviews.yaml
      tunesmith plan reviews.yaml adapter=full train.pack_tokens=4096
    """
    from tunesmith.spec import load_spec

    asked = load_spec(spec, overrides or [])  # before the engine is imported: a mistake is told at once
    from tunesmith.cli.show import print_json
    from tunesmith.ladder.plan import plan as foresee

    found = foresee(asked, reporter=session(ctx).reporter)
    if as_json:
        print_json(found.as_dict())
    else:
        show(found)
    if not found.fits:
        raise typer.Exit(1)


def show(plan: Plan) -> None:
    """Parts of the peak, time, what fits, and what to do where it does not."""
    from rich.table import Table
    from rich.text import Text

    from tunesmith.ladder.plan import clock, gb

    training, memory = plan.training, plan.training.memory
    layers = f"{'compiled' if training.compiled else 'uncompiled'} layers ({training.compiled_why})"
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    rows = [
        ("process", memory.process, "libraries and rows"),
        ("weights", memory.weights, plan.base),
        ("optimiser", memory.optimizer, f"{plan.trainable:,} trained values"),
        ("gradients", memory.gradients, ""),
        ("activations", memory.activations, f"largest micro-batch {training.largest_pack:,} tokens; {layers}"),
        ("head", memory.head, ""),
        ("workspace", memory.workspace, "kernels at work, and what the allocator does not give back"),
        ("kernels", memory.kernels, "kept by the CPU's matrix library for every length of pack"),
    ]
    for name, size, note in (("update", training.update, "the optimiser's, with"), ("evaluation", plan.evaluation, "on dev samples, with")):
        if size > memory.total:
            rows.append((name, size - memory.total, f"{note} what is held then, above all of these"))
    for name, size, note in rows:
        if size:
            table.add_row(name, gb(size), Text(note, "dim"))
    verdict = Text(f"of {gb(training.available)}: ").append(*(("fits", "green") if plan.fits else ("does not fit", "bold red")))
    table.add_row(Text("peak memory", "bold"), Text(gb(plan.peak), "bold"), verdict)
    if training.checkpointing is not None:
        again = training.checkpointing
        note = f"peak with train.checkpointing=true; a step then takes {again.step_seconds:.2f} s"
        table.add_row("", gb(again.peak), Text(note, "dim"))
    fitting = "none" if training.fitting_pack is None else f"{training.fitting_pack:,}"
    table.add_row("pack_tokens", fitting, f"largest micro-batch that fits and that a step fills; the spec says {plan.pack_tokens:,}")
    made = f"{training.step_tokens:,.0f} tokens in {training.packs_a_step:.1f} micro-batches"
    table.add_row("step", f"{training.step_seconds:.2f} s", made)
    judged = f" and {plan.evaluations} evaluations of {clock(plan.evaluation_seconds)}" if plan.evaluations else ""
    table.add_row(Text("run", "bold"), Text(clock(plan.total_seconds), "bold"), f"{training.steps:,} steps{judged}")
    console = stdout()
    console.print(table)
    for line in plan.advice:
        console.print(Text(f"  {line}", "cyan"), soft_wrap=True)
