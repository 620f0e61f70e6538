"""Configurations of training runs: YAML files that come with the package, known by name, or files of one's own."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import yaml

from .parser import did_you_mean, fail

SUFFIXES = (".yaml", ".yml")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without keys that are given twice, of which it would take the last."""

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
        name_or_path: the name of one that comes with the package, or the path of a file.
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
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: {getattr(error, 'strerror', None) or error}")
    except yaml.YAMLError as error:
        fail(f"{path}: not YAML: {error}")
    if not isinstance(content, dict):
        fail(f"{path}: expected keys and values, one pair a line, found {type(content).__name__}")
    return content
