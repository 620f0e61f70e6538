"""Pages of which a script writes the part between two marks."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

from capsule_heads.files import write_text


def add_page_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a script that writes its tables into a page."""
    parser.add_argument("--page", type=Path, help="page to write the tables into, between their marks")
    parser.add_argument("--machine", default=platform.machine(), help="what the page calls the machine")


def put_between_marks(page: Path, name: str, text: str) -> None:
    """Replace what a page has between `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    Raises:
        OSError: If the page cannot be read or written.
        ValueError: If it lacks the marks.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, is_begun, rest = page.read_text(encoding="utf-8").partition(begin)
    _, is_ended, after = rest.partition(end)
    if not is_begun or not is_ended:
        raise ValueError(f"{page} lacks marks; expected the lines {begin} and {end}, between which it is written.")
    write_text(page, f"{before}{begin}\n{text}\n{end}{after}")
