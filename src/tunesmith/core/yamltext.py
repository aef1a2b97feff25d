"""YAML as people mean it: 2e-4 is a number, a date is text, and a key that stands twice is an error."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

_FLOAT = "tag:yaml.org,2002:float"
_NUMBER = re.compile(
    r"""(?x) (?: [-+]? (?: \d[\d_]* (?:\.[\d_]*)? [eE][-+]?\d+  |  \d[\d_]* \. [\d_]*  |  \.\d[\d_]* (?:[eE][-+]?\d+)? )
               | [-+]?\.(?:inf|Inf|INF)  |  \.(?:nan|NaN|NAN) ) \Z"""
)
_LEFT_OUT = {_FLOAT, "tag:yaml.org,2002:timestamp"}


class _Loader(yaml.SafeLoader):
    """PyYAML follows YAML 1.1, which reads 2e-4 as a word, and takes the last of two equal keys without a word."""

    yaml_implicit_resolvers = {  # noqa: RUF012  as the base class declares it
        start: [(tag, pattern) for tag, pattern in resolvers if tag not in _LEFT_OUT]
        for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", key_node.start_mark)
                seen.add(key)
        made: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return made


_Loader.add_implicit_resolver(_FLOAT, _NUMBER, list("-+0123456789."))


def read_yaml(text: str) -> Any:
    """Plain values from YAML. Raises yaml.YAMLError; nothing else than plain values is ever built."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except (ValueError, RecursionError) as cause:
        raise yaml.YAMLError(str(cause)) from None
    finally:
        loader.dispose()


def read_value(text: str) -> Any:
    """The value of a `key=value` on a command line: YAML where it is one, else the text as written ("Label: {text} #1")."""
    text = text.strip()
    try:
        value = read_yaml(text)
    except yaml.YAMLError:
        return text
    meant = not isinstance(value, dict) or text.startswith("{")
    meant = meant and not (isinstance(value, list) and not text.startswith("["))
    meant = meant and not (isinstance(value, str) and text[:1] not in ("'", '"'))
    meant = meant and not (value is None and text not in ("", "~", "null", "Null", "NULL"))
    return value if meant else text
