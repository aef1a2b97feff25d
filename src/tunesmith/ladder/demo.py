"""The demo: a real model, real tweets, five rungs, minutes on a laptop."""

from __future__ import annotations

from importlib.resources import files

import yaml

from tunesmith.spec import Spec, make_spec


def demo_spec(overrides: list[str] | None = None) -> Spec:
    """The spec of `tunesmith demo`, with `key=value` overrides. Its files travel with the package."""
    folder = files("tunesmith.ladder") / "demo_files"
    values = yaml.safe_load((folder / "demo.yaml").read_text(encoding="utf-8"))
    values["climb"]["demonstrations"] = str(folder / values["climb"]["demonstrations"])
    return make_spec(values, overrides or [], where="the demo's spec")
