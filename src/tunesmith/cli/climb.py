"""`tunesmith climb`."""

from __future__ import annotations

import typer

from tunesmith.cli.common import Overrides, Overwrite, Resume, SpecFile, session
from tunesmith.cli.show import show_climb


def climb(ctx: typer.Context, spec: SpecFile, overrides: Overrides = None, resume: Resume = False, overwrite: Overwrite = False) -> None:
    """Try prompts and training on the same questions and say which was worth it.

    Writes runs/NAME/report.html, report.json and report.md.

    Example:
      tunesmith climb reviews.yaml
      tunesmith climb reviews.yaml 'climb.rungs=\\[zero_shot, sft]' name=two
    """
    from tunesmith.spec import load_spec

    asked = load_spec(spec, overrides or [])  # before the engine is imported: a mistake is told at once
    from tunesmith.ladder.climb import climb

    report, paths = climb(asked, resume=resume, overwrite=overwrite, reporter=session(ctx).reporter)
    show_climb(report, paths)
