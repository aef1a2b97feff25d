"""What rows hold that say which answer is better: pairs, rankings, answers marked good or bad; and questions without an answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tunesmith.core.errors import DataError
from tunesmith.core.record import Message, said
from tunesmith.data import dialogues
from tunesmith.data.files import RawRow

Optional = Callable[[str], Any]
"""The value of a part that a row may have, None where it has not."""

_TEXTS = ("response", "answer", "completion", "text", "content")
_SCORES = ("score", "overall_score", "rating")
_SYSTEM = ("system", "developer")


def pair(raw: RawRow, columns: Mapping[str, str], optional: Optional) -> dict[str, Any]:
    """The parts of a pair, by their names in `Record`.

    Where both answers are dialogues that begin alike, what they share is the prompt. Of a probability below 0.5 the two change
    places, so that the first is the likelier one. Raises DataError for equal or empty
    answers, a probability outside of 0 to 1, a margin that is no finite number, and a prompt that is not the answers' own.
    """
    chosen, rejected = (_turns(raw, columns[part], "assistant") for part in ("chosen", "rejected"))
    prompt, chosen, rejected = _parted(raw, _prompt(raw, columns), chosen, rejected)
    answers = (_answer(raw, chosen, columns["chosen"]), _answer(raw, rejected, columns["rejected"]))
    _all_different(raw, answers)
    soft, margin = _number(raw, "probability", optional), _number(raw, "margin", optional)
    if soft is not None and not 0 <= soft <= 1:
        hints = ["It is the probability that the chosen answer is the better one; 0.5 is a tie."]
        raise DataError(f"the probability is {soft:g}, and not within 0 to 1.", where=raw.where, hints=hints)
    if soft is not None and soft < 0.5:
        answers, soft, margin = answers[::-1], 1 - soft, None if margin is None else -margin
    return {"messages": prompt, "answers": answers, "soft": soft, "margin": margin}


def ranking(raw: RawRow, columns: Mapping[str, str], optional: Optional) -> dict[str, Any]:
    """The parts of a ranking: answers the best first, by their scores where there are any.

    Equal scores keep the order of the row; of two answers they are a tie (soft 0.5). Raises DataError for less than two answers,
    equal or empty ones, and scores that are not one finite number an answer.
    """
    column = columns["answers"]
    given, own = listed(raw.fields[column])
    if given is None:
        raise DataError(f"'{column}' holds no list of answers.", where=raw.where, hints=['Form:  ["the best", "the next", "the worst"]'])
    if len(given) < 2:
        what = f"the ranking has {len(given)} answer{'s' if len(given) != 1 else ''}; a comparison needs two."
        raise DataError(what, where=raw.where, hints=["An answer alone that is good or bad:  data.shape=rated"])
    answers = tuple(_answer(raw, _as_turns(raw, item, "assistant", column), column) for item in given)
    _all_different(raw, answers)
    scores = _scores(raw, optional("scores") if own is None else own, len(answers))
    order = sorted(range(len(answers)), key=lambda place: -scores[place]) if scores else range(len(answers))
    tie = len(scores) == 2 and scores[0] == scores[1]
    return {
        "messages": _prompt(raw, columns),
        "answers": tuple(answers[place] for place in order),
        "scores": tuple(scores[place] for place in order) if scores else (),
        "soft": 0.5 if tie else None,
    }


def rated(raw: RawRow, columns: Mapping[str, str], _: Optional) -> dict[str, Any]:
    """The parts of an answer that is good or bad. Raises DataError for an empty answer, and a mark that is neither yes nor no."""
    answer = _answer(raw, _turns(raw, columns["completion"], "assistant"), columns["completion"])
    return {"messages": _prompt(raw, columns), "answers": (answer,), "good": _mark(raw, columns["good"])}


def question(raw: RawRow, columns: Mapping[str, str], optional: Optional) -> dict[str, Any]:
    """The parts of a question: the prompt, and the answer where the row has one."""
    gold = optional("answer")
    if isinstance(gold, int | float) and not isinstance(gold, bool):
        gold = str(gold)
    known = gold is not None and gold != ""
    answers = (_answer(raw, _as_turns(raw, gold, "assistant", "answer"), "answer"),) if known else ()
    return {"messages": _prompt(raw, columns), "answers": answers}


def asked(raw: RawRow, columns: Mapping[str, str], _: Optional) -> dict[str, Any]:
    """The same of a dialogue: up to its last turn where that is the assistant's, which then is the answer."""
    turns = _turns(raw, columns["messages"], "user")
    known = turns[-1].get("role") == "assistant"
    prompt = turns[:-1] if known else turns
    if not any(turn.get("role") == "user" for turn in prompt):
        raise DataError("the dialogue asks nothing: it has no turn of a user before an answer.", where=raw.where)
    return {"messages": prompt, "answers": (turns[-1:],) if known else ()}


def listed(value: Any) -> tuple[list[Any] | None, list[Any] | None]:
    """(answers, their scores) of a list of answers; scores where the answers are objects that hold a text and one. None for none."""
    items = dialogues.as_list(value)
    if not items or not all(isinstance(item, Mapping) and "role" not in item for item in items):
        return items, None
    texts = [next((item[key] for key in _TEXTS if key in item), None) for item in items]
    scores = [next((item[key] for key in _SCORES if key in item), None) for item in items]
    if any(text is None for text in texts):
        return items, None
    return texts, None if any(score is None for score in scores) else scores


def _prompt(raw: RawRow, columns: Mapping[str, str]) -> tuple[Message, ...]:
    return _turns(raw, columns["prompt"], "user") if "prompt" in columns else ()


def _turns(raw: RawRow, column: str, role: str) -> tuple[Message, ...]:
    return _as_turns(raw, raw.fields[column], role, column)


def _as_turns(raw: RawRow, value: Any, role: str, column: str) -> tuple[Message, ...]:
    """A text as one turn, or the turns of a dialogue in either form, also a single one."""
    turns = [value] if isinstance(value, Mapping) else value
    form = dialogues.form_of(turns)
    if form is not None:
        read = dialogues.openai_messages if form == "messages" else dialogues.sharegpt_messages
        return read(turns, raw.where)
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise DataError(f"'{column}' is empty.", where=raw.where, hints=[f"See the rows:   tunesmith data show {raw.source}"])
    if not isinstance(value, str):
        raise DataError(f"'{column}' holds a {type(value).__name__}, not a text or a list of messages.", where=raw.where)
    return ({"role": role, "content": value},)


def _parted(
    raw: RawRow, prompt: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """(prompt, chosen, rejected), where the answers may repeat the prompt's turns, with or without its system turn."""
    if "assistant" in (chosen[0].get("role"), rejected[0].get("role")):
        return prompt, chosen, rejected
    if chosen == rejected:
        raise _equal(raw)
    shared = next((at for at, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    begun = chosen[:shared]
    if not begun:
        hints = ["The turns before the answers have to be the same ones in both."]
        raise DataError("the two answers are dialogues that do not begin alike.", where=raw.where, hints=hints)
    if prompt and _spoken(prompt) != _spoken(begun):
        what = "the row has two prompts: one in its column, and another one that both answers begin with."
        raise DataError(what, where=raw.where, hints=["Keep one of them."])
    return (prompt if len(prompt) > len(begun) else begun), chosen[shared:], rejected[shared:]


def _spoken(turns: Sequence[Message]) -> list[str]:
    return [f"{turn.get('role')}: {said((turn,))}" for turn in turns if turn.get("role") not in _SYSTEM]


def _answer(raw: RawRow, turns: tuple[Message, ...], column: str) -> tuple[Message, ...]:
    """The turns of an answer: one of the assistant that says or calls something."""
    roles = [str(turn.get("role")) for turn in turns]
    if roles != ["assistant"]:
        what = f"an answer is one turn of the assistant, and that in '{column}' is {len(turns)} ({', '.join(roles) or 'none'})."
        raise DataError(
            what, where=raw.where, hints=["Turns that stand before the last one belong to the prompt, the same in all answers."]
        )
    if not dialogues.has_answer(turns) or not said(turns):
        raise DataError(f"the answer in '{column}' is empty.", where=raw.where)
    return turns


def _all_different(raw: RawRow, answers: Sequence[tuple[Message, ...]]) -> None:
    words = list(map(said, answers))
    twice = next((word for place, word in enumerate(words) if word in words[:place]), None)
    if twice is not None:
        raise _equal(raw) if len(words) == 2 else DataError(f"the answer '{twice[:60]}' stands there twice.", where=raw.where)


def _equal(raw: RawRow) -> DataError:
    hints = ["Take the row out, or count such rows and go on:  data.bad_rows=skip"]
    return DataError("the two answers are equal, so neither is better.", where=raw.where, hints=hints)


def _scores(raw: RawRow, given: Any, count: int) -> list[float]:
    values = dialogues.as_list(given) if given is not None else []
    if values is None:
        raise DataError(f"the scores are a {type(given).__name__}, not a list of numbers.", where=raw.where)
    if given is not None and len(values) != count:
        raise DataError(f"the row has {count} answers and {len(values)} scores.", where=raw.where)
    return [_finite(raw, value, f"score {place}") for place, value in enumerate(values, 1)]


def _number(raw: RawRow, part: str, optional: Optional) -> float | None:
    value = optional(part)
    return None if value is None or value == "" else _finite(raw, value, f"the {part}")


def _finite(raw: RawRow, value: Any, what: str) -> float:
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"{what} is {value!r}, not a finite number.", where=raw.where)
    return found


_MARKS = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}


def _mark(raw: RawRow, column: str) -> bool:
    """true or false, also as 1 and 0 and as a table spells them."""
    value = raw.fields[column]
    mark = _MARKS.get(str(value).strip().casefold())
    if mark is None:
        hints = ["Form:  true or false. Numbers between them are scores:  answers and scores,  data.shape=ranking"]
        raise DataError(f"'{column}' holds {value!r}, which is neither true nor false.", where=raw.where, hints=hints)
    return mark


PARTED: Mapping[str, Callable[[RawRow, Mapping[str, str], Optional], dict[str, Any]]] = {
    "pair": pair,
    "ranking": ranking,
    "rated": rated,
    "question": question,
    "asked": asked,
}
"""By kind of reading: the parts of a record, by their names in `Record`."""
