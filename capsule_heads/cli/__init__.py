"""The command line, `capsule-heads` and `python -m capsule_heads`.

Each module here that has a `COMMAND` is a command with the module's name. `options` holds what the commands share.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Mapping, Sequence

from .options.parser import (
    Command,
    OneLineParser,
    add_import_option,
    did_you_mean,
    ended_in_one_line,
    import_modules,
    imports_given,
)
from .options.quiet import quiet, quiet_libraries


def find_commands() -> dict[str, Command]:
    """Return the commands by name."""
    modules = {x.name: f"{__name__}.{x.name}" for x in pkgutil.iter_modules(__path__) if not x.ispkg}
    found = {name: getattr(importlib.import_module(module), "COMMAND", None) for name, module in modules.items()}
    return {name: command for name, command in found.items() if isinstance(command, Command)}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: the command and its options. Default: the arguments of this process.

    Raises:
        SystemExit: After help; and with status 2 after a mistake, which one line describes.
    """
    with ended_in_one_line(), quiet():
        _run(argv)


def _run(argv: Sequence[str] | None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    commands = find_commands()
    parser = OneLineParser(
        prog="capsule-heads",
        usage="%(prog)s COMMAND [options]",
        description=_describe(commands),
        epilog="capsule-heads COMMAND --help shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help(None if argv else sys.stderr)
        sys.exit(0 if argv else 2)
    name, *rest = argv
    if name not in commands:
        hint = did_you_mean(name, commands) or f"; expected one of {', '.join(sorted(commands))}"
        parser.error(f"unknown command {name}{hint}")
    import_modules(imports_given(rest))
    options = commands[name].make_parser(f"capsule-heads {name}")
    add_import_option(options)
    given = options.parse_args(rest)
    with quiet_libraries():
        commands[name].run(given)


def _describe(commands: Mapping[str, Command]) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in sorted(commands.items())]
    return "\n".join(("Routing-capsule heads on the hidden states of transformers.", "", *lines))
