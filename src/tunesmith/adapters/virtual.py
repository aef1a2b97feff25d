"""Virtual tokens: vectors that an adapter puts before, or among, the words of a text.

They are token ids at or above the vocabulary's size: id V + k means vector k. The embedding never sees such an id (a hook
before it puts another in its place) and its answer there is exchanged for the vector (a hook behind it). So they pass
through packs, padding, caches and attention of every kind as words do, and only their numbers are the adapter's. A method
may also give their keys and values at every layer: then a form at each key and value site exchanges what leaves it there.

Some steps of a forward happen after the embedding has been asked, and activations may be computed again in the backward:
`Moment` is what a forward has to know until then, and `remembering` gives it back to the second computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tunesmith.adapters.forms import Form
from tunesmith.adapters.hooks import ByName
from tunesmith.core.errors import AdapterError

Place = int | Literal["end"]
"""Where tokens stand: after so many tokens of the text, or right before what is learned from or answered ("end")."""

Encode = Callable[[str], Sequence[int]]
"""Text to token ids."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a forward meets an owner's tokens. at: their flat indices in [batch * tokens]; which: their vectors, [met].

    layers: what its forms give, in their order, [count, outputs] each.
    """

    at: Tensor
    which: Tensor
    layers: Sequence[Tensor]


class VirtualTokens(nn.Module):
    """`count` tokens of one adapter. first: id of the first, counted from the end of the vocabulary. active: switched on.

    places: where they stand, as many at each as at the others. forms: path of a site -> what gives their outputs there.
    fixed: their keys and values at every layer are given, so they depend on nothing before them, and nothing on their states.
    """

    fixed = False

    def __init__(self, count: int, places: Sequence[Place] = (0,)) -> None:
        super().__init__()
        self.count, self.places = count, tuple(places)
        self.first, self.active = 0, True
        self.__dict__["forms"] = {}
        self.__dict__["moment"] = None

    forms: dict[str, LayerVectors]
    moment: Moment | None
    table: nn.Parameter

    def vectors(self) -> Tensor:
        """What stands in place of the embedding's vectors, fp32 [count, width]."""
        return self.table

    def layers(self) -> Sequence[Tensor]:
        """What each of the forms gives, [count, outputs] each, in the order of `forms`."""
        return ()

    def saved(self) -> Tensor | None:
        """What PEFT keeps of it under the name `prompt_embeddings`, [count, ...]; None where its function is not PEFT's."""
        return None

    def groups(self) -> list[tuple[Place, range]]:
        """The tokens at each place, as numbers from `first`."""
        each = self.count // len(self.places)
        return [(place, range(self.first + at * each, self.first + (at + 1) * each)) for at, place in enumerate(self.places)]

    def meet(self, ids: Tensor, vocabulary: int) -> None:
        """Find its tokens among ids [batch, tokens], and have the forms ready for them."""
        flat = ids.flatten() - (vocabulary + self.first)
        at = ((flat >= 0) & (flat < self.count)).nonzero()[:, 0]
        self.put(Moment(at, flat[at], self.layers()) if len(at) else None)

    def put(self, moment: Moment | None) -> None:
        """Be at this moment of this forward."""
        if moment is self.moment:
            return
        self.__dict__["moment"] = moment
        for number, form in enumerate(self.forms.values()):
            form.give(*((None, None, None) if moment is None else (moment.layers[number], moment.at, moment.which)))

    def embed(self, out: Tensor) -> Tensor:
        """The embedding's answer, [batch, tokens, width], with its vectors in their places."""
        if self.moment is None:
            return out
        new = self.vectors()[self.moment.which].to(out.dtype)
        return out.flatten(0, -2).index_copy(0, self.moment.at, new).view(out.shape)


class LayerVectors(Form):
    """What leaves a site at virtual tokens is given, whatever entered there. It comes after all other forms of its site.

    axis: that of the tokens in what leaves the site, 1 ([batch, tokens, ...]) or 2 ([batch, heads, tokens, dim]).
    columns: which outputs are given, where a site computes others besides; None for all. It owns no parameter.
    """

    last = True
    columns: Tensor | None

    def __init__(self, axis: int = 1, columns: Tensor | None = None) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("columns", columns, persistent=False)
        self.give(None, None, None)

    def give(self, vectors: Tensor | None, at: Tensor | None, which: Tensor | None) -> None:
        """The outputs of all tokens, [count, outputs], and where which of them stand in the forward to come; None for nowhere."""
        self.__dict__.update(vectors=vectors, at=at, which=which)  # plain attributes: no parameters, and compiled code sees them change

    vectors: Tensor | None
    at: Tensor | None
    which: Tensor | None

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        if self.at is None or self.vectors is None or self.which is None:
            return out
        moved = out if self.axis == 1 else out.transpose(1, 2)
        flat = moved.flatten(0, 1)
        new = self.vectors.index_select(0, self.which).to(out.dtype)
        if self.columns is not None:
            new = flat.index_select(0, self.at).index_copy(1, self.columns, new)
        flat = flat.index_copy(0, self.at, new.view(-1, *flat.shape[1:]))
        given = flat.view(moved.shape)
        return given if self.axis == 1 else given.transpose(1, 2)


def vocabulary_of(model: Any) -> int:
    """Words of the model's embedding; virtual ids begin there. Raises AdapterError for a model that embeds no words."""
    return int(_embedding(model).weight.shape[0])


def standing(model: Any, names: Sequence[str] | None = None) -> tuple[VirtualTokens, ...]:
    """The virtual tokens that are switched on, first attached first; names: of adapters, where those of some only are meant."""
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    found: tuple[VirtualTokens, ...] = () if embedding is None else embedding.__dict__.get("ts_virtual_on", ())
    if names is None or not found:
        return found
    owners = {id(tokens): key.split("~")[0] for key, tokens in embedding.ts_virtual.items()}
    return tuple(tokens for tokens in found if owners[id(tokens)] in names)


def join_tokens(model: Any, key: str, tokens: VirtualTokens) -> None:
    """Make tokens a submodule of the embedding, under ids that no other adapter has."""
    embedding = _embedding(model)
    if not hasattr(embedding, "ts_virtual"):
        embedding.ts_virtual = ByName()
        for module in [
            each for each in model.modules() if getattr(each, "weight", None) is embedding.weight and hasattr(each, "num_embeddings")
        ]:
            module.__dict__["ts_virtual_of"] = embedding  # some families look words up in a module of its own with the same table
            module.register_forward_pre_hook(_before)
            module.register_forward_hook(_behind)
    if key in embedding.ts_virtual:
        raise AdapterError(f"an adapter named '{key}' has virtual tokens already.", hints=["Detach it first, or give another name."])
    tokens.first = max((other.first + other.count for other in embedding.ts_virtual.values()), default=0)
    embedding.ts_virtual[key] = tokens
    refresh_tokens(model)


def remove_tokens(model: Any, key: str) -> None:
    """Take tokens off."""
    embedding = _embedding(model)
    if key in getattr(embedding, "ts_virtual", ()):
        embedding.ts_virtual[key].put(None)
        del embedding.ts_virtual[key]
    refresh_tokens(model)


def refresh_tokens(model: Any) -> None:
    """Put into force which tokens are switched on."""
    embedding = _embedding(model)
    if hasattr(embedding, "ts_virtual"):
        embedding.__dict__["ts_virtual_on"] = tuple(tokens for tokens in embedding.ts_virtual.values() if tokens.active)


def virtual_among(model: Any) -> Tensor | None:
    """Flat indices of all virtual tokens in the forward that goes on, None where there are none."""
    met = [tokens.moment.at for tokens in standing(model) if tokens.moment is not None]
    return torch.cat(met) if met else None


def remembering(model: Any) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """For torch's checkpoint: a layer that is computed again in the backward meets the tokens of its own forward."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _again([(tokens, tokens.moment) for tokens in standing(model)])

    return contexts


@contextmanager
def _again(moments: Sequence[tuple[VirtualTokens, Moment | None]]) -> Iterator[None]:
    before = [(tokens, tokens.moment) for tokens, _ in moments]
    for tokens, moment in moments:
        tokens.put(moment)
    try:
        yield
    finally:
        for tokens, moment in before:
            tokens.put(moment)


def _embedding(model: Any) -> Any:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if embedding is None or not hasattr(embedding, "weight"):
        raise AdapterError(f"{type(model).__name__} has no embedding of words that virtual tokens could stand beside.")
    return embedding


def _before(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Find virtual ids, and give the embedding others that it knows."""
    on = module.__dict__["ts_virtual_of"].__dict__["ts_virtual_on"]
    if not on:
        return None
    ids, vocabulary = args[0], module.weight.shape[0]
    if not ids.numel() or int(ids.max()) < vocabulary:
        for tokens in on:
            tokens.put(None)
        return None
    for tokens in on:
        tokens.meet(ids, vocabulary)
    return (ids.clamp(max=vocabulary - 1), *args[1:])


def _behind(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    for tokens in module.__dict__["ts_virtual_of"].__dict__["ts_virtual_on"]:
        out = tokens.embed(out)
    return out
