"""Several rewards as one number an answer: asked, held against what numbers may be, normalised, gated and summed."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import numpy as np
from pydantic import TypeAdapter, ValidationError

from tunesmith.bases import Base
from tunesmith.core.errors import DataError, SpecError, TunesmithError
from tunesmith.core.registry import check_options
from tunesmith.rewardspec import RewardSpec, function_of, reward_call, reward_spec
from tunesmith.rollout import builtin  # noqa: F401  (fills the table)
from tunesmith.rollout.comparing import rewards_of
from tunesmith.rollout.functions import by_names, load_function
from tunesmith.rollout.rewarding import REWARDS, Kind, RewardError, Scoring, is_async
from tunesmith.rollout.sample import Sample, groups_of_samples

LARGEST = 1e6
"""A reward beyond it is taken for an overflow: no gradient that is worth following comes of it."""

_SHOWN = 200
"""Characters of an answer in a message."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A reward that failed for an answer. where: of the row. what: went wrong."""

    reward: str
    where: str
    completion: str
    what: str

    def __str__(self) -> str:
        text = self.completion if len(self.completion) <= _SHOWN else f"{self.completion[:_SHOWN]}…"
        return f"{self.where or 'an answer'}: the reward {self.reward} {self.what}; the answer: {text!r}"


@dataclass(frozen=True, slots=True)
class Scored:
    """total: the reward of each answer, NaN where no reward spoke: it is to be left out. parts: what each reward said, before it was
    clipped or normalised, by name, NaN where it said nothing. problems: what went wrong and was passed over."""

    total: list[float]
    parts: dict[str, list[float]]
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward ready to be asked. name: of its part. compares: is it called with the answers to one prompt?"""

    name: str
    spec: RewardSpec
    scoring: Scoring
    compares: bool


def open_reward(given: str | Mapping[str, Any] | RewardSpec, columns: Collection[str] | None = None) -> Reward:
    """A reward by its expression: options are held against its maker's signature, a function's parameters against the columns.

    Nothing heavy is loaded yet. Raises SpecError, saying what is known.
    """
    spec = reward_spec(given)
    call, there = reward_call(spec.reward), function_of(spec.reward)
    if there is not None:
        function = load_function(*there)
        compares = spec.compares or bool(getattr(function, "compares", False))
        return Reward(spec.name or there[1], spec, by_names(function, spec.reward, columns), compares)
    assert call is not None
    kind = REWARDS[call.name]
    check_options(kind.make, call.options, kind=f"reward {call.name}")
    _check_values(kind, call.options)
    missing = [p.name for p in inspect.signature(kind.make).parameters.values() if p.default is p.empty and p.name not in call.options]
    if missing:
        raise SpecError(f"the reward {call.name} needs {missing[0]}.", hints=[f"Form:  {call.name}({missing[0]}=...)"])
    if spec.compares and not kind.compares:
        raise SpecError(f"the reward {call.name} scores each answer by itself.", hints=["Leave out:  compares"])
    if kind.compares and spec.batch is not None:
        raise SpecError(f"the reward {call.name} compares, so it is called once a prompt.", hints=["Leave out:  batch"])
    return Reward(spec.name or call.name, spec, kind.make(**call.options), kind.compares)


def _check_values(kind: Kind, options: Mapping[str, Any]) -> None:
    """Raises SpecError for the first option whose value is not of the type that its maker's signature says."""
    types = get_type_hints(kind.make)
    for name, value in options.items():
        try:
            TypeAdapter(types[name]).validate_python(value, strict=True)
        except ValidationError as cause:
            told = cause.errors()[0]["msg"].removeprefix("Input ")
            what = f"the reward {kind.name}: {name} {told}, not {value!r}."
            raise SpecError(what, hints=["Text that reads as a number stands in quotes:  '42'"] if types[name] is str else []) from None


class Rewards:
    """Rewards as a whole.

    specs: strings, plain values or RewardSpec. columns: of the data, to hold functions' parameters against; None where unknown.
    Raises SpecError for no rewards, two of one name, and as `open_reward`.
    """

    def __init__(self, specs: Sequence[str | Mapping[str, Any] | RewardSpec], *, columns: Collection[str] | None = None) -> None:
        if not specs:
            hints = ["rewards: [numeric]", f"Known: {', '.join(sorted(REWARDS))}"]
            raise SpecError("nothing says what answers are rewarded for.", where="rewards", hints=hints)
        self.rewards = [open_reward(spec, columns) for spec in specs]
        names = [one.name for one in self.rewards]
        if twice := [name for name in names if names.count(name) > 1]:
            raise SpecError(f"two rewards are called {twice[0]}.", hints=[f"Name one:  {{reward: {twice[0]}, name: other}}"])
        if not any(one.spec.weight for one in self.rewards):
            raise SpecError("every reward has the weight 0, so nothing is rewarded.", hints=["weight: 1"])

    @property
    def names(self) -> list[str]:
        """Of the parts, in order."""
        return [one.name for one in self.rewards]

    def share(self, base: Base) -> None:
        """Let reward models and judges that stand on this base use it as it is loaded, beside the policy's adapters."""
        for one in self.rewards:
            if hasattr(one.scoring, "share"):
                one.scoring.share(base)

    def check(self) -> None:
        """Refuse models that cannot reward or judge, by what their files say, before anything heavy is loaded. Raises SpecError, RunError
        for a run that has not ended, and what finding a model raises."""
        for one in self.rewards:
            if hasattr(one.scoring, "check"):
                one.scoring.check()

    def score(self, samples: Sequence[Sample]) -> Scored:
        """The rewards of answers, in order; answers of one group are those to one prompt.

        Of each reward: clipped, then normalised, then weighed. The weights of those that say nothing of an answer are shared out
        among those that speak. An answer that does not pass a gate has that gate's floor as its total. Raises RewardError where a
        reward fails or is no finite number below 1e6, unless it is to be skipped, and what the rewards raise themselves.
        """
        samples = list(samples)
        if not samples:
            return Scored([], {name: [] for name in self.names})
        parts, problems = self.parts(samples)
        return Scored(self.totals(groups_of_samples(samples), parts), parts, problems)

    def parts(self, samples: Sequence[Sample]) -> tuple[dict[str, list[float]], list[Problem]]:
        """What each reward says of answers, by name, and what was passed over; raises as `score`."""
        said = self._asked(samples)
        parts = {one.name: each.values for one, each in zip(self.rewards, said, strict=True)}
        return parts, [problem for one in said for problem in one.problems]

    def _asked(self, samples: Sequence[Sample]) -> list[_Said]:
        calls = [_Asking(one, samples) for one in self.rewards]
        waiting = [call for call in calls if is_async(call.reward.scoring)]

        async def all_of_them() -> None:
            await asyncio.gather(*(call.ask_together() for call in waiting))

        if waiting:
            _run(all_of_them())
        for call in calls:
            if call not in waiting:
                call.ask()
        return [call.said for call in calls]

    def totals(self, groups: Sequence[Sequence[int]], parts: Mapping[str, Sequence[float]]) -> list[float]:
        """The reward of each answer from what each reward says of it, as `score` sums them. groups: places of the answers to each prompt,
        of all answers that a reward normalised over the batch is normalised over."""
        whole, count = sum(abs(one.spec.weight) for one in self.rewards), sum(map(len, groups))
        sums, spoken = np.zeros(count), np.zeros(count)
        for one in self.rewards:
            values = np.asarray(parts[one.name], np.float64)
            used = values if one.spec.clip is None else np.clip(values, *one.spec.clip)
            used = _normalised(used, groups, one.spec.normalise)
            there = ~np.isnan(used)
            sums[there] += one.spec.weight * used[there]
            spoken[there] += abs(one.spec.weight)
        with np.errstate(divide="ignore", invalid="ignore"):
            totals = np.where(spoken > 0, sums * whole / spoken, np.nan)
        for one in reversed(self.rewards):  # the first gate that is not passed says the floor
            if one.spec.gate is not None:
                values = np.asarray(parts[one.name], np.float64)
                totals = np.where(values <= one.spec.gate, one.spec.floor, totals)
        return [float(value) for value in totals]


@dataclass(slots=True)
class _Said:
    values: list[float]
    problems: list[Problem] = field(default_factory=list)


class _Asking:
    """One reward asked about a batch of answers."""

    def __init__(self, reward: Reward, samples: Sequence[Sample]) -> None:
        self.reward, self.samples = reward, samples
        self.said = _Said([math.nan] * len(samples))
        size = reward.spec.batch or len(samples)
        every = list(range(len(samples)))
        self.parts = [every[at : at + size] for at in range(0, len(every), size)]
        if reward.compares:  # an answer alone is compared with nothing
            self.parts = [group for group in groups_of_samples(samples) if len(group) > 1]

    def ask(self) -> None:
        for places in self.parts:
            try:
                self._note(places, self.reward.scoring([self.samples[place] for place in places]))
            except TunesmithError as cause:
                if self._of_a_row(places, cause):
                    self._each(places, cause)
                else:
                    self._refuse(places, cause)
            except Exception as cause:
                self._each(places, cause)

    async def ask_together(self) -> None:
        limit = asyncio.Semaphore(self.reward.spec.concurrency)

        async def one(places: Sequence[int]) -> None:
            async with limit:
                try:
                    said = await self.reward.scoring([self.samples[place] for place in places])
                except Exception as cause:
                    self._refuse(places, cause)
                    return
                self._note(places, said)

        await asyncio.gather(*(one(places) for places in self.parts))

    def _of_a_row(self, places: Sequence[int], cause: TunesmithError) -> bool:
        """Does an error speak of one answer, such as one that is too long for a model? Others are of the reward as a whole."""
        if isinstance(cause, RewardError):  # names the first row of a call that returned something else than its answers' rewards
            return False
        return isinstance(cause, DataError) or any(cause.where and cause.where == self.samples[place].where for place in places)

    def _each(self, places: Sequence[int], cause: Exception) -> None:
        """After a batch that raised: one at a time, so that only the answers that make it raise are refused."""
        if len(places) == 1 or self.reward.compares:
            self._refuse(places, cause)
            return
        for place in places:
            try:
                said = self.reward.scoring([self.samples[place]])
            except Exception as own:
                self._refuse([place], own)
                continue
            self._note([place], said)

    def _note(self, places: Sequence[int], said: Any) -> None:
        if self.reward.compares:
            try:
                values = [math.nan] * len(places) if said is None else rewards_of(said, len(places))
            except ValueError as cause:
                self._problem(places[0], f"compares {len(places)} answers, and {cause}", cause)
                return
        else:
            values = self._numbers(places, said)
        for place, value in zip(places, values, strict=True):
            self.said.values[place] = value

    def _numbers(self, places: Sequence[int], said: Any) -> list[float]:
        """What was returned as numbers; NaN where it said nothing or what it said is refused."""
        listed = said.tolist() if hasattr(said, "tolist") else said
        if not isinstance(listed, Sequence) or isinstance(listed, str) or len(listed) != len(places):
            size = f" of {len(listed)}" if isinstance(listed, Sequence) else ""
            raise RewardError(
                f"the reward {self.reward.name} returned a {type(said).__name__}{size} for {len(places)} answers.",
                where=self.samples[places[0]].where,
                hints=["It returns a list with one number an answer, or None where it says nothing."],
            )
        return [self._number(place, value) for place, value in zip(places, listed, strict=True)]

    def _number(self, place: int, value: Any) -> float:
        if value is None:
            return math.nan
        number = value.item() if hasattr(value, "item") else value
        if not isinstance(number, bool | int | float):
            self._problem(place, f"is {value!r}, not a number")
        elif number != number or abs(number) == math.inf:
            self._problem(place, f"is {number}")
        elif abs(number) > LARGEST:
            self._problem(place, f"is {str(number)[:20]}, beyond {LARGEST:g}")
        else:
            return float(number)
        return math.nan

    def _refuse(self, places: Sequence[int], cause: Exception) -> None:
        if isinstance(cause, TunesmithError):
            if self.reward.spec.on_error == "error" or isinstance(cause, SpecError):
                raise cause
            what = f"failed: {cause.what}"
        else:
            what = f"raised {type(cause).__name__}: {cause}"
        for place in places:
            self._problem(place, what, cause)

    def _problem(self, place: int, what: str, cause: Exception | None = None) -> None:
        sample = self.samples[place]
        problem = Problem(self.reward.name, sample.where, sample.completion, what)
        if self.reward.spec.on_error == "skip":
            self.said.problems.append(problem)
            return
        text = problem.completion if len(problem.completion) <= _SHOWN else f"{problem.completion[:_SHOWN]}…"
        hints = [f"The answer: {text!r}", "Or count it as missing for such answers:  on_error: skip"]
        raise RewardError(f"the reward {self.reward.name} {what}.", where=sample.where, hints=hints) from cause


def _normalised(values: np.ndarray, groups: Sequence[Sequence[int]], over: str) -> np.ndarray:
    """To mean 0 and unbiased deviation 1 over what is no NaN; 0 where all are alike."""
    if over == "none":
        return values
    out = values.copy()
    for places in groups if over == "group" else [list(range(len(values)))]:
        own = [place for place in places if not math.isnan(values[place])]
        gap = values[own] - values[own].mean() if own else np.zeros(0)
        deviation = float(np.sqrt((gap**2).sum() / (len(own) - 1))) if len(own) > 1 else 0.0
        out[own] = gap / deviation if deviation > 1e-9 else 0.0
    return out


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Also where a loop runs already, as in notebooks."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as pool:
        runner: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run
        pool.submit(runner, work).result()
