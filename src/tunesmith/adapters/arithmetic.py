"""Arithmetic of weight changes: sums, TIES, DARE, resizing, and conversion of anything that changes weights to plain LoRA.

A change is what an adapter, or a finished full fine-tune, makes of each weight of one base. Low-rank ones are kept as their
factors, so linear combinations are exact; whatever has to be cut to a rank says what that cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tunesmith.adapters.adalora import Triplets
from tunesmith.adapters.attach import Adapter, attach
from tunesmith.adapters.forms import Form, LowRank
from tunesmith.adapters.lowrank import Principal
from tunesmith.adapters.merging import forms_by_module, merged_site
from tunesmith.adapters.sites import widths
from tunesmith.adapters.weights import bias_of, is_transposed, weight_of
from tunesmith.core.errors import AdapterError

Factors = tuple[Tensor, Tensor]
"""(B [outputs, r], A [r, inputs]) of a change B A."""


@dataclass(frozen=True)
class Change:
    """What is added to each weight of a base, fp32.

    low: module path -> factors. full: module path -> matrix [outputs, inputs]. other: path -> changes of parameters that are
    no matrix of a linear map (biases, norms, embeddings), which LoRA cannot hold.
    """

    low: Mapping[str, Factors] = field(default_factory=dict)
    full: Mapping[str, Tensor] = field(default_factory=dict)
    other: Mapping[str, Tensor] = field(default_factory=dict)

    def paths(self) -> list[str]:
        """Modules whose weight changes."""
        return [*self.low, *self.full]

    def matrix(self, path: str) -> Tensor:
        """The change of a module's weight, [outputs, inputs]."""
        if path in self.full:
            return self.full[path]
        b, a = self.low[path]
        return b @ a

    def square(self) -> float:
        """Squared Euclidean norm of everything that changes."""
        matrices = sum(float(_square(*self.low[path])) for path in self.low)
        return matrices + sum(float(value.double().square().sum()) for value in (*self.full.values(), *self.other.values()))


@dataclass(frozen=True)
class Fit:
    """A change as plain LoRA. factors: by module path. error: Euclidean norm of what is left out, over that of the whole change.
    left_out: paths of changed parameters that no LoRA can hold; they count in the error."""

    factors: Mapping[str, Factors]
    error: float
    left_out: tuple[str, ...] = ()

    @property
    def ranks(self) -> dict[str, int]:
        return {path: a.shape[0] for path, (_, a) in self.factors.items()}


@torch.no_grad()
def change_of(adapter: Adapter) -> Change:
    """What an adapter adds to the weights of its base. Raises AdapterError where it is no change of weights.

    Of one that trains the base in place: the weights as they are less those that were kept (attach with keep_original=True).
    New words' vectors are the task's own and must not be there; a task head is left aside.
    """
    if virtual := [plan.method for plan in adapter.plans if plan.kind not in ("listen", "in-place", "head")]:
        raise AdapterError(f"'{virtual[0]}' is tokens of its own, not a change of weights.", hints=["Nearest that works here:  lora"])
    if adapter.rows:
        what = f"'{adapter.expression}' also trains the vectors of new words, which no sum or LoRA of weights holds."
        raise AdapterError(what, hints=["Merge it into the base instead:  tunesmith export RUN FOLDER --profile merged"])
    low: dict[str, Factors] = {}
    full: dict[str, Tensor] = {}
    other: dict[str, Tensor] = {}
    for path, forms in forms_by_module(adapter).items():
        if len(forms) == 1 and (factors := factors_of(forms[0])) is not None:
            low[path] = factors
            continue
        module = adapter.model.get_submodule(path)
        written = [change for form in forms if form.writes and (change := form.delta()) is not None]
        weight, bias = merged_site(module, forms, adapter.expression)
        full[path] = weight - weight_of(module, "converting") + sum(written, torch.zeros(()))
        own = bias_of(module)
        if bias is not None and (own is None or not torch.equal(bias, own)):
            other[f"{path}.bias"] = bias if own is None else bias - own
    for path, before in adapter.originals().items():
        _sort(adapter.model, path, adapter.trained[path].detach().float() - before.float(), full, other)
    return Change(low, full, other)


@torch.no_grad()
def difference(model: nn.Module, base: Mapping[str, Tensor]) -> Change:
    """What a finished fine-tune changed. model: as it is now. base: the weights that it began with, by path of parameter.

    Raises AdapterError where the two are not of the same shape.
    """
    full: dict[str, Tensor] = {}
    other: dict[str, Tensor] = {}
    for path, parameter in model.named_parameters():
        if any(part.startswith("ts_") for part in path.split(".")):
            continue
        if path not in base or base[path].shape != parameter.shape:
            raise AdapterError(f"the model has '{path}' of shape {tuple(parameter.shape)}, and the base does not.")
        _sort(model, path, parameter.detach().float() - base[path].to(parameter.device).float(), full, other)
    return Change({}, full, other)


def _sort(model: nn.Module, path: str, change: Tensor, full: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Put the change of a parameter where it belongs; what did not change belongs nowhere."""
    if not bool(change.any()):
        return
    where, _, name = path.rpartition(".")
    module = model.get_submodule(where)
    if name == "weight" and widths(module) is not None:
        full[where] = change.t() if is_transposed(module) else change
    else:
        other[path] = change


def factors_of(form: Form) -> Factors | None:
    """The factors of a form's change, scale included; None where it has no exact ones."""
    if isinstance(form, Principal):
        a, b = form.pair()
        return (b * form.scale).detach(), a.detach()
    if isinstance(form, Triplets):
        left = form.e.detach()[:, 0] != 0
        return (form.b.detach() * form.scale)[:, left], (form.a * form.e).detach()[left]
    return ((form.b * form.scale).detach(), form.a.detach()) if isinstance(form, LowRank) else None


# Combinations


@torch.no_grad()
def linear(changes: Sequence[Change], weights: Sequence[float]) -> Change:
    """The weighted sum, exact: factors are laid side by side, so ranks add up."""
    _check_same(changes, weights)
    if any(change.full for change in changes):
        return _each(changes, lambda parts: _sum(parts, weights))
    low: dict[str, Factors] = {}
    for path in _all_paths(changes):
        parts = [(b * w, a) for change, w in zip(changes, weights, strict=True) if path in change.low for b, a in [change.low[path]]]
        low[path] = torch.cat([b for b, _ in parts], dim=1), torch.cat([a for _, a in parts])
    return Change(low, {}, _others(changes, weights))


def average(changes: Sequence[Change]) -> Change:
    """Their mean; a weight that only some change counts as unchanged in the others."""
    return linear(changes, [1 / max(1, len(changes))] * len(changes))


def stack(changes: Sequence[Change]) -> Change:
    """All of them on one base at once, as if each were attached."""
    return linear(changes, [1.0] * len(changes))


def subtract(change: Change, other: Change) -> Change:
    """One less the other: what it taught is taken away."""
    return linear([change, other], [1.0, -1.0])


@torch.no_grad()
def ties(changes: Sequence[Change], weights: Sequence[float], *, density: float = 0.2) -> Change:
    """Trim, elect signs, merge (Yadav et al. 2023 · 2306.01708): of each change the `density` largest entries of each matrix;
    the sign of their sum for each entry; then the mean, weighted, over those that agree with it."""
    _check_same(changes, weights, density)
    return _each(changes, lambda parts: _elected([_trimmed(part, density) for part in parts], weights))


@torch.no_grad()
def dare(changes: Sequence[Change], weights: Sequence[float], *, density: float = 0.5, seed: int = 0, elect: bool = False) -> Change:
    """Drop and rescale (Yu et al. 2023 · 2311.03099): of each change a random share `density` of entries, divided by it; then their
    weighted sum, or with `elect` that of TIES. The same seed drops the same entries."""
    _check_same(changes, weights, density)
    generator = torch.Generator().manual_seed(seed)

    def thinned(part: Tensor) -> Tensor:
        return part * (torch.rand(part.shape, generator=generator) < density).to(part) / density

    def combined(parts: list[Tensor]) -> Tensor:
        left = [thinned(part) for part in parts]
        return _elected(left, weights) if elect else _sum(left, weights)

    return _each(changes, combined)


def _check_same(changes: Sequence[Change], weights: Sequence[float], density: float = 1.0) -> None:
    if not changes:
        raise AdapterError("there is nothing to combine.")
    if len(weights) != len(changes):
        raise AdapterError(f"{len(changes)} adapters need as many weights, not {len(weights)}.")
    if not 0 < density <= 1:
        raise AdapterError(f"density must lie above 0 and be at most 1, not {density}.")
    for path in _all_paths(changes):
        if len({tuple(_shape(change, path)) for change in changes if path in change.paths()}) > 1:
            raise AdapterError(f"the adapters are not of one base: their shapes at {path} differ.")


def _shape(change: Change, path: str) -> tuple[int, int]:
    if path in change.full:
        return change.full[path].shape[0], change.full[path].shape[1]
    b, a = change.low[path]
    return b.shape[0], a.shape[1]


def _all_paths(changes: Sequence[Change]) -> list[str]:
    return list(dict.fromkeys(path for change in changes for path in change.paths()))


def _each(changes: Sequence[Change], rule: Callable[[list[Tensor]], Tensor]) -> Change:
    """A rule on whole matrices, weight by weight; what a change does not touch is zero."""
    full = {}
    for path in _all_paths(changes):
        zero = torch.zeros(next(_shape(change, path) for change in changes if path in change.paths()))
        full[path] = rule([change.matrix(path).cpu() if path in change.paths() else zero for change in changes])
    names = dict.fromkeys(name for change in changes for name in change.other)
    other = {}
    for name in names:
        like = next(change.other[name] for change in changes if name in change.other)
        other[name] = rule([change.other.get(name, torch.zeros_like(like)).cpu() for change in changes])
    return Change({}, full, other)


def _others(changes: Sequence[Change], weights: Sequence[float]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for change, weight in zip(changes, weights, strict=True):
        for name, value in change.other.items():
            out[name] = out[name] + weight * value if name in out else weight * value
    return out


def _sum(parts: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([part * weight for part, weight in zip(parts, weights, strict=True)]).sum(0)


def _trimmed(part: Tensor, density: float) -> Tensor:
    count = int(density * part.numel())
    out = torch.zeros_like(part).flatten()
    chosen = part.abs().flatten().topk(count).indices
    out[chosen] = part.flatten()[chosen]
    return out.view_as(part)


def _elected(parts: list[Tensor], weights: Sequence[float]) -> Tensor:
    every = torch.stack(parts)
    sign = torch.where(every.sum(0) >= 0, 1.0, -1.0)
    agree = every.sign() == sign
    scaled = every * torch.tensor(weights).view(-1, *[1] * (every.ndim - 1))
    return (scaled * agree).sum(0) / agree.sum(0).clamp(min=1)


# Plain LoRA


@torch.no_grad()
def fit(change: Change, *, rank: int | None = None, tolerance: float = 1e-5) -> Fit:
    """The best LoRA of at most this rank, by SVD. rank: None for as many as it takes to leave out no more than `tolerance` of each
    matrix's norm. Raises AdapterError for a rank below one, or where nothing is left that a LoRA could hold."""
    if rank is not None and (type(rank) is not int or rank < 1):
        raise AdapterError(f"rank must be a whole number of at least 1, not {rank!r}.")
    factors: dict[str, Factors] = {}
    missed = sum(float(value.double().square().sum()) for value in change.other.values())
    for path in change.paths():
        u, s, v = _svd(change, path)
        wanted = _enough(s, tolerance) if rank is None else min(rank, len(s))
        missed += float(s[wanted:].square().sum())
        root = s[:wanted].sqrt()
        factors[path] = (u[:, :wanted] * root).float().contiguous(), (root[:, None] * v[:wanted]).float().contiguous()
    if not factors:
        raise AdapterError("there is no changed weight that a LoRA could hold.")
    whole = change.square()
    return Fit(factors, (missed / whole) ** 0.5 if whole else 0.0, tuple(change.other))


@torch.no_grad()
def plain(change: Change, *, rank: int | None = None) -> Fit:
    """The change as plain LoRA: as it stands where it is low-rank all through and no rank is asked for, else by SVD (`fit`)."""
    small = all(a.shape[0] <= min(b.shape[0], a.shape[1]) for b, a in change.low.values())
    if rank is None and small and change.low and not change.full and not change.other:
        return Fit(dict(change.low), 0.0)
    return fit(change, rank=rank)


def as_lora(model: nn.Module, fitted: Fit, *, name: str = "default", one_rank: bool = False) -> Adapter:
    """Attach a fit as a plain LoRA with alpha = rank, so that its factors stand for themselves.

    one_rank: fill all up with zeros to the largest rank, as some servers need it. Ranks of zero become one. Raises AdapterError
    where a rank is larger than its matrix.
    """
    ranks = {path: max(1, rank) for path, rank in fitted.ranks.items()}
    if one_rank:
        ranks = dict.fromkeys(ranks, max(ranks.values()))
    groups: dict[int, list[str]] = {}
    for path, rank in ranks.items():
        groups.setdefault(rank, []).append(path)
    expression = " + ".join(f"lora(rank={rank}, alpha={rank}, sites={paths})" for rank, paths in groups.items())
    adapter = attach(model, expression, name=name)
    state = {}
    for path, (b, a) in fitted.factors.items():
        lacking = ranks[path] - a.shape[0]
        state[f"{path}.a"], state[f"{path}.b"] = nn.functional.pad(a, (0, 0, 0, lacking)), nn.functional.pad(b, (0, lacking))
    adapter.load(state)
    return adapter


def _svd(change: Change, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """(U, S, V') of a weight's change, fp64; of factors through two thin QRs, at the cost of their rank."""
    if path in change.full:
        u, s, v = torch.linalg.svd(change.full[path].double(), full_matrices=False)
        return u, s, v
    b, a = change.low[path]
    left, upper = torch.linalg.qr(b.double())
    right, lower = torch.linalg.qr(a.double().t())
    u, s, v = torch.linalg.svd(upper @ lower.t(), full_matrices=False)
    return left @ u, s, v @ right.t()


def _enough(s: Tensor, tolerance: float) -> int:
    """How many singular values leave out no more than this share of the norm."""
    left = s.square().flip(0).cumsum(0).flip(0)  # what is left out by keeping i of them
    return int((left > tolerance**2 * left[0]).sum()) if len(left) else 0


def _square(b: Tensor, a: Tensor) -> Tensor:
    """||B A||^2 without the product."""
    b, a = b.double(), a.double()
    return ((b.t() @ b) * (a @ a.t())).sum()
