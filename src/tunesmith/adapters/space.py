"""The literature in one screen: where each method of the catalogue lies in the space sites x form x insertion x composition.

Two methods that differ in one column are one another's ablation (He et al. 2022, 2110.04366, table 1).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from tunesmith.adapters.methods import METHODS
from tunesmith.core.errors import AdapterError, unknown


@dataclass(frozen=True, slots=True)
class Point:
    """A method's coordinates. sites: where it listens unless told otherwise. form: what is trained there. insertion: "before",
    "behind" or "beside" the site, "among" the tokens, or "in" the base's own weights. composition: how it joins what is there.
    share: values trained, r a rank, i and o a site's inputs and outputs, d the model's width, L its layers, n tokens.
    merges: whether the base's weights can hold it. file: PEFT's name for it, else empty; ours is always written.
    """

    sites: str
    form: str
    insertion: str
    composition: str
    share: str
    merges: bool
    file: str = ""


POINTS: dict[str, Point] = {
    "lora": Point("q v", "low rank", "beside", "add", "r (i + o) a site", True, "LORA"),
    "rslora": Point("q v", "low rank", "beside", "add, scale 1 / sqrt r", "r (i + o) a site", True, "LORA"),
    "lora_plus": Point("q v", "low rank", "beside", "add, B learns faster", "r (i + o) a site", True, "LORA"),
    "pissa": Point("q v", "low rank, from the weight's own", "beside", "add, less where it began", "r (i + o) a site", True, "LORA"),
    "qlora": Point("all, of a 4-bit base", "low rank", "beside", "add", "r (i + o) a site", False, "LORA"),
    "dora": Point("q v", "low rank and a length a row", "beside", "rescale", "r (i + o) + o a site", True, "LORA"),
    "adalora": Point("all", "low rank, pruned by importance", "beside", "add", "r (i + o + 1) a site", True, "ADALORA"),
    "ia3": Point("k v down", "scale", "behind, before down", "multiply", "o, or i, a site", True, "IA3"),
    "bias": Point("q v", "bias", "behind", "add", "o a site", True),
    "bitfit": Point("biases", "bias", "in", "replace", "o a bias", True),
    "norms": Point("norms", "scale and shift", "in", "replace", "d or 2 d a norm", True),
    "sparse": Point("all", "entries of a mask", "in", "add", "share of i o a site", True),
    "diff_pruning": Point("all", "gated difference", "beside", "add, gated", "2 i o a site, few stay", True),
    "layers": Point("whole blocks", "weights", "in", "replace", "k / L of the blocks", True),
    "modules": Point("chosen modules", "weights", "in", "replace", "theirs", True),
    "full": Point("everything", "weights", "in", "replace", "all", True),
    "head": Point("behind the last block", "linear map", "behind", "replace the vocabulary", "d a label", False),
    "prompt": Point("embedding", "vectors", "among", "attend", "n d", False, "PROMPT_TUNING"),
    "ptuning": Point("embedding", "vectors of a small network", "among", "attend", "n d and the network", False, "P_TUNING"),
    "prefix": Point("keys and values", "vectors of a small network", "among", "attend", "n d and the network", False, "PREFIX_TUNING"),
    "ptuning_v2": Point("keys and values", "vectors", "among", "attend", "2 n L times the width of keys", False, "PREFIX_TUNING"),
    "bottleneck": Point("ffn", "bottleneck", "behind, or beside", "add, scale", "2 d r a site", False),
    "houlsby": Point("attn ffn", "bottleneck", "behind", "add", "2 d r a site", False),
    "pfeiffer": Point("ffn", "bottleneck", "behind", "add", "2 d r a site", False),
    "parallel": Point("ffn", "bottleneck", "beside", "add", "2 d r a site", False),
    "scaled_parallel": Point("ffn", "bottleneck", "beside", "add, scale 4", "2 d r a site", False),
    "adapter_drop": Point("ffn", "bottleneck", "behind", "add, lower layers left out", "2 d r a site", False),
    "fusion": Point("as its adapters", "attention over bottlenecks", "behind", "attend to adapters, add", "3 d^2 a site", False),
    "lst": Point("block", "narrow network on all layers", "beside the base", "gate, add to the last states", "d^2 / 8 a layer", False),
    "mam": Point("keys and values, ffn", "prefix and bottleneck", "among, beside", "attend, add with scale 4", "both", False),
    "unipelt": Point("keys and values, ffn, q v", "prefix, bottleneck, low rank", "among, behind, beside", "gate", "all three", False),
    "gate": Point("as its method", "as its method", "as its method", "gate", "1 an input more", False),
}
"""In the order of their kinds. Every method of the catalogue has a line here."""


@dataclass(frozen=True, slots=True)
class Described:
    """A method as people read it. title: the first sentence of its docstring. text: all of it. options: name -> default, None where
    it has to be given."""

    name: str
    title: str
    text: str
    options: dict[str, str | None]
    point: Point


def described(name: str) -> Described:
    """All there is to say of a method. Raises AdapterError for a name that is not in the catalogue, with the nearest ones."""
    if name not in METHODS:
        raise unknown("adapter method", name, METHODS, error=AdapterError)
    function = METHODS[name]
    text = inspect.getdoc(function) or ""
    options = {
        each.name: None if each.default is each.empty else _plain(each.default)
        for each in inspect.signature(function).parameters.values()
        if each.kind is each.KEYWORD_ONLY
    }
    return Described(name, " ".join(text.split("\n\n")[0].split()), text, options, POINTS[name])


def ordered() -> list[str]:
    """The methods of the catalogue, in the order of the table above."""
    return [name for name in POINTS if name in METHODS]


def _plain(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"[{', '.join(map(_plain, value))}]" if isinstance(value, tuple | list) else str(value)
