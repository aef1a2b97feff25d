"""A judge: a local model or a server that says, by a rubric, which of two answers is better, or how good one is.

Each comparison is asked in both orders and the two are averaged, for judges favour a place (Wang et al. 2023, 2305.17926).
A local model's verdict is the likelihood of each letter, which is a soft preference (Lee et al. 2023, 2309.00267, sec. 3.1);
a server's is parsed from what it says. Everything is kept on disk by content, so that nothing is asked twice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from tunesmith.bases import Base, load_base
from tunesmith.bases.kinds import decide_kind, read_config
from tunesmith.bases.source import locate
from tunesmith.core.errors import DataError, RunError, SpecError, unknown
from tunesmith.core.progress import Quiet, Reporter
from tunesmith.core.record import Message
from tunesmith.data.lengths import longest_path
from tunesmith.engine.asking import Question, Reply
from tunesmith.engine.journal import Journal, digest
from tunesmith.engine.local import answerer, located, score_options
from tunesmith.engine.model import Model
from tunesmith.engine.runs import is_run, open_run
from tunesmith.engine.sampler import Sampling
from tunesmith.engine.server import Server, connect, is_server
from tunesmith.rollout.named import head_of, stands_on
from tunesmith.rollout.rubric import COMPARE, Form, again, question, rating_on, rubric_of, settled

Way = Literal["likelihood", "generation"]
NoVerdict = Literal["error", "skip", "tie"]

FOLDER = "judgements"
"""Where in the cache answers of judges are kept."""

BRIEF_TOKENS, REASONED_TOKENS = 16, 512
"""Longest answers in words: a verdict alone, and one with its reasons."""

_CHUNK = 64
"""Questions to a local model between two writings to disk."""


@dataclass(frozen=True, slots=True)
class Duel:
    """Two answers to one prompt ("" where texts are compared by themselves). where: the place that errors name."""

    first: str
    second: str
    prompt: str = ""
    where: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Probabilities that the first answer is the better one.

    preference: the mean of both orders, None for no verdict. ahead, behind: as asked with the first answer before the second, and
    after it; None where that order was not asked or brought no verdict.
    """

    preference: float | None
    ahead: float | None = None
    behind: float | None = None

    @property
    def flips(self) -> bool | None:
        """Does the verdict change with the order? None where both orders have not been heard."""
        if self.ahead is None or self.behind is None:
            return None
        return (self.ahead > 0.5) != (self.behind > 0.5) or (self.ahead < 0.5) != (self.behind < 0.5)


@dataclass(slots=True)
class Tally:
    """Questions so far: asked of the model, kept from before, asked again after prose, and those that brought no verdict."""

    asked: int = 0
    kept: int = 0
    again: int = 0
    none: int = 0

    def line(self) -> str:
        """For the terminal."""
        return f"{self.asked:,} asked · {self.kept:,} kept from before · {self.again:,} asked again · {self.none:,} without a verdict"


@dataclass(slots=True)
class Judge:
    """model: who judges. rubric: by what. reasons: it thinks in words first. way: likelihood of the verdicts, or words, parsed.

    no_verdict: what becomes of a question that was answered with prose twice: "error", "skip" (None) or "tie" (undecided). both_orders:
    False asks one order, drawn by content. base: the one that a local judge shares with the policy is asked without the policy's adapters.
    scale: words that answers are rated in, the worst first; () for 1 to 10. tally: what happened. told: three answers that held no verdict.
    """

    model: Model | Server
    rubric: str
    reasons: bool = False
    way: Way = "likelihood"
    no_verdict: NoVerdict = "error"
    both_orders: bool = True
    max_new_tokens: int = 0
    batch: int = 32
    scale: tuple[str, ...] = ()
    source: str = ""
    reporter: Reporter = field(default_factory=Quiet, repr=False)
    tally: Tally = field(default_factory=Tally)
    told: list[str] = field(default_factory=list)
    _too_long: dict[str, str] = field(default_factory=dict, repr=False)  # questions beyond the context, and what is to be said of each
    _kept_answers: Journal | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.no_verdict not in get_args(NoVerdict):
            raise unknown("value of no_verdict", self.no_verdict, get_args(NoVerdict))
        if self.way not in get_args(Way):
            raise unknown("way of judging", self.way, get_args(Way))
        if isinstance(self.model, Server) and self.way == "likelihood":
            what = "a server says answers, not the probabilities of given ones, so its verdicts are read from its words."
            raise SpecError(what, where=self.model.url, hints=["Nearest that works here:  way=generation"])
        if isinstance(self.model, Model) and self.model.base.kind == "encoder":
            raise SpecError(f"{self.model.base.name} is an encoder: it judges nothing in words.", hints=["Name a decoder, or a server."])
        self.max_new_tokens = self.max_new_tokens or (REASONED_TOKENS if self.reasons else BRIEF_TOKENS)

    @property
    def name(self) -> str:
        """For reports: who judges, and in which way."""
        who = self.model.name if isinstance(self.model, Server) else self.model.name or self.model.base.name
        return f"{who} ({self.way}{', with reasons' if self.reasons else ''})"

    @property
    def rubric_digest(self) -> str:
        """Content hash of the rubric."""
        return hashlib.sha256(self.rubric.encode()).hexdigest()[:12]

    def compare(self, duels: Sequence[Duel]) -> list[Judgement]:
        """A judgement for each duel, in order. Raises, where no_verdict is "error", RunError for prose that came twice and DataError for
        a question that the model's context does not hold; and what asking raises."""
        orders = [self._orders(duel) for duel in duels]
        asked = [
            (question(self.rubric, COMPARE, duel.prompt, texts, self.reasons), duel.where)
            for duel, own in zip(duels, orders, strict=True)
            for texts in ([duel.first, duel.second] if ahead else [duel.second, duel.first] for ahead in own)
        ]
        heard = iter(self._values(COMPARE, asked))
        return [_judgement({ahead: next(heard) for ahead in own}) for own in orders]

    def rate(self, answers: Sequence[tuple[str, str]], where: Sequence[str] = ()) -> list[float | None]:
        """A rating from 1 to 10, or to the number of words in the scale, of each (prompt, answer), None for no verdict; by likelihood the
        mean over them, as Liu et al. 2023 (2303.16634, sec. 2) weight them. Raises as `compare`."""
        places, form = where or [""] * len(answers), rating_on(self.scale)
        asked = [
            (question(self.rubric, form, prompt, [answer], self.reasons), place)
            for (prompt, answer), place in zip(answers, places, strict=True)
        ]
        return self._values(form, asked)

    def _orders(self, duel: Duel) -> list[bool]:
        """Which orders are asked: True for the first answer ahead."""
        if self.both_orders:
            return [True, False]
        return [int(digest([duel.prompt, *sorted([duel.first, duel.second])]), 16) % 2 == (duel.first <= duel.second)]

    def _values(self, form: Form, asked: Sequence[tuple[list[Message], str]]) -> list[float | None]:
        """The value of each question. Equal ones are asked once."""
        journal = self._journal()
        keys = [digest([form.options, messages]) for messages, _ in asked]
        once = {key: item for key, item in zip(keys, asked, strict=True)}
        with closing(journal) if journal else nullcontext(), self.reporter.work("judge", len(once)) as work:
            found: dict[str, float | None] = {}
            size = 8 * self.model.concurrency if isinstance(self.model, Server) else _CHUNK
            items = list(once.items())
            for start in range(0, len(items), size):
                part = dict(items[start : start + size])
                found |= self._chunk(form, part, journal)
                work.advance(len(part))
        missing = [place for place, key in enumerate(keys) if found[key] is None]
        if missing:
            return self._without(form, asked, keys, found)
        return [found[key] for key in keys]

    def _without(
        self, form: Form, asked: Sequence[tuple[list[Message], str]], keys: Sequence[str], found: Mapping[str, float | None]
    ) -> list[float | None]:
        """What becomes of questions that brought no verdict."""
        if self.no_verdict == "error":
            place = next(place for place, key in enumerate(keys) if found[key] is None)
            if what := self._too_long.get(keys[place]):
                hints = ["Shorten the texts or the rubric, or name a judge with more context.", "Or leave such out:  no_verdict=skip"]
                raise DataError(what, where=asked[place][1] or self.name, hints=hints)
            hints = [
                f"It said:  {self.told[-1] if self.told else 'nothing'}",
                "Count such as ties, or leave them out:  no_verdict=tie  ·  no_verdict=skip",
            ]
            count = sum(value is None for value in found.values())
            what = f"the judge gave no verdict on {count:,} of {len(found):,} questions, asked twice each."
            raise RunError(what, where=asked[place][1] or self.name, hints=hints)
        return [form.tie if self.no_verdict == "tie" and found[key] is None else found[key] for key in keys]

    def _journal(self) -> Journal | None:
        """Where answers are kept: a file for each judge and each way of asking it."""
        if self._kept_answers is None and (own := identity_of(self.model)) is not None:
            self._kept_answers = Journal(f"{own} {digest([self.way, self.reasons, self.max_new_tokens])}", FOLDER)
        return self._kept_answers

    def _chunk(self, form: Form, part: Mapping[str, tuple[list[Message], str]], journal: Journal | None) -> dict[str, float | None]:
        asked = {key: (messages, where) for key, (messages, where) in part.items()}
        if self.way == "likelihood":
            if self.reasons:
                thought = self._said(asked, "thought", journal)
                asked = {key: (settled(asked[key][0], own.text, form), asked[key][1]) for key, own in thought.items()}
            likely = self._likely(form, asked, journal)
            return {key: likely.get(key) for key in part}
        said = self._said(asked, "said", journal)
        found = {key: form.parse(reply.text) for key, reply in said.items()}
        stern = {key: (again(asked[key][0], said[key].text, form), asked[key][1]) for key, value in found.items() if value is None}
        if stern:
            self.tally.again += len(stern)
            replies = self._said(stern, "again", journal)
            found |= {key: form.parse(reply.text) for key, reply in replies.items()}
            none = [replies[key].text for key in replies if found[key] is None]
            self.tally.none += len(none)
            self.told = [*self.told, *(f"'{' '.join(text.split())[:120]}'" for text in none)][:3]
        return {key: found.get(key) for key in part}

    def _refuse_long(self, key: str, tokens: int) -> bool:
        """Note a question of so many tokens, its answer included, where the model's context does not hold it."""
        context = self.model.context_length if isinstance(self.model, Model) else None
        if context is None or tokens <= context:
            return False
        assert isinstance(self.model, Model)
        self._too_long[key] = f"the question to the judge takes {tokens:,} tokens, and {self.model.base.name} reads {context:,}."
        self.tally.asked -= 1
        self.tally.none += 1
        return True

    def _said(self, asked: Mapping[str, tuple[list[Message], str]], stage: str, journal: Journal | None) -> dict[str, Reply]:
        """What the model says to each, kept ones unasked, but for questions that it has no room for. Greedy."""
        kept, left = self._kept(asked, stage, journal)
        if isinstance(self.model, Model):
            left = {key: item for key, item in left.items() if not self._refuse_long(key, self._asked_tokens(*item))}
        if left:
            who = answerer(self.model, self.batch, shorten=False)
            questions = [Question(messages, where=where) for messages, where in left.values()]
            with who.session(), torch.no_grad():
                done = who.answer(questions, Sampling(max_new_tokens=self.max_new_tokens))
            for key, reply in zip(left, done.replies, strict=True):
                kept[key] = reply
                if journal:
                    journal.keep(f"{stage} {key}", reply)
        return {key: kept[key] for key in asked if key in kept}

    def _asked_tokens(self, messages: list[Message], where: str) -> int:
        """Of a question to a local model, with room for the longest answer."""
        assert isinstance(self.model, Model)
        with located(where):
            return len(self.model.renderer.prompt(messages).ids) + self.max_new_tokens

    def _likely(self, form: Form, asked: Mapping[str, tuple[list[Message], str]], journal: Journal | None) -> dict[str, float]:
        """The mean value under the likelihood of each option as a whole answer, but for questions that there is no room for."""
        kept, left = self._kept(asked, "likely", journal)
        if left and isinstance(self.model, Model):
            rows = {}
            for key, (messages, where) in left.items():
                with located(where):
                    row = self.model.renderer.options(messages, form.options, where=where)
                if not self._refuse_long(key, longest_path(row)):
                    rows[key] = row
            with self.model.active(), torch.no_grad():
                scores = score_options(self.model, list(rows.values()))
            for key, own in zip(rows, scores, strict=True):
                kept[key] = Reply(" ".join(f"{value:.9g}" for value in own), "likelihood", 0, 0)
                if journal:
                    journal.keep(f"likely {key}", kept[key])
        return {key: _mean([float(word) for word in kept[key].text.split()], form.values) for key in asked if key in kept}

    def _kept(
        self, asked: Mapping[str, tuple[list[Message], str]], stage: str, journal: Journal | None
    ) -> tuple[dict[str, Reply], dict[str, tuple[list[Message], str]]]:
        """Replies that are known already, and what is left to ask."""
        known = {key: reply for key in asked if journal and (reply := journal.get(f"{stage} {key}"))}
        left = {key: item for key, item in asked.items() if key not in known}
        self.tally.kept += len(known)
        self.tally.asked += len(left)
        return known, left


def open_judge(
    source: str | Path | Model | Server,
    *,
    rubric: str | Path | None = None,
    reasons: bool = False,
    way: str = "auto",
    no_verdict: NoVerdict = "error",
    both_orders: bool = True,
    max_new_tokens: int = 0,
    batch: int = 32,
    scale: Sequence[str] = (),
    key_env: str | None = None,
    base: Base | None = None,
    reporter: Reporter | None = None,
) -> Judge:
    """A judge from the name of a base, of a finished run or of a server ("http://HOST:PORT/v1#MODEL"), or from a model.

    rubric: a text, a file, or None for the default. way: "likelihood", "generation" or "auto" (likelihood for a local model, generation
    for a server). base: one that is loaded already, which is used where the judge is it or a run on it. The others: as of `Judge`;
    max_new_tokens 0 is 16, with reasons 512.
    Raises SpecError for options that do not fit, and what opening the source raises.
    """
    text = rubric_of(rubric)  # before a model is loaded
    rating_on(scale)
    model = source if isinstance(source, Model | Server) else _open(str(source), key_env, base, reporter)
    if key_env is not None and not isinstance(model, Server):
        raise SpecError("key_env names the key of a server, and the judge is none.", hints=["Form:  http://HOST:PORT/v1#MODEL"])
    chosen = ("generation" if isinstance(model, Server) else "likelihood") if way == "auto" else way
    if chosen not in get_args(Way):
        raise unknown("way of judging", chosen, ("auto", *get_args(Way)))
    named = model.name if isinstance(model, Server) else str(source) if not isinstance(source, Model) else model.name or model.base.name
    return Judge(
        model,
        text,
        reasons=reasons,
        way="generation" if chosen == "generation" else "likelihood",
        no_verdict=no_verdict,
        both_orders=both_orders,
        max_new_tokens=max_new_tokens,
        batch=batch,
        scale=tuple(scale),
        source=named,
        reporter=reporter or Quiet(),
    )


def _open(source: str, key_env: str | None, base: Base | None, reporter: Reporter | None) -> Model | Server:
    if is_server(source):
        return connect(source, key_env=key_env, reporter=reporter)
    check_judge_source(source)
    shared = base if base is not None and stands_on(source, base) else None
    if is_run(source):
        return open_run(source, base=shared)
    loaded = shared or load_base(source, reporter=reporter)
    return Model(loaded, name=loaded.name)


def check_judge_source(source: str) -> None:
    """Raise SpecError for a name that cannot judge: a run that answers by its task head, or an encoder. Nothing is loaded, nobody is
    asked. Raises RunError for a run that has not ended, and what locating a base raises."""
    if is_server(source):
        return
    if is_run(source):
        if head_of(source) is not None:
            hints = [f"As a reward it is written:  model(source={source})", "To measure it:  tunesmith evaluate RUN PAIRS"]
            raise SpecError(f"{source} answers by its task head, and a judge answers in words.", hints=hints)
        return
    folder = locate(source).folder
    if decide_kind(read_config(folder, source, remote_code=False), "auto", source) == "encoder":
        raise SpecError(f"{source} is an encoder: it judges nothing in words.", hints=["Name a decoder, or a server."])


def identity_of(model: Model | Server) -> str | None:
    """What stays the same where answers stay the same; None for a model with an adapter that has no content hash yet."""
    if isinstance(model, Server):
        return f"{model.url} {model.model}"
    digests = [adapter.digest for adapter in model.adapters]
    if not all(digests):
        return None
    return digest([model.base.fingerprint, str(model.base.dtype), str(model.base.quantise), model.renderer.fingerprint(), digests])


def weights_of(model: Model | Server) -> str | None:
    """What a judge is recognised by from one day to another, however it is asked: a server by its model's name, a local one by its
    weights; None for a model with an adapter that has no content hash yet."""
    if isinstance(model, Server):
        return digest(["server", model.model.casefold()])
    digests = [adapter.digest for adapter in model.adapters]
    return digest([model.base.fingerprint, digests]) if all(digests) else None


def _mean(log_probs: Sequence[float], values: Sequence[float]) -> float:
    """Mean value under softmax(log_probs)."""
    most = max(log_probs)
    weights = [math.exp(value - most) for value in log_probs]
    return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)


def _judgement(heard: Mapping[bool, float | None]) -> Judgement:
    """heard: by whether the first answer stood ahead, the probability that the answer ahead is better. One order without a verdict
    leaves none, for its place could not be averaged out."""
    ahead, said = heard.get(True), heard.get(False)
    behind = None if said is None else 1 - said
    known = [value for value in (ahead, behind) if value is not None]
    return Judgement(sum(known) / len(known) if len(known) == len(heard) else None, ahead, behind)
