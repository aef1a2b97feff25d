"""The supervised head: vocabulary projection and log-probabilities at target positions only, in chunks.

No [targets, vocab] tensor ever exists whole. With a frozen head the gradient with respect to the hidden state is formed
in the forward (one pass over the vocabulary); with a trained head the chunk is computed again in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 256
"""Targets projected at a time: 256 x 49,152 words x 4 bytes = 50 MB."""


def target_log_probs(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    """log p(target) under softmax(hidden W^T + b), in nats, fp32.

    hidden [targets, width]; weight [vocab, width]; target [targets] -> [targets].
    """
    trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    function: Any = _Trained if trained else _Frozen
    log_probs: Tensor = function.apply(hidden, weight, target, bias)
    return log_probs


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias).float()


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        slope = torch.empty_like(hidden) if wanted else None
        out = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        for at in range(0, hidden.shape[0], CHUNK):
            part = slice(at, at + CHUNK)
            logits, gold = _logits(hidden[part], weight, bias), target[part, None]
            total = logits.logsumexp(-1, keepdim=True)
            out[part] = (logits.gather(1, gold) - total)[:, 0]
            if slope is not None:  # d log p / d hidden = W[target] - p W
                p = logits.sub_(total).exp_().to(weight.dtype)
                slope[part] = weight.index_select(0, target[part]) - p @ weight
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0][:, None].to(slope.dtype) if slope is not None else None), None, None, None


class _Trained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight, target, bias)
        out = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        for at in range(0, hidden.shape[0], CHUNK):
            part = slice(at, at + CHUNK)
            logits = _logits(hidden[part], weight, bias)
            out[part] = logits.gather(1, target[part, None])[:, 0] - logits.logsumexp(-1)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, bias = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[3] else None
        for at in range(0, hidden.shape[0], CHUNK):
            part = slice(at, at + CHUNK)
            slope = torch.softmax(_logits(hidden[part], weight, bias), -1).neg_()
            slope.scatter_add_(1, target[part, None], torch.ones_like(slope[:, :1]))
            d_logits = slope.mul_(grads[0][part, None]).to(weight.dtype)
            if d_hidden is not None:
                d_hidden[part] = d_logits @ weight
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, hidden[part])
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        return d_hidden, d_weight, None, d_bias
