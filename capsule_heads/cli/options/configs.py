"""Configurations of training runs: YAML files that come with the package and have a name, or a user's own files."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import yaml

from .parser import did_you_mean, fail

SUFFIXES = (".yaml", ".yml")
PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}


class _PlainLoader(yaml.SafeLoader):
    """YAML of keys, numbers, words and lists.

    Dates are words. A key that is given twice is an error, as YAML would take the last one. So is an alias of a list or
    of keys, as it may contain itself or grow without end. Types that only a tag can name are errors too.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="an alias of a list or of keys; write it out", problem_mark=mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag not in PLAIN_TAGS:
            raise yaml.MarkedYAMLError(problem=f"{node.tag} is not a plain value", problem_mark=node.start_mark)
        return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key.value in (other.value for other in keys[:index]):
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def config_folder() -> Path:
    """Return the folder of the configurations: in an installed package, or at the top of a checkout."""
    package = Path(str(importlib.resources.files("capsule_heads")))
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def named_configs() -> dict[str, Path]:
    """Return the configurations that come with the package, by name."""
    return {path.stem: path for path in sorted(config_folder().glob("*.yaml"))}


def describe_config(path: Path) -> str:
    """Return the first line of a configuration, a comment that says what it is."""
    first, _, _ = path.read_text(encoding="utf-8").partition("\n")
    return first.removeprefix("#").strip()


def read_config(name_or_path: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a configuration, and its keys and values, or end the program with one line.

    Args:
        name_or_path: the name of a configuration in the package, or the path of a file.
    """
    path, named = Path(name_or_path), named_configs()
    if name_or_path in named:
        path = named[name_or_path]
    elif path.suffix not in SUFFIXES and len(path.parts) == 1 and not path.exists():
        hint = did_you_mean(name_or_path, named) or "; capsule-heads train --list-configs shows all"
        fail(f"command line: there is no configuration {name_or_path}{hint}")
    return path.stem, read_yaml(path)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file, or end the program with one line."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: {getattr(error, 'strerror', None) or error}")
    except (yaml.YAMLError, LookupError, RecursionError, ValueError) as error:  # the last three: bad values
        fail(f"{path}: not YAML: {error}")
    if not isinstance(content, dict):
        fail(f"{path}: expected keys and values, one pair a line, found {type(content).__name__}")
    return content
