"""Command lines of the scripts: a YAML file sets defaults, options override them, a mistake is one line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser


class OneLineParser(HfArgumentParser):
    """An argument parser whose errors are one line, without the usage of some hundred options before it."""

    source = "command line"

    def error(self, message: str) -> NoReturn:
        """Ends the program; says which of the sources is wrong."""
        fail(f"{self.source}: {message}")


class _GivenOptions(OneLineParser):
    """Parses what is given and nothing else: here no option is required, and none has a default."""

    def __init__(self, dataclass_types: Sequence[type]) -> None:
        super().__init__(dataclass_types, add_help=False, allow_abbrev=False)

    def add_argument(self, *names, **kwargs):
        return super().add_argument(*names, **{**kwargs, "default": argparse.SUPPRESS, "required": False})

    def parse(self, options: Sequence[str], source: str) -> tuple[dict[str, Any], list[str]]:
        """The values of options, and what is none."""
        self.source = source
        namespace, rest = self.parse_known_args(options)
        return vars(namespace), rest


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML without keys that are given twice, of which it would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for index, key in enumerate(keys):
            if key.value in (other.value for other in keys[:index]):
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def at_least(least: int) -> Callable[[str], int]:
    """The `type` of an option that is a whole number, so many or more; 0 is the least there may be."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number, {least} or more")
        return int(text)

    return parse


def file_to_write(text: str) -> Path:
    """The `type` of an option that names a file which is written when all is done: its folder has to be there before.

    Raises:
        argparse.ArgumentTypeError: if it is not, or the file is a folder.
    """
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} cannot be written: expected a file in a folder that exists")
    return path


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
    if not argv or {"-h", "--help"} & set(argv):
        parser = HfArgumentParser(list(dataclass_types), description=description)
        parser.usage = "%(prog)s CONFIG.yaml [--option value ...]"
        parser.print_help(None if argv else sys.stderr)
        sys.exit(0 if argv else 2)
    path, *options = argv
    if path.startswith("-"):
        fail(f"command line: expected a YAML file before the options, found {path}")
    parser = _GivenOptions(dataclass_types)
    values = _parse_config(parser, _read_yaml(Path(path)), path)
    overrides, rest = parser.parse(options, "command line")
    if rest:
        is_option = rest[0].startswith("-")
        fail(f"command line: {'unknown option' if is_option else 'unexpected value'} {rest[0].partition('=')[0]}")
    values |= overrides
    instances = []
    for cls in dataclass_types:
        fields = _fields(cls)
        for name, field in fields.items():
            if name not in values and field.default is field.default_factory is dataclasses.MISSING:
                fail(f"{path}: the key {name} is missing (or the option --{name})")
        try:
            instances.append(cls(**{name: value for name, value in values.items() if name in fields}))
        except (ImportError, TypeError, ValueError) as error:  # what the dataclass itself checks
            fail(f"{path}{' with the command line' if options else ''}: {error}")
    return tuple(instances)


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{path}: {getattr(error, 'strerror', None) or error}")
    except yaml.YAMLError as error:
        fail(f"{path}: not YAML: {error}")
    if not isinstance(content, dict):
        fail(f"{path}: expected keys and values, one pair a line, found {type(content).__name__}")
    return content


def _parse_config(parser: _GivenOptions, config: dict[str, Any], source: str) -> dict[str, Any]:
    """The values of a YAML file's keys.

    Each is parsed as the option that would say the same: file and command line then have one way to be right. It also
    makes a number of 5e-4, which YAML takes for a string.
    """
    hints = {}
    for cls in parser.dataclass_types:
        types = get_type_hints(cls)
        hints |= {name: types[name] for name in _fields(cls)}
    values = {}
    for name, value in config.items():
        if name not in hints:
            fail(f"{source}: unknown key {name}")
        types = get_args(hints[name])
        if value is None:
            if type(None) not in types:
                fail(f"{source}: {name} is null; expected a value, or leave the key out")
            values[name] = None
            continue
        if isinstance(value, dict):
            if dict not in {get_origin(kind) or kind for kind in types}:
                fail(f"{source}: {name} holds keys of its own; expected one value")
            value = json.dumps(value)
        options = [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
        parsed, rest = parser.parse(options, source)
        if rest:
            fail(f"{source}: {name} is a list; expected one value")
        values |= parsed
    return values
