"""Where in a rendered dialogue the answers stand: exact character spans, found by rendering, verified by round trip.

For an assistant turn the template is asked twice: for the dialogue before the turn with a generation prompt (what the
model reads at use), and for the dialogue up to and with the turn. The second must begin with the first; the rest is what
the model has to write. A turn counts as unaltered in a longer dialogue if that one begins with the very same text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tunesmith.core.errors import RenderError
from tunesmith.core.record import Message
from tunesmith.data.encoding import Piece, any_of
from tunesmith.data.templates import Template

_PLANE = 0xF0000  # a private-use plane: signs from it mark places in the text and never reach the tokenizer
_CONTENT = 0x100000

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Signs:
    """Two characters that do not occur in the dialogue; special-token text in the data is put between them."""

    opening: str
    closing: str

    @classmethod
    def absent_from(cls, text: str) -> Signs:
        used = set(text)
        free = (chr(code) for code in range(_PLANE, _PLANE + 0xFFFD) if chr(code) not in used)
        return cls(next(free), next(free))

    def strip(self, text: str) -> str:
        return text.replace(self.opening, "").replace(self.closing, "")

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text's parts without the signs, each with whether it stood between two; a lone sign only separates."""
        parts = re.split(f"{self.opening}([^{self.opening}{self.closing}]*){self.closing}|[{self.opening}{self.closing}]", text)
        for index, part in enumerate(parts):
            if part:
                yield part, index % 2 == 1


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn as it is rendered when it is the last: `text[start:end]` is what the model has to write.

    text: the dialogue up to the turn's end. spans: the supervised characters. add_eos: the template ends the turn with
    no token, so the eos token is to be added. notes: what was decided.
    """

    index: int
    text: str
    start: int
    end: int
    spans: tuple[Span, ...]
    add_eos: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ending:
    """How a template ends an assistant turn: the control tokens there, and all text after the answer."""

    tokens: int
    text: str
    first: str


class Structure:
    """What a template does around answers, found once by rendering probes.

    control: token texts that only the template may write. answer_control: the same for an assistant's own text, where
    tokens such as <think> are the answer's to write.
    """

    def __init__(self, template: Template, special: Sequence[str], added: Sequence[str]) -> None:
        self.template = template
        self._added = any_of(text for text in added if text.strip())  # some vocabularies hold runs of white space
        self._user: Message = {"role": "user", "content": "a"}
        self.answer_control = set(special) | set(self._added.findall(self.ending.first))
        self.control = self.answer_control | self._structure_tokens()

    def _answer(self, content: str) -> Message:
        return {"role": "assistant", "content": content}

    def _structure_tokens(self) -> set[str]:
        return set(self._added.findall(self.template([self._user], None, True).text))

    @cached_property
    def _probe(self) -> tuple[str, str]:
        """What a template writes in an assistant turn before and after the answer, header included if it has no generation prompt."""
        sign = chr(_PLANE)
        text = self.template([self._user, self._answer(sign)], None, False).text
        before = self.template([self._user], None, True).text
        start = len(before) if text.startswith(before) else 0
        at = text.find(sign)
        if at < start:
            raise RenderError(
                f"the {self.template.name} leaves out the answer of an assistant turn.", hints=[f"It writes: {text[-200:]!r}"]
            )
        return text[start:at], text[at + 1 :]

    @cached_property
    def header(self) -> str:
        """The answer header of a template that ignores add_generation_prompt: "" where it writes a generation prompt."""
        asked = self.template([self._user], None, True).text
        before = self._probe[0]
        answered = self.template([self._user, self._answer("a")], None, False).text
        ignored = asked == self.template([self._user], None, False).text and answered.startswith(asked)
        return before if ignored and before.strip() else ""

    @cached_property
    def ending(self) -> Ending:
        after = self._probe[1]
        found = self._added.findall(after) if not self._added.sub("", after).strip() else []
        first = found[0] if found else ""
        return Ending(len(found), after, first)

    def end_of(self, answer: str) -> int | None:
        """Where the end-of-turn token of a rendered turn ends; None if it has none."""
        tokens: list[Span] = []
        control = tuple(self.control)
        end = len(answer.rstrip())
        while answer.endswith(control, 0, end):
            token = max((t for t in control if answer.endswith(t, 0, end)), key=len)
            tokens.append((end - len(token), end))
            end = len(answer[: end - len(token)].rstrip())
        if not tokens:
            return None
        return tokens[min(max(self.ending.tokens, 1), len(tokens)) - 1][1]

    def length_without_ending(self, answer: str) -> int:
        """Length of a turn that no token ends: without the white space the template adds."""
        if not answer.endswith(self.ending.text):
            return len(answer)
        return len(answer) - len(self.ending.text) if not self.ending.text.strip() else len(answer.rstrip())


class Dialogue:
    """One dialogue (its special-token text already between signs) under one template; renderings are kept."""

    def __init__(self, structure: Structure, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, signs: Signs) -> None:
        self.structure, self.messages, self.tools, self.signs = structure, messages, tools, signs
        self.answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        self._turns: dict[int, Turn] = {}

    def rendered(self, count: int, generation_prompt: bool = False) -> str:
        """The first `count` messages, with a generation prompt if asked (found by a probe if the template writes none)."""
        text = self.structure.template(self.messages[:count], self.tools, generation_prompt).text
        return text + self.structure.header if generation_prompt else text

    def turn(self, index: int) -> Turn:
        """The assistant turn at message `index`, as rendered when it is the last.

        Raises RenderError where the text that the model reads at use is not how the text with the answer begins.
        """
        if index not in self._turns:
            self._turns[index] = self._locate(index)
        return self._turns[index]

    def _locate(self, index: int) -> Turn:
        rendering = self.structure.template(self.messages[: index + 1], self.tools, False)
        text = rendering.text
        notes: list[str] = []
        prompt = self.rendered(index, generation_prompt=True) if index else self._opening(notes)
        if not text.startswith(prompt):
            what = "the prompt as read at use is not how the same dialogue with its answer begins, so the answer cannot be masked exactly"
            hint = "Use a template whose answers continue its generation prompt:  base.template=FILE"
            raise self._mismatch(what, {"The prompt at use": prompt, "With its answer": text}, hint)
        answer = text[len(prompt) :]
        end = self.structure.end_of(answer)
        add_eos = end is None
        stop = len(prompt) + (self.structure.length_without_ending(answer) if end is None else end)
        if add_eos:
            notes.append("the template ends an answer with no token: the eos token is added and trained on")
        if self.structure.header:
            notes.append(f"the template has no generation prompt: {self.structure.header!r} is used, found by a probe")
        self._check_content(self.messages[index], answer, notes)
        spans: tuple[Span, ...] = ((len(prompt), stop),)
        if self.structure.template.markers:
            spans = _clip(rendering.spans, len(prompt), stop, notes)
        return Turn(index, text[:stop], len(prompt), stop, spans, add_eos, tuple(notes))

    def _opening(self, notes: list[str]) -> str:
        """What stands before the answer of a dialogue that an assistant turn opens: no prompt can be rendered for it."""
        notes.append("the dialogue opens with an assistant turn; its header was found by a probe")
        sign = chr(_PLANE + 0xFFFC)
        text = self.structure.template([{"role": "assistant", "content": sign}], self.tools, False).text
        return text.partition(sign)[0]

    def _check_content(self, message: Message, answer: str, notes: list[str]) -> None:
        for call in message.get("tool_calls", ()):
            name = str(call.get("function", call).get("name"))
            if name not in answer:
                raise RenderError(
                    f"the {self.structure.template.name} does not write tool calls ('{name}' is missing).",
                    hints=[f"It writes: {answer[:200]!r}", "Use a template that knows tools:  base.template=FILE"],
                )
        content = str(message.get("content", ""))
        if content.strip() and content.strip() not in answer:
            if not message.get("tool_calls") and not _last_words(content) & _last_words(answer):
                raise RenderError(
                    f"the {self.structure.template.name} leaves out the answer {content[:60]!r}.", hints=[f"It writes: {answer[:200]!r}"]
                )
            notes.append("the template alters the text of an answer")
        if message.get("reasoning_content") and str(message["reasoning_content"]).strip() not in answer:
            notes.append("the template leaves out the reasoning of an answer")

    def kept(self, index: int, text: str) -> bool:
        """Whether turn `index` stands in `text` exactly as it was rendered as the last one.

        A turn whose end the template leaves open is never kept: the eos token added to it in training would be missing.
        """
        turn = self.turn(index)
        return text.startswith(turn.text) and (not turn.add_eos or len(turn.text) == len(text))

    def history(self, text: str, before: int) -> list[int]:
        """The assistant turns before message `before` that `text` holds unaltered; those that cannot be located are not cut out."""
        found = []
        for index in self.answers:
            try:
                if index < before and self.kept(index, text):
                    found.append(index)
            except RenderError:
                continue
        return found

    def _mismatch(self, what: str, renderings: Mapping[str, str], hint: str) -> RenderError:
        first, second = (self.signs.strip(text) for text in renderings.values())
        same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
        view = slice(max(0, same - 60), same + 120)
        return RenderError(
            f"under the {self.structure.template.name} {what}.",
            hints=[
                f"They part at character {same}.",
                *(f"{name}: {text[view]!r}" for name, text in zip(renderings, (first, second), strict=True)),
                hint,
            ],
        )

    def altered(self, index: int, text: str) -> RenderError:
        """The error for a turn that a longer dialogue renders otherwise."""
        what = f"message {index + 1} (assistant) is written otherwise once the dialogue goes on, as use never shows it"
        hint = "Render each turn as a row of its own (render_turns; to_rows does it by itself), or supervise the last turn only."
        return self._mismatch(what, {"As the last turn": self.turn(index).text, "In the dialogue": text}, hint)

    def pieces(self, text: str, turns: Sequence[int]) -> list[Piece]:
        """The text cut at the edges of its unaltered turns and at special-token text from the data."""
        marks: list[tuple[int, int, bool]] = [(0, -1, False)]
        for index in turns:
            turn = self.turn(index)
            edges = sorted({turn.start, turn.end, *(edge for span in turn.spans for edge in span)})
            for edge in edges[:-1]:
                marks.append((edge, index, any(a <= edge < b for a, b in turn.spans)))
            marks.append((turn.end, -1, False))
        stops = [mark[0] for mark in marks[1:]] + [len(text)]
        pieces: list[Piece] = []
        for (start, index, supervised), stop in zip(marks, stops, strict=True):
            pieces.extend(Piece(part, literal, index, supervised) for part, literal in self.signs.split(text[start:stop]))
        return pieces

    def contents(self, text: str, count: int, generation_prompt: bool) -> list[tuple[int, Span]]:
        """Where each message's content stands in `text` (signs left out): message index and character span.

        Found by rendering with a sign of its own around each content; empty where that changes anything else in the text.
        """
        probe = [_enclose(number, message) for number, message in enumerate(self.messages[:count])]
        marked = self.structure.template(probe, self.tools, generation_prompt).text + (self.structure.header if generation_prompt else "")
        pattern = re.compile(f"[{chr(_CONTENT)}-{chr(_CONTENT + 2 * count + 1)}]")
        if not pattern.sub("", marked).startswith(text):
            return []
        found: list[tuple[int, Span]] = []
        start = at = 0
        for part in re.split(f"({pattern.pattern})", marked):
            if not pattern.fullmatch(part):
                at += len(self.signs.strip(part))
            elif (number := ord(part) - _CONTENT) % 2 == 0:
                start = at
            else:
                found.append((number // 2, (start, at)))
        return found


def _enclose(number: int, message: Message) -> Message:
    content = str(message.get("content", ""))
    core = content.strip()
    if not core:
        return message
    head, _, tail = content.partition(core)  # white space stays outside: a template that trims still trims it
    return {**message, "content": f"{head}{chr(_CONTENT + 2 * number)}{core}{chr(_CONTENT + 2 * number + 1)}{tail}"}


def _clip(spans: Sequence[Span], start: int, stop: int, notes: list[str]) -> tuple[Span, ...]:
    """The generation markers' spans within the turn, the last one reaching over the end-of-turn token."""
    inside = [(max(a, start), min(b, stop)) for a, b in spans if b > start and a < stop]
    if not inside:
        notes.append("the template's generation markers leave out an answer: it is not trained on")
        return ()
    if inside[-1][1] < stop:
        notes.append("the end-of-turn token stands outside the template's generation markers: it is trained on all the same")
        inside[-1] = (inside[-1][0], stop)
    return tuple(inside)


def _last_words(text: str) -> set[str]:
    return set(text.split()[-3:])
