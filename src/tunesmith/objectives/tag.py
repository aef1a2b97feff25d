"""Token classification: the cross-entropy of a tag at each labelled piece of a word."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tunesmith.core.loss import Loss
from tunesmith.objectives.classify import classify, wants_of
from tunesmith.objectives.registry import objective


@objective("tag", reads=("logits", "labels"), denominator="labelled pieces of words of the step", wants=wants_of("tag"))
def tag(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, weights: Sequence[float] | None = None) -> Loss:
    """Cross-entropy of a task head's tags, summed over the labelled pieces of words; others count nowhere.

    logits: the head's outputs where it is asked, [reads, tags]. labels: the right tag of each, [reads]. label_smoothing,
    weights: as for classify. What transformers' ...ForTokenClassification computes where other positions have the label -100.
    """
    return classify(logits, labels, label_smoothing=label_smoothing, weights=weights)
