"""`tunesmith pipeline`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.common import Overwrite, Resume, session, stdout
from tunesmith.cli.show import show_comparison


def pipeline(
    ctx: typer.Context,
    spec: Annotated[Path, typer.Argument(metavar="FILE", help="Stages in one YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[STAGE.]KEY=VALUE", help="Keys to set, in one stage or in all.", show_default=False),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train stages that go on from one another, into runs/NAME/STAGE, and compare what they made.

    Every stage is checked before the first one runs; --resume goes on in the stage that was stopped.

    Example:
      tunesmith pipeline examples/ppo-pipeline.yaml
      tunesmith pipeline examples/ppo-pipeline.yaml ppo.train.steps=40 --resume
    """
    from tunesmith.pipeline import load_pipeline

    done = load_pipeline(spec, overrides or []).run(resume=resume, overwrite=overwrite, reporter=session(ctx).reporter)
    for name, run in done.runs.items():
        stdout().print(f"{name:<9} {run.folder}", soft_wrap=True)
    if done.comparison is not None:
        show_comparison(done.comparison, done.comparison.report())
