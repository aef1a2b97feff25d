"""The training loop: rows of a step, packs, one forward and backward each, one update. Resumes bit for bit.

What happens at a step is a function of the spec, the rows, the step number and the weights: the order of rows, the
random numbers and the learning rate are computed from the step, so a checkpoint needs no hidden state.
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from tunesmith.core.errors import Interrupted, RunError
from tunesmith.core.progress import Quiet, Reporter
from tunesmith.core.row import Row
from tunesmith.data.sharing import share_prefix
from tunesmith.engine.memory import in_mode, out_of_memory, recomputing, release
from tunesmith.engine.model import Model
from tunesmith.engine.optimizer import Optimizer, learning_rate
from tunesmith.engine.pack import Pack, pack_rows
from tunesmith.engine.rundir import Metrics, RunFolder
from tunesmith.engine.trackers import Trackers
from tunesmith.objectives import OBJECTIVES
from tunesmith.spec import Spec, objective_call

DevMetric = Callable[[], Mapping[str, float]]
"""Judges the model as it stands on the dev samples; the first value is the one that counts, higher is better."""


@dataclass
class State:
    """What changes over a run, besides weights: all of it is in each checkpoint."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    worse: int = 0  # evaluations since the best
    losses: list[float] = field(default_factory=list)  # the first five and the last twenty
    tokens: int = 0
    supervised: int = 0
    train_seconds: float = 0.0
    dev_seconds: float = 0.0
    metrics_offset: int = 0
    pack_tokens: int | None = None  # of a micro-batch, where the spec's did not fit into memory


class Trainer:
    """One run of one objective over rows. `run()` trains and leaves the best weights in the model."""

    def __init__(
        self,
        model: Model,
        rows: Sequence[Row],
        spec: Spec,
        folder: RunFolder,
        *,
        dev: DevMetric | None = None,
        reporter: Reporter | None = None,
        resume_hint: str = "",
    ) -> None:
        if not rows:
            raise RunError("there are no rows to train on.")
        self.model, self.rows, self.spec, self.folder, self.dev = model, rows, spec, folder, dev
        self.reporter = reporter or Quiet()
        self.resume_hint = resume_hint or f"tunesmith train {folder.path / 'spec.yaml'} --resume"
        self.adapter = model.adapter
        call = objective_call(spec.objective)
        self.objective, self.options = OBJECTIVES[call.name].function, call.options
        self.lr = spec.train.lr or (2e-5 if self.adapter.in_place else 2e-4)
        self.total = total_steps(spec, len(rows))
        self.every = spec.train.evaluate_every or max(1, self.total // 8)
        self.save_every = spec.train.save_every or self.every
        self.order = partial(rows_of_step, rows=len(rows), batch=spec.train.batch, seed=spec.train.seed)
        self.optimizer = Optimizer(self.adapter.named_parameters(), spec.train)
        self.state = State()
        self._stop = False
        if spec.train.patience is not None and dev is None:
            hints = ["Set some apart:  data.dev=10%", "Or train to the end:  train.patience=null"]
            raise RunError("train.patience needs dev samples to judge by.", hints=hints)

    def run(self, *, resume: bool = False) -> State:
        """Train to the end, the early stop or an interruption; then the model holds the best weights seen."""
        if resume:
            self._resume()
        self.metrics = Metrics(self.folder.path / "metrics.jsonl", self.state.metrics_offset)
        trackers = Trackers(self.spec.track, self.folder.path, self.folder.path.name, self.spec.model_dump(mode="json"))
        noise = self.model.forward.neftune(self.spec.train.neftune, self.spec.train.neftune_noise)
        again = recomputing(self.model.base.model, self.spec.train.checkpointing)
        self.adapter.train()
        try:
            with (
                self.model.active(),
                noise,
                again,
                self.model.forward.held(),
                self._signals(),
                self.reporter.work("step", self.total, self.state.step) as work,
            ):
                while self.state.step < self.total and not self._patience_over():
                    values = self._one_step()
                    trackers.log(values, self.state.step)
                    judged = self._judge_and_save()
                    trackers.log(judged, self.state.step)
                    work.advance(1, self._note(values["loss"]))
        finally:
            self.adapter.train(False)
            trackers.end()
        self._take_best()
        return self.state

    # One step

    def _one_step(self) -> dict[str, float]:
        began, step, spec = time.perf_counter(), self.state.step, self.spec.train
        rows = [self.rows[index] for index in self.order(step)]
        weight = float(sum(row.supervised_tokens for row in rows))
        loss, norm = self._gradients(rows, weight) / weight, self.optimizer.gradient_norm()
        lr = learning_rate(step, self.total, self.lr, spec)
        self._guard(loss, norm, lr, rows)
        self.optimizer.step(lr, 1.0 if spec.clip is None else min(1.0, spec.clip / (norm + 1e-6)))
        self.state.step += 1
        self._remember(loss)
        tokens = sum(row.tokens for row in rows)
        self.state.tokens += tokens
        self.state.supervised += int(weight)
        seconds = time.perf_counter() - began
        self.state.train_seconds += seconds
        values = {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": tokens, "seconds": seconds}
        self.metrics.write(step=self.state.step, **values)
        return values

    def _gradients(self, rows: Sequence[Row], weight: float) -> float:
        """Forward and backward of the step's rows, the summed loss. What does not fit into memory is done again in smaller
        micro-batches: the same rows, the same loss."""
        longest = max(row.tokens for row in rows)
        while True:
            budget = max(self.state.pack_tokens or self.spec.train.pack_tokens, longest)
            packs = pack_rows(self._trees(rows, budget), budget)
            try:
                return sum(self._backward(pack, micro, weight) for micro, pack in enumerate(packs))
            except (RuntimeError, MemoryError) as cause:
                if not out_of_memory(cause):
                    raise
            self._shrink(max(pack.tokens for pack in packs), longest)

    def _shrink(self, tokens: int, longest: int) -> None:
        """Halve the micro-batch for the rest of the run. Raises RunError where a single row is too much."""
        self.optimizer.clear()
        release()
        if tokens <= longest:
            raise RunError(
                f"out of memory with a single row of {longest:,} tokens in a micro-batch.",
                where=str(self.folder.path),
                hints=[
                    "Compute activations again instead of keeping them:  train.checkpointing=true",
                    f"Or shorten the rows:  data.max_tokens={longest // 2} data.overlong=truncate-left-of-prompt",
                    "Or take a smaller base, or adapt fewer layers.",
                ],
            )
        self.state.pack_tokens = max(tokens // 2, longest)
        smaller = f"{self.state.pack_tokens:,} from now on: the same rows a step, the same loss"
        self.reporter.line("memory", f"out of memory with {tokens:,} tokens a micro-batch; {smaller}")

    def _trees(self, rows: Sequence[Row], budget: int) -> list[Row]:
        """The step's rows with common prompts merged: system turns and instructions are computed once, not once a row.

        Exact, since shared tokens are unsupervised and see nothing but themselves. Not under NEFTune, where every row has
        noise of its own, nor where rows are padded and would be unrolled again.
        """
        if self.spec.train.neftune is not None or not self.model.forward.packed:
            return list(rows)
        return [shared.row for shared in share_prefix(rows, max_tokens=budget)]

    def _backward(self, pack: Pack, micro: int, weight: float) -> float:
        torch.manual_seed(_mix(self.spec.train.seed, self.state.step, micro))
        loss = self.objective(self.model.forward(pack).log_probs, **self.options)
        (loss.total / weight).backward()
        self.optimizer.collect()
        return loss.total.item()

    def _guard(self, loss: float, norm: float, lr: float, rows: Sequence[Row]) -> None:
        """Stop on a loss that is not a number or has exploded, before it reaches the weights."""
        seen = self.state.losses
        exploded = len(seen) >= 10 and loss > self.spec.train.explode * statistics.median(seen[5:]) and loss > 2 * max(seen[:5])
        if math.isfinite(loss) and math.isfinite(norm) and not exploded:
            return
        self.optimizer.clear()
        kind = "exploded" if math.isfinite(loss) and math.isfinite(norm) else "is not a number"
        was = f"{statistics.median(seen[-20:]):.3f}" if seen else "not known"
        what = f"the loss {kind} at step {self.state.step + 1}: loss {loss:.4g} (it was {was}), gradient norm {norm:.4g}"
        places = ", ".join(dict.fromkeys(row.where for row in rows[:4] if row.where))
        raise self._diverged(what, lr, [f"The step's rows: {places}, ... ({len(rows)} in all)"])

    def _diverged(self, what: str, lr: float, hints: Sequence[str] = ()) -> RunError:
        steps = self.folder.checkpoints.steps()
        kept = f"the last good checkpoint is {self.folder.checkpoints.path(steps[-1])}" if steps else "there is no checkpoint yet"
        return RunError(
            f"{what}, learning rate {lr:.2g}; {kept}.",
            where=str(self.folder.path),
            hints=[
                *hints,
                f"Most often the learning rate is too high: try  train.lr={self.lr / 4:.1g}  or a longer  train.warmup",
                "If it happens at once: try  base.dtype=fp32, and look at the rows with  tunesmith data show",
            ],
        )

    def _remember(self, loss: float) -> None:
        kept = [*self.state.losses, loss]
        self.state.losses = kept if len(kept) <= 25 else [*kept[:5], *kept[-20:]]

    # Dev metric and checkpoints

    def _judge_and_save(self) -> dict[str, float]:
        state, last = self.state, self.state.step == self.total
        values: dict[str, float] = {}
        improved = False
        if self.dev is not None and (state.step % self.every == 0 or last):
            values, improved = self._judge()
        if improved or self._stop or last or state.step % self.save_every == 0:
            self._save()
        if self._stop:
            raise Interrupted(f"stopped at step {state.step} of {self.total}; everything is saved.", hints=[f"Go on:  {self.resume_hint}"])
        return values

    def _judge(self) -> tuple[dict[str, float], bool]:
        assert self.dev is not None
        began, state = time.perf_counter(), self.state
        with in_mode(self.model.base.model, training=False):
            values = {f"dev_{name}": float(value) for name, value in self.dev().items()}
        state.dev_seconds += time.perf_counter() - began
        self.metrics.write(step=state.step, **values)
        judged = next(iter(values.values()))
        improved = state.best is None or judged > state.best
        if improved:
            state.best, state.best_step, state.worse = judged, state.step, 0
        else:
            state.worse += 1
        return values, improved

    def _patience_over(self) -> bool:
        patience = self.spec.train.patience
        return patience is not None and self.dev is not None and self.state.worse >= patience

    def _save(self) -> None:
        self.state.metrics_offset = self.metrics.offset()
        weights, moments = self.optimizer.state()
        if not all(bool(torch.isfinite(weight).all()) for weight in weights.values()):
            raise self._diverged(f"the update of step {self.state.step} made the weights infinite", self.lr)
        files = {"weights": weights, "moments": moments}
        self.folder.checkpoints.save(self.state.step, files, asdict(self.state), best=self.state.best_step)

    def _resume(self) -> None:
        steps = self.folder.checkpoints.steps()
        if not steps:
            return
        tensors, state = self.folder.checkpoints.load(steps[-1])
        self.optimizer.load(tensors["weights"], tensors.get("moments", {}))
        self.state = State(**{name: state[name] for name in asdict(State())})
        self.reporter.line("resume", f"from step {self.state.step} of {self.total}")

    def _take_best(self) -> None:
        if self.state.best_step is not None and self.state.best_step != self.state.step:
            tensors, _ = self.folder.checkpoints.load(self.state.best_step)
            self.optimizer.load(tensors["weights"], {})

    # Words and signals

    def _note(self, loss: float) -> str:
        state = self.state
        dev = f" · dev {state.best:.3f} (best, step {state.best_step})" if state.best is not None else ""
        return f"loss {loss:.3f}{dev} · {state.tokens / max(state.train_seconds, 1e-9):,.0f} tok/s"

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or termination finishes the step and saves; the second ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: Any) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def total_steps(spec: Spec, rows: int) -> int:
    """Optimiser steps of the run: as given, or from epochs (3 if neither is given)."""
    if spec.train.steps is not None:
        return spec.train.steps
    return max(1, math.ceil((spec.train.epochs or 3.0) * rows / min(rows, spec.train.batch)))


def rows_of_step(step: int, rows: int, batch: int, seed: int) -> list[int]:
    """Indices of a step's rows. Each epoch is a permutation of its own, laid end to end; batches run across the seams."""
    batch = min(batch, rows)
    out: list[int] = []
    at = step * batch
    while len(out) < batch:
        epoch, offset = divmod(at, rows)
        taken = _order(epoch, rows, seed)[offset : offset + batch - len(out)]
        out += taken.tolist()
        at += len(taken)
    return out


@lru_cache(maxsize=2)
def _order(epoch: int, rows: int, seed: int) -> np.ndarray:
    """The permutation of an epoch, kept while its steps last."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def _mix(*parts: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
