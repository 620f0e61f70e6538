"""`capsule-heads push`: push a run to the Hub, with a model card."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

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
        "--head_only",
        choices=("true", "false"),
        help="Whether to push the name of the backbone without its weights (default: as the model is saved).",
    )
    parser.add_argument(
        "--include_code", action="store_true", help="Push code too, so that the model runs without this package."
    )
    parser.add_argument("--private", action="store_true", help="Make the repository private, if this creates it.")
    parser.add_argument("--license", help="Identifier of the model's licence, such as mit.")
    parser.add_argument("--language", help="ISO 639 code of the language of the model's texts, such as en.")
    parser.add_argument("--commit_message", default="Upload model", help="Message of the commit.")
    return parser


def run(options: argparse.Namespace) -> None:
    """Push a run, and print the address of the commit."""
    from ..hub import push_run

    with one_line_errors(OSError, TypeError, ValueError), tempfile.TemporaryDirectory() as folder:
        is_saved_again = options.head_only is not None and Path(options.directory).is_dir()
        if is_saved_again:
            _save_again(Path(options.directory), Path(folder), head_only=options.head_only == "true")
        commit = push_run(
            folder if is_saved_again else options.directory,
            options.repo_id,
            include_code=options.include_code,
            private=options.private or None,  # else the owner's default
            license=options.license,
            language=options.language,
            commit_message=options.commit_message,
        )
    print(commit.commit_url)


def _save_again(directory: Path, folder: Path, head_only: bool) -> None:
    """Link a run's files into an empty folder, and save the model there with or without its backbone's weights."""
    from ..tasks import load_classifier

    for path in directory.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path.resolve())
    load_classifier(str(directory)).save_pretrained(folder, head_only=head_only)


COMMAND = Command("Push a trained model to the Hub, with a card.", make_parser, run)
