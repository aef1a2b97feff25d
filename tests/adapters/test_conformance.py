"""Every method keeps its promises on every family: see conformance.py for the examples, and docs/conformance.md for the table."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import EXAMPLES, FAMILIES, FAST, NOT_THE_BASE_AT_FIRST, Case, attached, base_for, build, flat_rows, rows, said
from torch import Tensor

from tunesmith.adapters import METHODS, load_adapter, routing, save_adapter
from tunesmith.adapters.merging import merge, unmerge
from tunesmith.adapters.sites import blocks
from tunesmith.adapters.space import POINTS
from tunesmith.core.errors import AdapterError, TunesmithError
from tunesmith.core.row import Row, Segment, single
from tunesmith.engine import compiling
from tunesmith.engine.compiling import compiled
from tunesmith.engine.forward import Forward
from tunesmith.engine.memory import recomputing
from tunesmith.engine.probe import probe
from tunesmith.engine.sampler import Sampling, generate

CELLS = [
    pytest.param(method, family, marks=[] if family in FAST else [pytest.mark.wide], id=f"{method}-{family}")
    for family in FAMILIES
    for method in EXAMPLES
]
DECODERS = [
    cell
    for cell in CELLS
    if cell.values[1] in ("llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt_neox", "olmo", "mixtral")
]
every = pytest.mark.parametrize(("method", "family"), CELLS)
on_decoders = pytest.mark.parametrize(("method", "family"), DECODERS)
on_llama = pytest.mark.parametrize(("method", "family"), [cell for cell in CELLS if cell.values[1] == "llama"])
slowly = pytest.mark.parametrize(("method", "family"), [pytest.param(*c.values, marks=pytest.mark.wide, id=c.id) for c in CELLS])

_LENT: dict[str, tuple[Forward, dict[str, Tensor]]] = {}


@pytest.fixture
def lend() -> Iterator[Callable[..., Case]]:
    """A method on a family's model, which is built and probed once; models that were not given back as they were are made anew."""
    used: list[tuple[str, Case]] = []

    def make(method: str, family: str, *, shaken: bool = True, **options: Any) -> Case:
        family = base_for(method, family)
        try:
            if family not in _LENT:
                model = build(family)
                _LENT[family] = probe(model), {name: value.clone() for name, value in model.named_parameters()}
            case = attached(method, _LENT[family][0], **options)
        except TunesmithError as refusal:
            assert refusal.what.endswith(".") and refusal.hints, f"a refusal without a way on: {refusal}"
            pytest.skip(f"refused: {refusal.what}")
        used.append((family, case))
        if shaken:
            case.shake()
        return case

    yield make
    for family, case in used:
        forward, weights = _LENT.get(family, (None, {}))
        if case.adapter.named_parameters() and next(iter(case.adapter.named_parameters()), None) is not None:
            case.adapter.detach()
        now = dict(case.model.named_parameters())
        if forward is None or now.keys() != weights.keys() or not all(torch.equal(now[name], value) for name, value in weights.items()):
            _LENT.pop(family, None)


def close(ours: Tensor, theirs: Tensor, within: float = 2e-5) -> bool:
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=0, atol=within * max(1.0, float(theirs.detach().abs().max())))


def all_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], within: float = 5e-5) -> None:
    assert ours.keys() == theirs.keys()
    size = max((float(value.abs().max()) for value in theirs.values()), default=1.0)
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=1e-4, atol=within * max(1.0, size)), name


def test_every_method_of_the_catalogue_is_in_the_suite() -> None:
    assert sorted(EXAMPLES) == sorted(METHODS), "give it a line in EXAMPLES"


@every
def test_it_begins_as_the_base_or_says_why_not(method: str, family: str, lend: Callable[..., Case]) -> None:
    case = lend(method, family, shaken=False)
    if case.adapter.head is not None:
        return  # what a head says has nothing to begin as
    with torch.no_grad():
        ours = case.said(rows())
        with case.adapter.disabled():
            base = case.said(rows())
    assert close(ours, base) == (method not in NOT_THE_BASE_AT_FIRST)


@every
def test_gradient_reaches_its_parameters_and_no_others(method: str, family: str, lend: Callable[..., Case]) -> None:
    case = lend(method, family)
    case.clear()
    case.adapter.train()
    torch.manual_seed(1)
    case.loss(rows()).backward()
    case.adapter.train(False)
    own = {id(p) for _, p in case.adapter.named_parameters()}
    others = [name for name, p in case.model.named_parameters() if p.grad is not None and id(p) not in own]
    assert others == []
    unreached = [name for name, p in case.adapter.named_parameters() if p.grad is None or not bool(p.grad.any())]
    if case.adapter.trained:  # the base's own: those that what is read of it depends on
        unreached = [name for name in unreached if name not in unread(case)]
    assert unreached == []
    assert all(bool(torch.isfinite(p.grad).all()) for _, p in case.adapter.named_parameters() if p.grad is not None)
    case.clear()


def unread(case: Case) -> set[str]:
    """Parameters of the base that its states, or its words, do not depend on: a masked word's head, biases of keys."""
    model = build(next(name for name, (forward, _) in _LENT.items() if forward is case.forward)).requires_grad_(True)
    forward = Forward(model, packed=False, direct_head=False, causal=case.forward.causal, speaks=case.forward.speaks)
    said(forward, forward.pack(rows())).square().sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is None or float(p.grad.abs().max()) < 1e-4}


@every
def test_saved_and_loaded_onto_the_bare_base_it_says_the_same(method: str, family: str, lend: Callable[..., Case], tmp_path: Path) -> None:
    case = lend(method, family)
    with torch.no_grad():
        wanted = case.said(rows())
    save_adapter(case.adapter, tmp_path, base="tiny", fingerprint="")
    case.adapter.detach()
    loaded = load_adapter(case.model, tmp_path)
    again = Case(case.forward, loaded)
    try:
        with torch.no_grad():
            assert close(again.said(rows()), wanted, 1e-6)
    finally:
        loaded.detach()


@every
def test_packs_and_trees_are_as_each_path_alone(method: str, family: str, lend: Callable[..., Case]) -> None:
    case = lend(method, family)
    with torch.no_grad():
        if case.adapter.head is None and not case.forward.speaks:
            pack = case.forward.pack(rows())
            for number, (row, index) in enumerate(zip(pack.segment_row, pack.segment_index, strict=True)):
                if index not in rows()[row].leaves():
                    continue  # what several paths share lies there once for each, and is read from the first
                by_itself = case.forward.pack([path_of(rows()[row], index)])
                ours, alone = (case.forward.states(p, torch.from_numpy(p.own[n])) for p, n in ((pack, number), (by_itself, -1)))
                assert close(ours, alone)
            return
        assert close(case.said(rows()), torch.cat([case.said([row]) for row in paths(rows(), case)]))


def paths(given: Sequence[Row], case: Case) -> list[Row]:
    """Rows as they would be alone: each path of a tree, reading what its own segments ask."""
    return [
        path_of(row, index)
        for row in given
        for index, part in enumerate(row.segments)
        if (part.asked.size if case.adapter.head is not None else part.supervised.any())
    ]


def path_of(row: Row, index: int) -> Row:
    """The path to a segment, of which the segment alone asks anything."""
    chain: list[Segment] = []
    for each in row.path(index)[:-1]:
        part = row.segments[each]
        chain.append(Segment(part.ids, part.supervised & False, len(chain) - 1))
    return Row((*chain, row.segments[index].part(slice(None), len(chain) - 1)))


@every
def test_padding_and_company_change_nothing(method: str, family: str, lend: Callable[..., Case]) -> None:
    case = lend(method, family)
    before = case.forward.packed
    with torch.no_grad():
        alone = torch.cat([case.said([row]) for row in flat_rows()])
        packed = case.said(flat_rows())
        case.forward.packed = False
        try:
            padded = case.said(flat_rows())
        except TunesmithError as refusal:
            assert refusal.hints
            padded = packed
        finally:
            case.forward.packed = before
    assert close(packed, alone) and close(padded, alone)


@on_decoders
def test_nothing_reads_the_future(method: str, family: str, lend: Callable[..., Case]) -> None:
    case = lend(method, family)
    ids = list(range(5, 25))
    with torch.no_grad():
        before, after = (
            case.forward.states(case.forward.pack([single(x, False)]), torch.arange(20)) for x in (ids, [*ids[:12], 60, *ids[13:]])
        )
    assert close(before[:12], after[:12]) and not close(before[12:], after[12:], 1e-3)


@on_decoders
def test_greedy_answers_with_a_cache_are_those_without(method: str, family: str, lend: Callable[..., Case], tiny_tokenizer: Any) -> None:
    case = lend(method, family)
    asked = [list(range(5, 12)), list(range(30, 33)), list(range(40, 60))]
    answers = [list(a.ids) for a in generate(case.forward, tiny_tokenizer, case.forward.prompts(asked), Sampling(max_new_tokens=6))]
    for prompt, answer in zip(asked, answers, strict=True):
        full = [*prompt, *answer]
        pack = case.forward.pack([single(full, [False] * len(prompt) + [True] * len(answer))])
        with torch.no_grad():
            source = case.forward.logits(pack)
            logits = torch.empty(len(answer), source.vocabulary, dtype=case.model.dtype)
            source.into(logits, slice(0, len(answer)))
        lost = logits.max(-1).values - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert float(lost.max()) < 1e-3, "an answer that is not the likeliest word"


@every
def test_on_some_layers_only_it_lies_there_alone(method: str, family: str, lend: Callable[..., Case]) -> None:
    if "layers" not in inspect.signature(METHODS[method]).parameters:
        pytest.skip("it has no layers to choose")
    expression = EXAMPLES[method]
    with_layers = expression[:-1] + ", layers=[0])" if expression.endswith(")") else f"{expression}(layers=[0])"
    case = lend(method, family, expression=with_layers)
    elsewhere = f"{blocks(case.model)[0]}.1."
    assert case.adapter.trainable() and not any(elsewhere in name for name, _ in case.adapter.named_parameters())
    with torch.no_grad():
        ours = case.said(rows())
        with case.adapter.disabled():
            assert not close(ours, case.said(rows()), 1e-3)


@every
def test_activations_computed_again_change_nothing(method: str, family: str, lend: Callable[..., Case]) -> None:
    case = lend(method, family)
    if not case.model.supports_gradient_checkpointing:
        pytest.skip("the family cannot compute its activations again")
    case.adapter.train()  # as recomputing has it
    wanted = case.gradients(rows())
    with case.forward.held(), recomputing(case.model, True):
        all_close(case.gradients(rows()), wanted)
    case.adapter.train(False)


@every
def test_detached_it_leaves_the_base_bit_for_bit(method: str, family: str, lend: Callable[..., Case]) -> None:
    case = lend(method, family)
    family = base_for(method, family)
    forward, weights = _LENT[family]
    case.adapter.detach()
    now = dict(case.model.named_parameters())
    assert now.keys() == weights.keys()
    assert all(torch.equal(now[name], value) for name, value in weights.items())
    assert not any(parameter.requires_grad for parameter in now.values())
    with torch.no_grad():
        bare = probe(build(family))
        assert torch.equal(said(forward, forward.pack(rows())), said(bare, bare.pack(rows())))


@every
def test_switched_off_and_on_again_it_is_itself(method: str, family: str, lend: Callable[..., Case]) -> None:
    case = lend(method, family)
    with torch.no_grad():
        on = case.said(rows())
        with case.adapter.disabled():
            case.said(rows())
        assert torch.equal(case.said(rows()), on)


@every
def test_merged_it_says_the_same_and_taken_out_again_too(method: str, family: str, lend: Callable[..., Case]) -> None:
    case = lend(method, family)
    with torch.no_grad():
        on = case.said(rows())
    try:
        merge(case.adapter)
    except AdapterError as refusal:
        assert not POINTS[method].merges or (method == "bias" and "has none to hold it" in refusal.what), refusal
        assert refusal.hints
        pytest.skip(f"refused: {refusal.what}")
    assert POINTS[method].merges or method == "head"  # of a head alone there is nothing to merge
    with torch.no_grad():
        assert close(case.said(rows()), on, 5e-5)
        if case.adapter.merged:
            unmerge(case.adapter)
        assert torch.equal(case.said(rows()), on)


@every
def test_beside_rows_of_the_base_its_own_say_the_same(method: str, family: str, lend: Callable[..., Case]) -> None:
    case = lend(method, family)
    name, given = case.adapter.name, flat_rows()
    with torch.no_grad():
        through = [case.said([row]) for row in given]
        with case.adapter.disabled():
            past = [case.said([row]) for row in given]
        try:
            with routing(case.model, [case.adapter]) as router:
                case.forward.router = router
                pack = case.forward.pack([*given, *given], [(name,) if number % 2 else () for number in range(2 * len(given))])
                ours = said(case.forward, pack, case.adapter)
        except AdapterError as refusal:
            assert refusal.hints
            pytest.skip(f"refused: {refusal.what}")
        finally:
            case.forward.router = None
    wanted = [(past, through)[place % 2][place % len(given)] for place in pack.order]
    assert close(ours, torch.cat(wanted))


@on_llama
def test_a_base_in_half_precision_carries_parameters_in_full(method: str, family: str) -> None:
    try:
        case = attached(method, probe(build(base_for(method, family)).to(torch.bfloat16)))
    except TunesmithError as refusal:
        pytest.skip(f"refused: {refusal.what}")
    case.shake(0.02)
    kinds = {p.dtype for name, p in case.adapter.named_parameters() if name not in case.adapter.trained}
    assert kinds <= {torch.float32}
    assert all(bool(torch.isfinite(value).all()) for value in case.gradients(rows()).values())


@slowly
def test_attached_after_compiling_it_is_seen(method: str, family: str, lend: Callable[..., Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "eager")  # what is asked is whether Dynamo sees the hooks
    torch._dynamo.reset()
    first = lend("lora", family, name="before")
    wanted = lend(method, family)
    truth = wanted.gradients(rows())
    wanted.adapter.detach()
    with compiled(first.model, True, pytest.fail):
        with first.forward.held():
            first.gradients(rows())
        late = lend(method, family)
        with late.forward.held():
            all_close(late.gradients(rows()), truth, 2e-4)
    torch._dynamo.reset()
