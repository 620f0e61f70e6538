"""`capsule-heads sweep`: train many heads at once, and keep the best."""

from __future__ import annotations

import argparse

from .options import Command, OneLineParser, fail, one_line_errors
from .options.parser import INTERRUPTED


def make_parser(prog: str) -> OneLineParser:
    """Return the parser of options."""
    from .options.sweep import SweepParser  # imports transformers

    return SweepParser(prog)


def run(options: argparse.Namespace) -> None:
    """Train all heads, and write and print the results."""
    from ..training.sweep import Sweep
    from ..training.sweep_results import render

    try:
        with one_line_errors(FloatingPointError, ImportError, OSError, ValueError):
            sweep = Sweep(options.plan, options.data, options.model, options.head, options.arguments)
            found = sweep.execute()
    except KeyboardInterrupt:
        fail(
            f"interrupted; --resume continues from the last checkpoint in {options.arguments.output_dir}.", INTERRUPTED
        )
    print(render(found))


COMMAND = Command("Train many heads at once, and keep the best.", make_parser, run)
