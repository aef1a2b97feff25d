"""Attaching: adapters join their sites through one shared hook; detaching gives back exactly the base.

An adapter is a submodule of its site (so `.to()`, FSDP and state_dict see it) and the base's own weights and module
names stay untouched. Methods that train the base in place keep the original values for the way back.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.adapters.forms import LowRank, TokenRows
from tunesmith.adapters.methods import Plan, plan
from tunesmith.adapters.sites import blocks, checked_layers, select
from tunesmith.adapters.words import attach_words, refresh, remove_words
from tunesmith.core.errors import AdapterError


class Adapter:
    """Something trainable on a base: forms at sites, parameters of the base itself, and rows for new words.

    name: unique on its base. expression: as written. forms: module path -> form. trained: path -> parameter of the
    base trained in place. rows: module path -> vectors of new words.
    """

    def __init__(self, model: nn.Module, expression: str, name: str = "default") -> None:
        self.model, self.expression, self.name = model, expression, name
        self.plans = plan(expression)
        self.forms: dict[str, LowRank] = {}
        self.trained: dict[str, nn.Parameter] = {}
        self.rows: dict[str, TokenRows] = {}
        self._active = True
        self._kept: dict[str, Tensor] = {}  # what in-place training overwrote; while switched off, what it learned

    @property
    def in_place(self) -> bool:
        return any(p.kind == "in-place" for p in self.plans)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trainable parameter under a name that is stable between runs."""
        for path, form in self.forms.items():
            yield f"{path}.a", form.a
            yield f"{path}.b", form.b
        yield from self.trained.items()
        for path, rows in self.rows.items():
            yield f"{path}.rows", rows.rows

    def trainable(self) -> int:
        """Number of trainable values."""
        return sum(parameter.numel() for _, parameter in self.named_parameters())

    def train(self, mode: bool = True) -> None:
        """Dropout of the forms on or off; the base is left as it is."""
        for form in self.forms.values():
            form.train(mode)

    def freeze(self) -> None:
        """Keep the adapter active, but train it no further."""
        for _, parameter in self.named_parameters():
            parameter.requires_grad_(False)

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take values by name. Raises AdapterError where names or shapes differ."""
        own = dict(self.named_parameters())
        if missing := sorted(own.keys() ^ state.keys()):
            raise AdapterError(f"the saved adapter and the attached one differ in {len(missing)} parameters, first '{missing[0]}'.")
        for name, parameter in own.items():
            if parameter.shape != state[name].shape:
                raise AdapterError(f"'{name}' has shape {tuple(state[name].shape)}, but {tuple(parameter.shape)} is needed.")
            parameter.copy_(state[name])

    def state(self) -> dict[str, Tensor]:
        """Values by name, detached, contiguous copies."""
        return {name: parameter.detach().clone().contiguous() for name, parameter in self.named_parameters()}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base without this adapter, for a while. May be nested. Raises AdapterError where the base's weights were not kept."""
        before = self._active
        self._switch(False)
        try:
            yield
        finally:
            self._switch(before)

    def detach(self) -> None:
        """Take the adapter off: the base computes again exactly what it did before."""
        self._switch(False)
        self._remove()

    def _switch(self, active: bool) -> None:
        if active == self._active:
            return
        if self.trained and not self._kept:
            raise AdapterError(
                f"'{self.expression}' was attached without keeping the weights that it trains, so the base is not to be had back.",
                hints=["Load the base again, or attach with keep_original=True."],
            )
        self._active = active
        for path, form in self.forms.items():
            form.active = active
            _refresh_forms(self.model.get_submodule(path))
        for name, parameter in self.trained.items():
            before = parameter.detach()
            parameter.data, self._kept[name] = self._kept[name], before
        if self.rows:
            for rows in self.rows.values():
                rows.active = active
            refresh(self.model)

    def _remove(self) -> None:
        for path in self.forms:
            module: Any = self.model.get_submodule(path)
            del module.ts_forms[self.name]
            _refresh_forms(module)
        if self.rows:
            remove_words(self.model, self.name)
        for parameter in self.trained.values():
            parameter.requires_grad_(False)
        self.forms, self.trained, self.rows, self._kept = {}, {}, {}, {}


def attach(
    model: nn.Module,
    expression: str,
    *,
    name: str = "default",
    new_words: Sequence[int] = (),
    keep_original: bool = True,
    seed: int = 0,
) -> Adapter:
    """Attach an adapter by its expression, for example "lora(rank=16, sites=[q, v])".

    new_words: ids of words whose vectors are trained too (those that were added to the vocabulary for a task).
    keep_original: keep what in-place methods overwrite, so that `detach` works (costs a copy of those weights).
    seed: of the initial values. Raises AdapterError where the model cannot carry it, and then leaves it as it was.
    """
    if not name or "." in name:
        raise AdapterError(f"'{name}' cannot be the name of an adapter: it is empty or has a dot.")
    adapter = Adapter(model, expression, name)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for part in adapter.plans:
                if part.kind == "listen":
                    _listen(adapter, part)
                else:
                    _in_place(adapter, part)
        if new_words:
            adapter.rows = attach_words(model, list(dict.fromkeys(new_words)), name, trained=adapter.trained.values())
    except BaseException:
        adapter._remove()
        raise
    if keep_original:
        adapter._kept = {path: parameter.detach().clone() for path, parameter in adapter.trained.items()}
    return adapter


def _listen(adapter: Adapter, part: Plan) -> None:
    for site in select(adapter.model, part.sites, part.layers):
        if site.path in adapter.forms:
            raise AdapterError(
                f"two parts of '{adapter.expression}' listen at the same site {site.path}.", hints=["Give one of them other sites."]
            )
        if part.form["rank"] > min(site.inputs, site.outputs):
            raise AdapterError(
                f"{part.method}: rank {part.form['rank']} is larger than site {site.name} allows ({site.outputs} x {site.inputs}).",
                hints=[f"Nearest that works here:  rank={min(site.inputs, site.outputs)}"],
            )
        module: Any = site.module
        form = LowRank(site.inputs, site.outputs, **part.form).to(next(adapter.model.parameters()).device).eval()
        if not hasattr(module, "ts_forms"):
            module.ts_forms = nn.ModuleDict()
            module.register_forward_hook(_add_forms)
        if adapter.name in module.ts_forms:
            raise AdapterError(f"an adapter named '{adapter.name}' is attached already.", hints=["Detach it first, or give another name."])
        module.ts_forms[adapter.name] = form
        _refresh_forms(module)
        adapter.forms[site.path] = form
    if not adapter.forms:
        raise AdapterError(f"'{adapter.expression}' selects no site of this model.")


def _refresh_forms(module: Any) -> None:
    """Which forms listen at a site: those switched on, always in the order in which they were attached."""
    module.ts_active = tuple(form for form in module.ts_forms.values() if form.active)


def _add_forms(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """The one hook: whatever is active at the site adds its output."""
    for form in module.ts_active:
        out = out + form(args[0])
    return out


def _in_place(adapter: Adapter, part: Plan) -> None:
    named = dict(adapter.model.named_parameters())
    paths = [path for path in named if not any(part.startswith("ts_") for part in path.split("."))]
    if part.method == "layers":
        root, layers = blocks(adapter.model)
        count = len(layers)
        if part.last is not None and part.last > count:
            raise AdapterError(
                f"layers(last={part.last}) is more than the model's {count} layers.",
                hints=[f"Nearest that works here:  layers(last={count})"],
            )
        chosen = checked_layers(part.layers, count) if part.layers is not None else set(range(count - (part.last or 0), count))
        paths = [path for path in paths if any(path.startswith(f"{root}.{layer}.") for layer in chosen)]
    elif part.method == "modules":
        paths = [path for path in paths if any(_matches(path, name) for name in part.names)]
        for name in part.names:
            if not any(_matches(path, name) for path in paths):
                raise AdapterError(f"modules: no parameter of the model matches '{name}'.", hints=[f"Paths look like:  {_examples(named)}"])
    for path in paths:
        if not named[path].is_floating_point():
            raise AdapterError(f"{path} is quantised and cannot be trained in place.", hints=["Nearest that works here:  lora"])
        named[path].requires_grad_(True)
        adapter.trained[path] = named[path]
    if not adapter.trained:
        raise AdapterError(f"'{adapter.expression}' selects no parameter of this model.")


def _matches(path: str, name: str) -> bool:
    if "*" in name:
        return fnmatch.fnmatch(path, name) or fnmatch.fnmatch(path, f"{name}.weight") or fnmatch.fnmatch(path, f"{name}.bias")
    return f".{name}." in f".{path}."


def _examples(named: dict[str, nn.Parameter]) -> str:
    paths = list(named)
    return "  ·  ".join(dict.fromkeys([paths[0], paths[len(paths) // 2], paths[-1]]))
