"""Every reading of the head and its gradient are those of a plain softmax over all logits in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.core.errors import RunError
from tunesmith.engine import head
from tunesmith.engine.divergence import TopTeacher
from tunesmith.engine.head import Projection, read_head
from tunesmith.engine.ownhead import OwnLogits
from tunesmith.engine.readings import Readings
from tunesmith.objectives import Divergence, Wanted

SCALAR = ("log_probs", "mean", "best", "entropy", "divergence")


def full(logits: Tensor, target: Tensor, wanted: Wanted, ids: Tensor | None = None, teacher: Tensor | TopTeacher | None = None) -> Readings:
    """The readings from whole logits, by definition."""
    log_p = torch.log_softmax(logits / wanted.temperature, -1)
    out = Readings(log_p.gather(1, target[:, None])[:, 0])
    out.mean, out.best, out.entropy = log_p.mean(-1), log_p.amax(-1), -(log_p.exp() * log_p).sum(-1)
    out.given = None if ids is None else log_p.gather(1, ids)
    if wanted.divergence is not None and teacher is not None:
        scale, beta = wanted.divergence.temperature, wanted.divergence.beta
        s = torch.softmax(logits / scale, -1)
        if isinstance(teacher, TopTeacher):
            known = teacher.log_probs.to(s).exp()
            t, s = torch.cat([known, 1 - known.sum(-1, keepdim=True)], -1), s.gather(1, teacher.ids)
            s = torch.cat([s, 1 - s.sum(-1, keepdim=True)], -1)
        else:
            t = torch.softmax(teacher / scale, -1)
        m = (1 - beta) * s + beta * t
        out.divergence = kl(t, s) if beta == 0 else kl(s, t) if beta == 1 else beta * kl(t, m) + (1 - beta) * kl(s, m)
    return out


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


def pulled(readings: Readings, leaves: list[Tensor], names: tuple[str, ...]) -> list[Tensor]:
    """Gradients of a weighted sum of the named readings, the weights the same for the same shapes."""
    noise = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64)
    for name in names:
        value = getattr(readings, name)
        total = total + (value.double() * torch.randn(value.shape, generator=noise, dtype=torch.float64)).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


@pytest.fixture(params=[None, 7, 8], ids=["one chunk", "chunks of 7", "chunks of 8"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of so many targets of 30 words in fp64, and blocks of three."""
    if request.param is not None:
        monkeypatch.setattr(head, "CHUNK_BYTES", request.param * 30 * 8)
    monkeypatch.setattr("tunesmith.engine.readings._ROWS", 3)


def make(count: int, *, trained: str = "", bias: bool = False, rank: int = 0) -> tuple[Projection, list[Tensor]]:
    """A projection of random numbers to 30 words, and its leaves: inputs first, then what is trained."""
    inputs = [torch.randn(count, width, dtype=torch.float64, requires_grad=True) for width in (12, rank) if width]
    weights = [torch.randn(30, width, dtype=torch.float64) for width in (12, rank) if width]
    shift = torch.randn(30, dtype=torch.float64) if bias else None
    moved = {"weight": weights[0], "bias": shift, "low rank": weights[-1]}
    leaves = [*inputs]
    for name in trained.split(", ") if trained else []:
        leaf = moved[name]
        assert leaf is not None
        leaves.append(leaf.requires_grad_())
    return Projection(tuple(inputs), tuple(weights), shift), leaves


def logits_of(projection: Projection) -> Tensor:
    out = sum((x @ w.T for x, w in zip(projection.inputs, projection.weights, strict=True)), torch.zeros((), dtype=torch.float64))
    return out if projection.bias is None else out + projection.bias


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 21])
@pytest.mark.parametrize(
    ("trained", "options"),
    [
        ("", {}),
        ("", {"bias": True, "rank": 2}),
        ("weight", {}),
        ("weight, bias", {"bias": True}),
        ("bias", {"bias": True, "rank": 2}),
        ("low rank", {"rank": 2}),
    ],
)
def test_every_reading_and_its_gradient_on_both_sides_of_a_chunk_border(count: int, trained: str, options: dict[str, Any]) -> None:
    projection, leaves = make(count, trained=trained, **options)
    target, ids = torch.randint(0, 30, (count,)), torch.randint(0, 30, (count, 3))
    other = torch.randn(count, 12, dtype=torch.float64)
    teacher = Projection((other,), (torch.randn(30, 12, dtype=torch.float64),))
    wanted = Wanted(mean=True, best=True, entropy=True, top_k=4, temperature=0.7, divergence=Divergence(0.3, 2.0))
    got = read_head(projection, target, wanted, given=ids, teacher=teacher)
    should = full(logits_of(projection), target, wanted, ids, logits_of(teacher))
    for name in (*SCALAR, "given"):
        assert torch.allclose(getattr(got, name), getattr(should, name), atol=1e-10), name
    top = torch.log_softmax(logits_of(projection) / 0.7, -1).topk(4)
    assert got.top is not None and got.top_ids is not None and torch.equal(got.top_ids, top.indices)
    assert torch.allclose(got.top, top.values, atol=1e-10) and not got.top.requires_grad
    if not count:
        return
    every = ("log_probs", "mean", "entropy", "given", "divergence")
    for names in (*((name,) for name in every), every):
        got = read_head(projection, target, wanted, given=ids, teacher=teacher)
        should = full(logits_of(projection), target, wanted, ids, logits_of(teacher))
        for ours, theirs in zip(pulled(got, leaves, names), pulled(should, leaves, names), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-9), names


@settings(max_examples=60, deadline=None)
@given(
    beta=st.sampled_from([0.0, 1.0, 0.5, 0.1]),
    temperature=st.floats(0.3, 4),
    count=st.integers(1, 9),
    known=st.integers(1, 29),
    trained=st.booleans(),
    seed=st.integers(0, 999),
)
def test_a_teacher_known_by_its_likeliest_tokens_is_one_of_those_and_the_rest(
    beta: float, temperature: float, count: int, known: int, trained: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    projection, leaves = make(count, trained="weight" if trained else "")
    top = torch.log_softmax(torch.randn(count, 30, dtype=torch.float64) / temperature, -1).topk(known)
    teacher, target = TopTeacher(top.indices, top.values), torch.randint(0, 30, (count,))
    wanted = Wanted(divergence=Divergence(beta, temperature), detached=frozenset({"log_probs"}))
    got = read_head(projection, target, wanted, teacher=teacher)
    should = full(logits_of(projection), target, wanted, None, teacher)
    assert got.divergence is not None and should.divergence is not None
    assert torch.allclose(got.divergence, should.divergence, atol=1e-6)
    for ours, theirs in zip(pulled(got, leaves, ("divergence",)), pulled(should, leaves, ("divergence",)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    vocabulary=st.integers(2, 70),
    width=st.integers(1, 20),
    temperature=st.floats(0.2, 5),
    bias=st.booleans(),
    trained=st.booleans(),
    chunk=st.integers(1, 50),
    seed=st.integers(0, 999),
)
def test_any_shape_temperature_and_chunk_in_fp32(
    count: int, vocabulary: int, width: int, temperature: float, bias: bool, trained: bool, chunk: int, seed: int
) -> None:
    torch.manual_seed(seed)
    hidden = torch.randn(count, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=trained)
    shift = torch.randn(vocabulary) if bias else None
    target, wanted = torch.randint(0, vocabulary, (count,)), Wanted(mean=True, entropy=True, temperature=temperature)
    kept, head.CHUNK_BYTES = head.CHUNK_BYTES, chunk * vocabulary * 4
    try:
        got = read_head(Projection((hidden,), (weight,), shift), target, wanted)
        leaves = [hidden, weight] if trained else [hidden]
        ours = pulled(got, leaves, ("log_probs", "mean", "entropy"))
    finally:
        head.CHUNK_BYTES = kept
    should = full(torch.nn.functional.linear(hidden.double(), weight.double(), None if shift is None else shift.double()), target, wanted)
    for name in ("log_probs", "mean", "entropy"):
        assert getattr(got, name).dtype == torch.float32
        assert torch.allclose(getattr(got, name).double(), getattr(should, name), atol=1e-3, rtol=1e-4)
    for mine, theirs in zip(ours, pulled(should, leaves, ("log_probs", "mean", "entropy")), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-3, rtol=1e-3)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("count", [0, 1, 8, 21])
def test_a_head_of_the_models_own_gives_the_same_readings_and_gradients(count: int) -> None:
    hidden, weight = (torch.randn(size, 12, dtype=torch.float64, requires_grad=True) for size in (count, 30))

    def capped(states: Tensor) -> Tensor:
        return 3 * torch.tanh(states @ weight.T / 3)

    source = OwnLogits(capped, hidden, 30)
    target, ids = torch.randint(0, 30, (count,)), torch.randint(0, 30, (count, 2))
    teacher = OwnLogits(capped, torch.randn(count, 12, dtype=torch.float64), 30)
    wanted = Wanted(mean=True, best=True, entropy=True, temperature=1.3, divergence=Divergence(0.5))
    got = read_head(source, target, wanted, given=ids, teacher=teacher)
    should = full(capped(hidden), target, wanted, ids, capped(teacher.states).detach())
    for name in (*SCALAR, "given"):
        assert torch.allclose(getattr(got, name), getattr(should, name), atol=1e-10), name
    names = ("log_probs", "mean", "entropy", "given", "divergence")
    if count:
        for ours, theirs in zip(pulled(got, [hidden, weight], names), pulled(should, [hidden, weight], names), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-9)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes how many elements the largest wide tensor, and the largest narrow one, that an operation gave had."""

    wide = narrow = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64):
                self.wide = max(self.wide, value.numel())
            if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
                self.narrow = max(self.narrow, value.numel())
        return out


@pytest.mark.parametrize("way", ["frozen", "trained", "low rank", "own"])
def test_no_wide_tensor_of_all_logits_ever_exists_nor_a_narrow_one_beyond_a_chunk(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count, vocabulary, width = 300, 500, 8
    monkeypatch.setattr(head, "CHUNK_BYTES", 40 * vocabulary * 2)
    hidden = torch.randn(count, width).bfloat16().requires_grad_()
    weight = torch.randn(vocabulary, width).bfloat16().requires_grad_(way == "trained")
    inner, outer = torch.randn(count, 2).bfloat16().requires_grad_(), torch.randn(vocabulary, 2).bfloat16().requires_grad_()
    low = way == "low rank"
    source: Projection | OwnLogits = Projection((hidden, inner) if low else (hidden,), (weight, outer) if low else (weight,))
    if way == "own":
        source = OwnLogits(lambda states: torch.tanh(states @ weight.T), hidden, vocabulary)
    with Largest() as seen:
        wanted = Wanted(mean=True, entropy=True, top_k=3, divergence=Divergence(0.5))
        out = read_head(source, torch.randint(0, vocabulary, (count,)), wanted, teacher=Projection((hidden,), (weight,)))
        pulled(out, [hidden], ("log_probs", "mean", "entropy", "divergence"))
    assert seen.wide <= 7 * 16 * vocabulary  # room for blocks of 16 rows
    assert seen.narrow <= 40 * vocabulary


def test_what_is_read_as_a_number_only_has_no_gradient_and_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    projection, _ = make(5)
    wanted = Wanted(entropy=True, detached=frozenset({"entropy"}))
    products: list[int] = []
    monkeypatch.setattr(torch, "mm", lambda *args, out, kept=torch.mm: (products.append(1), kept(*args, out=out))[1])
    got = read_head(projection, torch.arange(5), wanted)
    assert got.entropy is not None and not got.entropy.requires_grad and got.log_probs.requires_grad
    assert len(products) == 2  # the logits, and the gradient of the log-probabilities
    assert not read_head(projection, torch.arange(5), Wanted(detached=frozenset({"log_probs"}))).log_probs.requires_grad


def test_a_tied_table_collects_gradient_from_both_ends() -> None:
    table = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    ids, target = torch.tensor([1, 2, 3]), torch.tensor([4, 1, 2])
    (ours,) = torch.autograd.grad(read_head(Projection((table[ids],), (table,)), target).log_probs.sum(), table)
    (theirs,) = torch.autograd.grad(full(table[ids] @ table.T, target, Wanted()).log_probs.sum(), table)
    assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("trained", ["", "weight"])
def test_a_second_backward_gives_the_same_and_so_do_two_calls_in_flight(trained: str) -> None:
    projection, leaves = make(9, trained=trained)
    other, _ = make(9)
    got = read_head(projection, torch.arange(9), Wanted(entropy=True))
    read_head(other, torch.arange(9), Wanted(entropy=True))  # uses the same memory
    total = (got.log_probs + got.entropy).sum()  # type: ignore[operator]
    first, second = (torch.autograd.grad(total, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_huge_logits_neither_overflow_nor_lose_the_answer() -> None:
    hidden, weight = torch.full((1, 2), 1e4, requires_grad=True), torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    wanted = Wanted(entropy=True, divergence=Divergence(0.5))
    got = read_head(Projection((hidden,), (weight,)), torch.tensor([0]), wanted, teacher=Projection((hidden,), (weight,)))
    assert got.entropy is not None and got.divergence is not None
    (got.log_probs + got.entropy + got.divergence).sum().backward()
    assert float(got.log_probs.detach()) == 0 and hidden.grad is not None and torch.equal(hidden.grad, torch.zeros(1, 2))


@pytest.mark.parametrize("surplus", [0.0, 3.0, 9.0, 30.0])
def test_the_likeliest_token_is_known_as_such_to_the_last_bit_and_its_log_probability_is_never_above_0(surplus: float) -> None:
    weight, target = torch.randn(60, 12), torch.randint(0, 60, (200,))
    hidden = weight[target] * surplus + torch.randn(200, 12)
    got = read_head(Projection((hidden,), (weight,)), target, Wanted(best=True))
    likeliest = (hidden @ weight.T).argmax(-1) == target
    assert got.best is not None and torch.equal(got.log_probs >= got.best, likeliest)
    assert float(got.log_probs.max()) <= 0 and likeliest.any()


@pytest.mark.parametrize("trained", [False, True])
def test_bf16_weights_give_fp32_readings_close_to_the_exact_ones(trained: bool) -> None:
    hidden, weight = torch.randn(40, 16).bfloat16().requires_grad_(), torch.randn(50, 16).bfloat16().requires_grad_(trained)
    target, wanted = torch.randint(0, 50, (40,)), Wanted(mean=True, best=True, entropy=True)
    got = read_head(Projection((hidden,), (weight,)), target, wanted)
    should = full(hidden.double() @ weight.double().T, target, wanted)
    for name in ("log_probs", "mean", "best", "entropy"):
        assert getattr(got, name).dtype == torch.float32
        assert (getattr(got, name).double() - getattr(should, name)).abs().max() < 0.1
    leaves = [hidden, weight] if trained else [hidden]
    for ours, theirs in zip(pulled(got, leaves, ("log_probs", "entropy")), pulled(should, leaves, ("log_probs", "entropy")), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs.double()).norm() < 0.03 * theirs.double().norm()


def test_without_gradients_nothing_is_kept() -> None:
    with torch.no_grad():
        projection = Projection((torch.randn(3, 4),), (torch.randn(5, 4, requires_grad=True),))
        assert not read_head(projection, torch.tensor([0, 1, 2])).log_probs.requires_grad


@pytest.mark.parametrize(
    "teacher",
    [
        lambda: Projection((torch.randn(2, 12, dtype=torch.float64),), (torch.randn(31, 12, dtype=torch.float64),)),
        lambda: TopTeacher(torch.tensor([[30], [2]]), torch.zeros(2, 1)),
    ],
)
def test_a_teacher_of_another_vocabulary_is_refused(teacher: Callable[[], Any]) -> None:
    with pytest.raises(RunError, match="vocabulary of 31 tokens and the policy one of 30"):
        read_head(make(2)[0], torch.arange(2), Wanted(divergence=Divergence()), teacher=teacher())
