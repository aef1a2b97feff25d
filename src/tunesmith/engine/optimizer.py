"""AdamW with fp32 master weights, clipping that looks before it steps, and schedules that are functions of the step.

Nothing here has hidden state: what resuming needs is in `state()`, and the learning rate follows from the step alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tunesmith.core.errors import RunError
from tunesmith.engine.processes import ALONE, Processes
from tunesmith.engine.sharding import is_spread, piece, piece_of
from tunesmith.spec import TrainSpec


def learning_rate(step: int, total: int, lr: float, spec: TrainSpec) -> float:
    """Learning rate of a step, counted from 0, of `total`: linear warm-up, then cosine, linear or constant to the floor."""
    warmup = spec.warmup * total if spec.warmup < 1 else spec.warmup
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[spec.schedule]
    return lr * (spec.min_lr + (1 - spec.min_lr) * shape)


class Optimizer:
    """torch's AdamW over named parameters. Parameters that are not fp32 get an fp32 master, which is what is stepped.

    Of a parameter that is spread over processes the master is this process's piece, so each steps its own.
    rates: factors on the learning rate, by name, where they are not 1.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        spec: TrainSpec,
        processes: Processes = ALONE,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        self.parameters, self.processes = dict(named), processes
        self.spread = frozenset(name for name, parameter in self.parameters.items() if is_spread(parameter))
        self.masters = {name: self._master(name, parameter) for name, parameter in self.parameters.items()}
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, master in self.masters.items():  # biases and norms are not decayed
            groups.setdefault((master.ndim >= 2, (rates or {}).get(name, 1.0)), []).append(master)
        self.adamw = torch.optim.AdamW(
            [{"params": p, "weight_decay": spec.weight_decay * decayed, "rate": rate} for (decayed, rate), p in groups.items()],
            lr=0.0, betas=spec.betas, eps=spec.eps, foreach=True,
        )  # fmt: skip

    def _master(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if name not in self.spread and parameter.dtype == torch.float32:
            return parameter
        return nn.Parameter(piece(parameter.detach()).float())  # a piece in fp32 keeps its storage: stepping it is enough

    def collect(self) -> None:
        """Add the gradients of one micro-batch to the masters', in fp32, so that many small ones are not rounded away."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                grad = piece(parameter.grad)
                master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
                parameter.grad = None

    def received(self) -> list[float]:
        """1 for each parameter that has a gradient here, else 0."""
        return [float(master.grad is not None) for master in self.masters.values()]

    def add_up(self, received: Sequence[float]) -> None:
        """Sum the gradients over all processes. received: how many processes have one, for each parameter.

        Pieces of spread parameters were summed in the backward. A parameter without a gradient anywhere stays without.
        """
        for master, count in zip(self.masters.values(), received, strict=True):
            if count and master.grad is None:
                master.grad = torch.zeros_like(master)
        self.processes.add_up([m.grad for name, m in self.masters.items() if m.grad is not None and name not in self.spread])

    def gradient_norm(self) -> float:
        """Euclidean norm of the whole gradient. Raises RunError where nothing received one."""
        grads = [p.grad for name, p in self.masters.items() if p.grad is not None and name not in self.spread]
        pieces = [p.grad for name, p in self.masters.items() if p.grad is not None and name in self.spread]
        if not grads and not pieces:
            raise RunError(
                "no trained parameter received a gradient.", hints=["Is the adapter attached to layers that the loss depends on?"]
            )
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))) if grads else 0.0
        if not self.spread:
            return norm
        square = float(torch.stack(torch._foreach_norm(pieces)).square().sum()) if pieces else 0.0
        return math.sqrt(norm**2 + self.processes.sum([square])[0])

    def step(self, lr: float, scale: float) -> None:
        """One update with gradients times `scale` (from clipping); gradients are then cleared."""
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in self.masters.values() if p.grad is not None], scale)
        for group in self.adamw.param_groups:
            group["lr"] = lr * group["rate"]
        self.adamw.step()
        self.publish()
        self.clear()

    def clear(self) -> None:
        """Forget gradients."""
        for parameter in (*self.masters.values(), *self.parameters.values()):
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Copy masters into the parameters that the model computes with."""
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                piece(parameter).copy_(self.masters[name])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(weights, moments) by name: fp32 master weights; `NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.step`. Pieces of what is spread."""
        weights = {name: master.detach().contiguous() for name, master in self.masters.items()}
        moments = {f"{n}.{key}": value.contiguous() for n, m in self.masters.items() for key, value in self.adamw.state.get(m, {}).items()}
        return weights, moments

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave, in whole tensors. Raises RunError where the names or shapes are not those of this run."""
        if weights.keys() != self.masters.keys():
            odd = sorted(weights.keys() ^ self.masters.keys())[0]
            raise RunError(f"the checkpoint is not of this adapter: it differs in '{odd}'.")
        for name, master in self.masters.items():
            parameter, whole = self.parameters[name], weights[name]
            if whole.shape != parameter.shape:
                raise RunError(f"the checkpoint is not of this adapter: '{name}' has shape {tuple(whole.shape)}.")
            master.copy_(piece_of(whole, parameter))
            kept = {key: moments[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in moments}
            if kept:  # moments lie where the weights do, the counter of steps on the CPU
                own = {
                    key: value.clone() if key == "step" else piece_of(value, parameter).to(master.device, copy=True)
                    for key, value in kept.items()
                }
                self.adamw.state[master] = own
        self.publish()
