"""Regression: the squared error of a task head's one value."""

from __future__ import annotations

from torch import Tensor

from tunesmith.core.loss import Loss
from tunesmith.objectives.registry import objective


@objective("regress", reads=("logits", "labels"), denominator="values of the step")
def regress(logits: Tensor, labels: Tensor) -> Loss:
    """Squared error of a task head's value, summed over values that were asked for.

    logits: the head's output, [reads, 1]. labels: the right value, [reads], both in standard deviations from the mean of the
    training samples' values, so that neither the learning rate nor the loss depends on their unit; predictions are given in the
    unit of the data. What transformers' ...ForSequenceClassification computes for one output.
    """
    error = logits[:, 0] - labels.to(logits.dtype)
    return Loss(error.square().sum(), weight=float(labels.numel()), metrics={"absolute_error": error.detach().abs().sum()})
