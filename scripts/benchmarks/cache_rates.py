"""Time writing and reading hidden states in shards, beside copying a file of their size, and `datasets.map`.

    python scripts/benchmarks/cache_rates.py --scratch DIRECTORY --page docs/benchmarks/cache.md

The states are random numbers, of as many layers and numbers as all-MiniLM-L6-v2 has, so nothing is computed that a
backbone would. Each case is a process of its own, in which its largest memory is measured beyond what it began with.
Files are read that were just written: from memory, where the machine has room for them. Cases are timed in rounds, one
after another; the figures are medians.

With `--gpu_texts_a_second` the table of clusters is printed too: what each number of GPUs gives until the network is
the bound.
"""

import argparse
import datetime
import multiprocessing
import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from results_pages.marks import add_page_options, put_between_marks
from results_pages.tables import markdown
from torch.utils.data import DataLoader

from capsule_heads.cli.options import OneLineParser, at_least, fail
from capsule_heads.data.computing_states import ShardComputer, texts_of
from capsule_heads.data.encodings import ENCODINGS
from capsule_heads.data.hidden_states import CapsuleCollator
from capsule_heads.data.state_folder import StateFolder

LAYERS, SIZE, TOKENS = 7, 384, 24  # of all-MiniLM-L6-v2, and of a short text
BATCH = 20
COPY, MAP = "a copy of a file", "datasets.map"


class Case:
    """The texts of all cases, and the folder that they are written to."""

    def __init__(self, n_texts: int, scratch: Path) -> None:
        self.n_texts, self.scratch = n_texts, scratch
        generator = torch.Generator().manual_seed(0)
        self.states = torch.randn(n_texts * TOKENS, LAYERS, SIZE, generator=generator).half()
        ids = np.arange(n_texts)
        self.texts = Dataset.from_dict({"input_ids": np.repeat(ids[:, None], TOKENS, 1)})
        self.digests = np.zeros((n_texts, 16), np.uint8)
        self.digests[:, :8] = ids[:, None].view(np.uint8)

    def folder(self, encoding: str) -> StateFolder:
        """Return the folder of an encoding."""
        lengths = np.full(self.n_texts, TOKENS)
        key = {"dtype": encoding}
        return StateFolder.of_key(self.scratch, key, lengths, self.digests, (LAYERS, SIZE), ENCODINGS[encoding])

    def source(self, texts: dict[str, list], n_tokens: int) -> torch.Tensor:
        """Return the states of some texts, as a backbone would."""
        start = texts["input_ids"][0][0] * TOKENS
        return self.states[start : start + n_tokens]

    def write(self, encoding: str) -> None:
        """Write all shards."""
        folder = self.folder(encoding)
        folder.begin()
        computer = ShardComputer(folder, self.source, 2048)
        for shard in range(folder.n_shards):
            computer.compute(shard, texts_of(folder, shard, self.texts))

    def write_by_map(self) -> None:
        """Write the same by `datasets.map`."""
        features = Features({"states": List(Value("float16"))})

        def compute(batch: dict[str, list]) -> dict[str, list]:
            states = self.source(batch, len(batch["input_ids"]) * TOKENS)
            return {"states": list(states.reshape(len(batch["input_ids"]), -1).numpy())}

        self.texts.map(
            compute,
            batched=True,
            batch_size=85,  # as many tokens as above
            writer_batch_size=1000,
            features=features,
            remove_columns=self.texts.column_names,
            cache_file_name=str(self.scratch / "map.arrow"),
        )

    def copy(self) -> None:
        """Copy a file of as many bytes, and wait for the disk, as writing does."""
        with open(self.scratch / "file", "rb") as source, open(self.scratch / "copy", "wb") as target:
            shutil.copyfileobj(source, target, 2**20)
            target.flush()
            os.fsync(target.fileno())

    def read(self, encoding: str, order: str, workers: int = 0) -> None:
        """Read all texts in batches, as training does."""
        rows = Rows(self.folder(encoding))
        indices = np.random.default_rng(0).permutation(len(rows)) if order == "shuffled" else np.arange(len(rows))
        batches = np.split(indices, range(BATCH, len(indices), BATCH))
        collate = CapsuleCollator.__new__(CapsuleCollator)  # of states: it needs no tokenizer
        for _ in DataLoader(rows, batch_sampler=[x.tolist() for x in batches], collate_fn=collate, num_workers=workers):
            pass

    def read_map(self) -> None:
        """Read what `datasets.map` wrote, shuffled, in such batches."""
        rows = Dataset.from_file(str(self.scratch / "map.arrow")).with_format("numpy")
        order = np.random.default_rng(0).permutation(len(rows))
        for batch in np.split(order, range(BATCH, len(order), BATCH)):
            np.stack(rows[batch]["states"]).reshape(len(batch), TOKENS, LAYERS, SIZE)

    def read_file(self) -> None:
        """Read the file."""
        with open(self.scratch / "file", "rb", buffering=0) as file:
            buffer = bytearray(2**20)
            while file.readinto(buffer):
                pass


class Rows(torch.utils.data.Dataset):
    """The texts of a folder, each of which is checked, as in a first epoch."""

    def __init__(self, folder: StateFolder) -> None:
        self.places = folder.places()
        self.shards = [folder.open(shard) for shard in range(folder.n_shards)]

    def __len__(self) -> int:
        return len(self.places[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard, row = (int(x[index]) for x in self.places)
        return {"hidden_states": self.shards[shard].read(row, check=True)}


def cases(case: Case) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Yield what is timed: what it does, by which means, and a function."""
    yield "write", COPY, case.copy
    for encoding in ENCODINGS:
        yield "write", encoding, lambda encoding=encoding: case.write(encoding)
    yield "write", MAP, case.write_by_map
    yield "read", COPY, case.read_file
    for encoding in ENCODINGS:
        yield "read, in order", encoding, lambda encoding=encoding: case.read(encoding, "in order")
        yield "read, shuffled", encoding, lambda encoding=encoding: case.read(encoding, "shuffled")
    yield "read, shuffled, 2 workers", "float16", lambda: case.read("float16", "shuffled", 2)
    yield "read, shuffled", MAP, case.read_map


def timed(work: Callable[[], None]) -> tuple[float, int]:
    """Return the seconds that something takes in a process of its own, and the bytes of memory that it adds."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(False)

    def child() -> None:
        torch.set_num_threads(1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        sender.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"A case ended with status {process.exitcode}.")
    return receiver.recv()


def measure(options: argparse.Namespace) -> str:
    """Time all cases in rounds, and return a table."""
    options.scratch.mkdir(parents=True, exist_ok=True)
    case = Case(options.texts, options.scratch)
    n_bytes = case.folder("float16").n_bytes
    (options.scratch / "file").write_bytes(os.urandom(2**20) * (n_bytes // 2**20))
    found: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for _ in range(options.rounds):
        for path in (*options.scratch.glob("hidden_states_*"), options.scratch / "map.arrow"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for what, means, work in cases(case):
            found.setdefault((what, means), []).append(timed(work))
    lines = []
    for (what, means), results in found.items():
        seconds = statistics.median(x for x, _ in results)
        size = case.folder(means).n_bytes if means in ENCODINGS else n_bytes
        rates = [f"{options.texts / seconds:,.0f}", f"{size / seconds / 1e6:,.0f}"]
        lines.append([what, means, *rates, f"{statistics.median(x for _, x in results) / 1e6:,.0f}"])
    return markdown(["", "", "texts a second", "MB a second", "memory added, MB"], lines)


def cluster_table(texts_a_second: float, text_bytes: int) -> str:
    """Return a table of how many texts a second GPUs give, with networks to the store of some gigabits a second."""
    networks, lines = (10, 100), []
    for n in (1, 2, 4, 8, 16, 32, 64):
        cells = [f"{n}", f"{n * texts_a_second:,.0f}"]
        for gigabits in networks:
            bound = gigabits * 1e9 / 8 / text_bytes
            cells.append(
                f"{min(n * texts_a_second, bound):,.0f}" + (" (network)" if bound < n * texts_a_second else "")
            )
        lines.append(cells)
    return markdown(["GPUs", "computed", *(f"written, {x} Gbit/s" for x in networks)], lines)


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=at_least(100), default=4000)
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for all files")
    parser.add_argument("--gpu_texts_a_second", type=at_least(1), help="of a backbone's forward pass, on one GPU")
    add_page_options(parser)
    options = parser.parse_args()
    datasets.disable_progress_bars()
    datasets.disable_caching()
    try:
        table = measure(options)
        tables = {"rates": table}
        if options.gpu_texts_a_second:
            text_bytes = TOKENS * ENCODINGS["float16"].token_bytes((LAYERS, SIZE))
            tables["clusters"] = cluster_table(options.gpu_texts_a_second, text_bytes)
        if options.page is not None:
            about = f"{options.texts:,} texts of {TOKENS} tokens, {LAYERS} layers of {SIZE}; {options.machine}, "
            tables["rates"] = f"{about}{datetime.date.today()}.\n\n{table}"
            for name, text in tables.items():
                put_between_marks(options.page, name, text)
    except (OSError, RuntimeError, ValueError) as error:
        fail(error)
    print("\n\n".join(tables.values()))


if __name__ == "__main__":
    main()
