"""The YAML of presets: PyYAML's safe one, with what makes it misread or overflow taken out."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml import YAMLError
from yaml.representer import RepresenterError

__all__ = ["RepresenterError", "YAMLError", "dump", "load"]


def load(text: str, name: str) -> Any:
    """The data in a text; ``name`` stands for it in the parser's complaints.

    Raises:
        YAMLError: no YAML, an alias or a duplicate key.
        ValueError: a date that does not exist.
        RecursionError: nested too deeply.
    """
    loader = Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def dump(data: Any) -> str:
    """The text of plain data; :func:`load` reads it back.

    Raises:
        RepresenterError: something that YAML does not know.
    """
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100)


class Loader(yaml.SafeLoader):
    """Safe YAML without duplicate keys and without aliases (a few lines of nested ones fill the memory)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed in presets", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1 as PyYAML reads it takes `1e-4` for text; people write it for a number.
Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+\Z"), list("-+.0123456789")
)


class Dumper(yaml.SafeDumper):
    """Safe YAML without anchors, so that :class:`Loader` reads it back."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
