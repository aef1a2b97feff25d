"""Answers of one or several models to prompts, and prompts made harder by rewriting. What is done is kept until the work ends."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tunesmith.core.errors import SpecError
from tunesmith.core.progress import Quiet, Reporter
from tunesmith.core.record import Message, as_messages
from tunesmith.curation.pairs import Answers, folded
from tunesmith.engine.asking import Question, Reply
from tunesmith.engine.journal import Journal, digest
from tunesmith.engine.local import located
from tunesmith.engine.model import Model
from tunesmith.engine.sampler import Sampling, generate
from tunesmith.engine.server import Server
from tunesmith.rollout.judges import identity_of

CHUNK = 16
"""Prompts between two writings to disk."""

REWRITES: Mapping[str, str] = {
    "typos": "Rewrite the request below as someone would type it in a hurry: with typing errors, without capitals. Keep its meaning.",
    "terse": "Rewrite the request below in as few words as possible, leaving out whatever a reader could guess. Keep its meaning.",
    "wordy": "Rewrite the request below at twice its length, with asides that do not matter to it. Keep what is asked.",
    "distract": "Rewrite the request below so that it also tells something true that has nothing to do with what is asked.",
    "false-premise": "Rewrite the request below so that it takes something wrong for granted, without saying that it is wrong.",
    "leading": "Rewrite the request below so that it urges a particular wrong answer upon the reader, politely.",
    "ambiguous": "Rewrite the request below so that it can be understood in two ways.",
    "trap": "Rewrite the request below so that the obvious answer to it is wrong and a careful reader can find the right one.",
}
"""Instructions by name. Each asks for the rewritten request alone."""

ONLY = "Write the rewritten request and nothing else."


@dataclass(slots=True)
class Sampled:
    """Answers prompts: `samples` of each system. systems: by the name that provenance gives. rewriter, rewrites: who makes further
    prompts of each, by which instructions (names of REWRITES, or instructions themselves); the answers to them stand beside the others.

    Every answer draws from the seed, its prompt and its number alone, so a stopped piece of work goes on to the same answers.
    """

    systems: Mapping[str, Model | Server]
    samples: int = 4
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=128, temperature=1.0))
    rewriter: tuple[str, Model | Server] | None = None
    rewrites: Sequence[str] = ()
    reporter: Reporter = field(default_factory=Quiet)
    notes: list[str] = field(default_factory=list)
    _journals: list[Journal] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.samples < 1 or self.samples * len(self.systems) < 2:
            what = f"{self.samples} sample of {len(self.systems)} model makes no pair."
            raise SpecError(what, hints=["--samples 4", "Or sample a second model:  --sample OTHER"])
        if self.sampling.temperature == 0 and self.samples > 1:
            raise SpecError(
                "at temperature 0 all samples of a model are the same.", hints=["--temperature 1", "Or one of each:  --samples 1"]
            )
        if bool(self.rewrites) != (self.rewriter is not None):
            raise SpecError("rewriting takes an instruction and a model that follows it.", hints=["--rewrite typos --rewriter SYSTEM"])

    def __call__(self, prompts: Sequence[Answers]) -> list[Answers]:
        """Each prompt, and each that was made of it, with all its answers."""
        wanted = list({folded(one.prompt): replace(one, group=one.group or folded(one.prompt)) for one in prompts}.values())
        wanted += self._rewritten(wanted)
        texts: list[list[str]] = [[] for _ in wanted]
        about: list[list[dict[str, Any]]] = [[] for _ in wanted]
        asked = [as_messages(one.prompt) for one in wanted]
        for name, model in self.systems.items():
            said = self._ask(f"sample {name}", model, asked, [one.where for one in wanted], self.samples, self.sampling)
            for own, told, replies in zip(texts, about, said, strict=True):
                for number, reply in enumerate(replies):
                    if text := reply.text.strip():
                        own.append(text)
                        told.append({"system": name, "sample": number, "seed": self.sampling.seed, "finished": reply.finished})
        kept = []
        for one, own, told in zip(wanted, texts, about, strict=True):
            rewritten = one.about[0] if one.about else {}
            kept.append(replace(one, texts=tuple(own), about=tuple({**told_one, **rewritten} for told_one in told), scores=(), ratings=()))
        alike = sum(len({folded(text) for text in one.texts}) < 2 for one in kept)
        if alike:
            self.notes.append(f"{alike:,} of {len(kept):,} prompts got fewer than two different answers, and make no pair")
        return kept

    def done(self) -> None:
        """The pairs are written: the answers need not be kept any longer."""
        for journal in self._journals:
            journal.forget()

    def _rewritten(self, prompts: Sequence[Answers]) -> list[Answers]:
        """Further prompts. Dialogues and what came back empty, unchanged or many times as long are left out, and counted."""
        if self.rewriter is None:
            return []
        name, model = self.rewriter
        plain = [one for one in prompts if isinstance(one.prompt, str)]
        out, lost = [], len(prompts) - len(plain)
        for how in self.rewrites:
            told = REWRITES.get(how, how)
            asked: list[list[Message]] = [[{"role": "user", "content": f"{told} {ONLY}\n\n{one.prompt}"}] for one in plain]
            limit = Sampling(max_new_tokens=self.sampling.max_new_tokens, temperature=0.0)
            said = self._ask(f"rewrite {how}", model, asked, [one.where for one in plain], 1, limit)
            for one, (reply,) in zip(plain, said, strict=True):
                text = reply.text.strip().strip('"').strip()
                if not text or folded(text) == folded(one.prompt) or len(text) > 4 * len(one.prompt) + 200 or reply.finished == "length":
                    lost += 1
                    continue
                made = {"rewritten": {"from": one.prompt, "how": how, "by": name}}
                out.append(replace(one, prompt=text, about=(made,)))
        if lost:
            self.notes.append(f"{lost:,} rewritten prompts were left out: empty, unchanged, cut off or far too long")
        return out

    def _ask(
        self, work: str, model: Model | Server, asked: Sequence[Sequence[Message]], where: Sequence[str], samples: int, sampling: Sampling
    ) -> list[list[Reply]]:
        """`samples` replies to each, written down chunk by chunk."""
        own = identity_of(model)
        journal = None if own is None else Journal(f"{own} {sampling}", "samples")
        keys = [digest(messages) for messages in asked]
        found: dict[str, list[Reply]] = {}
        for key in keys:
            known = [reply for number in range(samples) if journal and (reply := journal.get(f"{number} {key}"))]
            if len(known) == samples:
                found[key] = known
        left = [place for place, key in enumerate(keys) if key not in found]
        with ExitStack() as stack:
            if journal:
                stack.callback(journal.close)
                self._journals.append(journal)
            task = stack.enter_context(self.reporter.work(work, len(keys), len(keys) - len(left)))
            for start in range(0, len(left), CHUNK):
                part = left[start : start + CHUNK]
                said = _answers(model, [asked[at] for at in part], [keys[at] for at in part], [where[at] for at in part], samples, sampling)
                for at, replies in zip(part, said, strict=True):
                    found[keys[at]] = replies
                    for number, reply in enumerate(replies):
                        if journal:
                            journal.keep(f"{number} {keys[at]}", reply)
                task.advance(len(part))
        return [found[key] for key in keys]


def _answers(
    model: Model | Server, asked: Sequence[Sequence[Message]], keys: Sequence[str], where: Sequence[str], samples: int, sampling: Sampling
) -> list[list[Reply]]:
    if isinstance(model, Server):
        replies: list[list[Reply]] = [[] for _ in asked]
        with model.session():
            for number in range(samples):
                own = replace(sampling, seed=_seed(f"{sampling.seed} {number} {keys[0]}"))
                done = model.answer([Question(messages, where=place) for messages, place in zip(asked, where, strict=True)], own)
                for out, reply in zip(replies, done.replies, strict=True):
                    out.append(reply)
        return replies
    renderer, tokenizer = model.renderer, model.base.tokenizer
    prompts = []
    for messages, place in zip(asked, where, strict=True):
        with located(place):
            prompts.append(renderer.prompt(messages).ids)
    with model.active(), torch.no_grad():
        done_here = generate(
            model.forward,
            tokenizer,
            model.forward.prompts(prompts),
            sampling,
            samples=samples,
            seeds=[_seed(key) for key in keys],
            ends=renderer.stop_ids,
        )
    made = [Reply(one.text, one.finished, 0, len(one.ids)) for one in done_here]
    return [made[at * samples : (at + 1) * samples] for at in range(len(asked))]


def _seed(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
