"""Heads of every kind compute what transformers' own models do, whatever the company, and pairs are marked as those mark them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from families import FAMILIES
from tunesmith.adapters import Adapter, Way, attach
from tunesmith.core.row import SECOND, Row, Segment, segment
from tunesmith.data.sharing import share_prefix
from tunesmith.engine.forward import Forward
from tunesmith.engine.heads import read_task_head, task_answers
from tunesmith.engine.losses import loss_of, weight_of
from tunesmith.engine.probe import probe
from tunesmith.objectives import OBJECTIVES


def asked(ids: list[int], labels: dict[int, float], parent: int = -1, name: str = "") -> Segment:
    said = np.full(len(ids), np.nan, np.float32)
    for at, label in labels.items():
        said[at] = label
    return Segment(np.asarray(ids, np.int32), np.zeros(len(ids), np.bool_), parent, name, said)


def drawn(*lengths: int, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 90, (length,), generator=generator).tolist() for length in lengths]


def twin(family: str, kind: str, outputs: int, pool: str) -> tuple[Any, Forward, Adapter]:
    """transformers' model with a head, and ours of the same weights."""
    config, _, options = FAMILIES[family]
    torch.manual_seed(1)
    theirs = getattr(transformers, kind)(getattr(transformers, config)(**options, num_labels=outputs)).eval().requires_grad_(False)
    for parameter in theirs.parameters():
        parameter.normal_(std=0.15)
    body = getattr(transformers, config.replace("Config", "Model"))(theirs.config).eval().requires_grad_(False)
    body.load_state_dict(getattr(theirs, theirs.base_model_prefix).state_dict(), strict=False)
    if family == "llama":
        full = transformers.LlamaForCausalLM(theirs.config).eval().requires_grad_(False)
        full.model.load_state_dict(body.state_dict())
        body = full
    linear = theirs.classifier if hasattr(theirs, "classifier") else theirs.score
    forward = probe(body, speaks=family == "llama")
    adapter = attach(body, "head")
    adapter.give_head(32, tuple("abcdef"[:outputs]), Way(pool, bias=linear.bias is not None))  # type: ignore[arg-type]
    assert adapter.head is not None
    adapter.head.out.load_state_dict(linear.state_dict())
    return theirs, forward, adapter


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize(
    ("family", "kind"),
    [("bert", "BertForTokenClassification"), ("roberta", "RobertaForTokenClassification"), ("llama", "LlamaForTokenClassification")],
)
def test_tags_cost_what_transformers_token_classification_costs(family: str, kind: str, padded: bool) -> None:
    theirs, forward, adapter = twin(family, kind, 3, "last")
    forward.packed = not padded
    one, two = drawn(9, 5)
    rows = [Row((asked(one, {1: 2, 4: 0}),)), Row((asked(two, {0: 1}),))]
    ids, labels, mask = torch.ones(2, 9, dtype=torch.long), torch.full((2, 9), -100), torch.zeros(2, 9, dtype=torch.long)
    ids[0], ids[1, :5], mask[0], mask[1, :5] = torch.tensor(one), torch.tensor(two), 1, 1
    labels[0, [1, 4]], labels[1, 0] = torch.tensor([2, 0]), 1
    truth = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
    found = loss_of(forward, adapter, forward.pack(rows), OBJECTIVES["tag"], {})
    assert float(found.total / weight_of(rows, OBJECTIVES["tag"])) == pytest.approx(float(truth), abs=1e-5)


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
def test_a_number_for_a_pair_costs_what_transformers_regression_costs_with_its_segments(padded: bool) -> None:
    theirs, forward, adapter = twin("bert", "BertForSequenceClassification", 1, "pooler")
    theirs.config.problem_type = "regression"
    forward.packed = not padded
    one, two, three, four = drawn(4, 3, 6, 2)
    rows = [Row((segment(a), asked(b, {-1: label}, 0, SECOND))) for a, b, label in ((one, two, 0.5), (three, four, -1.0))]
    truth = [
        theirs(
            input_ids=torch.tensor([a + b]), token_type_ids=torch.tensor([[0] * len(a) + [1] * len(b)]), labels=torch.tensor([label])
        ).loss
        for a, b, label in ((one, two, 0.5), (three, four, -1.0))
    ]
    found = loss_of(forward, adapter, forward.pack(rows), OBJECTIVES["regress"], {})
    assert float(found.total / found.weight) == pytest.approx(float(torch.stack(truth).mean()), rel=1e-4)
    plain = [Row((segment(a), asked(b, {-1: 0.5}, 0))) for a, b in ((one, two), (three, four))]
    assert not torch.allclose(
        read_task_head(forward, forward.pack(plain), adapter.head).logits, read_task_head(forward, forward.pack(rows), adapter.head).logits
    )


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_choice_costs_what_transformers_multiple_choice_costs(family: str) -> None:
    theirs, forward, adapter = twin(family, f"{family.capitalize()}ForMultipleChoice", 1, "pooler")
    question, *candidates = drawn(5, 4, 4, 4)
    name = SECOND if family == "bert" else ""  # RoBERTa's tokenizer marks no second text
    row = Row((segment(question), *(asked(c, {-1: 1 - n}, 0, name) for n, c in enumerate(candidates))))
    inputs = {"input_ids": torch.tensor([[question + c for c in candidates]]), "labels": torch.tensor([1])}
    if family == "bert":
        inputs["token_type_ids"] = torch.tensor([[[0] * 5 + [1] * 4] * 3])
    truth = theirs(**inputs).loss
    found = loss_of(forward, adapter, forward.pack([row]), OBJECTIVES["choose"], {})
    assert float(found.total) == pytest.approx(float(truth), abs=1e-5) and found.weight == weight_of([row], OBJECTIVES["choose"]) == 1


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_questions_that_share_their_beginning_cost_the_same_as_one_tree_as_together_and_as_alone(family: str) -> None:
    kinds = {"bert": "BertForSequenceClassification", "llama": "LlamaForSequenceClassification"}
    _, forward, adapter = twin(family, kinds[family], 1, "mean")
    start, *ends = drawn(20, 3, 2, 4, 5, 3, 2, 6)
    roots = [start + ends[0], start + ends[1]]
    rows = [
        Row((segment(roots[0]), *(asked(c, {-1: 2 - n}, 0, SECOND) for n, c in enumerate(ends[2:5])))),
        Row((segment(roots[1]), *(asked(c, {-1: -n}, 0, SECOND) for n, c in enumerate(ends[5:7])))),
    ]
    objective = OBJECTIVES["choose"]
    alone = sum(float(loss_of(forward, adapter, forward.pack([row]), objective, {}).total) for row in rows)
    together = loss_of(forward, adapter, forward.pack(rows), objective, {})
    assert float(together.total) == pytest.approx(alone, abs=1e-4) and together.weight == 2
    if family == "llama":
        trees = [shared.row for shared in share_prefix(rows)]
        assert len(trees) == 1 and weight_of(trees, objective) == 2
        assert float(loss_of(forward, adapter, forward.pack(trees), objective, {}).total) == pytest.approx(alone, abs=1e-4)


def test_answers_at_many_words_know_their_row_whatever_the_size_of_packs() -> None:
    _, forward, adapter = twin("bert", "BertForTokenClassification", 3, "last")
    rows = [Row((asked(ids, {at: 10 * n + at for at in range(n + 1)}),)) for n, ids in enumerate(drawn(9, 4, 7))]
    found = {}
    for places, said in task_answers(forward, adapter.head, rows, 12):  # type: ignore[arg-type]
        for row, label, logits in zip(said.rows, said.labels.tolist(), said.logits, strict=True):
            found[places[row], label - 10 * places[row]] = logits
    assert found.keys() == {(n, at) for n in range(3) for at in range(n + 1)}
    whole = read_task_head(forward, forward.pack(rows), adapter.head)  # type: ignore[arg-type]
    assert torch.allclose(torch.stack([found[key] for key in sorted(found)]), whole.logits, atol=1e-5)
