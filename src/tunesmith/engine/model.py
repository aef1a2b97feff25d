"""A base with adapters on it: what is trained, evaluated and asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from tunesmith.adapters import Adapter, TaskHead, attach
from tunesmith.bases import Base
from tunesmith.core.errors import AdapterError
from tunesmith.data.rendering import Renderer, renderer_for
from tunesmith.engine.forward import Forward
from tunesmith.engine.probe import probe


@dataclass(slots=True)
class Model:
    """base: the frozen model. adapters: those that this model uses, first attached first; the last may be trained."""

    base: Base
    adapters: list[Adapter] = field(default_factory=list)
    name: str = ""

    @property
    def adapter(self) -> Adapter:
        """The adapter that training changes. Raises AdapterError on a bare base."""
        if not self.adapters:
            raise AdapterError("the model has no adapter to train.", hints=["Attach one:  ts.attach(base, 'lora(rank=16)')"])
        return self.adapters[-1]

    @property
    def head(self) -> TaskHead | None:
        """The task head that answers for this model: that of its last adapter."""
        return self.adapters[-1].head if self.adapters else None

    @property
    def forward(self) -> Forward:
        """The base's forward, probed once a base."""
        return forward_of(self.base)

    @property
    def renderer(self) -> Renderer:
        """How dialogues become tokens for this base, everywhere."""
        base = self.base
        return renderer_for(base.tokenizer, base.template, system=base.system_turn, special=base.special, variables=base.template_variables)

    @property
    def virtual_tokens(self) -> int:
        """Tokens that its adapters add to every text; counts of tokens leave them out."""
        return sum(tokens.count for adapter in self.adapters for tokens in adapter.virtual.values())

    @property
    def context_length(self) -> int | None:
        """Tokens that a text and its answer may have at most: the base's context less the virtual tokens."""
        return None if self.base.context_length is None else self.base.context_length - self.virtual_tokens

    def trainable(self) -> int:
        """Values that training may change."""
        return self.adapters[-1].trainable() if self.adapters else 0

    def detach(self) -> None:
        """Take this model's adapters off its base, which then computes exactly what it did before."""
        for adapter in reversed(self.adapters):
            adapter.detach()
            attached_to(self.base).remove(adapter)
        self.adapters = []

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run with exactly this model's adapters, whatever else is attached to the base. May be nested with another model's."""
        with ExitStack() as stack:
            for adapter in reversed(attached_to(self.base)):  # in-place ones lie upon one another
                if adapter not in self.adapters:
                    stack.enter_context(adapter.switched(False))
            for adapter in self.adapters:
                stack.enter_context(adapter.switched(True))
            yield


def forward_of(base: Base) -> Forward:
    """The one Forward of a base; probing happens at the first call, under no adapter."""
    kept: Forward | None = base.model.__dict__.get("ts_forward")
    if kept is None:
        with Model(base).active():
            kept = base.model.__dict__["ts_forward"] = probe(base.model, speaks=base.kind == "decoder")
        kept.name = base.name
    return kept


def attached_to(base: Base) -> list[Adapter]:
    """All adapters on the base's model, kept on the model itself so that they live as long as it does."""
    attached: list[Adapter] = base.model.__dict__.setdefault("ts_attached", [])
    return attached


def attach_to(model: Base | Model, expression: str, *, name: str = "", keep_original: bool = True, seed: int = 0) -> Model:
    """A model with one more adapter, which is the one that training changes; those before it are frozen.

    Raises AdapterError where another model's adapter has changed the base's own weights, or the expression does not fit.
    """
    start = model if isinstance(model, Model) else Model(model)
    base = start.base
    forward_of(base)
    for other in attached_to(base):
        if other.in_place and other not in start.adapters:
            raise AdapterError(
                f"'{other.expression}' of another model has changed this base's own weights.",
                hints=["Detach that model first, attach on top of it, or load the base again."],
            )
    for adapter in start.adapters:
        adapter.freeze()
    unique = name or free_name(base, "adapter", first=0)
    new_words = [] if start.adapters else base.new_token_ids
    adapter = attach(
        base.model,
        expression,
        name=unique,
        new_words=new_words,
        keep_original=keep_original,
        seed=seed,
        encode=_encoder(base),
        fingerprint=base.fingerprint,
        beneath=[each.digest for each in start.adapters],
    )
    attached_to(base).append(adapter)
    return Model(base, [*start.adapters, adapter], start.name)


def free_name(base: Base, stem: str, first: int | None = None) -> str:
    """A name that no adapter on the base has: the stem, or the stem and a number. first: the number to begin with, None for none."""
    taken = {adapter.name for adapter in attached_to(base)}
    stem = stem.replace(".", "-").replace("~", "-") or "run"
    numbers = range(1 if first is None else first, len(taken) + 2)
    return next(name for name in [*([stem] if first is None else []), *(f"{stem}{n}" for n in numbers)] if name not in taken)


def _encoder(base: Base) -> Callable[[str], list[int]]:
    """The base's tokenizer, for adapters that begin with words."""
    return lambda text: list(base.tokenizer(text, add_special_tokens=False)["input_ids"])


def add_adapter(base: Base, adapter: Adapter) -> None:
    """Note an adapter that was loaded from files, so that `active` can leave it out for others."""
    attached_to(base).append(adapter)
