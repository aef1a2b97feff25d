"""`tunesmith pairs`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.common import AsJson, KeyEnv, open_all, session, stdout
from tunesmith.cli.judge import JUDGE_FORMS, Columns, OneOrder, Reasons, Rubric, Scale, Way, mapping
from tunesmith.core.errors import SpecError, unknown

if TYPE_CHECKING:
    from tunesmith.core.progress import Reporter
    from tunesmith.curation.building import Labels
    from tunesmith.curation.pairs import Pair
    from tunesmith.curation.sampling import Sampled
    from tunesmith.engine.model import Model
    from tunesmith.engine.server import Server

Option = typer.Option
Sources = Annotated[
    list[str],
    typer.Argument(metavar="SOURCE...", help="Scored answers, rankings, ratings, rated texts, pairs, or prompts.", show_default=False),
]
Out = Annotated[
    Path | None, Option("--out", "-o", metavar="FILE", help="A .jsonl; without it only the report is shown.", show_default=False)
]
Ratings = Annotated[
    str | None, Option("--ratings", metavar="TABLE", help="Raters' ratings of the texts, joined by id.", show_default=False)
]
RatingsColumns = Annotated[
    list[str] | None, Option("--ratings-columns", metavar="ROLE=COLUMN", help="Its columns: id, ratings.", show_default=False)
]
Raters = Annotated[str, Option("--raters", help="any; or same, where the k-th rating of every answer is by one rater.")]
UpTo = Annotated[
    str, Option("--group-up-to", metavar="SIGN", help="Texts with equal ids up to the last SIGN stay together.", show_default=False)
]
PerItem = Annotated[int, Option("--per-item", min=1, help="Of texts without a prompt: pairs that each is in.")]
SplitBy = Annotated[str, Option("--split-by", help="What is never parted: item (a prompt, or a text without one) or group (a column).")]
Dev = Annotated[str | None, Option("--dev", metavar="SIZE", help="Prompts, or texts, for dev: 10% or a number.", show_default=False)]
Test = Annotated[str | None, Option("--test", metavar="SIZE", help="The same for test.", show_default=False)]
MinMargin = Annotated[float, Option("--min-margin", help="Least difference of the scores.")]
MaxMargin = Annotated[float, Option("--max-margin", help="Largest difference of the scores.")]
Hard = Annotated[str | None, Option("--hard", metavar="smallest|largest", help="Pairs of this margin first.", show_default=False)]
Ties = Annotated[str, Option("--ties", help="keep them, with probability 0.5, or drop them.")]
Soften = Annotated[float, Option("--soften", metavar="SCALE", help="Probability of scores: sigmoid(margin / SCALE); 0: always 1.")]
PerPrompt = Annotated[int | None, Option("--per-prompt", min=1, help="Most pairs of a prompt.", show_default=False)]
Count = Annotated[int | None, Option("--count", min=1, help="Most pairs for training.", show_default=False)]
Weight = Annotated[list[float] | None, Option("--weight", help="Share of each source, in order; may be repeated.", show_default=False)]
Sample = Annotated[list[str] | None, Option("--sample", metavar="SYSTEM", help="Answers the prompts; may be repeated.", show_default=False)]
Samples = Annotated[int, Option("--samples", min=1, help="Answers of each to each prompt.")]
Heat = Annotated[float, Option("--temperature", "-t", help="Of the sampling.")]
Longest = Annotated[int, Option("--max-tokens", min=1, help="Longest sampled answer, in tokens.")]
Rewrite = Annotated[
    list[str] | None,
    Option("--rewrite", metavar="NAME|TEXT", help="More prompts by this instruction; may be repeated.", show_default=False),
]
Rewriter = Annotated[
    str | None, Option("--rewriter", metavar="SYSTEM", help="Who rewrites; default: the first --sample.", show_default=False)
]
Reward = Annotated[
    list[str] | None, Option("--reward", metavar="EXPR", help="Scores the answers, as in a spec; several add up.", show_default=False)
]
JudgeName = Annotated[str | None, Option("--judge", metavar="JUDGE", help=f"Says which is better: {JUDGE_FORMS}.", show_default=False)]
Rate = Annotated[bool, Option("--rate", help="The judge rates each answer by itself.")]
NoVerdict = Annotated[str, Option("--no-verdict", help="Where the judge gives none: error, skip or tie.")]
HeldOut = Annotated[
    list[str] | None, Option("--held-out", metavar="FILE", help="What must not be met in training; may be repeated.", show_default=False)
]
Leaks = Annotated[str, Option("--leaks", help="Pairs that share a prompt or a text with it: error, drop or allow.")]
SeedOf = Annotated[int, Option("--seed", help="Of splits, draws and samples.")]
Replace = Annotated[bool, Option("--overwrite", help="Replace files of this name.")]


def pairs(
    ctx: typer.Context,
    sources: Sources,
    out: Out = None,
    columns: Columns = None,
    ratings: Ratings = None,
    ratings_columns: RatingsColumns = None,
    raters: Raters = "any",
    group_up_to: UpTo = "",
    per_item: PerItem = 2,
    split_by: SplitBy = "item",
    dev: Dev = None,
    test: Test = None,
    min_margin: MinMargin = 0.0,
    max_margin: MaxMargin = math.inf,
    hard: Hard = None,
    ties: Ties = "keep",
    soften: Soften = 0.0,
    per_prompt: PerPrompt = None,
    count: Count = None,
    weight: Weight = None,
    sample: Sample = None,
    samples: Samples = 4,
    temperature: Heat = 1.0,
    max_tokens: Longest = 128,
    rewrite: Rewrite = None,
    rewriter: Rewriter = None,
    reward: Reward = None,
    judge: JudgeName = None,
    rubric: Rubric = None,
    reasons: Reasons = False,
    way: Way = "auto",
    rate: Rate = False,
    scale: Scale = None,
    one_order: OneOrder = False,
    no_verdict: NoVerdict = "error",
    held_out: HeldOut = None,
    leaks: Leaks = "error",
    seed: SeedOf = 0,
    overwrite: Replace = False,
    key_env: KeyEnv = None,
    as_json: AsJson = False,
) -> None:
    """Make preference pairs, each with its margin, its probability and its provenance.

    Splits are made before anything is paired: no prompt, and no text without one, stands in two of them. A call that was stopped goes
    on where it stopped: samples, verdicts and scores are kept in the cache.

    Example:
      tunesmith pairs scored.jsonl --out pairs.jsonl --test 10% --min-margin 0.5
      tunesmith pairs prompts.jsonl --sample runs/a --sample runs/b --judge http://localhost:8000/v1#big --out pairs.jsonl
      tunesmith pairs pairs.jsonl --held-out test.jsonl --leaks allow
    """
    making = _Making(dict(ctx.params), session(ctx).reporter)
    making.run()


class _Making:
    """One call. given: the options by name, as the signature above has them."""

    def __init__(self, given: Mapping[str, Any], reporter: Reporter) -> None:
        self.given, self.reporter = given, reporter

    def run(self) -> None:
        """Read, sample, label, write, and tell."""
        from tunesmith.curation.building import Recipe, build
        from tunesmith.curation.surveying import refuse_existing, survey, write

        given = self.given
        self._check()
        sizes = {name: given[name] for name in ("dev", "test") if given[name]}
        rules = self._rules()
        recipe = Recipe(rules, sizes, given["per_item"], given["count"], tuple(given["weight"] or ()), given["leaks"])
        if given["out"] is not None:
            refuse_existing(given["out"], ["train", *sizes], given["overwrite"])
        read = self._sources()
        self._check_used(read)
        held_out = {name: self._held_out(name) for name in given["held_out"] or []}
        labels, sampler = self._labels(), self._sampler()
        found = build(read, recipe, labels=labels, sampler=sampler, held_out=held_out)
        found.notes += sampler.notes if sampler else []
        found.notes += [labels.told] if labels is not None and labels.told else []
        if given["out"] is not None:
            files = write(found, given["out"])
            self.reporter.line("pairs", " · ".join(str(file) for file in files.values()))
            for work in (sampler, labels):
                if work is not None:
                    work.done()
        tell(survey(found), given["as_json"])

    def _check(self) -> None:
        """Refuse what would change nothing, and words that are not known."""
        given = self.given
        for name, known in _WORDS.items():
            if given[name] is not None and given[name] not in known:
                raise unknown(f"value of --{name.replace('_', '-')}", given[name], known)
        asked = {name for name in _WITH if self.given[name] not in (None, False, [], (), _DEFAULTS.get(name))}
        for name in sorted(asked):
            if not any(given[other] for other in _WITH[name]):
                needed = " or ".join("--" + other.replace("_", "-") for other in _WITH[name])
                option = "--" + name.replace("_", "-")
                raise SpecError(f"{option} changes nothing without {needed}.", where=option, hints=["Leave it out, or name one."])
        if given["reward"] and given["judge"]:
            raise SpecError("--reward and --judge both say which answer is better.", hints=["Leave one of them out."])
        if given["sample"] and not (given["reward"] or given["judge"]):
            raise SpecError(
                "nothing says which of the sampled answers is better.", where="--sample", hints=["--judge JUDGE", "--reward EXPR"]
            )
        if given["split_by"] == "group" and not (given["group_up_to"] or "group" in mapping(given["columns"])):
            raise SpecError("there is no group to split by.", where="--split-by", hints=["Name its column:  --columns group=NAME"])

    def _check_used(self, read: Sequence[Any]) -> None:
        """Refuse options that nothing of what was read has a use for."""
        answers = [one for source in read for one in source.answers]
        scored = bool(self.given["reward"] or self.given["judge"]) or any(one.scores and not one.ratings for one in answers)
        uses = {
            "raters": (self.given["raters"] != "any", any(one.ratings for one in answers), "raters' ratings"),
            "soften": (self.given["soften"] > 0, scored, "scores without raters"),
            "per_item": (self.given["per_item"] != 2, any(source.items for source in read), "texts without a prompt"),
            "weight": (len(self.given["weight"] or ()) == len(read) == 1, False, "several sources"),
        }
        for name, (asked, used, wanted) in uses.items():
            if asked and not used:
                option = "--" + name.replace("_", "-")
                raise SpecError(f"{option} is of {wanted}, and there are none here.", where=option, hints=["Leave it out."])

    def _rules(self) -> Any:
        from tunesmith.curation.pairs import Rules

        given = self.given
        names = ("min_margin", "max_margin", "soften", "raters", "hard", "per_prompt", "seed")
        return Rules(ties=given["ties"] == "keep", **{name: given[name] for name in names})

    def _sources(self) -> list[Any]:
        from tunesmith.curation.reading import read_source

        given = self.given
        return [
            read_source(
                name,
                mapping(given["columns"]),
                ratings=given["ratings"],
                ratings_columns=mapping(given["ratings_columns"], "--ratings-columns"),
                up_to=given["group_up_to"],
            )
            for name in given["sources"]
        ]

    def _held_out(self, name: str) -> list[Pair]:
        from tunesmith.curation.surveying import known_texts

        return known_texts(name)

    def _open(self, systems: Sequence[str]) -> dict[str, Model | Server]:
        from tunesmith.api import open as open_system
        from tunesmith.engine.server import is_server

        key_env = self.given["key_env"] if any(map(is_server, systems)) else None
        opened = open_all(systems, key_env, self.reporter)
        return {name: open_system(system, reporter=self.reporter) for name, system in zip(systems, opened, strict=True)}

    def _sampler(self) -> Sampled | None:
        from tunesmith.curation.sampling import Sampled
        from tunesmith.engine.sampler import Sampling

        given = self.given
        if not given["sample"]:
            return None
        names = list(dict.fromkeys(given["sample"]))
        rewriter = (given["rewriter"] or names[0]) if given["rewrite"] else None
        opened = self._open(list(dict.fromkeys([*names, *([rewriter] if rewriter else [])])))
        return Sampled(
            {name: opened[name] for name in names},
            given["samples"],
            Sampling(max_new_tokens=given["max_tokens"], temperature=given["temperature"], seed=given["seed"]),
            (rewriter, opened[rewriter]) if rewriter else None,
            given["rewrite"] or (),
            self.reporter,
        )

    def _labels(self) -> Labels | None:
        from tunesmith.curation.labels import JudgeLabels, RewardLabels

        given = self.given
        if given["reward"]:
            from tunesmith.rollout.rewards import Rewards

            return RewardLabels(Rewards(given["reward"]), tuple(given["reward"]))
        if not given["judge"]:
            return None
        from tunesmith.curation.checking import held_against
        from tunesmith.engine.server import is_server
        from tunesmith.rollout.judges import open_judge

        judge = open_judge(
            given["judge"],
            rubric=given["rubric"],
            reasons=given["reasons"],
            way=given["way"],
            no_verdict=given["no_verdict"],
            both_orders=not given["one_order"],
            scale=given["scale"].split(",") if given["scale"] else (),
            key_env=given["key_env"] if is_server(given["judge"]) else None,
            reporter=self.reporter,
        )
        return JudgeLabels(judge, given["rate"], held_against(Path("runs"), judge, rates=given["rate"]))


_WORDS = {
    "raters": ("any", "same"),
    "hard": ("smallest", "largest"),
    "ties": ("keep", "drop"),
    "no_verdict": ("error", "skip", "tie"),
    "leaks": ("error", "drop", "allow"),
    "split_by": ("item", "group"),
}
_WITH = {
    "rubric": ("judge",),
    "reasons": ("judge",),
    "rate": ("judge",),
    "scale": ("rate",),
    "one_order": ("judge",),
    "way": ("judge",),
    "no_verdict": ("judge",),
    "rewrite": ("sample",),
    "rewriter": ("rewrite",),
    "samples": ("sample",),
    "temperature": ("sample",),
    "max_tokens": ("sample",),
    "ratings_columns": ("ratings",),
    "leaks": ("held_out",),
    "overwrite": ("out",),
}
"""Options that say how something is done that another one asks for."""

_DEFAULTS = {"way": "auto", "no_verdict": "error", "leaks": "error", "samples": 4, "temperature": 1.0, "max_tokens": 128}


def tell(report: Mapping[str, Any], as_json: bool) -> None:
    """The report, as a table of the splits (quartiles of the margins, median words of chosen and rejected) and lines below it."""
    if as_json:
        from tunesmith.cli.show import print_json

        print_json(dict(report))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("split", "pairs", "prompts", "ties", "ceiling", "margins", "words", "longer"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for name, own in report["splits"].items():
        table.add_row(name, *_cells(own))
    console = stdout()
    console.print(table)
    for name, own in report["splits"].items():
        if own["pairs"]:
            parts = [f"{count:,} by {kind}" for kind, count in own["kinds"].items()]
            if own["flips"] is not None:
                parts.append(f"{own['flips'] * 100:.1f} % of the judge's verdicts turn with the order")
            parts += [f"{count:,} from {source}" for source, count in own["sources"].items() if source and len(own["sources"]) > 1]
            console.print(f"{name:<9} {' · '.join(parts)}", soft_wrap=True)
    if report["merged"]:
        twice = f"{report['merged']:,} pairs stood several times and were merged · {report['disagreed']:,} of them named opposite answers"
        console.print(f"{'merged':<9} {twice}", soft_wrap=True)
    for places, count in report["shared"].items():
        console.print(f"{'shared':<9} {count:,} prompts or texts between {places}", soft_wrap=True)
    for name, count in report["leaks"].items():
        console.print(f"{'leaks':<9} {count:,} pairs share a prompt or a text with {name}", soft_wrap=True)
    for note in report["notes"]:
        console.print(f"{'note':<9} {note}", soft_wrap=True)


def _cells(own: Mapping[str, Any]) -> list[str]:
    if not own["pairs"]:
        return ["0", *[""] * 6]
    margins, words = own["margins"], own["words"]
    return [
        f"{own['pairs']:,}",
        f"{own['prompts']:,}" if own["prompts"] else "none",
        f"{own['ties']:,}",
        f"{own['ceiling'] * 100:.1f} %",
        f"{margins['quarter']:.2g} · {margins['median']:.2g} · {margins['three_quarters']:.2g}" if margins else "none",
        f"{words['chosen']['median']:.0f} · {words['rejected']['median']:.0f}",
        f"{own['longer'] * 100:.1f} %" if own["longer"] is not None else "none",
    ]
