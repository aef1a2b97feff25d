"""YAML as people mean it."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.yamltext import read_value, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("1e3", 1000.0), ("-1.5E+2", -150.0), (".5", 0.5), ("1.", 1.0), ("7", 7), ("1.2.3", "1.2.3"), ("v1e3", "v1e3"),
     ("e5", "e5"),     ("2024-13-45", "2024-13-45"), ("2024-01-01", "2024-01-01"), ("10%", "10%"), ("true", True), ("~", None)],
)  # fmt: skip
def test_numbers_are_numbers_and_dates_are_text(text, value):
    read = read_yaml(f"key: {text}")["key"]
    assert read == value and type(read) is type(value)


def test_a_key_that_stands_twice_is_an_error_with_its_line_and_merging_still_works():
    with pytest.raises(yaml.YAMLError, match=r"(?s)'lr' stands twice.*line 3"):
        read_yaml("train:\n  lr: 1\n  lr: 2\n")
    assert read_yaml("a: &a {x: 1}\nb:\n  <<: *a\n  y: 2\n")["b"] == {"x": 1, "y": 2}


def test_nothing_but_plain_values_is_ever_built():
    with pytest.raises(yaml.YAMLError):
        read_yaml("!!python/object/apply:os.getcwd []")


@pytest.mark.parametrize(
    ("text", "value"),
    [("Label: {text}", "Label: {text}"), ("Rate it #1", "Rate it #1"), ("#1", "#1"), (">= 0.8", ">= 0.8"), ("- a", "- a"), ("'5'", "5"),
     ("[q, 1e-3]", ["q", 1e-3]), ("{a: 1}", {"a": 1}), ("", None), ("null", None), ("yes", True), ("@x", "@x"), ("[broken", "[broken")],
)  # fmt: skip
def test_a_value_on_the_command_line_is_yaml_where_it_looks_so_and_else_the_text_itself(text, value):
    assert read_value(text) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_that_was_written_is_read_back_exactly(number):
    assert read_yaml(yaml.safe_dump({"a": number}))["a"] == number
    assert read_value(repr(number)) == number
