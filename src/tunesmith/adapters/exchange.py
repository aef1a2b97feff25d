"""How PEFT writes the methods that change weights: LoRA and its kin, AdaLoRA, IA3.

Keys are those of the model that the adapter sits on; what stands before them in a file is files.py's affair.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tunesmith.adapters import tokenfiles
from tunesmith.adapters.adalora import Triplets
from tunesmith.adapters.attach import Adapter
from tunesmith.adapters.forms import Form, LowRank
from tunesmith.adapters.ia3 import Scaled
from tunesmith.adapters.lowrank import Directed, FasterB, Principal
from tunesmith.adapters.weights import is_transposed
from tunesmith.core.errors import AdapterError

Config = Mapping[str, Any]
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A kind of adapter in PEFT's files.

    peft_type: what PEFT calls it. fits: can this adapter be written so? tensors: by key. config: what its configuration holds
    besides what all have, given what stands before module paths. expression: the adapter expression of a file.
    state: our values by name, from a file's tensors and configuration. All that read raise AdapterError for what cannot be.
    """

    peft_type: str
    fits: Callable[[Adapter], bool]
    tensors: Callable[[Adapter], dict[str, Tensor]]
    config: Callable[[Adapter, str], dict[str, Any]]
    expression: Callable[[Config, Tensors], str]
    state: Callable[[Adapter, Tensors, Config], dict[str, Tensor]]
    bare: bool = False  # keys stand alone, with no model before them


def exchange_for(adapter: Adapter) -> Exchange | None:
    """How PEFT writes it; None where PEFT has no format: for what trains the base in place, a head alone, and most forms.

    Vectors of new words it has beside LoRA alone.
    """
    found = next((each for each in EXCHANGES.values() if (each.bare or _at_sites_alone(adapter)) and each.fits(adapter)), None)
    return None if adapter.rows and found is not None and found.peft_type != "LORA" else found


def _at_sites_alone(adapter: Adapter) -> bool:
    """Are its forms, one a module, all that there is besides rows for new words and a head?"""
    listens = all(plan.kind in ("listen", "head") for plan in adapter.plans)
    return listens and bool(adapter.forms) and not any("~" in path for path in adapter.forms)


# LoRA, LoRA+, PiSSA, DoRA


def _fits_lora(adapter: Adapter) -> bool:
    kinds = {type(form) for form in adapter.forms.values()}
    return kinds <= {LowRank, FasterB, Principal} or kinds == {Directed}


def plain_of(form: Form) -> tuple[Tensor, Tensor, int, float]:
    """(A [r, inputs], B [outputs, r], r, alpha) of the plain LoRA that a form is, but for DoRA's lengths."""
    low = cast(LowRank, form.low if isinstance(form, Directed) else form)
    a, b = low.a.detach(), low.b.detach()
    if isinstance(low, Principal):  # what it began with is taken away again
        return torch.cat([a, low.a0]), torch.cat([b, -low.b0], dim=1), 2 * low.rank, 2 * low.alpha
    return a, b, low.rank, low.alpha


def _lora_tensors(adapter: Adapter) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for path, form in adapter.forms.items():
        out[f"{path}.lora_A.weight"], out[f"{path}.lora_B.weight"], _, _ = plain_of(form)
        if isinstance(form, Directed):
            out[f"{path}.lora_magnitude_vector"] = form.m.detach()
    return out


def _lora_config(adapter: Adapter, outer: str) -> dict[str, Any]:
    ranks = {f"{outer}{path}": plain_of(form)[2] for path, form in adapter.forms.items()}
    alphas = {f"{outer}{path}": plain_of(form)[3] for path, form in adapter.forms.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    first = next(iter(adapter.forms.values()))
    low = cast(LowRank, first.low if isinstance(first, Directed) else first)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": low.dropout,
        "use_rslora": low.stabilised,
        "use_dora": isinstance(first, Directed),
        "bias": "none",
        "rank_pattern": {path: own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {path: own for path, own in alphas.items() if own != alpha},
    }


_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (),
    "lora_bias": (False,),
    "ensure_weight_tying": (False,),
    "use_qalora": (False,),
    "use_bdlora": (),
    "target_parameters": (),
    "layer_replication": (),
    "alora_invocation_tokens": (),
    "arrow_config": (),
    "kasa_config": (),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "pissa"),  # the others change the base's weights as well
}
"""Options of PEFT's LoRA that change what is computed, with the values that can be read (beside None and empty)."""


def _check_plain(config: Config, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    for key, plain in allowed.items():
        value = config.get(key)
        if value and value not in plain:
            shown = " or ".join(repr(each) for each in plain) or "null"
            raise AdapterError(f"{key}={value!r} cannot be read.", hints=[f"Readable here:  {key}={shown}"])


def _lora_expression(config: Config, tensors: Tensors) -> str:
    """One term for each rank and alpha, with its sites by path."""
    _check_plain(config, _PLAIN)
    paths = _paths(tensors, ".lora_A.weight")
    try:
        groups: dict[tuple[int, float], list[str]] = {}
        for path in paths:
            rank, alpha = for_path(config, "r", "rank_pattern", path), for_path(config, "lora_alpha", "alpha_pattern", path)
            groups.setdefault((rank, alpha), []).append(path)
    except (KeyError, TypeError, AttributeError, re.error) as cause:
        raise AdapterError(f"rank and alpha cannot be read: {cause!r}.") from None
    variants = {"dora": config.get("use_dora"), "rslora": config.get("use_rslora"), "pissa": config.get("init_lora_weights") == "pissa"}
    asked = [name for name, on in variants.items() if on]
    if len(asked) > 1:
        raise AdapterError(f"{' with '.join(asked)} cannot be read.", hints=["Readable here:  one of them at a time."])
    method, dropout = (asked or ["lora"])[0], config.get("lora_dropout") or 0.0
    return " + ".join(f"{method}(rank={r}, alpha={a}, dropout={dropout}, sites={sites})" for (r, a), sites in groups.items())


def for_path(config: Config, key: str, patterns: str, path: str) -> Any:
    """A setting of one module: PEFT takes the first pattern that matches the end of its path, as a regular expression."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return config[key]


def _paths(tensors: Tensors, ending: str) -> list[str]:
    paths = sorted(key.removesuffix(ending) for key in tensors if key.endswith(ending))
    if not paths:
        raise AdapterError(f"no tensors that end in '{ending}' inside.")
    return paths


def _lora_state(adapter: Adapter, tensors: Tensors, config: Config) -> dict[str, Tensor]:
    parts = {".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_magnitude_vector": "m", ".lora_magnitude_vector.weight": "m"}
    state = renamed(tensors, parts)
    for path, form in adapter.forms.items():
        if isinstance(form, Directed):
            state |= {f"{path}.low.{part}": state.pop(f"{path}.{part}") for part in "ab" if f"{path}.{part}" in state}
        elif isinstance(form, Principal) and f"{path}.a" in state and f"{path}.b" in state:
            state |= _principal_state(path, form, state.pop(f"{path}.a"), state.pop(f"{path}.b"))
    return state


def _principal_state(path: str, form: Principal, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Ours holds what A and B began with; PEFT's holds A and B alone, since it takes the start out of the base each time."""
    r = form.rank
    parts = (a[:r], b[:, :r], a[r:], -b[:, r:]) if a.shape[0] == 2 * r else (a, b, form.a0, form.b0)
    return {f"{path}.{name}": value for name, value in zip(form.kept, parts, strict=True)}


def renamed(tensors: Tensors, parts: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors under our names. parts: what their keys end in -> our name. Raises AdapterError for a key that ends in none."""
    out = {}
    for key, value in tensors.items():
        ending = next((ending for ending in parts if key.endswith(ending)), None)
        if ending is None:
            raise AdapterError(f"the tensor '{key}' belongs to no method that can be read here.")
        out[f"{key.removesuffix(ending)}.{parts[ending]}"] = value
    return out


# AdaLoRA


def _fits_adalora(adapter: Adapter) -> bool:
    forms = [form for form in adapter.forms.values() if isinstance(form, Triplets)]
    return len(forms) == len(adapter.forms) and len({(form.rank, form.alpha, form.dropout, form.schedule) for form in forms}) == 1


def _left(form: Triplets) -> Tensor:
    """Which triplets do something, [r]."""
    return form.e.detach()[:, 0] != 0


def _adalora_tensors(adapter: Adapter) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for path, form in adapter.forms.items():
        assert isinstance(form, Triplets)
        left = _left(form)
        out[f"{path}.lora_A"], out[f"{path}.lora_B"] = form.a.detach()[left], form.b.detach()[:, left]
        out[f"{path}.lora_E"] = form.e.detach()[left]
    return out


def _adalora_config(adapter: Adapter, outer: str) -> dict[str, Any]:
    forms = {path: form for path, form in adapter.forms.items() if isinstance(form, Triplets)}
    first = next(iter(forms.values()))
    schedule = first.schedule
    return {
        "target_r": schedule.target,
        "init_r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "deltaT": schedule.every,
        "beta1": schedule.beta1,
        "beta2": schedule.beta2,
        "orth_reg_weight": schedule.orthogonality,
        "tinit": 0,
        "tfinal": 0,
        "total_step": 1,  # the run is over, and PEFT will not read a configuration without a number of steps
        "bias": "none",
        "rank_pattern": {f"{outer}{path}.lora_E": _left(form).tolist() for path, form in forms.items()},
    }


def _adalora_expression(config: Config, tensors: Tensors) -> str:
    _check_plain(config, _PLAIN | {"use_dora": (False,), "use_rslora": (False,)})
    try:
        initial = config["init_r"]
        options = {
            "rank": min(config["target_r"], initial),
            "initial": initial,
            "alpha": config["lora_alpha"],
            "dropout": config.get("lora_dropout") or 0.0,
            "every": config.get("deltaT", 1),
            "orthogonality": config.get("orth_reg_weight", 0.5),
            "beta1": config.get("beta1", 0.85),
            "beta2": config.get("beta2", 0.85),
            "sites": _paths(tensors, ".lora_A"),
        }
    except (KeyError, TypeError) as cause:
        raise AdapterError(f"rank and alpha cannot be read: {cause!r}.") from None
    return f"adalora({', '.join(f'{name}={value}' for name, value in options.items())})"


def _adalora_state(adapter: Adapter, tensors: Tensors, config: Config) -> dict[str, Tensor]:
    state = renamed(tensors, {".lora_A": "a", ".lora_B": "b", ".lora_E": "e"})
    patterns = config.get("rank_pattern") or {}
    for path, form in adapter.forms.items():
        kept = next((value for name, value in patterns.items() if name.endswith(f"{path}.lora_E")), None)
        if kept is None or not isinstance(form, Triplets):
            continue
        if not isinstance(kept, list) or len(kept) != form.rank or not all(type(each) is bool for each in kept):
            raise AdapterError(f"rank_pattern of '{path}' is damaged.")
        left = torch.tensor(kept)
        for name, own in form.named_parameters():
            given, place = state.get(f"{path}.{name}"), own.new_zeros(own.shape)
            target = place[:, left] if name == "b" else place[left]
            if given is None or given.shape == own.shape:
                continue
            if given.shape != target.shape:
                raise AdapterError(f"'{path}.{name}' has shape {tuple(given.shape)}, but {tuple(target.shape)} is needed.")
            place[(slice(None), left) if name == "b" else left] = given.to(place)
            state[f"{path}.{name}"] = place
    return state


# IA3


def _fits_ia3(adapter: Adapter) -> bool:
    return all(type(form) is Scaled for form in adapter.forms.values())


def _ia3_tensors(adapter: Adapter) -> dict[str, Tensor]:
    forms = {path: form for path, form in adapter.forms.items() if isinstance(form, Scaled)}
    return {f"{path}.ia3_l": form.scale.detach()[None] if form.before else form.scale.detach()[:, None] for path, form in forms.items()}


def _ia3_config(adapter: Adapter, outer: str) -> dict[str, Any]:
    return {"feedforward_modules": [f"{outer}{path}" for path, form in adapter.forms.items() if form.before]}


def _ia3_expression(config: Config, tensors: Tensors) -> str:
    _check_plain(config, {"modules_to_save": ()})
    paths = _paths(tensors, ".ia3_l")
    shapes = {path: tensors[f"{path}.ia3_l"].shape for path in paths}
    if odd := [path for path, shape in shapes.items() if len(shape) != 2 or 1 not in shape]:
        raise AdapterError(f"'{odd[0]}.ia3_l' has shape {tuple(shapes[odd[0]])}, which is no row and no column.")
    return f"ia3(sites={paths}, inputs={[path for path, shape in shapes.items() if shape[0] == 1]})"


def _ia3_state(adapter: Adapter, tensors: Tensors, config: Config) -> dict[str, Tensor]:
    return {name: value.flatten() for name, value in renamed(tensors, {".ia3_l": "scale"}).items()}


EXCHANGES: dict[str, Exchange] = {
    "LORA": Exchange("LORA", _fits_lora, _lora_tensors, _lora_config, _lora_expression, _lora_state),
    "ADALORA": Exchange("ADALORA", _fits_adalora, _adalora_tensors, _adalora_config, _adalora_expression, _adalora_state),
    "IA3": Exchange("IA3", _fits_ia3, _ia3_tensors, _ia3_config, _ia3_expression, _ia3_state),
}
for _name, _kind in tokenfiles.KINDS.items():
    EXCHANGES[_name] = Exchange(
        _name, tokenfiles.fits(_kind), tokenfiles.tensors, tokenfiles.config, tokenfiles.expression, tokenfiles.state, bare=True
    )


def fan_in_fan_out(adapter: Adapter) -> bool:
    """What PEFT calls weights that are kept as [inputs, outputs]."""
    return any(is_transposed(adapter.model.get_submodule(path)) for path in adapter.forms)
