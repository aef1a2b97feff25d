"""Where a model makes keys and values, and what it does to them on their way to the attention.

Found by structure and by trying: a short text is read with given keys and values in some places, and everything that a
prefix relies on is seen there, not looked up in a list of families.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tunesmith.adapters.sites import Site, blocks, find_sites
from tunesmith.adapters.virtual import LayerVectors
from tunesmith.core.errors import AdapterError

_NORMS = ("k_norm", "k_layernorm", "key_layernorm", "k_ln")
"""What families call the norm of keys. It would take their length from learned keys, so they are given behind it."""

_LISTEN = "tunesmith-listen"
_TRIED = 4
"""Tokens whose keys are given in the trial."""


@dataclass(slots=True)
class Turn:
    """What the layers `layers` do to a key of a head on its way, by position: `back` [tokens, dim, dim] undoes it."""

    layers: list[int]
    back: Tensor


@dataclass(slots=True)
class KeyValueSites:
    """The places of every layer. forms: path -> form, in the order of `order`: (layer, part) with part 0 for keys, 1 for
    values, None for both side by side. heads, dim: of a layer's keys. turns: what happens to keys on their way, empty for
    nothing, None where it is no linear map of each key or cannot be seen; then what is learned is the key before it."""

    forms: dict[str, LayerVectors]
    order: list[tuple[int, int | None]]
    layers: int
    heads: int
    dim: int
    turns: list[Turn] | None


def key_value_sites(model: Any, tokens: int, who: str) -> KeyValueSites:
    """Find them for a prefix of so many tokens. Raises AdapterError, naming the method `who`, where the model has none that would do."""
    spots = _spots(model, who)
    forms = {path: form for path, _, _, form in spots}
    order = [(layer, part) for _, layer, part, _ in spots]
    layers = 1 + max(layer for layer, _ in order)
    config = model.config.get_text_config()
    width = next(_width(model, path, form, part) for path, _, part, form in spots if part in (0, None))
    heads = _kv_heads(config)
    found = KeyValueSites(forms, order, layers, *((heads, width // heads) if width % heads == 0 else (1, width)), None)
    try:
        _require_alone(model, found, who)
    except (RuntimeError, ValueError, IndexError, TypeError) as cause:
        raise _refused(who, model, f"it cannot read a short text ({str(cause).splitlines()[:1]})") from None
    try:
        found.turns = _turns(model, found, tokens)
    except Exception:  # whatever keeps us from seeing keys at the attention: they are then learned as they leave their site
        found.turns = None
    return found


def _spots(model: Any, who: str) -> list[tuple[str, int, int | None, LayerVectors]]:
    """(path, layer, part, form) of what gives keys and values: one key and one value a layer."""
    _, layers = blocks(model)
    sites = [site for site in find_sites(model) if site.name in ("k", "v", "qkv")]
    by_layer = [[site for site in sites if site.layer == number] for number in range(len(layers))]
    config = model.config.get_text_config()
    if len(layers) != getattr(config, "num_hidden_layers", len(layers)):
        raise _refused(
            who, model, f"its {config.num_hidden_layers} layers share {len(layers)} sets of weights, so no layer has keys of its own"
        )
    out: list[tuple[str, int, int | None, LayerVectors]] = []
    for number, own in enumerate(by_layer):
        names = sorted(site.name for site in own)
        if names == ["k", "v"]:
            key, value = sorted(own, key=lambda site: site.name)
            if key.outputs != value.outputs:
                raise _refused(who, model, f"keys and values of layer {number} differ in width")
            out += [(_behind_norm(model, key), number, 0, LayerVectors()), (value.path, number, 1, LayerVectors())]
        elif names == ["qkv"] and getattr(config, "num_attention_heads", None):
            keys, values = _columns(config, own[0])
            norm = _behind_norm(model, own[0])
            if norm != own[0].path:
                out += [(norm, number, 0, LayerVectors()), (own[0].path, number, 1, LayerVectors(columns=values))]
            else:
                out.append((own[0].path, number, None, LayerVectors(columns=torch.cat([keys, values]))))
        else:
            has = ", ".join(names) if names else "no map to keys and values"
            what = f"layer {number} has {has} where one key and one value map are needed"
            raise _refused(who, model, what)
    return out


def _refused(who: str, model: Any, why: str) -> AdapterError:
    what = f"{who} gives keys and values at every layer, which {type(model).__name__} has no place for: {why}."
    return AdapterError(what, hints=["Nearest that works here:  prompt  or  ptuning, which stand before the text as tokens do"])


def _behind_norm(model: Any, site: Site) -> str:
    """Path of the norm that keys go through, or of the site itself."""
    parent = site.path.rpartition(".")[0]
    held = model.get_submodule(parent)
    for name in _NORMS:
        if isinstance(getattr(held, name, None), nn.Module) and not isinstance(getattr(held, name), nn.Identity):
            return f"{parent}.{name}"
    return site.path


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None) or 1)


def _columns(config: Any, site: Site) -> tuple[Tensor, Tensor]:
    """Outputs of a joint map that are keys, and values: all queries, keys, values, or those of one head after another."""
    heads, kv = int(config.num_attention_heads), _kv_heads(config)
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    if site.path.endswith("query_key_value"):
        each = torch.arange(site.outputs).view(-1, 3, dim) if site.outputs % (3 * dim) == 0 else torch.zeros(0, 3, dim, dtype=torch.long)
        return each[:, 1].flatten(), each[:, 2].flatten()
    start = site.outputs - 2 * kv * dim
    both = torch.arange(max(start, 0), site.outputs)
    return both[: kv * dim], both[kv * dim :]


def _width(model: Any, path: str, form: LayerVectors, part: int | None) -> int:
    """Values of a layer's key."""
    if form.columns is not None:
        return len(form.columns) // (2 if part is None else 1)
    module = model.get_submodule(path)
    if hasattr(module, "out_features"):
        return int(module.out_features)
    config = model.config.get_text_config()
    dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return _kv_heads(config) * dim


# Trying


def _text(model: Any, shape: tuple[int, int], seed: int) -> Tensor:
    """Random words, none of which is padding."""
    weight = model.get_input_embeddings().weight
    pad = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    ids = torch.randint(0, weight.shape[0] - 1, shape, generator=torch.Generator().manual_seed(seed))
    return (ids + (ids >= pad)).clamp(max=weight.shape[0] - 1).to(weight.device)


@torch.no_grad()
def _read(model: Any, ids: Tensor) -> Tensor:
    states: Tensor = model.base_model(input_ids=ids)[0]
    return states


@contextmanager
def _hooked(model: Any, paths: Sequence[str], hooks: Sequence[Callable[..., Any]]) -> Iterator[None]:
    handles = [model.get_submodule(path).register_forward_hook(hook) for path, hook in zip(paths, hooks, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _given(model: Any, found: KeyValueSites, see: Callable[[str, LayerVectors, Tensor], None] | None = None) -> Iterator[None]:
    """With the forms at work, before they are attached. see: told what leaves each site before its form changes it."""

    def hook(path: str, form: LayerVectors) -> Callable[..., Any]:
        def leave(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            if see is not None:
                see(path, form, out)
            return form.leave(out, args[0])

        return leave

    try:
        with _hooked(model, list(found.forms), [hook(*each) for each in found.forms.items()]):
            yield
    finally:
        for form in found.forms.values():
            form.give(None, None, None)


def _require_alone(model: Any, found: KeyValueSites, who: str) -> None:
    """See at which axis each site's outputs have their tokens, and refuse a site that is called otherwise than once a text, and a model in
    which words reach later ones by another way than the keys and values that are given. One short text is read for it all."""
    length = next(n for n in range(_TRIED + 3, _TRIED + 6) if n not in (found.heads, found.dim))
    ids = _text(model, (2, length), 2)
    ids[1, _TRIED:] = ids[0, _TRIED:]
    ids[1, :_TRIED] = _text(model, (1, _TRIED), 3)[0]
    at = torch.cat([torch.arange(_TRIED), torch.arange(_TRIED) + length]).to(ids.device)
    which = torch.arange(_TRIED).repeat(2).to(ids.device)
    vectors = torch.randn(_TRIED, 2, found.heads * found.dim, generator=torch.Generator().manual_seed(4)).to(ids.device)
    shapes: dict[str, list[tuple[int, ...]]] = {path: [] for path in found.forms}

    def require_once(path: str) -> None:
        seen = shapes[path]
        if len(seen) != 1 or seen[0][0] != 2 or length not in seen[0][1:3]:
            raise _refused(who, model, f"{path} is called {len(seen)} times a text, with shapes {seen[:2]}")

    def see(path: str, form: LayerVectors, out: Tensor) -> None:
        shapes[path].append(tuple(out.shape))
        require_once(path)
        form.axis = 1 if out.shape[1] == length else 2

    with _given(model, found, see):
        for (_, part), form in zip(found.order, found.forms.values(), strict=True):
            form.give(vectors.flatten(1) if part is None else vectors[:, part], at, which)
        states = _read(model, ids)[:, _TRIED:].float()
    for path in found.forms:
        require_once(path)
    apart, scale = (states[0] - states[1]).abs().max(), states.abs().max()
    if not bool(apart <= (1e-3 if model.dtype in (torch.float32, torch.float64) else 3e-2) * scale):
        raise _refused(who, model, "later words depend on earlier ones by more than their keys and values")


class _Enough(Exception):
    """The layer in question has been seen."""


@contextmanager
def _listening(model: Any, heard: list[tuple[Tensor, Tensor]], last: int) -> Iterator[None]:
    """Hear the keys and values that each layer's attention gets, up to layer `last`; the attention itself answers zero."""

    def listen(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **extra: Any) -> tuple[Tensor, None]:
        heard.append((key.float(), value.float()))
        if len(heard) > last:
            raise _Enough
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register(_LISTEN, listen)
    before = model.config._attn_implementation
    model.set_attn_implementation(_LISTEN)
    try:
        yield
    except _Enough:
        pass
    finally:
        model.set_attn_implementation(before)


def _hear(model: Any, found: KeyValueSites, keys: Tensor, values: Tensor, tokens: int, last: int) -> list[tuple[Tensor, Tensor]]:
    """What the attention of layers 0 to `last` gets, [texts, heads, tokens, dim] each, where the sites give keys and values
    [layers, texts * tokens, width] at every token."""
    texts = keys.shape[1] // tokens
    ids = _text(model, (texts, tokens), 5)
    at = torch.arange(texts * tokens, device=ids.device)
    heard: list[tuple[Tensor, Tensor]] = []
    with _given(model, found), _listening(model, heard, last):
        for (layer, part), form in zip(found.order, found.forms.values(), strict=True):
            both = torch.cat([keys[layer], values[layer]], -1)
            form.give(both if part is None else (keys, values)[part][layer], at, at)
        _read(model, ids)
    return heard


def _turns(model: Any, found: KeyValueSites, tokens: int) -> list[Turn] | None:
    """What each layer does to keys, by position, and the way back."""
    if not model._can_set_attn_implementation():
        return None
    device = model.get_input_embeddings().weight.device
    heads, dim, count = found.heads, found.dim, found.layers
    generator = torch.Generator().manual_seed(6)
    keys, values = (torch.rand(count, tokens, heads * dim, generator=generator).to(device) - 0.5 for _ in range(2))
    heard = _hear(model, found, keys, values, tokens, count - 1)
    close = 1e-4 if model.dtype in (torch.float32, torch.float64) else 4e-2
    shape = (1, heads, tokens, dim)
    if len(heard) == count and heard[0][0].ndim == 4:  # a configuration may name heads that the model does not heed
        heads, dim = found.heads, found.dim = heard[0][0].shape[1], heard[0][0].shape[3]
    shape = (1, heads, tokens, dim)
    if len(heard) != count or any(key.shape != shape or value.shape != shape for key, value in heard):
        return None
    as_heard = [x.view(count, tokens, heads, dim).transpose(1, 2) for x in (keys, values)]
    if any(bool((value[0] - given).abs().max() > close) for (_, value), given in zip(heard, as_heard[1], strict=True)):
        return None
    pending = [layer for layer in range(count) if bool((heard[layer][0][0] - as_heard[0][layer]).abs().max() > close)]
    turns: list[Turn] = []
    while pending:
        turn = _turn(model, found, pending[0], tokens)
        made = [(layer, torch.einsum("hnd,ned->hne", as_heard[0][layer], turn)) for layer in pending]
        same = [layer for layer, key in made if bool((key - heard[layer][0][0]).abs().max() <= close * 3)]
        if pending[0] not in same:
            return None
        turns.append(Turn(same, torch.linalg.inv(turn)))
        pending = [layer for layer in pending if layer not in same]
    return turns


def _turn(model: Any, found: KeyValueSites, layer: int, tokens: int) -> Tensor:
    """The map of a layer's key at each position, [tokens, dim, dim]: heads and texts are given the unit vectors."""
    heads, dim = found.heads, found.dim
    texts = -(-dim // heads)
    unit = torch.zeros(texts * heads, dim)
    unit[torch.arange(dim), torch.arange(dim)] = 1
    given = unit.view(texts, 1, heads * dim).expand(-1, tokens, -1).reshape(1, texts * tokens, heads * dim)
    given = given.expand(found.layers, -1, -1).to(model.get_input_embeddings().weight.device)
    key = _hear(model, found, given, torch.zeros_like(given), tokens, layer)[layer][0]
    return key.permute(2, 3, 0, 1).flatten(2)[:, :, :dim]
