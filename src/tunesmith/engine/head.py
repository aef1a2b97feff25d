"""The supervised head: the vocabulary projection and what is read off it, at target positions only, in chunks.

One pass over the vocabulary gives everything that is asked. Logits exist for a chunk of targets at a time, in the model's
dtype, in memory that is used again; wider ones for a few rows only (`readings.py`). With a frozen head the gradient with
respect to the hidden states is formed in the forward, so the logits are computed once; with a trained head they are kept,
if one chunk holds all targets, or computed again in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.adapters import head_terms
from tunesmith.engine.divergence import TopTeacher, check_vocabulary
from tunesmith.engine.ownhead import OwnLogits
from tunesmith.engine.readings import Ask, Readings, pull, read, wide
from tunesmith.objectives.wanted import Wanted

CHUNK_BYTES = 64 << 20
"""Of logits at a time: in bf16, 682 targets over 49,152 words. Longer chunks read the weights less often."""


@dataclass(frozen=True, slots=True)
class Projection:
    """Logits as a sum of products: inputs[0] weights[0]^T + inputs[1] weights[1]^T + ... + bias.

    inputs: [targets, width of each]; the first is the hidden state, the others what low-rank forms on the head make of it.
    weights: [vocab, width of each]. bias: [vocab] or None.
    """

    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    bias: Tensor | None = None

    @classmethod
    def of(cls, head: nn.Module, hidden: Tensor) -> Projection:
        """What a model's head computes from hidden states [targets, width], with whatever adapters are active on it."""
        terms = head_terms(head, hidden)
        return cls(tuple(x for x, _ in terms), tuple(w for _, w in terms), getattr(head, "bias", None))

    @property
    def vocabulary(self) -> int:
        return self.weights[0].shape[0]

    def detach(self) -> Projection:
        """The same without gradients: a teacher."""
        bias = None if self.bias is None else self.bias.detach()
        return Projection(tuple(x.detach() for x in self.inputs), tuple(w.detach() for w in self.weights), bias)

    def part(self, rows: slice) -> Projection:
        """The same for some of the targets."""
        return Projection(tuple(x[rows] for x in self.inputs), self.weights, self.bias)

    def into(self, out: Tensor, rows: slice) -> Tensor:
        """Write the logits of some rows into `out` [rows, vocab]."""
        first, *others = ((x[rows], w.T) for x, w in zip(self.inputs, self.weights, strict=True))
        torch.mm(*first, out=out) if self.bias is None else torch.addmm(self.bias, *first, out=out)
        for x, w in others:
            out.addmm_(x, w)
        return out


Teacher = Projection | OwnLogits | TopTeacher


def read_head(
    source: Projection | OwnLogits,
    target: Tensor,
    wanted: Wanted | None = None,
    *,
    given: Tensor | None = None,
    teacher: Teacher | None = None,
) -> Readings:
    """log p of each target, and what else is wanted, under softmax(logits / temperature).

    target: [targets]. given: ids whose log-probabilities are wanted too, [targets, k]. teacher: what a divergence is from,
    at the same targets. Raises RunError where its vocabulary is another one.
    """
    ask, whole = _ask(target, wanted, given, teacher, source.vocabulary)
    if isinstance(source, OwnLogits):
        return _read_own(source, ask, whole)
    trained = torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in (*source.weights, source.bias))
    function: Any = _Trained if trained else _Frozen
    return Readings(*function.apply(_Call(ask, whole, len(source.weights)), source.bias, *source.inputs, *source.weights))


def _read_own(source: OwnLogits, ask: Ask, teacher: Projection | OwnLogits | None) -> Readings:
    """The same for logits that the model's own code makes: again in the backward, where gradients are on."""

    def part(states: Tensor, rows: slice) -> tuple[Tensor | None, ...]:
        call = _Call(ask.part(rows), None if teacher is None else teacher.part(rows), 0)
        function: Any = _FromLogits
        read_off: tuple[Tensor | None, ...] = function.apply(call, source.make(states))
        return read_off

    row_bytes = source.vocabulary * source.states.element_size() * (2 if teacher else 1)
    parts = []
    for rows in _chunks(len(ask.target), row_bytes) or [slice(0, 0)]:
        states = source.states[rows]
        parts.append(checkpoint(part, states, rows, use_reentrant=False) if torch.is_grad_enabled() else part(states, rows))
    return Readings.of(None if pieces[0] is None else torch.cat(pieces) for pieces in zip(*parts, strict=True))


@dataclass(slots=True)
class _Call:
    """What the autograd functions are told. teacher: a whole one. terms: products that the logits are a sum of."""

    ask: Ask
    teacher: Projection | OwnLogits | None
    terms: int

    def slopes(self) -> tuple[str, ...]:
        """Matrices of the size of the logits that a gradient takes, formed in the forward."""
        wanted = self.ask.wanted
        linear = ["log_probs"] + ["mean"] * wanted.mean + ["given"] * (self.ask.given is not None)
        on = {
            "p": bool(set(linear) - wanted.detached),
            "entropy": wanted.entropy and "entropy" not in wanted.detached,
            "divergence": wanted.divergence is not None and "divergence" not in wanted.detached,
        }
        return tuple(name for name, needed in on.items() if needed)

    def without_gradient(self, out: Readings) -> list[Tensor]:
        """Readings that are numbers only."""
        names = {"best", "top", "top_ids", *self.ask.wanted.detached}
        return [value for name in names if (value := getattr(out, name)) is not None]


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, bias: Tensor | None, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        here = Projection(tensors[: call.terms], tensors[call.terms :], bias)
        moving = [i for i, needed in enumerate(ctx.needs_input_grad[2 : 2 + call.terms]) if needed]
        names = call.slopes() if moving else ()
        out = Readings.empty(call.ask, wide(tensors[0].dtype))
        made = {name: [torch.empty_like(here.inputs[i]) for i in moving] for name in names}
        extra = [name for name in names if name != "p"]
        for rows, (logits, *room) in _rooms(here, 1 + len(extra) + (call.teacher is not None)):
            here.into(logits, rows)
            teacher = None if call.teacher is None else call.teacher.into(room.pop(), rows)
            slopes = dict(zip(extra, room, strict=True)) | ({"p": logits} if "p" in names else {})
            read(logits, call.ask.part(rows), out.part(rows), slopes, teacher)
            for name, slope in slopes.items():
                for i, product in zip(moving, made[name], strict=True):
                    torch.mm(slope, here.weights[i], out=product[rows])
        ctx.call, ctx.moving, ctx.names = call, moving, names
        ctx.save_for_backward(*(here.weights[i] for i in moving), *(product for name in names for product in made[name]))
        return _returned(ctx, call, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, count = ctx.call, len(ctx.moving)
        saved = list(ctx.saved_tensors)
        weights, products = saved[:count], saved[count:]
        out: list[Tensor | None] = [None] * (2 + 2 * call.terms)
        for at, i in enumerate(ctx.moving):
            formed = {name: products[number * count + at] for number, name in enumerate(ctx.names)}
            out[2 + i] = _assembled(call.ask, Readings(*grads), weights[at], formed)  # type: ignore[arg-type]
        return tuple(out)


def _assembled(ask: Ask, g: Readings, weight: Tensor, formed: dict[str, Tensor]) -> Tensor | None:
    """The gradient with respect to one of the inputs, from what the forward formed. Of log p: W[target] - p W."""
    total: Tensor | None = None
    pulls = [each for each in (g.log_probs, g.mean, None if g.given is None else g.given.sum(-1)) if each is not None]
    if pulls:
        total = formed["p"] * -torch.stack(pulls).sum(0)[:, None]
        if g.log_probs is not None:
            total.addcmul_(weight.index_select(0, ask.target), g.log_probs[:, None])
        if g.mean is not None:
            ones = weight.new_ones(1, len(weight))
            total.addcmul_((ones @ weight).to(total.dtype), g.mean[:, None], value=1 / len(weight))
        if g.given is not None and ask.given is not None:
            for ids, each in zip(ask.given.T, g.given.T, strict=True):
                total.addcmul_(weight.index_select(0, ids), each[:, None])
    if g.entropy is not None:
        bent = formed["entropy"] * g.entropy[:, None]
        total = bent if total is None else total.add_(bent)
    if total is not None:
        total.div_(ask.wanted.temperature)
    if g.divergence is not None:
        far = formed["divergence"] * g.divergence[:, None]
        total = far if total is None else total.add_(far)
    return None if total is None else total.to(weight.dtype)


class _Trained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, bias: Tensor | None, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        here = Projection(tensors[: call.terms], tensors[call.terms :], bias)
        out = Readings.empty(call.ask, wide(tensors[0].dtype))
        ctx.save_for_backward(bias, *tensors)
        ctx.call, ctx.kept = call, None
        chunks = _chunks(len(call.ask.target), _bytes(here, 1 + (call.teacher is not None)))
        if len(chunks) == 1 and call.teacher is None:
            ctx.kept = here.into(tensors[0].new_empty(len(call.ask.target), here.vocabulary), chunks[0])
            read(ctx.kept, call.ask, out, {}, None)
            return _returned(ctx, call, out)
        for rows, (logits, *room) in _rooms(here, 1 + (call.teacher is not None)):
            teacher = None if call.teacher is None else call.teacher.into(room[0], rows)
            read(here.into(logits, rows), call.ask.part(rows), out.part(rows), {}, teacher)
        return _returned(ctx, call, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        bias, *tensors = ctx.saved_tensors
        here = Projection(tuple(tensors[: call.terms]), tuple(tensors[call.terms :]), bias)
        kept, ctx.kept = ctx.kept, None  # it is overwritten, so a second backward computes it again
        g = _filled(grads, here.inputs[0])
        needed = ctx.needs_input_grad
        d_bias = torch.zeros_like(here.bias) if here.bias is not None and needed[1] else None
        d_inputs = [torch.empty_like(x) if need else None for x, need in zip(here.inputs, needed[2:], strict=False)]
        d_weights = [torch.zeros_like(w) if need else None for w, need in zip(here.weights, needed[2 + call.terms :], strict=True)]
        rooms = _rooms(here, 1 + (call.teacher is not None)) if kept is None else [(slice(0, len(kept)), [kept])]
        for rows, (logits, *room) in rooms:
            if kept is None:
                here.into(logits, rows)
            teacher = None if call.teacher is None else call.teacher.into(room[0], rows)
            pull(logits, call.ask.part(rows), g.part(rows), teacher)
            for x, w, d_x, d_w in zip(here.inputs, here.weights, d_inputs, d_weights, strict=True):
                if d_x is not None:
                    torch.mm(logits, w, out=d_x[rows])
                if d_w is not None:
                    d_w.addmm_(logits.T, x[rows])
            if d_bias is not None:
                d_bias += logits.sum(0)
        return None, d_bias, *d_inputs, *d_weights


class _FromLogits(torch.autograd.Function):
    """Readings of one chunk of logits that somebody else computed."""

    @staticmethod
    def forward(ctx: Any, call: _Call, logits: Tensor) -> tuple[Tensor | None, ...]:
        out = Readings.empty(call.ask, wide(logits.dtype))
        read(logits, call.ask, out, {}, _whole(call.teacher, logits))
        ctx.save_for_backward(logits)
        ctx.call = call
        return _returned(ctx, call, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        slope = logits.clone()
        pull(slope, ctx.call.ask, _filled(grads, logits), _whole(ctx.call.teacher, logits))
        return None, slope


def _ask(
    target: Tensor, wanted: Wanted | None, given: Tensor | None, teacher: Teacher | None, vocabulary: int
) -> tuple[Ask, Projection | OwnLogits | None]:
    """What is asked, and the teacher if it is a whole one. Raises RunError for a teacher of another vocabulary."""
    wanted = wanted or Wanted()
    if (teacher is None) != (wanted.divergence is None):
        raise ValueError("a divergence needs a teacher, and a teacher a divergence")
    if isinstance(teacher, TopTeacher):
        largest = int(teacher.ids.max()) + 1 if teacher.ids.numel() else 0
        check_vocabulary(max(largest, vocabulary), vocabulary)
        return Ask(target, wanted, given, teacher), None
    if teacher is not None:
        check_vocabulary(teacher.vocabulary, vocabulary)
        teacher = teacher.detach()
    return Ask(target, wanted, given), teacher


def _returned(ctx: Any, call: _Call, out: Readings) -> tuple[Tensor | None, ...]:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*call.without_gradient(out))
    return out.astuple()


def _filled(grads: Sequence[Tensor | None], like: Tensor) -> Readings:
    """Gradients of the readings, that of the log-probabilities being there always."""
    first, *others = grads
    count = next(len(each) for each in grads if each is not None)
    return Readings(first if first is not None else torch.zeros(count, dtype=wide(like.dtype), device=like.device), *others)


def _whole(teacher: Projection | OwnLogits | None, logits: Tensor) -> Tensor | None:
    return None if teacher is None else teacher.into(torch.empty_like(logits), slice(None))


def _bytes(projection: Projection, matrices: int) -> int:
    return projection.vocabulary * projection.inputs[0].element_size() * matrices


def _chunks(count: int, row_bytes: int) -> list[slice]:
    """As few chunks of equal size as CHUNK_BYTES allows."""
    most = max(1, CHUNK_BYTES // row_bytes)
    pieces = -(-count // most)
    size = -(-count // pieces) if pieces else 1
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]


def _rooms(projection: Projection, matrices: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Each chunk of targets, with room for `matrices` of the size of its logits, the same memory for every chunk."""
    x, vocabulary = projection.inputs[0], projection.vocabulary
    chunks = _chunks(len(x), _bytes(projection, matrices))
    if not chunks:
        return
    size = chunks[0].stop
    with _scratch(matrices * size * vocabulary, x) as flat:
        room = flat.view(matrices, size, vocabulary)
        for rows in chunks:
            yield rows, [each[: rows.stop - rows.start] for each in room]


_kept: list[Tensor] = []
"""Memory of the last call, on a CPU: asking the system for it again costs more than the softmax that it is for."""


@contextmanager
def _scratch(count: int, like: Tensor) -> Iterator[Tensor]:
    """Uninitialised room for `count` numbers, flat, of the dtype and on the device of `like`."""
    if like.device.type != "cpu":
        yield torch.empty(count, dtype=like.dtype, device=like.device)
        return
    size = count * like.element_size()
    found = _kept.pop() if _kept else None  # popped, so that no two threads ever hold the same
    if found is None or found.numel() < size:
        found = torch.empty(size, dtype=torch.uint8)
    try:
        yield found[:size].view(like.dtype)
    finally:
        if not _kept and found.numel() <= CHUNK_BYTES:
            _kept.append(found)
