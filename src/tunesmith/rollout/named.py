"""What stands behind the name of a base, a run or a server, as its files tell it: nothing is loaded and nobody is asked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tunesmith.adapters import plan
from tunesmith.adapters.files import OURS
from tunesmith.bases import Base
from tunesmith.bases.fingerprint import fingerprint
from tunesmith.core.errors import SpecError
from tunesmith.core.record import Record
from tunesmith.engine.journal import digest
from tunesmith.engine.rundir import RunFolder
from tunesmith.engine.runs import ADAPTER, TRAINED, is_run
from tunesmith.engine.server import is_server
from tunesmith.rewardspec import RewardSpec, reward_call
from tunesmith.spec import Spec

_SOURCES = {"judge": "model", "judge_rating": "model", "model": "source"}
"""Rewards that are models, and the option that names them."""

LABELLED = "labelled_by"
"""The key under which pairs, and runs that learned from them, name the models that labelled them."""


def chain(source: str) -> Iterator[tuple[Path, Spec]]:
    """The folder and the spec of a run and of the runs that it began from, itself first; nothing for what is no run."""
    while is_run(source):
        path = Path(source)
        path = path / TRAINED if not (path / ADAPTER).exists() and is_run(path / TRAINED) else path
        spec = RunFolder(path).spec()
        yield path, spec
        source = spec.base.model


def stands_on(source: str, base: Base) -> bool:
    """Is it this base, or a run on it that leaves the base's own weights as they are?"""
    specs = [spec for _, spec in chain(source)]
    in_place = any(part.kind == "in-place" for spec in specs if spec.adapter != "continue" for part in plan(spec.adapter))
    return (specs[-1].base.model if specs else source) == base.source and not in_place


def head_of(run: str) -> dict[str, Any] | None:
    """The head that answers for a finished run, as its files describe it ("says", "labels", ...); None where it has none.

    Raises RunError where the run has not ended.
    """
    for path, _ in chain(run):
        RunFolder(path).result()
        found: dict[str, Any] | None = _ours(path).get("head")
        return found
    return None


def same_model(a: str, b: str) -> bool:
    """Do two names stand for one model: the same weights, or the same model at servers?

    A server without a name of its model is known by its address.
    """
    if is_server(a) or is_server(b):
        (one, _, name), (other, _, its_name) = a.partition("#"), b.partition("#")
        return name.casefold() == its_name.casefold() if name and its_name else one.rstrip("/") == other.rstrip("/")
    return a.strip() == b.strip() or content_of(a) == content_of(b)


def refuse_shared_judge(judge: str, specs: Iterable[Spec]) -> None:
    """Raise SpecError where who is to judge the outcome gave the rewards of one of these runs, or taught in one: what was trained to
    please a judge is praised by it. judge: the name of a base, a run or a server."""
    for spec in specs:
        for role, source in _helpers(spec):
            if same_model(judge, source):
                raise _shared(judge, role)


def account_of(source: str) -> dict[str, str]:
    """A model that labels data, as their provenance tells of it: its name, and a digest of what its files hold ("" for a server)."""
    return {"model": source, "content": "" if is_server(source) else digest(list(content_of(source)))}


def labellers_among(records: Iterable[Record]) -> list[dict[str, str]]:
    """The models that labelled preference data, as `tunesmith pairs` noted them in the provenance of every pair.

    What `account_of` gives, and of a judge its "name", the first line of its "rubric", and how it was "checked".
    """
    found: dict[str, dict[str, str]] = {}
    for record in records:
        told = record.fields.get("provenance")
        noted = told.get(LABELLED) if isinstance(told, Mapping) else None
        for one in noted if isinstance(noted, list) else ():
            if isinstance(one, Mapping) and "model" in one:
                found.setdefault(json.dumps(one, sort_keys=True), {"content": "", **{str(key): str(value) for key, value in one.items()}})
    return list(found.values())


def labellers_of(run: str) -> list[dict[str, str]]:
    """The models that labelled what a finished run, or one that it began from, learned from."""
    return [one for path, _ in chain(run) if (done := RunFolder(path)).finished for one in done.result().get(LABELLED, [])]


def refuse_labeller(judge: str, accounts: Iterable[Mapping[str, str]]) -> None:
    """Raise SpecError where who is to judge the outcome labelled the preferences that it comes from."""
    content = None
    for account in accounts:
        if account["content"]:
            content = content or account_of(judge)["content"]
        if (account["content"] and account["content"] == content) or same_model(judge, account["model"]):
            raise _shared(judge, f"labelled the preferences that were learned from (as {account['model']})")


def _shared(judge: str, role: str) -> SpecError:
    return SpecError(
        f"{judge} {role}, so it cannot judge the result: what was trained to please it would be praised by it.",
        where="evaluate.judge",
        hints=[
            "Nearest that works here: another model or server as the judge (another rubric does not make it another judge).",
            "Whether one is any good:  tunesmith judge check JUDGE PAIRS",
        ],
    )


def lineage(spec: Spec) -> list[Spec]:
    """A run's spec and those of the runs that it begins from."""
    return [spec, *(each for _, each in chain(spec.base.model))]


def _helpers(spec: Spec) -> Iterator[tuple[str, str]]:
    """What models do for a run, and their names."""
    if spec.teacher is not None:
        yield "is the teacher of the run", spec.teacher
    for one in spec.rewards:
        if (source := model_behind(one)) is not None:
            yield f"gives the reward {one.name or one.reward.partition('(')[0]}", source


def model_behind(reward: RewardSpec) -> str | None:
    """The name of the model that gives a reward; None for what is no model."""
    call = reward_call(reward.reward)
    source = None if call is None else call.options.get(_SOURCES.get(call.name, ""))
    return source if isinstance(source, str) else None


def content_of(source: str) -> tuple[str, ...]:
    """What the files of a base or a run hold, by content; the name of what has no files here."""
    runs = list(chain(source))
    root = runs[-1][1].base.model if runs else source.strip()
    folder = Path(root).expanduser()
    below = fingerprint(folder) if (folder / "config.json").is_file() else root
    digests: list[str] = []
    for path, spec in reversed(runs):
        digests = digests[:-1] if spec.adapter == "continue" else digests  # its adapter took the place of the one it began with
        digests.append(str(_ours(path).get("digest") or path.resolve()))
    return (below, *digests)


def _ours(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / ADAPTER / OURS).read_text("utf-8"))
    except (OSError, ValueError):  # not finished, or told when it is opened
        return {}
    return found if isinstance(found, dict) else {}
