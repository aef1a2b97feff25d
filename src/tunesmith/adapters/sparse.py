"""Sparse methods: some entries of a weight are trained, chosen before training by a mask, or during it by gates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tunesmith.adapters.forms import Form
from tunesmith.adapters.methods import Plan, method, names_of
from tunesmith.adapters.sites import Site
from tunesmith.adapters.weights import is_quantised, is_transposed
from tunesmith.core.errors import AdapterError, unknown

Mask = Literal["magnitude", "gradient", "fisher", "random"]


@method("sparse")
def sparse(
    *,
    share: float = 0.005,
    mask: str = "fisher",
    samples: int = 64,
    sites: Sequence[str] | str = "all",
    layers: Sequence[int] | None = None,
) -> Plan:
    """Sparse masks: W' = W + d, where d is zero but for a share of each weight's entries, chosen once and then trained.

    mask: "fisher", entries with the largest mean squared gradient over single samples (Sung et al. 2021, FISH, 2111.09839;
    share 0.005 there); "gradient", with the largest gradient over all of them (Song et al. 2023, SIFT, 2312.11875);
    "magnitude", the largest weights, and "random" (Bhardwaj et al. 2024, SHiRA, 2406.13175). samples: rows that gradient and
    fisher look at as training begins. A step costs the gradient of each site's weight, as in full fine-tuning, but optimiser
    and files hold the chosen entries alone; inference costs nothing, and it merges by nature. When to use it: changes of
    high rank in a small file, or many tasks whose changes should not touch one another.
    """
    if mask not in get_args(Mask):
        raise unknown("mask", mask, get_args(Mask), error=AdapterError)
    if not 0 < share <= 1:
        raise AdapterError(f"sparse: share must lie above 0 and be at most 1, not {share}.")
    if type(samples) is not int or samples < 1:
        raise AdapterError(f"sparse: samples must be a whole number of at least 1, not {samples!r}.")
    chosen = None if layers is None else tuple(layers)
    return Plan(
        "sparse",
        "in-place",
        names_of("sparse", sites),
        chosen,
        {"samples": samples},
        make=lambda site: Entries(site, share=share, mask=mask, samples=samples),
    )


@method("diff_pruning")
def diff_pruning(
    *,
    penalty: float = 1.25e-7,
    gate_rate: float = 500.0,
    structured: bool = False,
    sites: Sequence[str] | str = "all",
    layers: Sequence[int] | None = None,
) -> Plan:
    """Diff Pruning: W' = W + z * w, a difference w with a gate z in [0, 1] for each entry, pressed towards zero.

    Guo, Rush and Kim 2021 (2012.07463). z = min(1, max(0, 3 s - 1.5)), s = sigmoid(log u - log(1 - u) + a), u uniform in
    training (hard concrete, Louizos et al. 2018, 1712.01312), and sigmoid(a) after it; the loss gains `penalty` times the
    expected number of open gates, the sum of sigmoid(a). a begins at 5. gate_rate: the gates' learning rate over that of
    the differences (0.1 in the paper). structured: a gate for each matrix as well, times which the others count. It trains
    two values an entry and changes few; a step costs two more products a site, the file holds the entries that are not zero,
    and it merges. When to use it: to learn which entries a task needs, and have the file small whatever the training cost.
    """
    if not 0 <= penalty < math.inf:
        raise AdapterError(f"diff_pruning: penalty must be a number of at least 0, not {penalty}.")
    if not 0 < gate_rate < math.inf:
        raise AdapterError(f"diff_pruning: gate_rate must be a number above 0, not {gate_rate}.")
    chosen = None if layers is None else tuple(layers)

    def make(site: Site) -> Form:
        return Gated(site.inputs, site.outputs, penalty=penalty, rate=gate_rate, structured=bool(structured))

    return Plan("diff_pruning", "listen", names_of("diff_pruning", sites), chosen, make=make)


class Entries(Form):
    """Some entries of the site's weight, trained in place: the weight holds what it held plus `values` at `index`.

    values: [entries], fp32. index: their places in the flattened weight. original: what the weight held there. decided:
    whether the mask is found. The base's own product computes with what is written, and only the backward is added: the
    entries' gradient, taken out of the whole weight's.
    """

    writes = True
    kept = ("index", "values")
    _sample: Tensor
    index: Tensor
    original: Tensor
    decided: Tensor

    def __init__(self, site: Site, *, share: float, mask: str, samples: int) -> None:
        super().__init__()
        if is_quantised(site.module):
            raise AdapterError(f"{site.path} is quantised and cannot be trained in place.", hints=["Nearest that works here:  lora"])
        weight: Any = site.module.weight
        self.__dict__["module"] = site.module  # outside of the module tree: the weight is the base's
        self.transposed = is_transposed(site.module)
        self.mask, self.samples = mask, samples
        self._seen: Tensor | None = None
        count = max(1, round(share * weight.numel()))
        self.values = nn.Parameter(torch.zeros(count, dtype=torch.float32))
        self.register_buffer("index", torch.zeros(count, dtype=torch.long), persistent=False)
        self.register_buffer("original", torch.zeros(count, dtype=weight.dtype), persistent=False)
        self.register_buffer("decided", torch.zeros((), dtype=torch.bool), persistent=False)
        if mask == "random":
            self._choose(torch.rand(weight.shape))
        elif mask == "magnitude":
            self._choose(weight.detach().float().abs())

    @property
    def waits(self) -> bool:  # type: ignore[override]
        """Whether its mask is still to be found."""
        return not bool(self.decided)

    @property
    def _weight(self) -> Tensor:
        """The base's weight, flat, outside of autograd: nobody's saved tensor counts as changed by writing into it."""
        flat: Tensor = self.__dict__["module"].weight.data.view(-1)
        return flat

    def _choose(self, score: Tensor) -> None:
        top = torch.topk(score.flatten(), len(self.values), sorted=False).indices
        self._at(top.sort().values.to(self.index.device))

    def _at(self, index: Tensor) -> None:
        self.index, self.original = index, self._weight[index.to(self._weight.device)].to(index.device)
        self.decided = torch.ones_like(self.decided)

    @torch.no_grad()
    def settle(self) -> None:
        """Write the entries into the weight, or what was there before."""
        if not self.waits:
            learned = (self.original.float() + self.values).to(self.original.dtype) if self.active else self.original
            self._weight[self.index] = learned

    def updated(self, step: int, total: int) -> None:
        """Write what the step learned."""
        self.settle()

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        """out itself; its backward also gives the entries their gradient."""
        if not torch.is_grad_enabled():
            return out
        function: Any = _TakeEntries if self._seen is None else _Watch
        tapped: Tensor = function.apply(out, x, self.values, self.index if self._seen is None else self, self.transposed)
        return tapped

    def watch(self, on: bool) -> None:
        """Add up gradients of the weight, or their squares, over samples; then take the largest."""
        if self._seen is None:
            self._seen, self._sample = (torch.zeros_like(self._weight, dtype=torch.float32) for _ in range(2))
        self._seen += self._sample.square() if self.mask == "fisher" else self._sample
        self._sample.zero_()
        if not on:
            self._choose(self._seen.abs())
            self._seen = None
            del self._sample

    def saw(self, gradient: Tensor) -> None:
        """The gradient of the weight in one pass through the site, [of the weight's shape]; a shared layer has several a sample."""
        self._sample += gradient.reshape(-1).float()

    def delta(self) -> Tensor:
        """The change of the weight, fp32 [outputs, inputs]."""
        module = self.__dict__["module"]
        change = torch.zeros(module.weight.numel(), device=self.values.device)
        change[self.index] = self.values.detach()
        change = change.view(module.weight.shape)
        return change.t() if self.transposed else change

    def flops(self) -> int:
        """None: the weight holds them."""
        return 0

    def stored(self) -> dict[str, Tensor]:
        """Places and changes of the entries."""
        return {"index": self.index.to(torch.int32 if self._weight.numel() < 2**31 else torch.int64), "values": self.values.detach()}

    def restore(self, values: dict[str, Tensor]) -> None:
        """Raises AdapterError for places that the weight does not have."""
        index, change = _entries(values, self._weight.numel())
        active, self.active = self.active, False
        self.settle()  # the weight as it was, before other places of it are noted
        self.active = active
        self._at(index.to(self.values.device))
        self.values = nn.Parameter(change.to(self.values.device))
        self.settle()


def _entries(values: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """(places, values), checked: a file may hold anything."""
    index, change = values["index"], values["values"]
    sound = index.ndim == 1 and index.shape == change.shape and not index.is_floating_point() and change.is_floating_point()
    if not sound or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < size) or len(index.unique()) < len(index):
        raise AdapterError(
            f"the saved entries do not fit a weight of {size:,} values.", hints=["Load the base that the adapter was made for."]
        )
    return index.long(), change.float()


def _weight_gradient(go: Tensor, x: Tensor, transposed: bool) -> Tensor:
    """The gradient of a linear map's weight: [outputs, inputs], or [inputs, outputs] where that is how it lies."""
    go, x = go.flatten(0, -2), x.flatten(0, -2).to(go.dtype)
    return x.t() @ go if transposed else go.t() @ x


class _TakeEntries(torch.autograd.Function):
    """Identity; the backward takes the gradient of some of the weight's entries."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, values: Tensor, index: Tensor, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, index)
        ctx.transposed = transposed
        return out.clone()  # not a view of the product: models add to it in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, index = ctx.saved_tensors
        of_weight = _weight_gradient(grads[0], x, ctx.transposed)
        return grads[0], None, of_weight.reshape(-1)[index].float(), None, None


class _Watch(torch.autograd.Function):
    """Identity; the backward shows the form the gradient of the whole weight."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, values: Tensor, form: Entries, transposed: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.form, ctx.transposed, ctx.entries = form, transposed, len(values)
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.form.saw(_weight_gradient(grads[0], x, ctx.transposed))
        return grads[0], None, torch.zeros(ctx.entries, device=x.device), None, None


_LOW, _HIGH, _OPEN = -1.5, 1.5, 5.0
"""What the gates are stretched to, and where they begin (Guo et al. 2021, section 4.2, and the code of that paper)."""


class Gated(Form):
    """y = W x + (z * w) x with hard-concrete gates z; see `diff_pruning`.

    w [outputs, inputs] begins at zero, so the site computes exactly the base at the start. gate [outputs * inputs], a, flat
    so that no weight decay closes it. group [1]: of the matrix, where it is structured. Parameters are fp32.
    """

    kept = ("index", "values")

    def __init__(self, inputs: int, outputs: int, *, penalty: float, rate: float, structured: bool) -> None:
        super().__init__()
        self.weight_of_penalty, self.gate_rate = penalty, rate
        self.w = nn.Parameter(torch.zeros(outputs, inputs, dtype=torch.float32))
        self.gate = nn.Parameter(torch.full((outputs * inputs,), _OPEN, dtype=torch.float32))
        self.group = nn.Parameter(torch.full((1,), _OPEN, dtype=torch.float32)) if structured else None
        self._last: tuple[Any, Tensor] | None = None

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        """out + (z * w) x."""
        return out + nn.functional.linear(x, self._change(x.dtype))

    def _change(self, dtype: torch.dtype) -> Tensor:
        """z * w; made once between two updates where no gradient is taken."""
        if self.training or torch.is_grad_enabled():
            return self._gated().to(dtype)
        key = (self.w._version, self.gate._version, None if self.group is None else self.group._version, dtype, self.w.device)
        if self._last is None or self._last[0] != key:
            self._last = (key, self._gated().to(dtype))
        return self._last[1]

    def _gated(self) -> Tensor:
        z = self._z(self.gate).view_as(self.w)
        return self.w * (z if self.group is None else z * self._z(self.group))

    def _z(self, a: Tensor) -> Tensor:
        if self.training:
            u = torch.rand_like(a).clamp(1e-6, 1 - 1e-6)
            a = a + torch.log(u) - torch.log1p(-u)
        return (torch.sigmoid(a) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def penalty(self) -> Tensor:
        """The expected number of open gates, times its weight."""
        shift = math.log(-_LOW / _HIGH)
        expected = torch.sigmoid(self.gate - shift).sum()
        if self.group is not None:
            expected = expected * torch.sigmoid(self.group - shift).sum()
        return self.weight_of_penalty * expected

    def rate(self, name: str) -> float:
        """Gates move faster than differences."""
        return 1.0 if name == "w" else self.gate_rate

    @torch.no_grad()
    def delta(self) -> Tensor:
        """z * w as it is used after training, fp32 [outputs, inputs]."""
        training, self.training = self.training, False
        try:
            return self._gated().detach()
        finally:
            self.training = training

    def flops(self) -> int:
        """A product with a matrix of the site's size."""
        return 2 * self.w.numel()

    def stored(self) -> dict[str, Tensor]:
        """The entries that are not zero."""
        change = self.delta().flatten()
        index = change.nonzero()[:, 0]
        return {"index": index.to(torch.int32 if change.numel() < 2**31 else torch.int64), "values": change[index]}

    @torch.no_grad()
    def restore(self, values: dict[str, Tensor]) -> None:
        """The same change: these entries with gates wide open, the others with theirs shut. Raises AdapterError for others' entries."""
        index, change = _entries(values, self.w.numel())
        self.w.zero_()
        self.w.view(-1)[index.to(self.w.device)] = change.to(self.w.device)
        self.gate.fill_(-_OPEN)
        self.gate[index.to(self.w.device)] = _OPEN
        if self.group is not None:
            self.group.fill_(_OPEN)
