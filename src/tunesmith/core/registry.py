"""A named table of things with options, and a tiny parser for `name(option=value, ...)`.

Used for adapter methods and objectives: what a user may write is exactly what the functions' signatures accept.
"""

from __future__ import annotations

import ast
import inspect
import io
import math
import re
import tokenize
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from tunesmith.core.errors import SpecError, TunesmithError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to things; an unknown name is an error that shows the nearest ones."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        if name in self._items:
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self._items[name] = item
        return item

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise unknown(self.kind, name, self._items)
        return self._items[name]

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def items(self) -> Iterator[tuple[str, T]]:
        return iter(self._items.items())


def check_options(function: Callable[..., Any], options: Mapping[str, Any], *, kind: str, error: type[TunesmithError] = SpecError) -> None:
    """Refuse an option that the function does not take (nothing is ever accepted and ignored).

    Options are the keyword-only parameters; the others are what the house itself passes.
    """
    allowed = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in allowed:
            raise unknown(f"option of {kind}", name, allowed, error=error)


@dataclass(frozen=True, slots=True)
class Call:
    """`name(option=value, flag)` as written: a flag is an option that is True. factor: a number that it is written with, `0.2 * name`."""

    name: str
    options: dict[str, Any]
    factor: float = 1.0


def parse_calls(expression: str, *, kind: str, factors: bool = False) -> list[Call]:
    """Read `a(x=1, sites=[q, v], flag) + b` into its calls. Only names, literals and lists: nothing is evaluated.

    factors: `0.2 * b` is read too. Raises SpecError where the text is not of this form.
    """
    text = " ".join(expression.split("\n")).strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # "\d" in a regular expression
            warnings.simplefilter("ignore", DeprecationWarning)
            tree = ast.parse(_as_python(text), mode="eval").body
        return [_weighed(node, kind, expression) if factors else _call(node, kind, expression) for node in _terms(tree)]
    except SyntaxError as cause:
        raise _malformed(kind, expression, cause.msg.rstrip(".?")) from None
    except (ValueError, RecursionError, MemoryError):
        raise _malformed(kind, expression, "it is no expression of names and options") from None


def _as_python(text: str) -> str:
    """The text as Python would write it: flags, which may stand anywhere, as `flag=True`, paths and dotted names as strings.

    Dotted names are names of sites and modules, and may hold what Python reserves (`down.in`). Paths hold a slash.
    """
    text = _PATH.sub(lambda found: repr(found[1]) if found[1] else found[0], text)
    try:
        tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string.strip()]
    except (tokenize.TokenError, SyntaxError):
        return text  # the parser says better what is wrong
    out, end = [], 0
    for start, last, new in _rewritten(tokens):
        out += [text[end:start], new]
        end = last
    return "".join(out) + text[end:]


_PATH = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|((?<=[=\[,\s])[^\s'"=,+()\[\]{}]*/[^\s'"=,+()\[\]{}]*)""")
"""What is quoted already, or, as its group, a path without quotes where a value may stand."""


def _rewritten(tokens: Sequence[tokenize.TokenInfo]) -> Iterator[tuple[int, int, str]]:
    """(start, end, new text) of what is written otherwise."""
    said = ["", *(token.string for token in tokens), ""]
    open_calls: list[bool] = []
    for at, token in enumerate(tokens, 1):
        before, after = said[at - 1], said[at + 1]
        if token.string in ("(", "[", "{"):
            open_calls.append(token.string == "(" and before.isidentifier())
        elif token.string in (")", "]", "}"):
            open_calls[-1:] = []
        elif token.type != tokenize.NAME or before == ".":
            continue
        elif after == ".":
            last = at
            while last + 1 < len(tokens) and said[last + 1] == "." and tokens[last + 1].type == tokenize.NAME:
                last += 2
            name = "".join(said[at : last + 1])
            yield token.start[1], tokens[last - 1].end[1], repr(name)
        elif open_calls and open_calls[-1] and before in ("(", ",") and after in (")", ","):
            yield token.start[1], token.end[1], f"{token.string}=True"


def _terms(tree: ast.expr) -> list[ast.expr]:
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        return _terms(tree.left) + _terms(tree.right)
    return [tree]


def _weighed(node: ast.expr, kind: str, expression: str) -> Call:
    """A call, or a number times one."""
    if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
        return _call(node, kind, expression)
    number, call = (node.left, node.right) if isinstance(node.left, ast.Constant) else (node.right, node.left)
    factor = number.value if isinstance(number, ast.Constant) else None
    if type(factor) not in (int, float) or not 0 < factor < math.inf:  # type: ignore[operator]
        raise _malformed(kind, expression, f"'{ast.unparse(node)}' is not a number above 0 times a name")
    return replace(_call(call, kind, expression), factor=float(factor))  # type: ignore[arg-type]


def _call(node: ast.expr, kind: str, expression: str) -> Call:
    if isinstance(node, ast.Name):
        return Call(node.id, {})
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise _malformed(kind, expression, f"'{ast.unparse(node)}' is not a name with options")
    if node.args:
        given = ast.unparse(node.args[0])
        raise _malformed(kind, expression, f"'{given}' needs a name: option={given}")
    options: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise _malformed(kind, expression, "'**' is not allowed")
        if keyword.arg in options:
            raise _malformed(kind, expression, f"the option '{keyword.arg}' is given twice")
        options[keyword.arg] = _literal(keyword.value, kind, expression)
    return Call(node.func.id, options)


def _literal(node: ast.expr, kind: str, expression: str) -> Any:
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "none": None, "null": None}.get(node.id, node.id)
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item, kind, expression) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise _malformed(kind, expression, f"'{ast.unparse(node)}' is not a plain value") from None


def _malformed(kind: str, expression: str, detail: str) -> SpecError:
    hints = ["Form:  name(option=value, sites=[q, v]) + other(option=value)"]
    return SpecError(f"the {kind} '{expression}' cannot be read: {detail}.", hints=hints)
