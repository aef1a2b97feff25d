"""Attaching: adapters join their sites through one shared hook; detaching gives back exactly the base.

An adapter is a submodule of its site (so `.to()`, FSDP and state_dict see it) and the base's own weights and module
names stay untouched. Methods that train the base in place keep the original values for the way back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.adapters.forms import Form, TokenRows
from tunesmith.adapters.heads import TaskHead, Way, put_head, remove_head
from tunesmith.adapters.hooks import join, refresh_forms
from tunesmith.adapters.methods import Plan, plan
from tunesmith.adapters.sites import Site, is_encoder_decoder, select
from tunesmith.adapters.virtual import Encode, VirtualTokens, join_tokens, refresh_tokens, remove_tokens
from tunesmith.adapters.words import attach_words, refresh, remove_words
from tunesmith.core.errors import AdapterError


class Adapter:
    """Something trainable on a base: forms at sites, parameters of the base itself, rows for new words, and a task head.

    name: unique on its base. expression: as written. forms: module path -> form; where several listen at one module, the others
    under the path with ~ and their method. trained: path -> parameter of the
    base trained in place. rows: module path -> vectors of new words. head: None until its labels are known (`give_head`).
    virtual: method -> tokens of its own that stand among those of a text. finished: name -> expression of adapters that it joins.
    digest: of its file, once it has one.
    """

    def __init__(self, model: nn.Module, expression: str, name: str = "default") -> None:
        self.model, self.expression, self.name = model, expression, name
        self.plans = plan(expression)
        self.forms: dict[str, Form] = {}
        self.trained: dict[str, nn.Parameter] = {}
        self.rows: dict[str, TokenRows] = {}
        self.head: TaskHead | None = None
        self.finished: dict[str, str] = {}
        self.digest = ""
        self.virtual: dict[str, VirtualTokens] = {}
        self.merged: frozenset[str] = frozenset()  # paths of the base's parameters that hold it
        self._active = True
        self._sites: dict[str, nn.Module] = {}
        self._kept: dict[str, Tensor] = {}  # what in-place training overwrote; while switched off, what it learned

    @property
    def in_place(self) -> bool:
        return any(p.kind == "in-place" for p in self.plans)

    @property
    def head_plan(self) -> Plan | None:
        """The head that the expression names, if it names one."""
        return next((p for p in self.plans if p.kind == "head"), None)

    def give_head(self, width: int, labels: Sequence[str], way: Way, *, seed: int = 0) -> None:
        """Put a task head on, with an output a label; one that the expression does not name is added to it.

        width: of the base's hidden states. seed: of its initial values. Raises AdapterError where there is one already.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = TaskHead(width, labels, way)
        put_head(self.model, self.name, head)
        self.head = head
        if self.head_plan is None:
            self.expression += " + head"
            self.plans = plan(self.expression)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every trainable parameter under a name that is stable between runs."""
        for path, form in self.forms.items():
            for name, parameter in form.named_parameters():
                yield f"{path}.{name}", parameter
        yield from self.trained.items()
        for path, rows in self.rows.items():
            yield f"{path}.rows", rows.rows
        for path, tokens in self.virtual.items():
            for name, parameter in tokens.named_parameters():
                yield f"ts_virtual.{path}.{name}", parameter
        for path, parameter in self.head.named_parameters() if self.head is not None else ():
            yield f"ts_head.{path}", parameter

    @property
    def lr(self) -> float:
        """Learning rate where none is given: the smallest of its parts'."""
        return min(part.lr for part in self.plans)

    def rates(self) -> dict[str, float]:
        """Factors on the learning rate, by parameter, where they are not 1."""
        every = {f"{path}.{name}": form.rate(name) for path, form in self.forms.items() for name, _ in form.named_parameters()}
        return {name: rate for name, rate in every.items() if rate != 1.0}

    def penalty(self) -> Tensor | None:
        """What its forms add to the loss of a step, a scalar; None for nothing."""
        added = [value for form in self.forms.values() if form.active and (value := form.penalty()) is not None]
        return torch.stack(added).sum() if added else None

    def settle(self) -> None:
        """Bring the base's weights in line with forms that write into them, after their values changed."""
        for form in self.forms.values():
            form.settle()

    def memory(self) -> dict[str, Tensor]:
        """What the forms remember besides their parameters, by name: resuming needs it. The tensors themselves."""
        return {f"{path}.{name}": buffer for path, form in self.forms.items() for name, buffer in form.named_buffers()}

    def begin(self, step: int, total: int, seed: int) -> None:
        """Tell the forms that a step, counted from 0, of a run with this seed begins."""
        for form in self.forms.values():
            form.begin(step, total, seed)

    def drop(self, layers: int) -> None:
        """Do without the forms of so many lowest layers from now on (AdapterDrop, Rücklé et al. 2021 · 2010.11918); 0 for none.

        Raises AdapterError where no form would be left.
        """
        top = max((form.layer for form in self.forms.values()), default=-1)
        if not 0 <= layers <= max(top, 0):
            raise AdapterError(f"'{self.expression}' cannot drop {layers} layers: its forms reach up to layer {top}.")
        for path, form in self.forms.items():
            form.left_out = 0 <= form.layer < layers
            refresh_forms(self.model.get_submodule(module_path(path)))

    def graded(self, step: int, total: int) -> None:
        """Tell the forms that a step's gradients are whole, before the update. step: counted from 1."""
        for form in self.forms.values():
            form.graded(step, total)

    def updated(self, step: int, total: int) -> None:
        """Tell the forms that a step's update is made."""
        for form in self.forms.values():
            form.updated(step, total)

    @property
    def waits(self) -> bool:
        """Whether a form has to see some of the data before it is trained."""
        return any(form.waits for form in self.forms.values())

    def trainable(self) -> int:
        """Number of trainable values."""
        return sum(parameter.numel() for _, parameter in self.named_parameters())

    def train(self, mode: bool = True) -> None:
        """Dropout of the forms and the head on or off; the base is left as it is."""
        for form in (*self.forms.values(), *self.virtual.values(), *([] if self.head is None else [self.head])):
            form.train(mode)

    def freeze(self) -> None:
        """Keep the adapter active, but train it no further."""
        for _, parameter in self.named_parameters():
            parameter.requires_grad_(False)

    def stored(self) -> dict[str, Tensor]:
        """What its file holds: values by name, of some forms a shorter account of them."""
        own = {name: parameter.detach() for name, parameter in self.named_parameters()}
        for path, form in self.forms.items():
            if form.kept:
                for name, _ in form.named_parameters():
                    del own[f"{path}.{name}"]
                own |= {f"{path}.{name}": value for name, value in form.stored().items()}
        return own

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `stored` gave. Raises AdapterError where it does not belong here."""
        rest = dict(state)
        own = dict(self.named_parameters())
        for path, form in self.forms.items():
            if form.kept:
                if missing := [name for name in form.kept if f"{path}.{name}" not in rest]:
                    raise AdapterError(f"the saved adapter lacks '{path}.{missing[0]}'.")
                for name, _ in form.named_parameters():
                    del own[f"{path}.{name}"]
                form.restore({name: rest.pop(f"{path}.{name}") for name in form.kept})
        _take(own, rest)
        self.settle()

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take values by name. Raises AdapterError where names or shapes differ."""
        _take(dict(self.named_parameters()), state)
        self.settle()

    def state(self) -> dict[str, Tensor]:
        """Values by name, detached, contiguous copies."""
        return {name: parameter.detach().clone().contiguous() for name, parameter in self.named_parameters()}

    def take_in(self, written: Mapping[str, Tensor], *, keep_original: bool) -> None:
        """Put merged values into the base's parameters, by path; forms and rows rest from here on (see `merging`)."""
        self._switch(False)
        self.merged = frozenset(written)
        self._kept |= written
        self._switch(True)
        if not keep_original:
            for path in written:
                del self._kept[path]

    def give_out(self) -> None:
        """Undo `take_in`. Raises AdapterError where nothing was merged, or what it overwrote was not kept."""
        if not self.merged:
            raise AdapterError(f"'{self.expression}' is not merged.")
        self._switch(False)
        for path in self.merged:
            del self._kept[path]
        self.merged = frozenset()
        self._switch(True)

    def originals(self) -> dict[str, Tensor]:
        """What in-place training overwrote, by path. Raises AdapterError where it was not kept."""
        if missing := self.trained.keys() - self._kept.keys():
            raise AdapterError(f"'{self.expression}' was attached without keeping what it changes, first '{min(missing)}'.")
        return {path: self._kept[path] for path in self.trained}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base without this adapter, for a while. May be nested. Raises AdapterError where the base's weights were not kept."""
        with self.switched(False):
            yield

    @contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        """With this adapter or without it, for a while. May be nested. Raises AdapterError where the base's weights were not kept."""
        before = self._active
        self._switch(on)
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
        if (self.trained or self.merged) and not self._kept:
            raise AdapterError(
                f"'{self.expression}' was attached or merged without keeping the weights that it changes: the base is not to be had back.",
                hints=["Load the base again, or attach or merge with keep_original=True."],
            )
        self._active = active
        for path, form in self.forms.items():
            form.__dict__["active"] = active and (form.writes or not self.merged)
            if form.writes:
                form.settle()
            refresh_forms(self._site(path))
        for name in (*self.trained, *self.merged):
            parameter = self.model.get_parameter(name)
            before = parameter.detach()
            parameter.data, self._kept[name] = self._kept[name], before
        for rows in self.rows.values():
            rows.active = active and not self.merged
        if self.rows:
            refresh(self.model)
        for tokens in self.virtual.values():
            tokens.active = active
            for path, given in tokens.forms.items():
                given.active = active
                refresh_forms(self._site(path))
            refresh_tokens(self.model)

    def _site(self, path: str) -> nn.Module:
        """The module at which the form of this path listens, looked up once."""
        if path not in self._sites:
            self._sites[path] = self.model.get_submodule(module_path(path))
        return self._sites[path]

    def _remove(self) -> None:
        for path in self.forms:
            module: Any = self.model.get_submodule(module_path(path))
            for key in [key for key in module.ts_forms if key.split("~")[0] == self.name]:
                del module.ts_forms[key]
            refresh_forms(module)
        for method, tokens in self.virtual.items():
            remove_tokens(self.model, f"{self.name}~{method}")
            for path in tokens.forms:
                site: Any = self.model.get_submodule(path)
                if f"{self.name}~{method}" in getattr(site, "ts_forms", ()):
                    del site.ts_forms[f"{self.name}~{method}"]
                    refresh_forms(site)
        if self.rows:
            remove_words(self.model, self.name)
        if self.head is not None:
            remove_head(self.model, self.name)
        for parameter in self.trained.values():
            parameter.requires_grad_(False)
        self.forms, self.trained, self.rows, self.virtual, self._kept, self.head = {}, {}, {}, {}, {}, None
        self._sites, self.merged = {}, frozenset()


def _take(own: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    if missing := sorted(own.keys() ^ state.keys()):
        raise AdapterError(f"the saved adapter and the attached one differ in {len(missing)} parameters, first '{missing[0]}'.")
    for name, parameter in own.items():
        if parameter.shape != state[name].shape:
            raise AdapterError(f"'{name}' has shape {tuple(state[name].shape)}, but {tuple(parameter.shape)} is needed.")
        parameter.copy_(state[name])


def attach(
    model: nn.Module,
    expression: str,
    *,
    name: str = "default",
    new_words: Sequence[int] = (),
    keep_original: bool = True,
    seed: int = 0,
    encode: Encode | None = None,
    fingerprint: str | None = None,
    finished: Mapping[str, str] | None = None,
    beneath: Sequence[str] = (),
) -> Adapter:
    """Attach an adapter by its expression, for example "lora(rank=16, sites=[q, v])".

    new_words: ids of words whose vectors are trained too (those that were added to the vocabulary for a task).
    keep_original: keep what in-place methods overwrite, so that `detach` works (costs a copy of those weights).
    seed: of the initial values. encode: text to token ids, for methods that begin with words. fingerprint: of the base, for methods
    that join finished adapters. finished: expressions of these, by name, where their values are to be restored and not read.
    beneath: digests of the adapters that it stands on, which these have to have stood on too.
    Raises AdapterError where the model cannot carry it, and then leaves it as it was.
    """
    if not name or "." in name:
        raise AdapterError(f"'{name}' cannot be the name of an adapter: it is empty or has a dot.")
    adapter = Adapter(model, expression, name)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for part in adapter.plans:
                if part.resolve is not None:
                    part = part.resolve(finished, fingerprint, beneath)
                    adapter.finished |= part.finished
                _refuse_two_stacks(model, part)
                if part.make is not None:
                    _listen(adapter, part)
                elif part.pick is not None:
                    _in_place(adapter, part)
                elif part.make_tokens is not None:
                    _stand(adapter, part, encode)
        if new_words:
            adapter.rows = attach_words(model, list(dict.fromkeys(new_words)), name, trained=adapter.trained.values())
    except BaseException:
        adapter._remove()
        raise
    if keep_original:
        adapter._kept = {path: parameter.detach().clone() for path, parameter in adapter.trained.items()}
    return adapter


def _refuse_two_stacks(model: nn.Module, part: Plan) -> None:
    """Raise AdapterError for what an encoder-decoder has no place for."""
    why = (
        "puts tokens of its own among those of a text, which our forward does, and it runs no encoder-decoder"
        if part.kind == "virtual"
        else "is a chain of rungs beside one stack of layers, and an encoder-decoder has two"
        if part.chained
        else ""
    )
    if why and is_encoder_decoder(model):
        hints = ["Nearest that works here:  lora  ·  houlsby  ·  parallel  ·  ia3"]
        raise AdapterError(f"{part.method} {why}: {type(model).__name__} cannot carry it.", hints=hints)


def module_path(path: str) -> str:
    """The module at which the form of this path listens."""
    return path.split("~")[0]


def _listen(adapter: Adapter, part: Plan) -> None:
    peers: list[Form] = []
    for site in select(adapter.model, part.sites, part.layers, sublayers=part.sublayers):
        if 0 <= site.layer < part.lowest:
            continue
        path, key = site.path, adapter.name
        if path in adapter.forms:
            path, key = f"{path}~{part.method}", f"{key}~{part.method}"
        beside = adapter.forms.get(site.path)
        if path in adapter.forms or (part.alone and beside is not None and not beside.last):
            raise AdapterError(
                f"two parts of '{adapter.expression}' listen at the same site {site.path}.", hints=["Give one of them other sites."]
            )
        assert part.make is not None
        if site.name == "head" and part.method not in ("lora", "rslora"):
            raise AdapterError(
                f"{part.method} cannot listen at the vocabulary head, whose weight is read without calling it.",
                hints=["Nearest that works here:  lora(sites=[head])", "Or train it whole:  modules(names=[lm_head])"],
            )
        form = part.make(site).to(next(adapter.model.parameters()).device).eval()
        form.layer = site.layer
        join(site.module, key, form)
        adapter.forms[path] = form
        peers.append(form)
        _listen_before(adapter, part, site, form)
    for form in peers:
        form.joined(peers)
    if not adapter.forms:
        raise AdapterError(f"'{adapter.expression}' selects no site of this model.")


def _listen_before(adapter: Adapter, part: Plan, site: Site, form: Form) -> None:
    """Join the form that reads a sub-layer's input for one that listens at its end, if that one needs it."""
    listener = form.listener() if site.source else None
    if listener is None:
        return
    suffix = f"~{part.method}~{site.name}"
    listener.layer = site.layer
    join(adapter.model.get_submodule(site.source), adapter.name + suffix, listener)
    adapter.forms[site.source + suffix] = listener


def _stand(adapter: Adapter, part: Plan, encode: Encode | None) -> None:
    """Give the adapter virtual tokens, and join the forms that give their keys and values to their sites."""
    assert part.make_tokens is not None
    if part.method in adapter.virtual:
        raise AdapterError(f"'{adapter.expression}' names {part.method} twice.", hints=["Give one of them all the tokens."])
    context = getattr(getattr(adapter.model, "config", None), "max_position_embeddings", None)
    if context and part.tokens >= context:
        raise AdapterError(f"{part.method}: {part.tokens} virtual tokens leave no room for a text in a context of {context}.")
    key = f"{adapter.name}~{part.method}"
    tokens = part.make_tokens(adapter.model, encode).to(next(adapter.model.parameters()).device).eval()
    join_tokens(adapter.model, key, tokens)
    adapter.virtual[part.method] = tokens
    for path, form in tokens.forms.items():
        join(adapter.model.get_submodule(path), key, form.to(tokens.table.device))


def _in_place(adapter: Adapter, part: Plan) -> None:
    assert part.pick is not None
    named = {path: p for path, p in adapter.model.named_parameters() if not any(each.startswith("ts_") for each in path.split("."))}
    for path in part.pick(adapter.model, named):
        if not named[path].is_floating_point():
            raise AdapterError(f"{path} is quantised and cannot be trained in place.", hints=["Nearest that works here:  lora"])
        named[path].requires_grad_(True)
        adapter.trained[path] = named[path]
    if not adapter.trained:
        raise AdapterError(f"'{adapter.expression}' selects no parameter of this model.")
