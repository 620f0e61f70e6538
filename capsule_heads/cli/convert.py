"""`capsule-heads convert`: convert a published checkpoint of the paper."""

from __future__ import annotations

import argparse

from .options import Command, OneLineParser, one_line_errors

DESCRIPTION = (
    "Convert a state dict of the original project (SST-2 root, SST-5 root, smallNORB) to a directory that "
    "from_pretrained loads. Nothing in the file is executed."
)


def make_parser(prog: str) -> OneLineParser:
    """Return the parser of options."""
    from ..paper.checkpoints import NETWORKS

    parser = OneLineParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("state_dict", help="File with a state dict of the original project.")
    parser.add_argument("network", choices=NETWORKS, help="Network whose weights the file holds.")
    parser.add_argument("output", help="Directory to write.")
    return parser


def run(options: argparse.Namespace) -> None:
    """Convert a state dict, and print the directory that was written."""
    from ..paper.checkpoints import convert_checkpoint

    with one_line_errors(OSError, ValueError):
        convert_checkpoint(options.state_dict, options.network, options.output)
    print(f"Wrote {options.output}.")


COMMAND = Command("Convert a published checkpoint of the paper.", make_parser, run)
