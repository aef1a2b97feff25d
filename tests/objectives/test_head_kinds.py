"""Tags, numbers and choices: each loss is transformers' own, summed, with a denominator that nothing but the step changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.objectives import OBJECTIVES, choose, regress, tag

SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def bert(kind: str, **options: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.BertConfig(**SIZES, **options)).eval()


def places_of(counts: list[int], rights: list[int]) -> Tensor:
    """Labels of candidates: how many further the right one stands."""
    return torch.tensor([float(right - place) for count, right in zip(counts, rights, strict=True) for place in range(count)])


def test_tags_are_transformers_token_classification_over_labelled_pieces_alone() -> None:
    model = bert("BertForTokenClassification", num_labels=3)
    ids, labels = torch.randint(1, 40, (2, 7)), torch.full((2, 7), -100)
    labels[0, [1, 4]], labels[1, 2] = torch.tensor([2, 0]), 1
    out = model(input_ids=ids, labels=labels)
    asked = labels >= 0
    ours = tag(out.logits[asked], labels[asked].float())
    assert float(ours.total / ours.weight) == pytest.approx(float(out.loss), rel=1e-6) and ours.weight == 3


def test_a_number_is_transformers_regression() -> None:
    model = bert("BertForSequenceClassification", num_labels=1, problem_type="regression")
    out = model(input_ids=torch.randint(1, 40, (3, 7)), labels=torch.tensor([0.5, -1.0, 2.0]))
    ours = regress(out.logits, torch.tensor([0.5, -1.0, 2.0]))
    assert float(ours.total / ours.weight) == pytest.approx(float(out.loss), rel=1e-6)


def test_a_choice_is_transformers_multiple_choice() -> None:
    model = bert("BertForMultipleChoice")
    right = torch.tensor([2, 0])
    out = model(input_ids=torch.randint(1, 40, (2, 3, 7)), labels=right)
    ours = choose(out.logits.reshape(-1, 1), places_of([3, 3], right.tolist()))
    assert float(ours.total / ours.weight) == pytest.approx(float(out.loss), rel=1e-6) and ours.weight == 2
    assert int(ours.metrics["accuracy"]) == int((out.logits.argmax(-1) == right).sum())


questions = st.lists(st.integers(1, 5).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))), min_size=1, max_size=6)


@given(questions, st.integers(0, 99))
def test_questions_of_any_number_of_candidates_are_told_apart_and_add_up(asked: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    counts, rights = [count for count, _ in asked], [right for _, right in asked]
    scores = torch.randn(sum(counts), 1, dtype=torch.float64, requires_grad=True)
    labels = places_of(counts, rights)
    parts = scores[:, 0].split(counts)
    truth = torch.stack([torch.nn.functional.cross_entropy(part, torch.tensor(right)) for part, right in zip(parts, rights, strict=True)])
    ours = choose(scores, labels)
    assert float(ours.total) == pytest.approx(float(truth.sum()))
    assert torch.allclose(*(torch.autograd.grad(loss, scores)[0] for loss in (ours.total, truth.sum())), atol=1e-12)
    assert ours.weight == len(asked) == OBJECTIVES["choose"].counts(labels.numpy())
    pieces = [choose(part[:, None], places_of([count], [right])) for part, count, right in zip(parts, counts, rights, strict=True)]
    assert float(sum(piece.total for piece in pieces)) == pytest.approx(float(ours.total))  # type: ignore[arg-type]


def test_no_question_at_all_costs_nothing() -> None:
    assert float(choose(torch.zeros(0, 1), torch.zeros(0)).total) == 0.0


def test_smoothing_and_weights_of_tags_are_those_of_classes() -> None:
    logits, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
    ours = tag(logits, labels.float(), label_smoothing=0.1, weights=[1.0, 2.0, 0.5])
    theirs = torch.nn.functional.cross_entropy(
        logits, labels, weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), label_smoothing=0.1, reduction="sum"
    )
    assert float(ours.total) == pytest.approx(float(theirs))
    assert OBJECTIVES["tag"].counts(np.zeros(4, np.float32)) == 4
