"""`capsule-heads cache`: compute hidden states before training, by one process or several."""

from __future__ import annotations

import argparse

from .options import Command, OneLineParser, fail, one_line_errors
from .options.parser import INTERRUPTED


def make_parser(prog: str) -> OneLineParser:
    """Return the parser of options."""
    from .options.cache import CacheParser  # imports transformers

    return CacheParser(prog)


def run(options: argparse.Namespace) -> None:
    """Compute the states of all splits, and print where they are."""
    from ..data.state_folder import gigabytes
    from ..training.caching import cache_states

    try:
        with one_line_errors(ImportError, OSError, ValueError):
            found = cache_states(
                options.data,
                options.model,
                options.head,
                options.arguments,
                options.part,
                options.batch_tokens,
                options.actors,
                options.import_states,
            )
    except KeyboardInterrupt:
        fail("interrupted; complete shards are kept, and the same command resumes there.", INTERRUPTED)
    if options.arguments.process_index:
        return
    for name, folder, missing in found:
        rest = f"; {missing} of {folder.n_shards} shards are missing, left to other parts" if missing else ""
        print(f"{name}: {len(folder.lengths):,} texts, {gigabytes(folder.n_bytes)}, {folder.place}{rest}")


COMMAND = Command("Compute hidden states before training, by one process or several.", make_parser, run)
