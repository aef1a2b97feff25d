"""Methods that train parameters of the base where they lie: all of them, some layers or modules, biases, norms.

Each names the parameters that it trains; attaching keeps their values, so that detaching gives back exactly the base, and
files hold what was trained and nothing else.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from tunesmith.adapters.forms import Form
from tunesmith.adapters.methods import Plan, method, names_of
from tunesmith.adapters.sites import Site, checked_layers, find_sites, layers_of, select
from tunesmith.core.errors import AdapterError

Named = Mapping[str, nn.Parameter]
_WHOLE = 2e-5
"""Learning rate of whole matrices, as full fine-tuning has it."""


@method("full")
def full() -> Plan:
    """Full fine-tuning: every parameter of the base.

    The degenerate point of the space. It costs the most: a gradient, two moments and, on a base in half precision, an fp32
    master for each value, and a whole model a task on disk. When to use it: much data, a small base, or a new domain.
    """
    return Plan("full", "in-place", pick=lambda model, named: list(named), lr=_WHOLE)


@method("layers")
def layers(*, last: int | None = None, only: Sequence[int] | None = None) -> Plan:
    """Selective layers: every parameter of the last k blocks, or of the blocks named (from 0; negative counts from the end).

    As in Howard and Ruder 2018 (1801.06146), without thawing step by step. With `last`, nothing below the first trained
    block is differentiated, so a step costs about k / L of full fine-tuning's backward. When to use it: memory for some
    layers but not for all, and a task whose low-level features the base has.
    """
    if (last is None) == (only is None):
        raise AdapterError("layers needs exactly one of last=K or only=[...].", hints=["For example:  layers(last=4)"])
    if last is not None and (type(last) is not int or last < 1):
        raise AdapterError(f"layers: last must be a whole number of at least 1, not {last!r}.")
    chosen = None if only is None else tuple(only)

    def pick(model: nn.Module, named: Named) -> list[str]:
        stack = layers_of(model)
        if last is not None and last > len(stack):
            raise AdapterError(
                f"layers(last={last}) is more than the model's {len(stack)} layers.",
                hints=[f"Nearest that works here:  layers(last={len(stack)})"],
            )
        numbers = checked_layers(chosen, len(stack)) if chosen is not None else set(range(len(stack) - (last or 0), len(stack)))
        return [path for path in named if any(path.startswith(f"{stack[number][0]}.") for number in numbers)]

    return Plan("layers", "in-place", layers=chosen, pick=pick, lr=_WHOLE)


@method("modules")
def modules(*, names: Sequence[str] | str) -> Plan:
    """Chosen modules: the parameters whose path matches one of the names, a module or parameter path, a part of it, or with *.

    `modules(names=[lm_head])` trains the vocabulary head alone (and with it the embedding, where the base ties the two).
    It costs what those parameters cost in full fine-tuning. When to use it: you know which part the task needs.
    """
    wanted = names_of("modules", names)

    def pick(model: nn.Module, named: Named) -> list[str]:
        for name in wanted:
            if not any(_matches(path, name) for path in named):
                raise AdapterError(f"modules: no parameter of the model matches '{name}'.", hints=[f"Paths look like:  {_examples(named)}"])
        return [path for path in named if any(_matches(path, name) for name in wanted)]

    return Plan("modules", "in-place", pick=pick, lr=_WHOLE)


@method("bitfit")
def bitfit(*, sites: Sequence[str] | str | None = None, layers: Sequence[int] | None = None) -> Plan:
    """BitFit: y = Wx + b, and only b is trained: all biases of the base, norms' too, or those of some sites.

    Ben Zaken et al. 2022 (2106.10199); a learning rate between 1e-4 and 1e-3 there, 4e-4 here. It trains some 0.1 % of an
    encoder, costs nothing at inference, and merges by nature. When to use it: an encoder, little data, many tasks. Llama-like
    bases have no biases: `bias` adds some. sites: for example [q, down]; "norm" is those of the norms.
    """
    wanted = None if sites is None else names_of("bitfit", sites)

    def pick(model: nn.Module, named: Named) -> list[str]:
        every = [path for path in named if path.rpartition(".")[2].endswith("bias") and _read(model, path)]
        if not every:
            raise AdapterError(
                f"adapter 'bitfit' trains biases, and {type(model).__name__} has none.",
                hints=[f"Nearest that works here:  {_nearest(model)}"],
            )
        if wanted is not None or layers is not None:
            every = [path for path in every if path in _of_sites(model, wanted, layers)]
        if not every:
            have = dict.fromkeys(site.name for site in find_sites(model) if f"{site.path}.bias" in named)
            raise AdapterError(
                "bitfit: the sites asked for have no biases.", hints=[f"Sites with biases here:  {', '.join(have) or 'norm'}"]
            )
        return every

    return Plan("bitfit", "in-place", wanted or (), None if layers is None else tuple(layers), pick=pick, lr=4e-4)


def _read(model: nn.Module, path: str) -> bool:
    """Does what is read of the model depend on this parameter? The head that an encoder was pretrained with is asked nothing."""
    if getattr(model, "can_generate", lambda: True)():
        return True
    return path.startswith(f"{model.base_model_prefix}.") or getattr(model, "base_model", model) is model


@method("norms")
def norms(*, biases: bool = True, layers: Sequence[int] | None = None) -> Plan:
    """Norm tuning: y = g * norm(x) + b, and only g and b are trained: the scales of all norms, and their shifts where there are some.

    Qi et al. 2022, LN-tuning (2211.08682), gain and bias; Zhao et al. 2023 (2312.11420). It trains some 0.03 % of a decoder,
    costs nothing at inference, and merges by nature. When to use it: the least that can be trained on a base without
    biases. biases=false: the scales alone.
    """

    def pick(model: nn.Module, named: Named) -> list[str]:
        kinds = ("weight", "bias") if biases else ("weight",)
        every = [f"{path}.{kind}" for path in _norms(model) for kind in kinds if f"{path}.{kind}" in named]
        if not every:
            what = f"adapter 'norms' trains the scales of norms, and those of {type(model).__name__} have none."
            raise AdapterError(what, hints=[f"Nearest that works here:  {_bias_hint(model)}"])
        if layers is not None:
            inside = _inside(model, layers)
            every = [path for path in every if path.startswith(inside)]
        return every

    return Plan("norms", "in-place", layers=None if layers is None else tuple(layers), pick=pick, lr=4e-4)


@method("bias")
def bias(*, sites: Sequence[str] | str = ("q", "v"), layers: Sequence[int] | None = None) -> Plan:
    """Added biases: y = Wx + b + b', and only b' is trained, beginning at zero; for bases that have no biases to train.

    BitFit's way (Ben Zaken et al. 2022, 2106.10199) on Llama-like bases. It trains a value for each output of a site, and
    costs as many additions a token. When to use it: where `bitfit` is refused.
    """
    chosen = None if layers is None else tuple(layers)
    return Plan("bias", "listen", names_of("bias", sites), chosen, make=lambda site: AddedBias(site.outputs), lr=4e-4)


class AddedBias(Form):
    """y = W x + b + b'. b' [outputs], fp32, begins at zero."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.added = nn.Parameter(torch.zeros(outputs))

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        """out + b'."""
        return out + self.added.to(out.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight as it is, and b + b'."""
        added = self.added.detach()
        return weight, added if bias is None else bias + added

    def flops(self) -> int:
        """One addition for each output."""
        return self.added.numel()


def _matches(path: str, name: str) -> bool:
    if "*" in name:
        return fnmatch.fnmatch(path, name) or fnmatch.fnmatch(path, f"{name}.weight") or fnmatch.fnmatch(path, f"{name}.bias")
    return f".{name}." in f".{path}."


def _examples(named: Named) -> str:
    paths = list(named)
    return "  ·  ".join(dict.fromkeys([paths[0], paths[len(paths) // 2], paths[-1]]))


def _norms(model: nn.Module) -> Iterator[str]:
    """Paths of modules that norm: by their class, whatever the family calls them."""
    return (path for path, module in model.named_modules() if "norm" in type(module).__name__.lower() and not list(module.children()))


def _of_sites(model: nn.Module, wanted: Sequence[str] | None, layers: Sequence[int] | None) -> set[str]:
    """Paths that biases of these sites would have; of everything in the layers where no sites are given."""
    inside = _inside(model, layers) if layers is not None else ("",)
    if wanted is None:
        return {path for path, _ in model.named_parameters() if path.startswith(inside)}
    out = {f"{path}.bias" for path in _norms(model) if path.startswith(inside)} if "norm" in wanted else set()
    if linear := [name for name in wanted if name != "norm"]:
        out |= {f"{site.path}.bias" for site in select(model, linear, layers)}
    return out


def _inside(model: nn.Module, layers: Sequence[int]) -> tuple[str, ...]:
    """What the paths of these layers begin with."""
    stack = layers_of(model)
    return tuple(f"{stack[number][0]}." for number in checked_layers(layers, len(stack)))


def _nearest(model: nn.Module) -> str:
    """What else trains a handful of values of this model, with their number."""
    scales = sum(model.get_parameter(f"{path}.weight").numel() for path in _norms(model) if hasattr(model.get_submodule(path), "weight"))
    return "  ·  ".join([_bias_hint(model), *([f"norms  trains {scales:,} scales"] if scales else [])])


def _bias_hint(model: nn.Module) -> str:
    sites: list[Site] = find_sites(model)
    names = [name for name in ("q", "v", "qkv") if any(site.name == name for site in sites)] or ["all"]
    added = sum(site.outputs for site in sites if site.name in names or names == ["all"])
    return f"bias(sites=[{', '.join(names)}])  trains {added:,} added biases"
