"""Tools that the policy may call while it answers: Python functions of the user's, their schemas, and calls as models write them."""

from __future__ import annotations

import inspect
import json
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from tunesmith.core.errors import SpecError
from tunesmith.rollout.functions import load_function
from tunesmith.rollout.sample import ToolCall

Schema = Mapping[str, Any]

_BETWEEN = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)
"""As Hermes, Qwen and SmolLM2 write calls."""
_MISTRALS = "[TOOL_CALLS]"
_ARGUMENT = re.compile(r"^\s*(\w+)\s*(?:\([^)]*\))?:\s*(.+)$")


@dataclass(frozen=True, slots=True)
class Tool:
    """name, schema: as the template shows them, in OpenAI's form. function: what is called with the arguments by name. types: of these."""

    name: str
    schema: Schema
    function: Callable[..., Any]
    types: Mapping[str, TypeAdapter[Any]]

    def call(self, arguments: Mapping[str, Any]) -> str:
        """What it returns, as text. Raises ValueError, for the model to read, for arguments that do not fit, and what the tool raises."""
        if unknown := sorted(arguments.keys() - self.types.keys()):
            raise ValueError(f"{self.name} has no argument '{unknown[0]}'; it takes {', '.join(self.types) or 'none'}")
        if missing := [name for name in self.schema["function"]["parameters"]["required"] if name not in arguments]:
            raise ValueError(f"{self.name} needs the argument '{missing[0]}'")
        try:
            fitting = {name: self.types[name].validate_python(value) for name, value in arguments.items()}
        except ValidationError as cause:
            error = cause.errors()[0]
            raise ValueError(f"an argument of {self.name}: {error['msg']} (given: {error['input']!r})") from None
        said = self.function(**fitting)
        return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False, default=str)


def load_tools(names: Sequence[str]) -> dict[str, Tool]:
    """Tools by their name, from "path/to/tools.py:function" each. Raises SpecError for one that cannot be called by names."""
    found: dict[str, Tool] = {}
    for written in names:
        file, colon, name = written.rpartition(":")
        if not colon or not file.endswith(".py"):
            raise SpecError(f"'{written}' names no tool.", where="rollout.tools", hints=["Form:  path/to/tools.py:function"])
        if name in found:
            raise SpecError(f"two tools are called '{name}'.", where="rollout.tools")
        found[name] = _tool(load_function(file, name, "tool"), name, written)
    return found


def _tool(function: Callable[..., Any], name: str, written: str) -> Tool:
    """Its schema follows from the signature: annotations are types, text where there is none; the docstring says what it is."""
    parameters = inspect.signature(function).parameters.values()
    if inspect.iscoroutinefunction(function) or any(p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters):
        raise SpecError(
            f"the tool '{written}' cannot be called by names.", where="rollout.tools", hints=["Form:  def NAME(query: str) -> str"]
        )
    hints = get_type_hints(function)
    types: dict[str, TypeAdapter[Any]] = {p.name: TypeAdapter(hints.get(p.name, str)) for p in parameters}
    doc = inspect.getdoc(function) or ""
    said: dict[str, str] = {found[1]: found[2] for line in doc.splitlines() if (found := _ARGUMENT.match(line))}
    properties = {key: {**kind.json_schema(), **({"description": said[key]} if key in said else {})} for key, kind in types.items()}
    required = [p.name for p in parameters if p.default is p.empty]
    form = {"type": "object", "properties": properties, "required": required}
    schema = {"type": "function", "function": {"name": name, "description": doc.split("\n\n")[0].strip(), "parameters": form}}
    return Tool(name, schema, function, types)


def calls_in(text: str) -> list[ToolCall]:
    """The calls that a turn makes, in order; one that cannot be read is marked as failed, and its result says why.

    Read are <tool_call>JSON</tool_call> (one object, or a list of them), [TOOL_CALLS] and a list, and a turn that is nothing but such
    JSON. An object names the tool under "name", and its arguments under "arguments" or "parameters".
    """
    found = [part.strip() for part in _BETWEEN.findall(text)]
    if not found and _MISTRALS in text:
        found = [text.partition(_MISTRALS)[2].strip()]
    if not found:
        bare = text.strip()
        return _read(bare) if bare.startswith(("{", "[")) and '"name"' in bare and not _broken(bare) else []
    return [call for part in found for call in _read(part)]


def _read(part: str) -> list[ToolCall]:
    if cause := _broken(part):
        return [ToolCall("", part, failed=True, result=f"Error: the call is no JSON: {cause}")]
    value = json.loads(part)
    out = []
    for item in value if isinstance(value, list) else [value]:
        name, arguments = (item.get("name"), item.get("arguments", item.get("parameters", {}))) if isinstance(item, dict) else (None, {})
        if isinstance(arguments, str) and not _broken(arguments):
            arguments = json.loads(arguments)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            out.append(ToolCall("", part, failed=True, result='Error: a call is {"name": ..., "arguments": {...}}'))
        else:
            out.append(ToolCall(name, json.dumps(arguments, ensure_ascii=False)))
    return out


def _broken(text: str) -> str:
    """Why a text is no JSON; "" where it is some."""
    try:
        json.loads(text)
    except ValueError as cause:
        return str(cause)
    return ""


def carried_out(call: ToolCall, tools: Mapping[str, Tool], seconds: float = math.inf) -> ToolCall:
    """The call with its result; what a tool raises is told to the model as its result, and that it took longer than so many seconds."""
    if call.failed:
        return call
    tool = tools.get(call.name)
    if tool is None:
        return ToolCall(call.name, call.arguments, True, f"Error: there is no tool '{call.name}'; there are: {', '.join(tools)}")
    try:
        return ToolCall(call.name, call.arguments, False, _in_time(lambda: tool.call(json.loads(call.arguments)), seconds, call.name))
    except Exception as cause:  # whatever a user's function raises is for the model to deal with
        return ToolCall(call.name, call.arguments, True, f"Error: {cause if isinstance(cause, ValueError) else repr(cause)}")


def _in_time(work: Callable[[], str], seconds: float, name: str) -> str:
    """What the work returns. Raises what it raises, and ValueError, for the model to read, once it has taken so long.

    It has a thread of its own, which is left behind then: no thread can be stopped from outside. It ends with the process.
    """
    if seconds == math.inf:
        return work()
    said: list[str] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            said.append(work())
        except BaseException as cause:  # a tool that exits ends its own thread and nothing else
            failed.append(cause)

    thread = threading.Thread(target=run, name=f"tool {name}", daemon=True)
    thread.start()
    thread.join(seconds)
    if said:
        return said[0]
    if failed:
        raise failed[0] if isinstance(failed[0], Exception) else RuntimeError(repr(failed[0]))
    raise ValueError(f"{name} did not return within {seconds:g} seconds")
