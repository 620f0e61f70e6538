"""Command lines whose mistakes are one line that says what was meant. Nothing here takes long to import."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


@dataclass(frozen=True)
class Command:
    """A command of `capsule-heads`.

    A module of `capsule_heads.cli` that assigns one to `COMMAND` is a command under the module's name. All commands are
    imported for `capsule-heads --help`, so their modules import what takes long inside their functions.

    Attributes:
        summary: one sentence for `capsule-heads --help`.
        make_parser: returns the parser of its options, given the program's name for the usage.
        run: does what was asked for, given the parsed options.
    """

    summary: str
    make_parser: Callable[[str], OneLineParser]
    run: Callable[[argparse.Namespace], None]


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""

    source = "command line"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """End the program, and say which of the sources is wrong."""
        fail(f"{self.source}: {message}")

    def parse_args(  # type: ignore[override]  # argparse has two overloads, and takes any namespace
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse all arguments; one that is unknown ends the program, with the option that was meant."""
        options, rest = self.parse_known_args(args, namespace)
        self.refuse(rest)
        return options

    def refuse(self, rest: Sequence[str]) -> None:
        """End the program if arguments are left over."""
        if not rest:
            return
        given = rest[0].partition("=")[0]
        if not given.startswith("-"):
            self.error(f"unexpected value {given}")
        known = [option for action in self._actions for option in action.option_strings]
        self.error(f"unknown option {given}{did_you_mean(given, known)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # The only place where argparse says which choices there are.
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(value, action.choices or ())
            raise


def did_you_mean(given: object, known: Iterable[Any]) -> str:
    """Return "; did you mean X?" for what is almost a known word, else nothing."""
    close = difflib.get_close_matches(str(given), [str(word) for word in known], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def at_least(least: int) -> Callable[[str], int]:
    """Return the `type` of an option that is a whole number of at least `least`, which is 0 or more."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is no whole number, {least} or more")
        return int(text)

    return parse


def file_to_write(text: str) -> Path:
    """Return the path of a file that is written when all is done: the `type` of an option.

    Raises:
        argparse.ArgumentTypeError: If its folder does not exist, or it is a folder itself.
    """
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text} cannot be written: expected a file in a folder that exists")
    return path


def fail(message: object) -> NoReturn:
    """End the program with status 2 and one line on stderr."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End the program with one line where a user's mistake is found.

    Args:
        *kinds: the exceptions that mistakes raise. Default: those of reading options, data and models.
    """
    kinds = kinds or (ImportError, OSError, TypeError, ValueError)
    try:
        yield
    except kinds as error:
        fail(error)


def add_import_option(parser: argparse._ActionsContainer) -> None:
    """Give a parser the option that `import_modules` reads before options are parsed."""
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        action="append",
        default=[],
        help="Module, or file.py, that registers heads or tasks of your own; may be given several times.",
    )


def imports_given(argv: Sequence[str]) -> list[str]:
    """Return the modules that `--import` names in a command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_import_option(parser)
    with contextlib.suppress(argparse.ArgumentError):  # the command's own parser reports it
        return parser.parse_known_args(argv)[0].imports
    return []


def import_modules(names: Sequence[str]) -> None:
    """Import modules by name or file, or end the program with one line."""
    for name in names:
        try:
            if name.endswith(".py"):
                _import_file(Path(name))
            else:
                importlib.import_module(name)
        except (ImportError, OSError, SyntaxError, TypeError, ValueError) as error:
            fail(f"--import {name}: {error}")


def _import_file(path: Path) -> None:
    path, name = path.resolve(), path.stem
    if not path.is_file():
        raise FileNotFoundError(f"there is no such file; expected the name of a module, or a file {path.name}")
    loaded = sys.modules.get(name)
    spec = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
    if spec is not None and spec.origin != str(path):
        raise ImportError(f"another module has the name {name}, from {spec.origin}; rename the file")
    if loaded is not None:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
