"""Kill what computes hidden states at random moments, and look at what it leaves and how it goes on.

    python scripts/benchmarks/cache_faults.py --page docs/benchmarks/cache.md

The states are computed by one process, two or four, or by two actors of a Ray cluster on this machine, and shards are
small. In a trial each process is killed (SIGKILL) at a moment of its own, or one actor at a batch of its own. A trial
is right where every file that has the name of a shard then has the bits of that shard, and where one process goes on
with those that are missing, alone, to the same bits. The script prints a table, and ends with status 1 if a trial is
wrong.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from faults import Run, in_a_process
from results_pages.marks import add_page_options, put_between_marks
from results_pages.tables import markdown

from capsule_heads.cli.options import OneLineParser, at_least
from capsule_heads.data import computing_states, state_folder
from capsule_heads.data.hidden_states import CapsuleCollator
from capsule_heads.data.state_folder import StateFolder
from capsule_heads.data.state_keys import find_folder

SHARD_BYTES = 2**12  # of at most 42 tokens of the run's three layers
RIGHT = "right"


class Computing:
    """The hidden states of a run's texts, computed in some folder.

    Args:
        run: with the texts and the backbone.
        folder: for the states.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        model = run.model()
        found, self.folder = find_folder(run.data, model, run.tokenizer, folder, "float16")
        self.texts = found.select(run.data, run.tokenizer)
        self.source = computing_states.BackboneStates(model, CapsuleCollator(run.tokenizer))

    def compute(self, part: tuple[int, int] = (0, 1)) -> None:
        """Compute all shards that no other process computes."""
        computing_states.compute(self.folder, self.texts, self.source, 40, part, wait=False)

    def bits(self) -> dict[str, bytes]:
        """Return the content of each shard that is there."""
        store = self.folder.store
        return {name: store.read(name) for name in store.names() if name.endswith(state_folder.SUFFIX)}


def kill_processes(n: int, seconds: float) -> Callable[[Computing, random.Random], str | None]:
    """Return a fault that lets `n` processes compute at once, and kills each at a random moment within some seconds."""

    def fault(computing: Computing, rng: random.Random) -> str | None:
        processes = [_forked(computing, (number, n)) for number in range(n)]
        begun = time.monotonic()
        for process, moment in sorted(((x, rng.uniform(0, seconds)) for x in processes), key=lambda pair: pair[1]):
            time.sleep(max(0.0, begun + moment - time.monotonic()))
            os.kill(process, signal.SIGKILL)  # which is of no effect on one that has ended
        statuses = {os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes}
        return None if statuses <= {0, -signal.SIGKILL} else f"processes ended with status {statuses}"

    return fault


def _forked(computing: Computing, part: tuple[int, int]) -> int:
    """Return a process that computes a part."""
    process = os.fork()
    if not process:
        status = 1
        try:
            computing.compute(part)
            status = 0
        finally:
            os._exit(status)
    return process


def kill_actor(computing: Computing, rng: random.Random) -> str | None:
    """Let two actors of a Ray cluster compute, and kill one at a batch: Ray goes on, and all shards are there."""
    from capsule_heads.engines import Actors
    from capsule_heads.engines.states import compute_on_ray

    # One of the two computes half of the shards or more, so it comes to that batch.
    at, marker = rng.randint(1, computing.folder.n_shards // 2), Path(f"{computing.folder.place}.killed")
    collator = computing.source.collator
    batches: list[int] = []  # of each actor its own

    def killing(features: list[dict[str, Any]]) -> Any:
        batches.append(len(features))
        if len(batches) == at and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return collator(features)

    source = computing_states.BackboneStates(computing.source.model, killing)
    compute_on_ray(computing.folder, computing.texts, source, 40, Actors(2, 2))
    if not marker.exists():
        return f"no actor was killed at batch {at}"
    return None if computing.folder.is_complete() else "shards are missing"


def trial(
    run: Run,
    folder: Path,
    fault: Callable[[Computing, random.Random], str | None],
    rng: random.Random,
    expected: dict[str, bytes],
) -> tuple[str, int]:
    """Return what a trial ended in, and the number of shards that were complete after the fault."""
    computing = Computing(run, folder)
    wrong = fault(computing, rng)
    left = computing.bits()
    if wrong is None and any(expected[name] != content for name, content in left.items()):
        wrong = "a shard has other bits"
    if wrong is None:
        computed: list[int] = []
        write = StateFolder.write

        def counted(self: StateFolder, shard: int, encoded: Any) -> None:
            computed.append(shard)
            write(self, shard, encoded)

        StateFolder.write = counted  # type: ignore[method-assign]
        try:
            Computing(run, folder).compute()
        finally:
            StateFolder.write = write  # type: ignore[method-assign]
        if len(computed) != len(expected) - len(left):
            wrong = f"{len(computed)} shards were computed again, where {len(expected) - len(left)} were missing"
        elif computing.bits() != expected:
            wrong = "it went on to other bits"
    return wrong or RIGHT, len(left)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=at_least(0), default=0, help="random seed (default: %(default)s)")
    parser.add_argument("--trials", type=at_least(1), default=20, help="of each kind (default: %(default)s)")
    parser.add_argument("--without_ray", action="store_true", help="leave out the actors of Ray")
    add_page_options(parser)
    options = parser.parse_args()
    state_folder.SHARD_BYTES = SHARD_BYTES
    torch.set_num_threads(1)
    logging.getLogger("capsule_heads").setLevel(logging.ERROR)  # what takes how much disk
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    wrong, lines = [], []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        run = Run(scratch)
        whole = Computing(run, scratch / "whole")
        start = time.perf_counter()
        status, output, _ = in_a_process(whole.compute)
        seconds = time.perf_counter() - start
        if status:
            sys.exit(output)
        expected = whole.bits()
        within = {1: seconds, 2: seconds / 2, 4: seconds / 2}  # about as long as they take on two cores
        faults = {f"{n} process{'es' * (n > 1)} killed": kill_processes(n, x) for n, x in within.items()}
        if not options.without_ray:
            faults["an actor of 2 killed"] = kill_actor
        for kind, fault in faults.items():
            ends, left = [], []
            for number in range(options.trials):
                folder = scratch / "trial"
                ended, n_left = trial(run, folder, fault, random.Random(f"{options.seed} {kind} {number}"), expected)
                ends.append(ended)
                left.append(n_left)
                shutil.rmtree(folder)
                if ended != RIGHT:
                    wrong.append(f"{kind}, trial {number}: {ended}")
            there = f"{min(left)} to {max(left)} of {len(expected)}"
            lines.append([kind, f"{len(ends)}", there, f"{ends.count(RIGHT)}"])
    table = markdown(["fault", "trials", "complete shards after it", "right"], lines)
    if options.page is not None:
        about = f"Seed {options.seed}; {options.machine}, {datetime.date.today()}."
        put_between_marks(options.page, "faults", f"{about}\n\n{table}")
    print(table, *wrong, sep="\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
