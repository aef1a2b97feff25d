"""Chat templates: finding one, calling it through transformers' sandbox, and putting its failures into words."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.core.errors import RenderError
from tunesmith.core.record import Message

PLAIN = (
    "{{ text_start }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'system' %}{{ '\\n\\n' }}{% elif message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""For bases without a chat template: the prompt's text, then the answer joined directly to it, then the eos token."""

BUILT_IN: Mapping[str, str] = {"plain": PLAIN}

_SYSTEM_HINT = "Join the system text to the first user turn:  base.system_turn=user  (or take it out of the data)"


@dataclass(frozen=True, slots=True)
class Rendering:
    """What a template wrote. spans: the character spans between its `{% generation %}` markers, if it has any."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Template:
    """A chat template bound to a tokenizer.

    source: the Jinja text. name: for messages and notes. markers: it has `{% generation %}` markers.
    variables: what the template sees besides messages and tools (special tokens, `enable_thinking`, ...).
    """

    tokenizer: Any
    source: str
    name: str
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def markers(self) -> bool:
        return "endgeneration" in self.source

    def __call__(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, generation_prompt: bool) -> Rendering:
        """The text of a dialogue. Raises RenderError with the template's line where the template fails."""
        try:
            return self._render(list(messages), list(tools) if tools else None, generation_prompt)
        except Exception as cause:  # a template is the user's program: it may raise anything
            raise self._failure(cause, messages) from cause

    def _render(self, messages: list[Message], tools: list[Mapping[str, Any]] | None, generation_prompt: bool) -> Rendering:
        if not self.markers:
            text = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.source,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **self.variables,
            )
            return Rendering(text)
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Callable[..., Any] = render_jinja_template  # its annotation leaves out the spans
        texts, spans = render(
            [[dict(message) for message in messages]],
            tools=tools,
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            add_generation_prompt=generation_prompt,
            **{**self.tokenizer.special_tokens_map, **self.variables},
        )
        return Rendering(texts[0], tuple(span for span in spans[0] if span[1] > span[0]))

    def _failure(self, cause: Exception, messages: Sequence[Message]) -> RenderError:
        line = template_line(cause)
        place = f"the {self.name}, line {line}" if line else f"the {self.name}"
        roles = [str(message.get("role")) for message in messages]
        hints = [f"The dialogue's roles: {', '.join(roles)}"]
        if line and line <= len(self.source.splitlines()):
            hints.insert(0, f"Line {line}: {_shorten(self.source.splitlines()[line - 1].strip())}")
        if "system" in roles:
            hints.append(_SYSTEM_HINT)
        hints.append("Or use a template of your own:  base.template=FILE")
        return RenderError(f"{place} refuses this dialogue: {cause} ({type(cause).__name__}).", hints=hints)


def find_template(
    tokenizer: Any,
    template: str | Path | None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> Template:
    """The template to use: a built-in name, one of the tokenizer's named templates, Jinja text, a file, or the tokenizer's own.

    Without a chat template in the tokenizer it is "plain". Raises RenderError where a file is missing or unreadable.
    """
    own = getattr(tokenizer, "chat_template", None)
    extra = dict(variables or {})
    if template is None and not own:
        template = "plain"
    if template is None or (isinstance(own, dict) and template in own):
        return Template(tokenizer, _own(tokenizer, template, tools), f"tokenizer's template{f' {template!r}' if template else ''}", extra)
    if isinstance(template, str) and template in BUILT_IN:
        start = "".join(tokenizer.convert_ids_to_tokens(added_around(tokenizer)[0]))
        return Template(tokenizer, BUILT_IN[template], f"built-in template '{template}'", {"text_start": start, **extra})
    if isinstance(template, str) and ("{{" in template or "{%" in template):
        return Template(tokenizer, template, "given template", extra)
    return Template(tokenizer, _read(Path(template)), f"template {template}", extra)


def _own(tokenizer: Any, name: str | Path | None, tools: Sequence[Mapping[str, Any]] | None) -> str:
    try:
        return str(tokenizer.get_chat_template(name, list(tools) if tools else None))
    except ValueError:
        known = ", ".join(sorted(tokenizer.chat_template))
        raise RenderError(
            "the tokenizer has several chat templates and none is the default.", hints=[f"Name one:  base.template=NAME  ({known})"]
        ) from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise RenderError(
            f"the template cannot be read: {getattr(cause, 'strerror', None) or cause}.",
            where=str(path),
            hints=[f"A template is a Jinja file, Jinja text, or a built-in name: {', '.join(BUILT_IN)}"],
        ) from None


def template_line(cause: Exception) -> int | None:
    """The line of the template where it failed, as Jinja rewrites it into the traceback."""
    if isinstance(line := getattr(cause, "lineno", None), int):
        return line
    lines = [frame.lineno for frame in traceback.extract_tb(cause.__traceback__) if frame.filename == "<template>"]
    return lines[-1] if lines else None


def added_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer itself puts before and after a text ([CLS] and [SEP], <s>, ...): often none."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


def added_between(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer itself puts between two texts ([SEP], </s></s>, ...): often none."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    head, tail = added_around(tokenizer)
    try:
        both = list(tokenizer("a", "a", add_special_tokens=True)["input_ids"])
    except (TypeError, ValueError, NotImplementedError):
        return []
    inner = both[len(head) + len(bare) : len(both) - len(tail) - len(bare)]
    return inner if both == [*head, *bare, *inner, *bare, *tail] else []


def marks_second(tokenizer: Any) -> bool:
    """Does the tokenizer mark the second of two texts, as BERT's does by token type 1?"""
    try:
        types = tokenizer("a", "a", return_token_type_ids=True).get("token_type_ids")
    except (TypeError, ValueError, NotImplementedError):
        return False
    return bool(types) and max(types) == 1


def normalise(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates expect them: absent keys rather than None, text rather than text parts, arguments as objects.

    Raises RenderError for an empty dialogue, a message without a role, and content that is not text.
    """
    if not messages:
        raise RenderError("the dialogue is empty.", hints=["A dialogue needs at least one message with a role and a content."])
    return [_normalise(index, message) for index, message in enumerate(messages)]


def _normalise(index: int, message: Message) -> dict[str, Any]:
    clean = {key: value for key, value in message.items() if value is not None}
    if not isinstance(clean.get("role"), str):
        raise RenderError(f"message {index + 1} has no role.", hints=[f"Its keys: {', '.join(map(str, message))}"])
    if isinstance(clean.get("content"), list | tuple):
        clean["content"] = "".join(_part(index, part) for part in clean["content"])
    if not isinstance(clean.get("content", ""), str):
        raise RenderError(f"the content of message {index + 1} ({clean['role']}) is {type(clean['content']).__name__}, not text.")
    if clean.get("tool_calls"):
        clean["tool_calls"] = [_call(call) for call in clean["tool_calls"]]
    else:
        clean.pop("tool_calls", None)
        clean.setdefault("content", "")
    return clean


def _part(index: int, part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RenderError(f"message {index + 1} has a part of kind '{kind}'; only text can be rendered.")


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's arguments are a string of JSON; templates write `arguments | tojson`, which would quote it a second time."""
    function = dict(call["function"]) if isinstance(call.get("function"), Mapping) else dict(call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except json.JSONDecodeError:
            parsed = None
        if isinstance(parsed, dict):
            function["arguments"] = parsed
    return {**call, "function": function} if "function" in call else function


def merge_system(messages: Sequence[Message]) -> list[Message]:
    """The system turns joined to the head of the first user turn, for templates that take no system turn."""
    system = "\n\n".join(str(m.get("content") or "") for m in messages if m.get("role") == "system")
    rest: list[Message] = [m for m in messages if m.get("role") != "system"]
    if not system:
        return rest
    for index, message in enumerate(rest):
        if message.get("role") == "user":
            rest[index] = {**message, "content": f"{system}\n\n{_text(message)}"}
            return rest
    raise RenderError("there is a system turn but no user turn to join it to.")


def _text(message: Message) -> str:
    return str(normalise([message])[0]["content"])


def _shorten(text: str, width: int = 160) -> str:
    return text if len(text) <= width else f"{text[:width]}..."
