"""Sites: named places in any transformer where an adapter may listen.

Found by structure: the decoder's (or encoder's) repeated blocks, and in each block the linear maps by the names that
transformers' families use. Asking for a site a model lacks is an error that says what it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tunesmith.core.errors import AdapterError, unknown

_NAMES: dict[str, str] = {
    "q": r"(q_proj|query|q_lin|q|wq|query_proj)",
    "k": r"(k_proj|key|k_lin|k|wk|key_proj)",
    "v": r"(v_proj|value|v_lin|v|wv|value_proj)",
    "qkv": r"(qkv_proj|query_key_value|c_attn|qkv|Wqkv|in_proj)",
    "o": r"(o_proj|out_proj|out_lin|attention\.output\.dense|attention\.dense|self_(attention|attn)\.dense|attn\.c_proj|attn\.Wo|wo|o)",
    "gate": r"(gate_proj|w1|wi_0)",
    "up": r"(up_proj|w3|intermediate\.dense|fc1|fc_in|lin1|dense_h_to_4h|mlp\.c_fc|wi|wi_1|ffn)",
    "gate_up": r"(gate_up_proj|mlp\.Wi)",
    "down": r"(down_proj|w2|(?<!attention\.)output\.dense|fc2|fc_out|lin2|dense_4h_to_h|mlp\.c_proj|mlp\.Wo|DenseReluDense\.wo|ffn_output)",
}
_ORDER = tuple(_NAMES)
_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
_EXPERT = re.compile(r"(^|\.)experts(\.|$)")
_CROSS = re.compile(r"(EncDecAttention|crossattention|cross_attn|encoder_attn)")
SUBLAYERS = ("attn", "ffn", "block")
"""What a block adds to the residual stream: that of attention, that of the feed-forward; and the block as a whole."""
_POST_NORMS = {
    "attn": ("post_self_attn_layernorm", "post_attention_layernorm"),
    "ffn": ("post_mlp_layernorm", "post_feedforward_layernorm"),
}
"""Norms between a sub-layer's last map and the residual stream. The same name means another norm where the feed-forward has none."""


@dataclass(frozen=True, slots=True)
class Site:
    """One place. name: "q", "down", "attn", ... layer: block number from 0, or -1 outside of blocks. path: module path. inputs, outputs:
    widths. source: of a sub-layer, the path of the module that its input enters, where `module` is the one that its output leaves. calls:
    layers that share the block.
    """

    name: str
    layer: int
    path: str
    module: nn.Module
    inputs: int
    outputs: int
    source: str = ""
    calls: int = 1


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the model's repeated blocks: the ModuleList that holds most parameters.

    Raises AdapterError where there is none.
    """
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise AdapterError(
            f"{type(model).__name__} has no list of repeated layers, so its sites cannot be found.",
            hints=["Nearest that works here:  full  trains every parameter  ·  modules(names=[...])  trains the named ones"],
        )
    outer = [(p, m) for p, m in lists if not any(p != q and p.startswith(q + ".") for q, _ in lists)]
    return max(outer, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of every block, in the order of layers; an encoder-decoder's encoder comes first, and its decoder is counted on.

    Raises AdapterError as `blocks`.
    """
    if not is_encoder_decoder(model):
        root, layers = blocks(model)
        return [(f"{root}.{number}", block) for number, block in enumerate(layers)]
    of: Any = model
    own = [block for stack in (of.get_encoder(), of.get_decoder()) for block in blocks(stack)[1]]
    paths = {id(module): path for path, module in model.named_modules()}
    return [(paths[id(block)], block) for block in own]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Has it two stacks of layers, the second of which attends to the first (T5, BART)? Its encoder alone is an encoder."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    stacks = [getattr(model, name, lambda: None)() for name in ("get_encoder", "get_decoder")]
    return all(isinstance(stack, nn.Module) and stack is not model for stack in stacks) and stacks[0] is not stacks[1]


def widths(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear map of any make: nn.Linear, a quantised one, transformers' Conv1D; None otherwise."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return int(module.weight.shape[0]), int(module.nf)
    return None


def find_sites(model: nn.Module) -> list[Site]:
    """Every linear site of every block, in the order of layers and of the table above."""
    found: list[Site] = []
    for number, (root, block) in enumerate(layers_of(model)):
        for path, module in block.named_modules():
            shape = widths(module)
            if shape is None or _EXPERT.search(path):
                continue
            name = _name(path)
            if name is not None:
                found.append(Site(name, number, f"{root}.{path}", module, *shape))
    return sorted(found, key=lambda site: (site.layer, _ORDER.index(site.name)))


def find_sublayers(model: nn.Module) -> list[Site]:
    """The sub-layers `attn` and `ffn` of every block and the block itself, as far as it has them, in the order of layers.

    What leaves such a site is what is added to the residual stream, before dropout and constant factors: the output of
    attention's or the feed-forward's last linear map, of the norm behind it where there is one, of the whole mixture of experts.
    """
    layers = layers_of(model)
    found: list[Site] = []
    config: Any = getattr(model, "config", None)
    calls = max(1, (getattr(config, "num_hidden_layers", None) or 1) // len(layers))
    every = [site for site in find_sites(model) if not _CROSS.search(site.path)]
    for number, (root, block) in enumerate(layers):
        linear = [site for site in every if site.layer == number]
        mixture = next((path.removesuffix(".experts") for path, _ in block.named_modules() if path.endswith(".experts")), None)
        width = 0
        for name, first, last in (("attn", ("v", "qkv"), "o"), ("ffn", ("up", "gate_up"), "down")):
            into, out = [site for site in linear if site.name in first], [site for site in linear if site.name == last]
            if name == "ffn" and mixture is not None:
                path = f"{root}.{mixture}"
                found.append(Site("ffn", number, path, model.get_submodule(path), width, width))
                continue
            for source, leaving in zip(into, out, strict=False):  # several where a block holds several layers
                width = leaving.outputs
                path = _behind(block, name, f"{root}.") or leaving.path
                found.append(Site(name, number, path, model.get_submodule(path), source.inputs, width, source.path))
        if width:
            found.append(Site("block", number, root, block, width, width, calls=calls))
    return found


def _behind(block: nn.Module, name: str, outer: str) -> str | None:
    """Path of the norm between a sub-layer's last map and the residual stream, if there is one."""
    children = dict(block.named_children())
    if not any(norm in children for norm in _POST_NORMS["ffn"]):
        return None
    return next((outer + norm for norm in _POST_NORMS[name] if norm in children), None)


def _name(path: str) -> str | None:
    return next((name for name in reversed(_ORDER) if re.search(rf"(^|\.){_NAMES[name]}$", path)), None)


def select(model: nn.Module, names: Sequence[str] | str, layers: Iterable[int] | None = None, *, sublayers: bool = False) -> list[Site]:
    """The sites asked for, on the layers asked for (default all). sublayers: `attn`, `ffn` and `block` are allowed among them.

    names: site names, "all" for every linear site of the blocks, "head" for the projection to the vocabulary (which no
    choice of layers touches), or full module paths of linear maps anywhere in the model.
    Raises AdapterError for a site that no model has, or that this one lacks, with what it has.
    """
    wanted = _wanted(names)
    if outer := [name for name in wanted if name in SUBLAYERS]:
        if not sublayers:
            hints = [
                "Nearest that works here:  sites=[o]  or  sites=[up, down], linear maps inside  ·  bottleneck, at the sub-layer itself"
            ]
            raise AdapterError(f"site '{outer[0]}' is a sub-layer, and what is asked for changes single linear maps.", hints=hints)
        inner = [name for name in wanted if name not in outer]
        return (select(model, inner, layers) if inner else []) + _sublayers(model, outer, layers)
    at_head = _head_path(model)
    if heads := [name for name in wanted if name in ("head", at_head)]:
        rest = [name for name in wanted if name not in heads]
        return (select(model, rest, layers) if rest else []) + [_head(model, at_head)]
    paths = [name for name in wanted if "." in name]
    if paths:
        if layers is not None:
            raise AdapterError("layers= cannot be given with sites that are module paths, which name their layers.")
        names = [name for name in wanted if "." not in name]
        return _by_path(model, paths) + (select(model, names) if names else [])
    every = find_sites(model)
    present = list(dict.fromkeys(site.name for site in every))
    for name in wanted:
        if name not in _NAMES and name != "all":
            raise unknown("site", name, [*_NAMES, *SUBLAYERS, "head", "all"], error=AdapterError)
        if name != "all" and name not in present:
            if name in ("gate", "up", "down") and any(_EXPERT.search(path) for path, _ in model.named_modules()):
                raise AdapterError(
                    f"{type(model).__name__} has no site '{name}': its feed-forward is a mixture of experts, which are no linear maps of "
                    "their own but slices of one table, and which a token meets only in part.",
                    hints=[f"Nearest that works here:  sites here: {', '.join(present)}  ·  bottleneck(sites=[ffn]), beside the mixture"],
                )
            fused = _FUSED.get(name)
            inside = f"use sites=[{fused}]: this model computes '{name}' inside it"
            nearest = inside if fused in present else f"sites here: {', '.join(present)}"
            raise AdapterError(f"{type(model).__name__} has no site '{name}'.", hints=[f"Nearest that works here:  {nearest}"])
    chosen = None if layers is None else checked_layers(layers, len(layers_of(model)))
    return [site for site in every if ("all" in wanted or site.name in wanted) and (chosen is None or site.layer in chosen)]


def _sublayers(model: nn.Module, names: Sequence[str], layers: Iterable[int] | None) -> list[Site]:
    """Sub-layers by name. Raises AdapterError for one that the model lacks."""
    every = find_sublayers(model)
    chosen = None if layers is None else checked_layers(layers, len(layers_of(model)))
    for name in names:
        if not any(site.name == name for site in every):
            have = ", ".join(dict.fromkeys(site.name for site in every)) or "none"
            raise AdapterError(f"{type(model).__name__} has no sub-layer '{name}' that was found.", hints=[f"Sub-layers here: {have}"])
    return [site for site in every if site.name in names and (chosen is None or site.layer in chosen)]


def _by_path(model: nn.Module, paths: Sequence[str]) -> list[Site]:
    modules = dict(model.named_modules())
    out = []
    for path in paths:
        module = modules.get(path)
        shape = widths(module) if module is not None else None
        if module is None or shape is None:
            hints = ["List the model's sites, or check that the adapter belongs to it."]
            raise AdapterError(f"the model has no linear map at '{path}'.", hints=hints)
        out.append(Site(path, -1, path, module, *shape))
    return out


def _head_path(model: nn.Module) -> str | None:
    """Module path of the projection to the vocabulary; None for a model without one."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return next((path for path, module in model.named_modules() if module is head), None) if head is not None else None


def _head(model: nn.Module, path: str | None) -> Site:
    """The head as a site. Its table may be that of the embedding: a form that listens there leaves the embedding as it is."""
    module = None if path is None else model.get_submodule(path)
    shape = None if module is None else widths(module)
    if path is None or module is None or shape is None:
        raise AdapterError(f"{type(model).__name__} has no projection to a vocabulary to listen at.", hints=["Leave 'head' out of sites."])
    return Site("head", -1, path, module, *shape)


def _wanted(names: Sequence[str] | str) -> list[str]:
    listed = names.replace(",", " ").split() if isinstance(names, str) else list(names)
    return [name.removesuffix(".out") if name.removesuffix(".out") in SUBLAYERS else name for name in listed]


def checked_layers(layers: Iterable[int], count: int) -> set[int]:
    """Layer numbers from 0; negative ones count from the end. Raises AdapterError for one that the model lacks."""
    out = set()
    for layer in layers:
        if not isinstance(layer, int) or not -count <= layer < count:
            raise AdapterError(f"layer {layer} does not exist: the model has layers 0 to {count - 1}.")
        out.add(layer % count)
    return out
