"""Classification: the cross-entropy of a task head's classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import log_softmax

from tunesmith.core.errors import SpecError
from tunesmith.core.loss import Loss
from tunesmith.objectives.registry import Wants, objective
from tunesmith.objectives.wanted import Wanted


def wants_of(name: str) -> Wants:
    """The check of the options of an objective of this name that sums cross-entropies of classes."""

    def wants(logging: bool, *, label_smoothing: float = 0.0, weights: Sequence[float] | None = None) -> Wanted:
        if not 0 <= label_smoothing < 1:
            raise SpecError(f"objective {name}: label_smoothing must lie in [0, 1), not {label_smoothing!r}.")
        if weights is not None and not (weights and all(type(each) in (int, float) and 0 <= each < math.inf for each in weights)):
            raise SpecError(f"objective {name}: weights must be a list of numbers of at least 0, not {weights!r}.")
        return Wanted()

    return wants


@objective("classify", reads=("logits", "labels"), denominator="labelled positions of the step", wants=wants_of("classify"))
def classify(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, weights: Sequence[float] | None = None) -> Loss:
    """Cross-entropy of a task head's classes, summed over labelled positions.

    logits: the head's outputs, [reads, classes]. labels: the right class of each, [reads]. label_smoothing: this share e of
    each label is spread evenly over the classes, (1 - e) * -log p + e * mean of -log p over the classes (Szegedy et al. 2016,
    1512.00567, section 7). weights: of the classes, in the order of task.labels; -log p of a class counts so many times.
    Raises SpecError where there are not as many weights as classes.
    """
    surprise = -log_softmax(logits, -1)
    if weights is not None:
        if len(weights) != logits.shape[-1]:
            raise SpecError(f"{len(weights)} weights are given for {logits.shape[-1]} labels.")
        surprise = surprise * surprise.new_tensor(weights)
    right = surprise.gather(-1, labels.long()[:, None])[:, 0]
    total = (1 - label_smoothing) * right.sum() + label_smoothing * surprise.mean(-1).sum()
    return Loss(total, weight=float(labels.numel()), metrics={"accuracy": (logits.argmax(-1) == labels).sum()})
