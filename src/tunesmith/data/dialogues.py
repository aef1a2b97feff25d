"""The usual ways to write a dialogue, read into OpenAI's: role, content, tool_calls, tool_call_id, name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tunesmith.core.errors import DataError, unknown
from tunesmith.core.record import Message

ROLES = ("system", "developer", "user", "assistant", "tool")

SHAREGPT_ROLES: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
}


def as_list(value: Any) -> list[Any] | None:
    """A list, also where a table cell spells it as JSON; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return None
    return list(value) if isinstance(value, list | tuple) else None


def form_of(value: Any) -> str | None:
    """ "messages" (role and content), "sharegpt" (from and value), or None if the value is no dialogue."""
    turns = as_list(value)
    if not turns or not isinstance(turns[0], Mapping):
        return None
    if "role" in turns[0]:
        return "messages"
    return "sharegpt" if "from" in turns[0] and "value" in turns[0] else None


def openai_messages(value: Any, where: str) -> tuple[Message, ...]:
    """Check messages and keep them as they are: every key stays (tool_calls, names, weights), null ones go.

    Content given as text parts becomes one text. Raises DataError for an unknown role, missing content, other parts.
    """
    return tuple(_message(turn, index, where) for index, turn in enumerate(as_list(value) or [], 1))


def _message(turn: Any, index: int, where: str) -> Message:
    if not isinstance(turn, Mapping) or "role" not in turn:
        raise DataError(f"message {index} is no object with a role.", where=where, hints=['Form:  {"role": "user", "content": "..."}'])
    role = turn["role"]
    if role not in ROLES:
        raise unknown(f"role in message {index}", str(role), ROLES, where=where, error=DataError)
    message = {key: item for key, item in turn.items() if item is not None}
    if message.get("tool_calls"):
        message["tool_calls"] = _checked_calls(message["tool_calls"], index, where)
    elif "content" not in message:
        raise DataError(f"message {index} ({role}) has no content.", where=where)
    if "content" in message:
        message["content"] = _content(message["content"], index, where)
    return message


def _content(content: Any, index: int, where: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
            kind = part.get("type", "unknown") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"message {index} holds content of type '{kind}'; only text is read.", where=where)
    return "".join(part["text"] for part in parts)


def _checked_calls(calls: Any, index: int, where: str) -> list[Any]:
    items = as_list(calls)
    for call in items or [None]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
            hints = ['Form:  [{"type": "function", "function": {"name": "...", "arguments": {...}}}]']
            raise DataError(f"the tool_calls of message {index} name no function.", where=where, hints=hints)
    return items or []


def sharegpt_messages(value: Any, where: str) -> tuple[Message, ...]:
    """Turns with from and value. A function_call becomes an assistant message with tool_calls, an observation its result.

    Results answer the calls in order, so they carry the calls' ids. Raises DataError for an unknown speaker, a null
    value, a call that is no JSON object with a name.
    """
    messages: list[Message] = []
    waiting: list[str] = []
    made = 0
    for index, turn in enumerate(as_list(value) or [], 1):
        speaker, text = _sharegpt_turn(turn, index, where)
        if speaker == "function_call":
            calls = _sharegpt_calls(text, index, made, where)
            made += len(calls)
            waiting = [call["id"] for call in calls]
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        elif speaker == "tool":
            messages.append({"role": "tool", "content": text, **({"tool_call_id": waiting.pop(0)} if waiting else {})})
        else:
            messages.append({"role": speaker, "content": text})
    return tuple(messages)


def _sharegpt_turn(turn: Any, index: int, where: str) -> tuple[str, str]:
    if not (isinstance(turn, Mapping) and "from" in turn and "value" in turn):
        raise DataError(f"turn {index} has no from and value.", where=where, hints=['Form:  {"from": "human", "value": "..."}'])
    speaker = SHAREGPT_ROLES.get(str(turn["from"]).casefold())
    if speaker is None:
        raise unknown(f"speaker in turn {index}", str(turn["from"]), SHAREGPT_ROLES, where=where, error=DataError)
    text = turn["value"]
    if isinstance(text, Mapping | list) and speaker in ("function_call", "tool"):
        text = json.dumps(text, ensure_ascii=False)
    if not isinstance(text, str):
        raise DataError(f"turn {index} ({turn['from']}) has no text.", where=where)
    return speaker, text


def _sharegpt_calls(text: str, index: int, made: int, where: str) -> list[dict[str, Any]]:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        value = None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        hints = ['Form:  {"name": "...", "arguments": {...}}']
        raise DataError(f"the function call in turn {index} is no JSON object with a name.", where=where, hints=hints)
    return [
        {"id": f"call_{made + place}", "type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for place, call in enumerate(calls, 1)
    ]


def history_messages(value: Any, where: str) -> tuple[Message, ...]:
    """Alpaca's history: a list of [question, answer] pairs; nothing for an empty one."""
    if value is None or value == "" or value == []:
        return ()
    pairs = as_list(value)
    if pairs is None or not all(
        isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
    ):
        raise DataError("the history is no list of [question, answer] pairs.", where=where)
    return tuple(
        message for asked, answered in pairs for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answered})
    )


def with_system(messages: tuple[Message, ...], system: str | None, where: str) -> tuple[Message, ...]:
    """Put a system text in front; refused where the dialogue has a different one already."""
    if not system:
        return messages
    if messages and messages[0].get("role") in ("system", "developer"):
        if messages[0].get("content") == system:
            return messages
        hints = ["Keep one of them: remove the column, or the message."]
        raise DataError("the row has two system texts, one in its column and one in the dialogue.", where=where, hints=hints)
    return ({"role": "system", "content": system}, *messages)


def tool_schemas(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Tools as OpenAI's {"type": "function", "function": {...}}; bare functions and JSON text are understood."""
    if value is None or value == "" or value == []:
        return ()
    tools = as_list(value)
    if tools is None or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError("the tools are no list of function descriptions.", where=where)
    return tuple(_schema(tool, where) for tool in tools)


def _schema(tool: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    wrapped = tool if "function" in tool else {"type": "function", "function": tool}
    function = wrapped["function"]
    if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
        raise DataError(
            "a tool has no name.", where=where, hints=['Form:  {"type": "function", "function": {"name": "...", "parameters": {...}}}']
        )
    return wrapped


def has_answer(messages: Iterable[Message]) -> bool:
    """Whether an assistant says or calls anything."""
    return any(m.get("role") == "assistant" and (m.get("content") or m.get("tool_calls")) for m in messages)
