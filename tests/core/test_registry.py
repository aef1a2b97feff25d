"""`name(option=value, flag)`: what can be written, and how mistakes are told."""

from __future__ import annotations

import contextlib
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.errors import AdapterError, SpecError
from tunesmith.core.registry import Call, Registry, check_options, parse_calls


def calls(text: str) -> list[tuple[str, dict[str, object]]]:
    return [(call.name, call.options) for call in parse_calls(text, kind="adapter")]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("lora", [("lora", {})]),
        ("lora(rank=8, sites=[q, v])", [("lora", {"rank": 8, "sites": ["q", "v"]})]),
        ("a(x=30) + b(sites=[ffn], parallel)", [("a", {"x": 30}), ("b", {"sites": ["ffn"], "parallel": True})]),
        ("x(parallel, a=1)", [("x", {"parallel": True, "a": 1})]),
        ("x(sites=[down.in, attn.kv], one=block.out)", [("x", {"sites": ["down.in", "attn.kv"], "one": "block.out"})]),
        ("x(of=[runs/a, ./b-2/c.d], one=/e/2f, c='g, h/i')", [("x", {"of": ["runs/a", "./b-2/c.d"], "one": "/e/2f", "c": "g, h/i"})]),
        ("x(a=-1, b=2e-4, c='d.e, f')", [("x", {"a": -1, "b": 2e-4, "c": "d.e, f"})]),
        ("x(d=true, e=false, f=none, g=(1, 2))", [("x", {"d": True, "e": False, "f": None, "g": [1, 2]})]),
        ("x(a=1)\n  + y(b)\n", [("x", {"a": 1}), ("y", {"b": True})]),
    ],
)  # fmt: skip
def test_an_expression_is_read_into_names_and_plain_options(text, read):
    assert calls(text) == read


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot be read"),
        ("x(", "never closed"),
        ("x(16)", "'16' needs a name: option=16"),
        ("x(a=1, a=2)", "'a' is given twice"),
        ("x(a, a=2)", "'a' is given twice"),
        ("x(**k)", r"'\*\*' is not allowed"),
        ("x(a=open('f'))", "is not a plain value"),
        ("x(a={[]: 1})", "is not a plain value"),
        ("x - y", "is not a name with options"),
        ("x()(1)", "is not a name with options"),
        ("x.y(a=1)", "is not a name with options"),
        ("'x'", "is not a name with options"),
        ("x(a=\0)", "cannot be read"),
        ("(" * 5000 + ")" * 5000, "cannot be read"),
    ],
)
def test_anything_else_is_refused_with_the_form_and_nothing_is_evaluated(text, says):
    with pytest.raises(SpecError, match=f"(?s){says}.*Form:"):
        calls(text)


def test_a_regular_expression_in_an_option_gives_no_python_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calls(r"regex(pattern='(\d+)')") == [("regex", {"pattern": r"(\d+)"})]


@given(st.text(alphabet="ab(),=[]{}+.'\"1 \n*-", max_size=25))
def test_any_text_is_either_read_or_refused_by_our_own_error(text):
    with contextlib.suppress(SpecError):
        assert all(isinstance(call, Call) for call in parse_calls(text, kind="adapter"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True).map(lambda s: f"o_{s}"), VALUES, max_size=4))
def test_what_python_would_write_for_options_is_read_back(options):
    text = f"x({', '.join(f'{name}={value!r}' for name, value in options.items())})"
    if "\n" not in text:
        assert calls(text) == [("x", options)]


def test_a_name_registered_twice_is_a_bug_and_an_unknown_one_shows_the_nearest():
    table: Registry[int] = Registry("adapter method")
    table.add("lora", 1)
    table.add("rslora", 2)
    with pytest.raises(ValueError, match="registered twice"):
        table.add("lora", 3)
    with pytest.raises(SpecError, match=r"(?s)unknown adapter method 'lorra'.*Did you mean:  lora.*Known: lora, rslora"):
        table["lorra"]
    assert "lora" in table and list(table) == ["lora", "rslora"] and dict(table.items()) == {"lora": 1, "rslora": 2}


def test_only_keyword_only_parameters_are_options_so_that_what_the_house_passes_cannot_be_set():
    def formula(log_probs, *, beta=0.1):
        return log_probs, beta

    check_options(formula, {"beta": 1}, kind="objective x")
    with pytest.raises(AdapterError, match=r"(?s)unknown option of objective x 'log_probs'.*Known: beta"):
        check_options(formula, {"log_probs": 1}, kind="objective x", error=AdapterError)
    with pytest.raises(SpecError, match="Did you mean:  beta"):
        check_options(formula, {"betta": 1}, kind="objective x")
