"""The two hooks that every site shares: forms are submodules of their site, and whatever is switched on there is asked in turn."""

from __future__ import annotations

from typing import Any, Self

from torch import nn

from tunesmith.adapters.forms import Form
from tunesmith.core.errors import AdapterError


class ByName(nn.ModuleDict):
    """Modules by the names of adapters, which may be called like a method of a module too: `train`, `half`."""

    def __setitem__(self, key: str, module: nn.Module) -> None:
        """Set a module, as a ModuleDict does but for its refusal of names that are attributes: these are read as items alone."""
        self._modules[key] = module

    def train(self, mode: bool = True) -> Self:
        """Switch between training and use, as every module does; `training` may be a module here."""
        self.__dict__["training"] = mode
        for module in self.children():
            module.train(mode)
        return self


def join(module: Any, key: str, form: Form) -> None:
    """Make a form a submodule of its site, which calls whatever is switched on through the shared hooks."""
    if not hasattr(module, "ts_forms"):
        module.ts_forms = ByName()
        module.register_forward_pre_hook(_enter, with_kwargs=True)
        module.register_forward_hook(_leave, with_kwargs=True)
    if key in module.ts_forms:
        raise AdapterError(f"an adapter named '{key}' is attached already.", hints=["Detach it first, or give another name."])
    module.ts_forms[key] = form
    refresh_forms(module)


def refresh_forms(module: Any) -> None:
    """Which forms listen at a site: those switched on, in the order in which they were attached, those that are `last` last."""
    forms: Any = module._modules["ts_forms"]._modules.values()  # a module's __getattr__ costs more than all the rest
    active = [form for form in forms if form.active and not form.left_out]
    if len(active) > 1:
        active.sort(key=lambda form: form.last)
    own = module.__dict__  # past a module's __setattr__, for the same reason
    own["ts_before"] = tuple([form for form in active if form.before])
    own["ts_active"] = tuple([form for form in active if not form.before])
    router = own.get("ts_router")
    if router is not None:  # rows of several adapters go through at once
        router.stand_at(module)


def _enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The one hook before a site: whatever is active there changes what enters it."""
    if not module.ts_before:
        return None
    x, args, kwargs = (args[0], args[1:], kwargs) if args else (kwargs[_INPUT], (), {k: v for k, v in kwargs.items() if k != _INPUT})
    for form in module.ts_before:
        x = form.enter(x)
    return (x, *args), kwargs


def _leave(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """The one hook after a site: whatever is active there changes what leaves it, the first thing where there are several."""
    if not module.ts_active:
        return out
    x = args[0] if args else kwargs[_INPUT]
    first = out[0] if isinstance(out, tuple) else out
    for form in module.ts_active:
        first = form.leave(first, x)
    return (first, *out[1:]) if isinstance(out, tuple) else first


_INPUT = "hidden_states"
"""What transformers calls the input of its attention and feed-forward modules, where it is passed by name."""
