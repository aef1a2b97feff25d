"""AdaLoRA: a budget of ranks for all sites together, moved during training to where it matters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.adapters.forms import Form, LowRank
from tunesmith.adapters.lowrank import Layers, Names, check_low_rank, check_rank
from tunesmith.adapters.methods import Plan, method, names_of
from tunesmith.adapters.sites import Site
from tunesmith.core.errors import AdapterError


@dataclass(frozen=True, slots=True)
class Schedule:
    """When ranks are taken away. target: of a site, on average, at the end. warmup, final: steps, or below 1 shares of all steps.

    every: steps between two allocations. orthogonality: weight of the penalty. beta1, beta2: of the two averages.
    """

    target: int
    warmup: float
    final: float
    every: int
    orthogonality: float
    beta1: float
    beta2: float

    def phases(self, total: int) -> tuple[int, int]:
        """(last step of the warm-up, step at which the budget is final) of `total`. Raises AdapterError where nothing lies between."""
        warmup, final = (round(value * total) if value < 1 else int(value) for value in (self.warmup, self.final))
        if warmup >= total - final:
            raise AdapterError(
                f"adalora: {total} steps leave none to take ranks away in, after {warmup} of warm-up and before the {final} last ones.",
                hints=["Train for more steps, or make warmup and final smaller:  adalora(warmup=0.1, final=0.3)"],
            )
        return warmup, total - final

    def budget(self, step: int, total: int, initial: int, target: int) -> tuple[int, bool]:
        """(ranks of all sites together, whether they are allocated now) after a step, counted from 1: eq. 10 of the paper."""
        warmup, final = self.phases(total)
        if step <= warmup:
            return initial, False
        if step >= final:
            return target, True
        left = 1 - (step - warmup) / (final - warmup)
        return int((initial - target) * left**3 + target), step % self.every == 0


@method("adalora")
def adalora(
    *,
    rank: int = 8,
    initial: int = 12,
    alpha: float = 32,
    warmup: float = 0.1,
    final: float = 0.3,
    every: int = 1,
    orthogonality: float = 0.5,
    beta1: float = 0.85,
    beta2: float = 0.85,
    dropout: float = 0.0,
    sites: Names = "all",
    layers: Layers = None,
) -> Plan:
    """Adaptive budget allocation: y = W x + (alpha / initial) B diag(E) A x, where triplets of little importance lose their E.

    Zhang et al. 2023 · 2303.10512. A, B ~ N(0, 0.02), E = 0: it starts as the base. The penalty is orthogonality times the mean of
    ||A A' - I|| and ||B' B - I|| (PEFT's, the paper squares them). An entry's importance is the running mean of |p grad| times that
    of its spread (beta1, beta2); a triplet's is E's plus the means of A's row and B's column. initial: rank of each site for the
    warm-up; from then on the budget falls by a cubic to `rank` a site on average, where it stays for the `final` steps. warmup,
    final: steps, or below 1 shares of the run. every: steps between allocations. Defaults are PEFT's, but warmup and final,
    which are 0 there; the paper's are nearer to ours. Costs as lora of rank `initial`, and more memory: two averages an entry.
    When to use it: many sites (all, as in the paper), a small file, and enough steps for the averages.
    """
    check_low_rank("adalora", alpha, dropout, rank=rank, initial=initial)
    _check_schedule(rank, initial, warmup, final, every, orthogonality, beta1, beta2)
    schedule = Schedule(rank, float(warmup), float(final), every, float(orthogonality), float(beta1), float(beta2))

    def make(site: Site) -> Form:
        check_rank("adalora", initial, site)
        return Triplets(site.inputs, site.outputs, rank=initial, alpha=float(alpha), dropout=float(dropout), schedule=schedule)

    form: dict[str, Any] = {"rank": rank, "initial": initial, "alpha": float(alpha), "dropout": float(dropout)}
    chosen = None if layers is None else tuple(layers)
    return Plan("adalora", "listen", names_of("adalora", sites), chosen, form, make=make, alone=True, lr=1e-3)


def _check_schedule(
    rank: int, initial: int, warmup: float, final: float, every: int, orthogonality: float, beta1: float, beta2: float
) -> None:
    if initial < rank:
        raise AdapterError(f"adalora: initial={initial} is less than rank={rank}, to which it is to fall.", hints=[f"Try  initial={rank}"])
    if type(every) is not int or every < 1:
        raise AdapterError(f"adalora: every must be a whole number of at least 1, not {every!r}.")
    for word, value in (("warmup", warmup), ("final", final), ("orthogonality", orthogonality)):
        if not value >= 0:
            raise AdapterError(f"adalora: {word} must be at least 0, not {value}.")
    for word, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 < value < 1:
            raise AdapterError(f"adalora: {word} must lie between 0 and 1, not {value}.")


class Triplets(LowRank):
    """y = W x + alpha / (r + 1e-5) B diag(E) A dropout(x), as PEFT has it; r is the initial rank to the end.

    a [r, inputs], b [outputs, r], e [r, 1], fp32. For each the running means of importance and of its spread, and in `chosen`
    [r] which triplets the last allocation left; all of it is in checkpoints.
    """

    a_mean: Tensor
    a_spread: Tensor
    b_mean: Tensor
    b_spread: Tensor
    e_mean: Tensor
    e_spread: Tensor
    chosen: Tensor

    def __init__(self, inputs: int, outputs: int, *, rank: int, alpha: float, dropout: float, schedule: Schedule) -> None:
        super().__init__(inputs, outputs, rank=rank, alpha=alpha, dropout=dropout)
        self.schedule = schedule
        self.e = nn.Parameter(torch.zeros(rank, 1))
        nn.init.normal_(self.a, std=0.02)
        nn.init.normal_(self.b, std=0.02)
        for name, parameter in tuple(self.named_parameters()):
            self.register_buffer(f"{name}_mean", torch.zeros_like(parameter))
            self.register_buffer(f"{name}_spread", torch.zeros_like(parameter))
        self.register_buffer("chosen", torch.ones(rank, dtype=torch.bool))
        self.__dict__["peers"] = (self,)  # not submodules

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank + 1e-5)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.linear(self.dropped(x), (self.a * self.e).to(x.dtype)), (self.b * self.scale).to(x.dtype)

    def leave(self, out: Tensor, x: Tensor) -> Tensor:
        return self.added(out, x, self.a * self.e, self.b)

    def delta(self) -> Tensor:
        return self.scale * (self.b @ (self.a * self.e))

    def flops(self) -> int:
        return 2 * (self.a.numel() + self.b.numel())  # E goes into A

    def joined(self, peers: Sequence[Form]) -> None:
        self.__dict__["peers"] = tuple(peers)

    def penalty(self) -> Tensor | None:
        """This form's share of the mean distance of A and B from orthogonality, times its weight."""
        if not self.schedule.orthogonality:
            return None
        one = torch.eye(self.rank, device=self.a.device)
        apart: Tensor = torch.linalg.norm(self.a @ self.a.t() - one) + torch.linalg.norm(self.b.t() @ self.b - one)
        count: int = len(self.__dict__["peers"])
        return apart * (self.schedule.orthogonality / (2 * count))

    @torch.no_grad()
    def graded(self, step: int, total: int) -> None:
        """Take a step's gradient into the running means, until the budget is final."""
        if step >= self.schedule.phases(total)[1]:
            return
        for name, parameter in self.named_parameters():
            if parameter.grad is None:
                continue
            importance = (parameter * parameter.grad).abs()
            mean, spread = getattr(self, f"{name}_mean"), getattr(self, f"{name}_spread")
            mean.mul_(self.schedule.beta1).add_(importance, alpha=1 - self.schedule.beta1)
            spread.mul_(self.schedule.beta2).add_((importance - mean).abs(), alpha=1 - self.schedule.beta2)

    def scores(self) -> Tensor:
        """Importance of each triplet, [r]."""
        parts = self.e_mean * self.e_spread, self.a_mean * self.a_spread, (self.b_mean * self.b_spread).t()
        return torch.stack([part.mean(1) for part in parts]).sum(0)

    @torch.no_grad()
    def updated(self, step: int, total: int) -> None:
        """Once for all peers, by the first of them: allocate where it is time, and after the last allocation keep to it."""
        peers: tuple[Triplets, ...] = self.__dict__["peers"]
        if peers[0] is not self:
            return
        initial, target = sum(form.rank for form in peers), self.schedule.target * len(peers)
        budget, now = self.schedule.budget(step, total, initial, target)
        if not now:
            return
        if step <= self.schedule.phases(total)[1]:
            allocate(peers, budget)
        for form in peers:
            form.e.masked_fill_(~form.chosen[:, None], 0.0)


@torch.no_grad()
def allocate(forms: Sequence[Triplets], budget: int) -> None:
    """Leave the `budget` triplets that matter most; those that matter as much as the last of them stay, too."""
    scores = [form.scores() for form in forms]
    least = torch.cat(scores).topk(budget).values[-1]
    for form, score in zip(forms, scores, strict=True):
        form.chosen.copy_(score >= least)
