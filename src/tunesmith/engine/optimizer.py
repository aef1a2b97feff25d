"""AdamW with fp32 master weights, clipping that looks before it steps, and schedules that are functions of the step.

Nothing here has hidden state: what resuming needs is in `state()`, and the learning rate follows from the step alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tunesmith.core.errors import RunError
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
    """torch's AdamW over named parameters. Parameters that are not fp32 get an fp32 master, which is what is stepped."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], spec: TrainSpec) -> None:
        self.parameters = dict(named)
        self.masters = {n: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for n, p in self.parameters.items()}
        decay = [p for p in self.masters.values() if p.ndim >= 2]
        plain = [p for p in self.masters.values() if p.ndim < 2]  # biases and norms are not decayed
        groups = [{"params": decay, "weight_decay": spec.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=spec.betas, eps=spec.eps, foreach=True)

    def collect(self) -> None:
        """Add the gradients of one micro-batch to the masters', in fp32, so that many small ones are not rounded away."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
                parameter.grad = None

    def gradient_norm(self) -> float:
        """Euclidean norm of the whole gradient. Raises RunError where nothing received one."""
        grads = [p.grad for p in self.masters.values() if p.grad is not None]
        if not grads:
            raise RunError(
                "no trained parameter received a gradient.", hints=["Is the adapter attached to layers that the loss depends on?"]
            )
        return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))

    def step(self, lr: float, scale: float) -> None:
        """One update with gradients times `scale` (from clipping); gradients are then cleared."""
        if scale != 1.0:
            torch._foreach_mul_([p.grad for p in self.masters.values() if p.grad is not None], scale)
        for group in self.adamw.param_groups:
            group["lr"] = lr
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
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(weights, moments) by name: fp32 master weights; `NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.step`."""
        weights = {name: master.detach().contiguous() for name, master in self.masters.items()}
        moments = {f"{n}.{key}": value.contiguous() for n, m in self.masters.items() for key, value in self.adamw.state.get(m, {}).items()}
        return weights, moments

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Take back what `state` gave. Raises RunError where the names or shapes are not those of this run."""
        if weights.keys() != self.masters.keys():
            odd = sorted(weights.keys() ^ self.masters.keys())[0]
            raise RunError(f"the checkpoint is not of this adapter: it differs in '{odd}'.")
        for name, master in self.masters.items():
            if weights[name].shape != master.shape:
                raise RunError(f"the checkpoint is not of this adapter: '{name}' has shape {tuple(weights[name].shape)}.")
            master.copy_(weights[name])
            kept = {key: moments[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in moments}
            if kept:
                self.adamw.state[master] = {k: v.clone() for k, v in kept.items()}
        self.publish()
