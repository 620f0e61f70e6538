"""Command lines of the scripts: a YAML file sets defaults, options override them, a mistake is one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser


class OneLineParser(HfArgumentParser):
    """An argument parser whose errors are one line, without the usage of some hundred options before it."""

    source = "command line"

    def error(self, message: str) -> NoReturn:
        fail(f"{self.source}: {message}")


def fail(message: object) -> NoReturn:
    """Ends the program with status 2 and one line on stderr."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def parse_config_and_options(dataclass_types: Sequence[type], argv: Sequence[str], description: str) -> tuple[Any, ...]:
    """Reads `CONFIG.yaml [--option value ...]` into dataclasses.

    Args:
        dataclass_types: their fields are the keys of the file and the names of the options.
        argv: the arguments, without the program's name.
        description: what the program does, for `--help`.

    Returns:
        One instance per dataclass.

    Raises:
        SystemExit: with status 2, after one line that says what is wrong and where, for a missing file, an unknown key,
            or a value of the wrong type.
    """
    parser = OneLineParser(list(dataclass_types), description=description, allow_abbrev=False)
    parser.usage = "%(prog)s CONFIG.yaml [--option value ...]"
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help()
        sys.exit(0 if argv else 2)
    if argv[0].startswith("-"):
        fail(f"command line: expected a YAML file before the options, found {argv[0]}")
    names = {action.dest for action in parser._actions}
    defaults = _to_options(_read_yaml(Path(argv[0])), names, argv[0])
    parser.source = argv[0]
    required = [action for action in parser._actions if action.required]
    for action in required:  # may be on the command line: not missing from the file yet
        action.required = False
    parser.parse_args(defaults)
    for action in required:
        action.required = True
    parser.source = f"{argv[0]} with the command line"
    namespace, unknown = parser.parse_known_args([*defaults, *argv[1:]])
    if unknown:
        fail(f"command line: unknown option {unknown[0]}")
    try:
        return tuple(
            cls(**{name: value for name, value in vars(namespace).items() if name in _init_fields(cls)})
            for cls in dataclass_types
        )
    except (TypeError, ValueError) as error:
        fail(f"{parser.source}: {error}")


def _init_fields(cls: type) -> set[str]:
    return {name for name, field in cls.__dataclass_fields__.items() if field.init}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: {getattr(error, 'strerror', None) or error}")
    except yaml.YAMLError as error:
        fail(f"{path}: not YAML: {error}")
    if not isinstance(content, dict):
        fail(f"{path}: expected keys and values, one pair a line, found {type(content).__name__}")
    return content


def _to_options(config: dict[str, Any], names: set[str], source: str) -> list[str]:
    """As the options that would say the same: one parser then checks names and types of both."""
    options = []
    for name, value in config.items():
        if name not in names:
            fail(f"{source}: unknown key {name}")
        if isinstance(value, list):
            options += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            options += [f"--{name}={json.dumps(value)}"]
        elif value is not None:
            options += [f"--{name}={value}"]
    return options
