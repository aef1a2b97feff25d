"""Multiple choice: the cross-entropy of the right one among the candidates of a question."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from tunesmith.core.loss import Loss
from tunesmith.objectives.registry import objective


@objective("choose", reads=("logits", "labels"), denominator="questions of the step", counts=lambda labels: int((labels == 0).sum()))
def choose(logits: Tensor, labels: Tensor) -> Loss:
    """Cross-entropy of the right candidate under a softmax over the candidates of its question, summed over questions.

    logits: the score of each candidate, [reads, 1], those of a question one after another. labels: how many candidates further
    the right one stands, 0 at itself and negative after it, [reads]. What transformers' ...ForMultipleChoice computes, with any
    number of candidates.
    """
    scores = by_question(logits[:, 0], labels)
    right = labels[_begins(labels)].long()
    found = log_softmax(scores, -1).gather(-1, right[:, None])
    return Loss(-found.sum(), weight=float(len(right)), metrics={"accuracy": (scores.argmax(-1) == right).sum()})


def by_question(scores: Tensor, labels: Tensor) -> Tensor:
    """Scores [reads] as a row a question, [questions, most candidates], minus infinity where a question has fewer."""
    begins = _begins(labels)
    question, first = begins.cumsum(0) - 1, labels[begins]
    column = (first[question] - labels).long()
    out = scores.new_full((len(first), int(column.max()) + 1 if len(column) else 1), float("-inf"))
    return out.index_put((question, column), scores)


def _begins(labels: Tensor) -> Tensor:
    """Where a question's first candidate stands: wherever the right one is not a step nearer than before, [reads]."""
    out = torch.ones_like(labels, dtype=torch.bool)
    out[1:] = labels[1:] != labels[:-1] - 1
    return out
