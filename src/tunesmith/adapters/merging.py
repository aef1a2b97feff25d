"""Merging: an adapter's change written into the base's own weights, in fp32, and taken out again bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.adapters.attach import Adapter, module_path
from tunesmith.adapters.forms import Form, LowRank
from tunesmith.adapters.sites import widths
from tunesmith.adapters.weights import bias_of, is_quantised, is_transposed, weight_of
from tunesmith.core.errors import AdapterError

_CONVERT = "Nearest that works here:  leave the adapter on, which answers the same and costs a little more"


def merge(adapter: Adapter, *, keep_original: bool = True) -> float:
    """Write the adapter into the base's weights and let its forms rest; the base then computes with it at its own cost.

    keep_original: keep what is overwritten, so that `unmerge` gives the base back bit for bit. A task head stays as it is.
    Returns the share of the change (of its Euclidean norm) that rounding to the base's dtype lost: 0 in fp32, up to rounding.
    Raises AdapterError, and changes nothing, where no weight holds what the adapter does: what depends on the input (gates,
    bottlenecks), tokens of its own (prompts, prefixes), a quantised base, a bias where there is none, a tied vocabulary head.
    """
    _check(adapter)
    written: dict[str, Tensor] = {}
    lost = changed = 0.0
    for path, old, new in _changes(adapter):
        parameter = adapter.model.get_parameter(path)
        rounded = new.to(parameter.dtype)
        lost += float((rounded.float() - new).square().sum())
        changed += float((new - old).square().sum())
        turned = is_transposed(adapter.model.get_submodule(path.rpartition(".")[0])) and new.ndim == 2
        written[path] = (rounded.t() if turned else rounded).contiguous()
    adapter.take_in(written, keep_original=keep_original)
    return (lost / changed) ** 0.5 if changed else 0.0


def unmerge(adapter: Adapter) -> None:
    """Give the base its own weights back and let the forms work again. Raises AdapterError where they were not kept."""
    adapter.give_out()


def untie(model: Any) -> None:
    """Give the vocabulary head a table of its own, a copy of the embedding's, so that changing one leaves the other."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False


def forms_by_module(adapter: Adapter) -> dict[str, list[Form]]:
    """Module path -> the adapter's forms that listen there, in their order."""
    out: dict[str, list[Form]] = {}
    for path, form in adapter.forms.items():
        out.setdefault(module_path(path), []).append(form)
    return out


def merged_site(module: Any, forms: list[Form], who: str) -> tuple[Tensor, Tensor | None]:
    """(weight [outputs, inputs], bias) of a site with its forms in it, fp32: those behind it in order, then those before it.

    Raises AdapterError where one of them is no change of weights.
    """
    if widths(module) is None:
        raise _no_weight(forms[0], who)
    weight, bias = weight_of(module, f"merging {who}"), bias_of(module)
    behind = [form for form in forms if not form.before and not form.writes]
    ahead = [form for form in reversed(forms) if form.before and not form.writes]
    for form in behind + ahead:
        held = form.merged(weight, bias)
        if held is None:
            raise _no_weight(form, who)
        weight, bias = held
    return weight, bias


def _no_weight(form: Form, who: str) -> AdapterError:
    what = f"'{who}' is no change of weights: what its {type(form).__name__} form adds depends on the input, which no weight holds."
    return AdapterError(what, hints=[_CONVERT])


@torch.no_grad()
def _changes(adapter: Adapter) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(path of a parameter, its own and its merged value), fp32, those of sites [outputs, inputs]."""
    for path, forms in forms_by_module(adapter).items():
        if all(form.writes for form in forms):
            continue  # it is in the weight already
        module: Any = adapter.model.get_submodule(path)
        _check_alone(adapter, path, module)
        weight, bias = merged_site(module, forms, adapter.expression)
        yield f"{path}.weight", weight_of(module, "merging"), weight
        own = bias_of(module)
        if bias is not None and own is None:
            raise AdapterError(f"'{adapter.expression}' adds a bias at {path}, where this model has none to hold it.", hints=[_CONVERT])
        if bias is not None and own is not None and not torch.equal(bias, own):
            yield f"{path}.bias", own, bias
    for path, rows in adapter.rows.items():
        table: Any = adapter.model.get_submodule(path)
        yield f"{path}.weight", table.weight.detach().float(), rows.weight(table.weight.float())


def _check(adapter: Adapter) -> None:
    if adapter.merged:
        raise AdapterError(f"'{adapter.expression}' is merged already.", hints=["Take it out again first:  unmerge"])
    if virtual := [plan.method for plan in adapter.plans if plan.kind not in ("listen", "in-place", "head")]:
        raise AdapterError(
            f"'{virtual[0]}' cannot be merged: it is tokens of its own, not a change of weights.",
            hints=[_CONVERT],
        )
    tied = _tied_paths(adapter.model)
    for path in forms_by_module(adapter):
        module = adapter.model.get_submodule(path)
        if widths(module) is not None and is_quantised(module):
            raise AdapterError(
                f"'{adapter.expression}' cannot be merged: the weight at {path} is quantised, and rounding would change the answers.",
                hints=[
                    "Make the base floating-point again, in all its memory:  tunesmith export RUN FOLDER --profile merged --dequantise",
                    _CONVERT,
                ],
            )
        if f"{path}.weight" in tied:
            raise AdapterError(
                f"'{adapter.expression}' cannot be merged: the weight at {path} is also {tied[f'{path}.weight']}, which it leaves alone.",
                hints=["Give the head a table of its own first:  tunesmith.adapters.untie(model)"],
            )


def _tied_paths(model: nn.Module) -> dict[str, str]:
    """Path of a parameter that several modules share -> another path of it."""
    seen: dict[int, str] = {}
    out: dict[str, str] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), path)
        if first != path and not _one_module(model, first, path):
            out[path], out[first] = first, path
    return out


def _one_module(model: nn.Module, first: str, second: str) -> bool:
    """Do two paths lead to one and the same module?"""
    return model.get_submodule(first.rpartition(".")[0]) is model.get_submodule(second.rpartition(".")[0])


def _check_alone(adapter: Adapter, path: str, module: Any) -> None:
    """Forms of several adapters at one place have to add up, or merging one would change what another does."""
    own = set(map(id, adapter.forms.values()))
    active = [form for form in module.ts_forms.values() if form.active]
    if any(id(form) not in own for form in active) and (odd := [form for form in active if not isinstance(form, LowRank)]):
        raise AdapterError(
            f"'{adapter.expression}' cannot be merged: several adapters listen at {path}, and a {type(odd[0]).__name__} form does not"
            " add up with others.",
            hints=["Detach the others first."],
        )
