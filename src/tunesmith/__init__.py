"""Tunesmith adapts a language model to a task and proves, with numbers, which adaptation was worth it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.api import (
        Comparison,
        Evaluation,
        Plan,
        Run,
        attach,
        choose,
        classify,
        climb,
        compare,
        connect,
        evaluate,
        generate,
        load_base,
        open,
        plan,
        rate,
        tag,
        train,
    )  # fmt: skip

__version__ = "0.1.0"
__all__ = [
    "Comparison", "Evaluation", "Plan", "Run", "attach", "choose", "classify", "climb", "compare", "connect", "evaluate", "generate",
    "load_base", "open", "plan", "rate", "tag", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load the verbs when they are first asked for, so that the command line's help needs no torch."""
    if name in __all__:
        from tunesmith import api

        return getattr(api, name)
    raise AttributeError(f"module 'tunesmith' has no attribute '{name}'")
