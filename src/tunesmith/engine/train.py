"""The training loop: rows of a step, packs, one forward and backward each, one update. Resumes bit for bit.

Several processes take a step together: each computes a share of its packs, the gradients are summed, and each makes the
same update. What they have to agree on (a stop, a lack of memory) they tell one another once a step.

What happens at a step is a function of the spec, the rows, the step number and the weights: the order of rows, the
random numbers and the learning rate are computed from the step, so a checkpoint needs no hidden state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tunesmith.core.errors import Interrupted, RunError
from tunesmith.core.progress import Quiet, Reporter
from tunesmith.core.row import Row
from tunesmith.data.sharing import share_prefix
from tunesmith.engine.compiling import compiled, decide
from tunesmith.engine.critic import Critic
from tunesmith.engine.dealing import Deal, deal
from tunesmith.engine.feed import Batch, Feed, Fixed
from tunesmith.engine.guard import bad_step, check_alike, diverged, gone_wrong, remembered
from tunesmith.engine.losses import Beside, loss_of, others_of, parts_of, weight_of
from tunesmith.engine.memory import Room, in_mode, out_of_memory, recomputing, release
from tunesmith.engine.model import Model
from tunesmith.engine.optimizer import Optimizer, learning_rate
from tunesmith.engine.preparing import digest, prepare
from tunesmith.engine.rundir import Metrics, RunFolder
from tunesmith.engine.sharding import gather, shard, whole
from tunesmith.engine.stopping import stopping
from tunesmith.engine.teaching import taught
from tunesmith.engine.trackers import Trackers
from tunesmith.engine.units import drift_on, parted
from tunesmith.spec import Spec

DevMetric = Callable[[], Mapping[str, float]]
"""Judges the model as it stands on the dev samples; the first value is the one that counts, higher is better. Where several
processes train, all of them call it at once, and the first one's values hold."""

_TRIES = 40
"""Times that a step is done again in smaller parts: more than halving can take."""

_ECHO = 2.0
"""Seconds in which a launcher's second signal counts as the terminal's first one."""


@dataclass
class State:
    """What changes over a run, besides weights: all of it is in each checkpoint."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    worse: int = 0  # evaluations since the best
    nothing: bool = True  # every evaluation so far said 0
    losses: list[float] = field(default_factory=list)  # the first five and the last twenty
    tokens: int = 0
    supervised: int = 0
    train_seconds: float = 0.0
    dev_seconds: float = 0.0
    metrics_offset: int = 0
    pack_tokens: int | None = None  # of a micro-batch, where the spec's did not fit into memory
    compiled: bool | None = None  # decided as the run begins, and kept: compiled layers round differently


class Trainer:
    """One run of one objective over rows. `run()` trains and leaves the best weights in the model."""

    def __init__(
        self,
        model: Model,
        rows: Sequence[Row] | Feed,
        spec: Spec,
        folder: RunFolder,
        *,
        dev: DevMetric | None = None,
        reporter: Reporter | None = None,
        resume_hint: str = "",
        critic: Model | None = None,
        teacher: Model | None = None,
    ) -> None:
        if isinstance(rows, Sequence):
            if not rows:
                raise RunError("there are no rows to train on.")
            rows = Fixed(rows, spec)
        self.model, self.feed, self.spec, self.folder, self.dev = model, rows, spec, folder, dev
        self.processes = folder.processes
        self.reporter = (reporter if self.processes.first else None) or Quiet()
        self.resume_hint = resume_hint or f"tunesmith train {folder.path / 'spec.yaml'} --resume"
        self.adapter = model.adapter
        self.parts = parts_of(spec.objective)
        self.objective, self.options = self.parts[0].objective, self.parts[0].options
        self.lr = spec.train.lr or self.adapter.lr
        self.total = rows.total
        self.every = spec.train.evaluate_every or max(1, self.total // 8)
        self.save_every = spec.train.save_every or self.every
        self.state = State()
        self.room = Room()
        self._reward: float | None = None  # of the last iteration, where answers are sampled
        self._asked = self._stop = False  # this process was asked to stop; all processes stop after this step
        if spec.train.patience is not None and dev is None:
            hints = ["Set some apart:  data.dev=10%", "Or train to the end:  train.patience=null"]
            raise RunError("train.patience needs dev samples to judge by.", hints=hints)
        if self.processes.several:
            check_alike(self.processes, spec, model, self.feed.first())
        self.spread = spec.train.sharding == "fsdp" and self.processes.several
        if self.spread:
            shard(model, self.processes)
        self.critic, self.teacher = Critic(critic) if critic is not None else None, teacher
        named, rates = dict(self.adapter.named_parameters()), dict(self.adapter.rates())
        if self.critic is not None:
            named |= self.critic.named_parameters()
            rates |= self.critic.rates()
        self.optimizer = Optimizer(named.items(), spec.train, self.processes, rates)

    def run(self, *, resume: bool = False) -> State:
        """Train to the end, the early stop or an interruption; then the model holds the best weights seen."""
        if resume:
            self._resume()
        self._prepare()
        self.metrics = Metrics(self.folder.path / "metrics.jsonl", self.state.metrics_offset, on=self.processes.first)
        tracked = self.spec.track if self.processes.first else []
        trackers = Trackers(tracked, self.folder.path, self.folder.path.name, self.spec.model_dump(mode="json"))
        noise = self.model.forward.neftune(self.spec.train.neftune, self.spec.train.neftune_noise)
        again = recomputing(self.model.base.model, self.spec.train.checkpointing)
        faster = compiled(self.model.base.model, self._compiling(), lambda line: self.reporter.line("", line))
        self.adapter.train()
        try:
            with (
                self.model.active(),
                noise,
                again,
                faster,
                self.model.forward.held(),
                stopping(self._ask_to_stop, echo=_ECHO if self.processes.several else 0.0),
                self.reporter.work("step", self.total, self.state.step) as work,
            ):
                while self.state.step < self.total and not self._patience_over():
                    values = self._one_step()
                    if self._logged(self.state.step):
                        trackers.log(values, self.state.step)
                    judged = self._judge_and_save()
                    trackers.log(judged, self.state.step)
                    work.advance(1, self._note(values))
        finally:
            self.adapter.train(False)
            trackers.end()
        self._take_best()
        if self.spread:
            gather(self.model)
        return self.state

    def _prepare(self) -> None:
        """Let the adapter see what it has to see of the data before the first step; on resuming it knows it from the checkpoint."""
        if not self.adapter.waits:
            return

        def loss(row: Row) -> Tensor:
            forward, (own, _) = self.model.forward, parted([row])
            weight = weight_of(own, self.objective, self.options) or 1.0
            values = None if self.critic is None else self.critic.numbers(own)
            beside = Beside(values=values, teacher=None if self.teacher is None else taught(self.teacher, own))
            return loss_of(forward, self.adapter, forward.pack(own), self.objective, self.options, beside=beside).total / weight

        with self.model.active(), self.model.forward.held():
            seen = prepare(self.adapter, self.feed.first(), loss)
        self.optimizer.clear()
        self.processes.same("masks", digest(self.adapter), ["Every machine needs the same kind of processor, or train on one process."])
        self.reporter.line("masks", f"found on {seen} rows")

    def _compiling(self) -> bool:
        """Whether layers are compiled; decided as the run begins, from what is planned."""
        if self.state.compiled is None:
            tokens = self.total * self.feed.tokens() / self.processes.count
            choice = "off" if self.spread else self.spec.train.compile
            self.state.compiled, why = decide(choice, self.model.base.model, int(tokens))
            self.reporter.line("layers", f"{'compiled' if self.state.compiled else 'not compiled'}: {why}")
        return self.state.compiled and not self.spread  # it may have been begun unspread

    # One step

    def _one_step(self) -> dict[str, float]:
        began, step, spec = time.perf_counter(), self.state.step, self.spec.train
        batch = self.feed.batch(step)
        logged = self._logged(step + 1)
        lr = learning_rate(step, self.total, self.lr, spec)
        values = {"loss": 0.0, "lr": lr, "grad_norm": 0.0}
        if batch.rows:
            values |= self._learn(batch, lr, logged)
        self.state.step += 1
        tokens = sum(row.tokens for row in batch.rows)
        self.state.tokens += tokens
        seconds = time.perf_counter() - began
        self.state.train_seconds += seconds
        values |= {"tokens": tokens, "seconds": seconds, **batch.figures}
        if logged:
            self.metrics.write(step=self.state.step, **values)
        return values

    def _learn(self, batch: Batch, lr: float, logged: bool) -> dict[str, float]:
        """One update from the rows of a step: its loss, and on logged steps the objective's metrics."""
        step, spec = self.state.step, self.spec.train
        rows, others = parted(batch.rows)
        weight = batch.weight or weight_of(rows, self.objective, self.options)
        self.adapter.begin(step, self.total, spec.seed)
        kl = drift_on(others, self.model, self.state.pack_tokens or spec.pack_tokens, self.processes) if others else None
        heat = self.spec.rollout.temperature if self.objective.samples else 1.0
        beside = Beside(kl, others=others_of(self.parts, rows, weight), temperature=heat)
        total, weight, sums = self._gradients(rows, weight, logged, beside)
        loss, norm = total / weight, self.optimizer.gradient_norm()
        self._guard(loss, norm, lr, rows)
        self.adapter.graded(step + 1, self.total)
        self.optimizer.step(lr, 1.0 if spec.clip is None else min(1.0, spec.clip / (norm + 1e-6)))
        self.adapter.updated(step + 1, self.total)
        self.state.losses = remembered(self.state.losses, loss)
        self.state.supervised += sum(row.supervised_tokens for row in rows) or int(weight)
        over = weight_of(rows, self.objective, self.options) or weight  # metrics are of these rows alone
        named = {name: value / (weight if name == "penalty" else over) for name, value in sums.items()} if logged else {}
        return {"loss": loss, "grad_norm": norm, **named}

    def _logged(self, step: int) -> bool:
        """Whether a step, counted from 1, has a line in the metrics."""
        return step % self.spec.train.log_every == 0 or step == self.total

    def _gradients(self, rows: Sequence[Row], weight: float | None, logged: bool, beside: Beside) -> tuple[float, float, dict[str, float]]:
        """Forward and backward of the step's rows: the summed loss, what it is divided by (the number of micro-batches if None is
        given) and, on logged steps, the sums of the objective's metrics.

        What does not fit into memory is done again in smaller micro-batches: the same rows, the same loss.
        """
        size = self.model.forward.size
        longest = max(map(size, rows))
        for _ in range(_TRIES):
            budget = max(self.state.pack_tokens or self.spec.train.pack_tokens, longest)
            dealt = deal(partial(self._trees, rows), size, budget, longest, self.processes.count)
            losses: list[Tensor] = []
            sums: dict[str, float] = {}
            fits, share = True, weight or float(len(dealt.batches))
            try:
                losses = self._own_part(dealt, share, sums if logged else None, beside)
            except (RuntimeError, MemoryError) as cause:
                if not out_of_memory(cause) or self.spread:  # the others wait within their blocks
                    raise
                fits = False
            if self._all_fit(fits):
                total, sums = self._summed(losses, sums if logged else None)
                return total, share, sums
            self._shrink(max(dealt.tokens), longest)
        raise RunError(f"out of memory {_TRIES} times in one step.", where=str(self.folder.path))

    def _own_part(self, dealt: Deal, weight: float, sums: dict[str, float] | None, beside: Beside) -> list[Tensor]:
        """This process's micro-batches: their losses. sums: where the metrics' sums go, on logged steps."""
        losses = [self._backward(rows, number, weight, sums, beside) for number, rows in dealt.of(self.processes.rank)]
        if self.spread:  # blocks are gathered by all processes or none
            for _ in range(dealt.passes - len(losses)):
                self._backward(dealt.smallest, 0, math.inf, None, beside)
        if self.processes.first:  # gradients are summed over the processes
            self._penalise(weight, sums)
        return losses

    def _penalise(self, weight: float, sums: dict[str, float] | None) -> None:
        """The gradient of what the method itself adds to the loss."""
        penalty = self.adapter.penalty()
        if penalty is None:
            return
        penalty.backward()
        self.optimizer.collect()
        if sums is not None:  # these are divided by the weight
            sums["penalty"] = float(penalty.detach()) * weight

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
        noise of its own, nor where rows are padded, or read both ways, and would be unrolled again.
        """
        forward = self.model.forward
        if self.spec.train.neftune is not None or not (forward.packed and forward.causal):
            return list(rows)
        return [shared.row for shared in share_prefix(rows, max_tokens=budget)]

    def _backward(self, rows: list[Row], micro: int, weight: float, sums: dict[str, float] | None, beside: Beside) -> Tensor:
        """One micro-batch: its gradient, and its loss before the division by the step's weight (inf: nothing is to be learned)."""
        torch.manual_seed(_mix(self.spec.train.seed, self.state.step, micro))
        self.room.before(sum(row.tokens for row in rows))
        forward = self.model.forward
        pack = forward.pack(rows)
        if self.critic is not None:
            beside = replace(beside, values=self.critic.values(rows))
        if self.teacher is not None:
            beside = replace(beside, teacher=taught(self.teacher, rows))
        loss = loss_of(forward, self.adapter, pack, self.objective, self.options, logging=sums is not None, beside=beside)
        (loss.total / weight).backward()
        if self.critic is not None:
            self.critic.learn()
        self.optimizer.collect()
        if sums is not None:
            for name, value in loss.metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return loss.total.detach()

    # What all processes have to know of a step

    def _all_fit(self, fits: bool) -> bool:
        """Whether the step fitted into every process's memory; gradients are then summed. A stop that one was asked for holds for all."""
        if not self.processes.several:
            return fits
        misfits, stops, *received = self.processes.sum([not fits, self._asked, *self.optimizer.received()])
        self._stop = bool(stops)
        if not misfits:
            self.optimizer.add_up(received)
        return not misfits

    def _summed(self, losses: Sequence[Tensor], sums: dict[str, float] | None) -> tuple[float, dict[str, float]]:
        """The loss and the metrics over all processes."""
        (total,) = self.processes.sum([sum(torch.stack(list(losses)).tolist()) if losses else 0.0])
        return total, {} if sums is None else self.processes.sum_named(sums)

    def _guard(self, loss: float, norm: float, lr: float, rows: Sequence[Row]) -> None:
        """Stop on a loss that is not a number or has exploded, before it reaches the weights."""
        factor = math.inf if self.objective.samples else self.spec.train.explode  # around 0, no multiple means anything
        wrong = gone_wrong(loss, norm, self.state.losses, factor)
        if wrong:
            self.optimizer.clear()
            what, hints = bad_step(wrong, self.state.step + 1, loss, norm, self.state.losses, rows)
            raise diverged(what, lr, self.folder, hints)

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
        together = whole(self.model) if self.spread else nullcontext()
        with together, in_mode(self.model.base.model, training=False):
            values = self.processes.told({f"dev_{name}": float(value) for name, value in self.dev().items()})
        state.dev_seconds += time.perf_counter() - began
        self.metrics.write(step=state.step, **values)
        judged = next(iter(values.values()))
        state.nothing = state.nothing and judged == 0
        improved = state.best is None or judged > state.best
        state.worse = 0 if improved else state.worse + 1
        if improved or state.nothing:  # what says nothing of the steps does not choose the first of them
            state.best, state.best_step = judged, state.step
        return values, state.best_step == state.step

    def _patience_over(self) -> bool:
        patience = self.spec.train.patience
        return patience is not None and self.dev is not None and self.state.worse >= patience

    def _save(self) -> None:
        self.state.metrics_offset = self.metrics.offset()
        weights, moments = self.optimizer.state()
        broken = any(not bool(torch.isfinite(weight).all()) for weight in weights.values())
        if self.processes.sum([broken])[0]:
            raise diverged(f"the update of step {self.state.step} made the weights infinite", self.lr, self.folder)
        memory = self.adapter.memory()
        fed, values = self.feed.memory()
        files = {"weights": weights, "moments": moments, "memory": memory, "feed": fed}
        self.folder.checkpoints.save(
            self.state.step,
            {name: tensors for name, tensors in files.items() if tensors or name in ("weights", "moments")},
            {**asdict(self.state), **({"feed": values} if values else {})},
            best=self.state.best_step,
            processes=self.processes,
            spread=self.optimizer.spread,
        )

    def _resume(self) -> None:
        steps = self.processes.told(self.folder.checkpoints.steps())
        if not steps:
            return
        tensors, state = self.folder.checkpoints.load(steps[-1])
        self.optimizer.load(tensors["weights"], tensors.get("moments", {}))
        self._remember(tensors.get("memory", {}))
        self.feed.recall(tensors.get("feed", {}), state.get("feed", {}))
        self.state = State(**{name: state.get(name, value) for name, value in asdict(State()).items()})
        self.reporter.line("resume", f"from step {self.state.step} of {self.total}")

    def _take_best(self) -> None:
        if self.state.nothing and self.state.worse:
            self.reporter.line("note", "dev was 0 at every evaluation and chose no step: the last one is kept")
        if self.state.best_step is not None and self.state.best_step != self.state.step:
            tensors, _ = self.folder.checkpoints.load(self.state.best_step)
            self.optimizer.load(tensors["weights"], {})
            self._remember(tensors.get("memory", {}))

    def _remember(self, memory: Mapping[str, Tensor]) -> None:
        """Give the forms back what they remembered at a checkpoint."""
        for name, kept in self.adapter.memory().items():
            kept.copy_(memory[name])
        self.adapter.settle()

    # Words and signals

    def _ask_to_stop(self) -> None:
        self._asked = True
        self._stop = not self.processes.several

    def _note(self, values: Mapping[str, float]) -> str:
        """Of a step: its loss; where answers are sampled the mean reward of the iteration, for the loss is near 0 whatever is learned."""
        state = self.state
        self._reward = values.get("reward", self._reward)
        said = f"loss {values['loss']:.3f}" if self._reward is None else f"reward {self._reward:.3f}"
        dev = f" · dev {state.best:.3f} (best, step {state.best_step})" if state.best is not None else ""
        return f"{said}{dev} · {state.tokens / max(state.train_seconds, 1e-9):,.0f} tok/s"


def _mix(*parts: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
