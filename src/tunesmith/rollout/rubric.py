"""What a judge is asked, and what its words mean: the rubric, the forms of comparing and of rating, verdicts in prose.

The forms follow Zheng et al. 2023 (2306.05685, appendix A): the answers stand between marks, and neither place is favoured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.errors import SpecError
from tunesmith.core.record import Message

DEFAULT_RUBRIC = (
    "Judge which answer serves the one who asked better. Weigh, in this order: whether it is right; whether it does what was "
    "asked, all of it and nothing else; whether it is clear and reads well. Length is no merit: a longer answer is not better for "
    "being longer. Which answer stands first says nothing about which is better."
)


def rubric_of(given: str | Path | None) -> str:
    """The rubric: the default, a text, or the content of a file (a name that ends in .txt or .md, or that exists).

    Raises SpecError for a file that is not there, is no text, or is empty.
    """
    if given is None:
        return DEFAULT_RUBRIC
    named = isinstance(given, Path) or (len(given) < 256 and "\n" not in given and given.endswith((".txt", ".md")))
    if not named and not (isinstance(given, str) and len(given) < 256 and "\n" not in given and Path(given).is_file()):
        text = str(given)
    else:
        try:
            text = Path(given).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as cause:
            why = cause.strerror if isinstance(cause, OSError) else "it is not UTF-8"
            raise SpecError(f"the rubric cannot be read: {why}.", where=str(given), hints=["Name a text file, or give the text."]) from None
    if not text.strip():
        raise SpecError("the rubric is empty.", where=str(given), hints=["Leave it out for the default one."])
    return text.strip()


def first_line(rubric: str) -> str:
    """A rubric in short."""
    first = rubric.splitlines()[0].strip()
    return first if len(first) <= 160 else f"{first[:159]}…"


@dataclass(frozen=True, slots=True)
class Form:
    """A kind of question with a closed set of answers.

    options: what may be said, for scoring by likelihood. values: what each is worth. tie: the value of saying neither.
    parse: a free text's value, None for prose that names none. stern: asked after such prose.
    """

    options: tuple[str, ...]
    values: tuple[float, ...]
    tie: float
    parse: Callable[[str], float | None]
    brief: str
    thought: str
    stern: str


_LETTER = r"(?P<said>[ABCab]|tie|Tie|TIE)"
_MARKS = (
    re.compile(rf"\[\[\s*{_LETTER}\s*\]\]"),
    re.compile(
        r"(?i:\b(?:verdict|final answer|winner|preference|choice|better(?: one| answer| text| response)?)\b\W{0,4}(?:is|:|=)?\W{0,4}"
        r"(?:(?:answer|text|response|option|assistant)\W{1,3})?)"
        r"(?P<said>[ABC]|tie|Tie|TIE)(?![\w'’])"
    ),
    re.compile(
        r"\b(?i:answer|text|response|option|assistant) (?P<said>[AB]) (?i:is|wins|was|seems)"
        r" (?i:the )?(?i:clearly |much |slightly )?(?i:better|winner|best|preferable)"
    ),
)
_ALONE = re.compile(rf"(?i:(?:answer|text|response|option)\W{{1,3}})?{_LETTER}")
_WORTH = {"a": 1.0, "b": 0.0, "c": 0.5, "tie": 0.5}


def parse_verdict(text: str) -> float | None:
    """1.0 for A, 0.0 for B, 0.5 for a tie; None where the text names none.

    Read are, in this order: the last [[A]]; the last "verdict: A", "the better answer is B" or "Answer A is better"; a text or a last
    line that is nothing but a letter. "A good answer ..." names nobody.
    """
    for mark in _MARKS:
        if found := [match["said"] for match in mark.finditer(text)]:
            return _WORTH[found[-1].lower()]
    lines = [line.strip(_TRIM) for line in text.strip().splitlines() if line.strip(_TRIM)]
    for line in lines[:1] if len(lines) == 1 else lines[-1:]:
        if match := _ALONE.fullmatch(line):
            return _WORTH[match["said"].lower()]
    return None


_TRIM = " \t*_`.:;!()[]\"'"
_NUMBER = r"(?P<said>10|[1-9])(?:\.0+)?(?![\d.]*\d)"
_RATINGS = (
    re.compile(rf"\[\[\s*{_NUMBER}\s*\]\]"),
    re.compile(rf"(?i)\b(?:rating|score|grade|verdict)\b\W{{0,4}}(?:is|of|:|=)?\W{{0,4}}{_NUMBER}"),
    re.compile(rf"(?<![\d.]){_NUMBER}\s*(?:/|out of)\s*10\b"),
)


def parse_rating(text: str) -> float | None:
    """A whole number from 1 to 10: the last [[7]], "rating: 7" or "7/10", or a text or last line that is nothing but one. Else None."""
    for mark in _RATINGS:
        if found := [match["said"] for match in mark.finditer(text)]:
            return float(found[-1])
    lines = [line.strip(_TRIM) for line in text.strip().splitlines() if line.strip(_TRIM)]
    match = re.fullmatch(_NUMBER, lines[-1]) if lines else None
    return float(match["said"]) if match else None


COMPARE = Form(
    options=("A", "B"),
    values=(1.0, 0.0),
    tie=0.5,
    parse=parse_verdict,
    brief="Which one is better? Say only the letter: A or B.",
    thought="Think it through in a few sentences. Then end with a line of its own: Verdict: A, or Verdict: B.",
    stern="That names no verdict. Say one letter and nothing else: A or B.",
)
RATE = Form(
    options=tuple(str(number) for number in range(1, 11)),
    values=tuple(float(number) for number in range(1, 11)),
    tie=5.5,
    parse=parse_rating,
    brief="How good is it, from 1 (worst) to 10 (best)? Say only the number.",
    thought="Think it through in a few sentences. Then end with a line of its own: Rating: and a number from 1 (worst) to 10 (best).",
    stern="That names no rating. Say one number from 1 to 10 and nothing else.",
)


def rating_on(scale: Sequence[str]) -> Form:
    """The form of rating in words, from the worst to the best, each worth its place from 1; without words the numbers 1 to 10.

    Small models place a text among words where they cannot among numbers. Raises SpecError for fewer than two different words.
    """
    if not scale:
        return RATE
    words = tuple(word.strip() for word in scale)
    if len(words) < 2 or len({word.casefold() for word in words}) < len(words) or not all(words):
        raise SpecError(f"'{', '.join(scale)}' is no scale.", hints=["Different words, the worst first:  negative,neutral,positive"])
    worth = {word.casefold(): float(place) for place, word in enumerate(words, 1)}
    any_word = re.compile(rf"(?<!\w)(?:{'|'.join(sorted(map(re.escape, worth), key=len, reverse=True))})(?!\w)")

    def parse(text: str) -> float | None:
        lines = [line.strip(_TRIM) for line in text.casefold().strip().splitlines() if line.strip(_TRIM)]
        last = lines[-1].removeprefix("rating").strip(_TRIM) if lines else ""
        said = {last} if last in worth else set(any_word.findall(text.casefold()))
        return worth[said.pop()] if len(said) == 1 else None

    among = ", ".join(words)
    return Form(
        options=words,
        values=tuple(worth.values()),
        tie=(1 + len(words)) / 2,
        parse=parse,
        brief=f"Which of these fits it best: {among}? Say only that.",
        thought=f"Think it through in a few sentences. Then end with a line of its own: Rating: and one of these: {among}.",
        stern=f"That names no rating. Say one of these and nothing else: {among}.",
    )


def question(rubric: str, form: Form, prompt: str, answers: Sequence[str], reasons: bool) -> list[Message]:
    """The dialogue that asks for a verdict on two answers, A and B, or for a rating of one. prompt: "" where texts stand alone."""
    thing, sign = "answer" if prompt else "text", _sign([prompt, *answers])
    parts = [rubric]
    if prompt:
        parts.append(f"[Question{sign}]\n{prompt}\n[End of question{sign}]")
    names = [""] if len(answers) == 1 else [" A", " B"]
    for name, text in zip(names, answers, strict=True):
        parts.append(f"[{thing.capitalize()}{name}{sign}]\n{text}\n[End of {thing}{name}{sign}]")
    parts.append(form.thought if reasons else form.brief)
    return [{"role": "user", "content": "\n\n".join(parts)}]


def in_words(turns: Sequence[Message]) -> str:
    """A prompt as a judge reads it: of one turn its content, of several each under the name of its speaker."""
    if len(turns) == 1:
        return str(turns[0].get("content") or "")
    return "\n\n".join(f"{str(turn.get('role', '')).capitalize()}: {turn.get('content') or ''}" for turn in turns)


def _sign(texts: Sequence[str]) -> str:
    """What makes the marks unlike anything in the texts: an answer that writes marks of its own does not end itself."""
    number = 0
    while any(f"{number or ''}]" in text and re.search(rf"\[End of \w+( [AB])?{f' {number}' if number else ''}\]", text) for text in texts):
        number += 1
    return f" {number}" if number else ""


def again(asked: Sequence[Message], said: str, form: Form) -> list[Message]:
    """The same dialogue with what was said, and a sterner question."""
    return [*asked, {"role": "assistant", "content": said or "..."}, {"role": "user", "content": form.stern}]


def settled(asked: Sequence[Message], said: str, form: Form) -> list[Message]:
    """The same dialogue with what was thought, and the question that a likelihood answers."""
    return [*asked, {"role": "assistant", "content": said or "..."}, {"role": "user", "content": form.brief}]
