"""Several adapters in one forward: each stretch of its tokens goes through the adapters that it asks for, and no others.

Within `routing` a router stands at every site in place of its forms. It is told before each forward which tokens go which
way, and gives every form the tokens that are its own. Virtual tokens need no router: each is met by its id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tunesmith.adapters.attach import Adapter
from tunesmith.adapters.forms import Form
from tunesmith.adapters.hooks import refresh_forms
from tunesmith.adapters.side import Rung
from tunesmith.adapters.virtual import LayerVectors
from tunesmith.core.errors import AdapterError

Route = tuple[str, ...]
"""Names of the adapters that a text goes through, first attached first; none of them: the base alone."""


class Router:
    """Where the tokens of the next forward go, flattened from [batch, tokens].

    stretches: (way, tokens) one after another, each way once. order: which token stands at each place of them, back: the place
    of each token; both None where tokens lie in that order already.
    """

    def __init__(self) -> None:
        self.stretches: list[tuple[Route, int]] = []
        self.shape = (0, 0)
        self.order: Tensor | None = None
        self.back: Tensor | None = None

    def send(self, parts: Sequence[tuple[Route, int]], shape: tuple[int, int], device: torch.device) -> None:
        """Tell it of the next forward, of ids of this shape. parts: (way, tokens), in the order in which the tokens lie."""
        joined = [(way, sum(count for _, count in same)) for way, same in groupby(parts, key=lambda part: part[0])]
        if sum(count for _, count in joined) != shape[0] * shape[1]:
            raise ValueError("every token needs a way")
        self.shape, self.order, self.back = shape, None, None
        ways = list(dict.fromkeys(way for way, _ in joined))
        if len(ways) < len(joined):
            number = np.repeat([ways.index(way) for way, _ in joined], [count for _, count in joined])
            order = np.argsort(number, kind="stable")
            self.order, self.back = (torch.from_numpy(x).to(device) for x in (order, np.argsort(order)))
            joined = [(way, int(count)) for way, count in zip(ways, np.bincount(number, minlength=len(ways)), strict=True)]
        self.stretches = joined

    def stand_at(self, module: Any) -> None:
        """Take the place of the forms that listen at a site, each under the name of its adapter."""
        names = {id(form): key.split("~")[0] for key, form in module.ts_forms.items()}
        for slot in ("ts_before", "ts_active"):
            forms: tuple[Form, ...] = getattr(module, slot)
            own = tuple((names[id(form)], form) for form in forms if not isinstance(form, LayerVectors))
            whole = tuple(form for form in forms if isinstance(form, LayerVectors))
            setattr(module, slot, ((Crossing(self, own),) if own else ()) + whole)

    def flat(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] -> [tokens of all, width], in the order of the stretches."""
        if tuple(x.shape[:-1]) not in (self.shape, (self.shape[0] * self.shape[1],)):
            raise AdapterError(
                "this model calls a site with something else than the tokens of texts, so rows cannot go different ways there.",
                hints=["Ask for the rows of one adapter at a time."],
            )
        x = x.flatten(0, -2)
        return x if self.order is None else x.index_select(0, self.order)


@dataclass(frozen=True, slots=True)
class Crossing:
    """What stands at a site: the forms of several adapters, each for its own tokens. forms: (name of the adapter, form)."""

    router: Router
    forms: tuple[tuple[str, Form], ...]

    def enter(self, x: Tensor) -> Tensor:
        """As Form.enter."""
        return self._each(x, None)

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        """As Form.leave."""
        return self._each(out, x)

    def _each(self, changed: Tensor, x: Tensor | None) -> Tensor:
        router = self.router
        flat, read = router.flat(changed), None if x is None else router.flat(x)
        pieces, start, touched = [], 0, False
        for way, count in router.stretches:
            piece, end = flat[start : start + count], start + count
            own = [form for name, form in self.forms if name in way] if count else []
            if own:
                touched, piece = True, piece[None]
                for form in own:
                    piece = form.enter(piece) if read is None else form.leave(piece, read[None, start:end])
                piece = piece[0]
            pieces.append(piece)
            start = end
        if not touched:
            return changed
        joined = torch.cat(pieces)
        return (joined if router.back is None else joined.index_select(0, router.back)).view(changed.shape)


@contextmanager
def routing(model: nn.Module, adapters: Sequence[Adapter]) -> Iterator[Router]:
    """A router for these adapters, which are switched on and stay so. All others have to be switched off.

    Raises AdapterError for an adapter that cannot be left out for some of the rows.
    """
    for adapter in adapters:
        require_apart(adapter)
    router: Router = model.__dict__.setdefault("ts_routes", Router())  # one a model: kept prompts then know it again
    sites: list[Any] = [module for module in model.modules() if hasattr(module, "ts_forms")]
    try:
        for site in sites:
            site.__dict__["ts_router"] = router
            refresh_forms(site)
        yield router
    finally:
        for site in sites:
            site.__dict__.pop("ts_router", None)
            refresh_forms(site)


def require_apart(adapter: Adapter) -> None:
    """Raise AdapterError unless an adapter can serve some rows of a forward and leave the others alone."""
    reason = _inseparable(adapter)
    if reason:
        raise AdapterError(
            f"'{adapter.expression}' ({adapter.name}) serves all rows of a forward or none: {reason}.",
            hints=["Ask for its rows by themselves:  ts.generate(model, ...)", "What goes beside others:  lora, bottleneck, ia3, prefix"],
        )


def _inseparable(adapter: Adapter) -> str:
    if adapter.trained:
        return "it changed the base's own weights"
    if adapter.merged:
        return "it is merged into the base's weights"
    if any(isinstance(form, Rung) for form in adapter.forms.values()):
        return "its layers hand their states on to one another"
    if any(form.writes for form in adapter.forms.values()):
        return "it writes into the base's own weights"
    if adapter.rows:
        return "it has vectors of new words, in a table that all rows read"
    head = getattr(adapter.model, "get_output_embeddings", lambda: None)()
    if head is not None and any(adapter.model.get_submodule(path.split("~")[0]) is head for path in adapter.forms):
        return "it listens at the vocabulary head, which is read for all rows at once"
    return ""
