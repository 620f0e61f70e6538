"""The options of `capsule-heads sweep`: those of `capsule-heads train`, and those that say what to try."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from ...training.sweep import SweepArguments
from .parser import fail
from .training import OUTPUT, GivenOptions, TrainParser

logger = logging.getLogger(__name__)

# Options of training that a sweep sets itself. output_dir and disable_tqdm have an effect in both.
WITHOUT_EFFECT = (*(x for x in OUTPUT if x not in ("output_dir", "disable_tqdm")), "eval_steps", "eval_delay")


class SweepParser(TrainParser):
    """The parser of `capsule-heads sweep`. `parse_args` returns `plan` too."""

    about = (
        "Train every combination of heads, options and learning rates, from several seeds, in one pass over the cached "
        "hidden states of a frozen backbone. Write a table of all heads, and the best head as a run of its own, to "
        "output_dir. Options of capsule-heads train apply to every head."
    )

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        help = {x.name: x.metadata["help"] for x in dataclasses.fields(SweepArguments)}
        self.add_argument(
            "--grid",
            action="append",
            nargs="+",
            metavar="NAME=VALUE,VALUE",
            default=[],
            help=f"{help['grid']} Several are combined.",
        )
        self.add_argument("--heads", metavar="NAME,NAME", help=help["heads"])
        self.add_argument("--seeds", type=int, default=1, help=f"{help['seeds']} Default: 1.")
        self.add_argument("--ensemble", type=int, metavar="K", help=help["ensemble"])
        for name in ("halving", "test_all", "resume"):
            self.add_argument(f"--{name}", action="store_true", help=help[name])

    def parse_more(
        self, own: argparse.Namespace, parser: GivenOptions, in_file: Mapping[str, Any], overrides: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the plan of the sweep."""
        for name, value in overrides.items():
            if name.startswith(WITHOUT_EFFECT):
                fail(f"{self.source}: {name} is {value}, which has no effect in a sweep; leave it out")
        unused = [name for name in in_file if name.startswith(WITHOUT_EFFECT)]
        if unused:  # the file is for capsule-heads train too
            logger.warning(f"{own.config}: a sweep ignores {', '.join(unused)}.")
        values = {**in_file, **overrides}
        grid: dict[str, list[Any]] = {}
        for axis in (axis for axes in own.grid for axis in axes):
            name, equals, text = axis.partition("=")
            if not equals or not name or not text:
                fail(f"{self.source}: --grid {axis}; expected a name and its values, such as learning_rate=5e-4,2e-3")
            if name in grid:
                fail(f"{self.source}: --grid has {name} twice; give all its values at once, with commas between")
            if name in values:
                fail(f"{self.source}: {name} is {values[name]}, and --grid has it too; leave one of them out")
            for value in text.split(","):
                parsed, rest = parser.parse([f"--{name}={value}"], f"{self.source}: --grid")
                parser.refuse(rest)
                grid.setdefault(name, []).append(parsed[name])
        heads = own.heads and [name.strip() for name in own.heads.split(",")]
        if heads and "head_type" in values:
            fail(f"{self.source}: head_type is {values['head_type']}, and --heads has heads too; leave one of them out")
        flags = {name: getattr(own, name) for name in ("seeds", "ensemble", "halving", "test_all", "resume")}
        try:
            return {"plan": SweepArguments(grid=grid, heads=heads or None, **flags)}
        except ValueError as error:
            fail(f"{self.source}: {error}")
