"""`capsule-heads push`: push a run to the Hub, with a model card."""

from __future__ import annotations

import argparse

from .options import Command, OneLineParser, one_line_errors

DESCRIPTION = (
    "Push a run to the Hub: the model, its processor and results.json, with a model card, in one commit. Prints the "
    "commit's address."
)


def make_parser(prog: str) -> OneLineParser:
    """Return the parser of options."""
    parser = OneLineParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("directory", help="output_dir of capsule-heads train, or another directory with a model.")
    parser.add_argument("repo_id", help='Name of the repository, "name" or "owner/name"; created if it does not exist.')
    parser.add_argument(
        "--include_code", action="store_true", help="Push code too, so that the model runs without this package."
    )
    parser.add_argument("--private", action="store_true", help="Make the repository a private one, if it is made.")
    parser.add_argument("--license", help="Identifier of the model's licence, such as mit.")
    parser.add_argument("--language", help="ISO 639 code of the language of the model's texts, such as en.")
    parser.add_argument("--commit_message", default="Upload model", help="Message of the commit.")
    return parser


def run(options: argparse.Namespace) -> None:
    """Push a run, and print the address of the commit."""
    from ..hub import push_run

    with one_line_errors(OSError, TypeError, ValueError):
        commit = push_run(
            options.directory,
            options.repo_id,
            include_code=options.include_code,
            private=options.private or None,  # else the owner's default
            license=options.license,
            language=options.language,
            commit_message=options.commit_message,
        )
    print(commit.commit_url)


COMMAND = Command("Push a trained model to the Hub, with a card.", make_parser, run)
