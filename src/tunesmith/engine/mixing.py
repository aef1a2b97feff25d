"""Models that share a base, in one batch: each row says which of them it goes through.

Rows of one model lie together in a pack, and its own forms see their tokens alone. Nothing is shared between rows of different
models, not even what their prompts have in common, for its keys and values differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tunesmith.adapters import Route, routing
from tunesmith.bases import Base
from tunesmith.core.errors import AdapterError, unknown
from tunesmith.engine.decoders import keeps_keys
from tunesmith.engine.model import Model, attached_to, forward_of

Choice = Model | str | None
"""A model on the base, the name of an adapter that is attached to it, or None for the base alone."""


def chosen(base: Base, choices: Sequence[Choice]) -> list[Model]:
    """The models that are meant. Raises AdapterError for one on another base, or an adapter that is not attached."""
    named = {adapter.name: adapter for adapter in attached_to(base)}
    models = []
    for choice in choices:
        if isinstance(choice, Model):
            if choice.base.model is not base.model:
                raise AdapterError(
                    "rows of one batch need one base, and a model on another one was given.",
                    hints=["Attach both to one:  ts.attach(base, ...)  ·  ts.open('runs/NAME', base=base)"],
                )
            models.append(choice)
        elif choice is None:
            models.append(Model(base))
        elif choice in named:
            models.append(Model(base, [named[choice]], choice))
        else:
            raise unknown("adapter", choice, list(named), error=AdapterError)
    return models


def route_of(model: Model) -> Route:
    """The adapters of a model by name, as rows say them."""
    return tuple(adapter.name for adapter in model.adapters)


@contextmanager
def mixed(base: Base, models: Sequence[Model]) -> Iterator[None]:
    """Within it, packs and prompts of the base's forward are given `routes`: that of one of these models for each row.

    Raises AdapterError for an adapter that cannot serve some rows and leave the others alone, ValueError within another mix.
    """
    forward = forward_of(base)
    if forward.router is not None:
        raise ValueError("a mix within a mix")
    used = list({id(adapter): adapter for model in models for adapter in model.adapters}.values())
    with Model(base, used).active():
        if forward.speaks:
            keeps_keys(forward)  # tried once a model, on rows without routes
        with routing(base.model, used) as router:
            forward.router = router
            try:
                yield
            finally:
                forward.router = None
