"""`tunesmith demo`."""

from __future__ import annotations

import typer

from tunesmith.cli.common import Overrides, Overwrite, Resume, session
from tunesmith.cli.show import show_climb


def demo(ctx: typer.Context, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False) -> None:
    """Climb the built-in ladder: a small real model, real tweets, prompts against training.

    Takes some minutes on two cores; the report is written to runs/demo/.

    Example:
      tunesmith demo
      tunesmith demo train.steps=100 name=short
    """
    from tunesmith.ladder.climb import climb
    from tunesmith.ladder.demo import demo_spec

    report, paths = climb(demo_spec(overrides or []), resume=resume, overwrite=overwrite, reporter=session(ctx).reporter)
    show_climb(report, paths)
