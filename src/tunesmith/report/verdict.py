"""What the report comes down to: the headline, the evidence behind it, and the few numbers that matter."""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.core.errors import DataError
from tunesmith.report import numbers
from tunesmith.report.schema import Report, Rung, VerdictWord, Versus

GLYPHS: dict[VerdictWord, str] = {"better": "▲", "worse": "▼", "equivalent": "=", "undecided": "?"}
_OPPOSITE: dict[VerdictWord, VerdictWord] = {"better": "worse", "worse": "better", "equivalent": "equivalent", "undecided": "undecided"}


@dataclass(frozen=True, slots=True)
class Tile:
    """A key number: what it is, the number, and one line that puts it in proportion."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The recommended rung, what it is measured against, and what to say about the two.

    rival: the best rung of the other kind (trained against prompted), or of the same kind where there is no other;
    None with a single rung. versus: the paired comparison of the two, seen from the recommended rung, where one was made.
    """

    rung: Rung
    rival: Rung | None
    rival_name: str
    versus: Versus | None
    headline: str
    evidence: str
    tiles: tuple[Tile, ...]


def is_trained(rung: Rung) -> bool:
    return rung.trainable_parameters > 0


def conclude(report: Report) -> Verdict:
    """Draw the verdict from the figures of a report. Raises DataError where it has no rung or recommends an unknown one."""
    rung = recommended(report)
    rival, rival_name = _rival(report, rung)
    versus = _versus(rung, rival) if rival else None
    return Verdict(
        rung=rung,
        rival=rival,
        rival_name=rival_name,
        versus=versus,
        headline=_headline(report, rung, rival, rival_name, versus),
        evidence=_evidence(report, rival, versus),
        tiles=tuple(_tiles(report, rung, rival, rival_name, versus)),
    )


def recommended(report: Report) -> Rung:
    if not report.rungs:
        raise DataError("the report has no rung.", hints=["A report needs at least one rung that was measured."])
    for rung in report.rungs:
        if rung.name == report.recommendation.rung:
            return rung
    names = ", ".join(rung.name for rung in report.rungs)
    raise DataError(f"the report recommends '{report.recommendation.rung}', which is none of its rungs.", hints=[f"Rungs: {names}"])


def best(rungs: list[Rung]) -> Rung:
    """The rung that scores highest; the earlier (cheaper) one of equals."""
    return max(rungs, key=lambda rung: rung.accuracy)


def _rival(report: Report, rung: Rung) -> tuple[Rung | None, str]:
    others = [other for other in report.rungs if other is not rung]
    if not others:
        return None, ""
    of_other_kind = [other for other in others if is_trained(other) != is_trained(rung)]
    rival = best(of_other_kind or others)
    name = "the best prompt" if of_other_kind and is_trained(rung) else rival.title
    return rival, name


def _versus(rung: Rung, rival: Rung) -> Versus | None:
    for made in (rung.versus_previous, rung.versus_best_before):
        if made and made.rung == rival.name:
            return made
    for made in (rival.versus_previous, rival.versus_best_before):
        if made and made.rung == rung.name:
            return _seen_from_the_other(made, rival.name)
    return None


def _seen_from_the_other(made: Versus, name: str) -> Versus:
    turned = {
        "rung": name,
        "wins": made.losses,
        "losses": made.wins,
        "difference": -made.difference,
        "difference_low": -made.difference_high,
        "difference_high": -made.difference_low,
        "verdict": _OPPOSITE[made.verdict],
    }
    return made.model_copy(update=turned)


def _headline(report: Report, rung: Rung, rival: Rung | None, rival_name: str, versus: Versus | None) -> str:
    scale = numbers.scale_of(report)
    if rival is None:
        return f"{rung.title} reaches {scale.score(rung.accuracy, 0)}"
    digits = 0 if abs(rung.accuracy - rival.accuracy) >= 0.02 else 1
    ours, theirs = scale.score(rung.accuracy, digits), scale.score(rival.accuracy, digits)
    if versus and versus.verdict == "undecided":
        return f"{rung.title} reaches {ours} and {rival_name} {theirs}: too close to call on {report.n_questions:,} questions"
    if versus and versus.verdict == "equivalent":
        return f"{rung.title} reaches {ours} and {rival_name} {theirs}: no difference that matters"
    if versus and versus.verdict == "worse":
        return f"{rung.title} is recommended at {ours}; {rival_name} reaches {theirs}"
    if rung.accuracy > rival.accuracy:
        return f"{rung.title} reaches {ours} where {rival_name} reaches {theirs}"
    return f"{rung.title} reaches {ours}; {rival_name} reaches {theirs}"


def _evidence(report: Report, rival: Rung | None, versus: Versus | None) -> str:
    if rival is None or versus is None:
        return ""
    asked = f"the same {report.n_questions:,} questions" if report.n_questions != 1 else "the same question"
    wins, losses = f"{versus.wins:,}", f"{versus.losses:,}"
    if numbers.scale_of(report).percent:
        told = f"{wins} that {rival.title} gets wrong, and loses {losses} that it gets right"
    else:
        told = f"{wins} against {rival.title} and loses {losses}"
    text = f"On {asked} it wins {told}: {numbers.p_value(versus.p_adjusted)} after correction for all comparisons."
    if versus.verdict == "undecided" and versus.questions_needed:
        text += f" About {versus.questions_needed:,} more questions would decide it."
    return text


def _tiles(report: Report, rung: Rung, rival: Rung | None, rival_name: str, versus: Versus | None) -> list[Tile]:
    scale = numbers.scale_of(report)
    right = f"{round(rung.accuracy * report.n_questions):,} of {report.n_questions:,} right; " if scale.percent else ""
    tiles = [Tile(sentence(scale.name), scale.score(rung.accuracy), f"{right}95 % interval {scale.bounds(rung.ci_low, rung.ci_high)}")]
    if rival and versus:
        paired = f"95 % interval {scale.gain_bounds(versus.difference_low, versus.difference_high)}"
        tiles.append(Tile(f"Gain over {rival_name}", scale.gain(versus.difference), paired))
    tokens = rung.prompt_tokens_per_answer + rung.completion_tokens_per_answer
    other = rival.prompt_tokens_per_answer + rival.completion_tokens_per_answer if rival else 0.0
    tiles.append(Tile("Tokens an answer", numbers.count(tokens), _beside(rival_name, numbers.count(other), tokens, other, "fewer", "more")))
    theirs = rival.seconds_per_answer if rival else 0.0
    beside = _beside(rival_name, numbers.duration(theirs), rung.seconds_per_answer, theirs, "faster", "slower")
    tiles.append(Tile("Time an answer", numbers.duration(rung.seconds_per_answer), beside))
    if is_trained(rung):
        size = f"once; {numbers.parameters(rung.trainable_parameters)} parameters, {numbers.memory(rung.peak_memory_mb)} of memory at peak"
        tiles.append(Tile("Training", numbers.duration(rung.train_seconds), size))
    return tiles


def _beside(rival_name: str, written: str, value: float, other: float, less: str, more: str) -> str:
    proportion = numbers.ratio(value, other, less, more)
    return f"{proportion} ({rival_name}: {written})" if proportion else ""


def sentence(text: str) -> str:
    """The first letter raised, the rest as it is."""
    return text[:1].upper() + text[1:]
