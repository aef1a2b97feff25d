"""`tunesmith train`."""

from __future__ import annotations

import typer

from tunesmith.cli.common import Overrides, Overwrite, Resume, SpecFile, session
from tunesmith.cli.show import show_run


def train(ctx: typer.Context, spec: SpecFile, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False) -> None:
    """Train what a spec says, into runs/NAME.

    Ctrl-C saves; --resume goes on to the same weights as if nothing had happened.

    Example:
      tunesmith train reviews.yaml
      tunesmith train reviews.yaml train.lr=1e-4 name=slower
    """
    from tunesmith.spec import load_spec

    asked = load_spec(spec, overrides or [])  # before the engine is imported: a mistake is told at once
    from tunesmith.api import train
    from tunesmith.engine.processes import current

    run = train(asked, resume=resume, overwrite=overwrite, reporter=session(ctx).reporter)
    if current().first:
        show_run(run)
