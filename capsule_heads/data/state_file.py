"""A folder with hidden states in one half-precision file, written once, and the key of what they depend on."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ..files import write_json

FORMAT = 2  # of what is on disk; another number is another folder
TOKENS_AT_ONCE = 10_000  # that are checked, and copied to a device
ABOUT = "about"  # the part of a key that is for people, and is not compared

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StateFile:
    """Hidden states of some texts, one text after another, in a folder that is named by what they depend on.

    The folder has `key.json`, what the states depend on; `states.f16`, all of them, or `states.f16.part`, those that
    are computed so far; `states.crc32`, the checksum of `key.json` and then those of each text's states; and `lock`,
    held by the process that computes them. A state is written once and never changed, and its checksum after it, so
    that the lengths of the unfinished files say what is done, also after the process was killed.

    Args:
        cache_dir: the folder of all such folders.
        key: what the states depend on, as JSON; under "about" are facts that are not compared.
        ends: `[texts]`, the token at which each text ends, counted through all texts.
        token_shape: number of layers and hidden size of a token's states.
    """

    cache_dir: Path
    key: dict[str, Any]
    ends: np.ndarray
    token_shape: tuple[int, int]

    @property
    def folder(self) -> Path:
        """The folder with the states."""
        compared = {name: value for name, value in self.key.items() if name != ABOUT}
        text = json.dumps({"format": FORMAT, **compared}, sort_keys=True)
        return self.cache_dir / f"hidden_states_{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def path(self) -> Path:
        """The finished file."""
        return self.folder / "states.f16"

    @property
    def part(self) -> Path:
        """The unfinished file."""
        return self.folder / "states.f16.part"

    @property
    def checksum_path(self) -> Path:
        """The file of checksums."""
        return self.folder / "states.crc32"

    @property
    def key_path(self) -> Path:
        """The file that says what the states depend on."""
        return self.folder / "key.json"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of tokens of all texts, number of layers, hidden size."""
        return (int(self.ends[-1]) if len(self.ends) else 0, *self.token_shape)

    @property
    def n_token_bytes(self) -> int:
        """Number of bytes of a token's states."""
        return int(np.prod(self.token_shape)) * np.dtype(np.float16).itemsize

    @property
    def n_bytes(self) -> int:
        """Number of bytes of the finished file."""
        return self.shape[0] * self.n_token_bytes

    def open(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the states and their checksums, for `check`.

        Returns:
            The states `[tokens, layers, hidden_size]`, float16, mapped into memory: they are read when used. And
            `[texts]`, uint32.

        Raises:
            ValueError: If there are not as many checksums as texts.
        """
        return self._map(self.path, self.shape[0]), self._read_checksums(exact=True)

    def _map(self, path: Path, n_tokens: int) -> np.ndarray:
        shape = (n_tokens, *self.token_shape)
        if not np.prod(shape):  # an empty file cannot be mapped
            return np.zeros(shape, np.float16)
        # As a plain array: a slice of a memmap object takes ten times as long.
        return np.asarray(np.memmap(path, np.float16, "r", shape=shape))

    def check(self, text: int, states: np.ndarray, checksums: np.ndarray) -> None:
        """Check the states of a text that were read.

        Raises:
            ValueError: If they are not those that were written.
        """
        if zlib.crc32(states.data) != checksums[text]:
            raise ValueError(
                f"The cached hidden states in {self.folder} are damaged: those of text {text:,} changed after they "
                f"were written (their CRC-32 is another). {self._remedy}"
            )

    def pieces(self, states: np.ndarray, checksums: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield copies of the states of texts, some complete texts at a time, after a check; and where each begins.

        Raises:
            ValueError: If `check` raises one.
        """
        first = 0
        while first < len(checksums):
            start = self._end_of(first)
            stop = int(np.searchsorted(self.ends[: len(checksums)], start + TOKENS_AT_ONCE, side="right"))
            stop = max(first + 1, stop)
            piece = np.array(states[start : self._end_of(stop)])
            for text in range(first, stop):
                self.check(text, piece[self._end_of(text) - start : self._end_of(text + 1) - start], checksums)
            yield start, piece
            first = stop

    def is_complete(self) -> bool:
        """Return whether the states are all there. Their values are for `check`.

        Raises:
            ValueError: If a file is cut short, or holds something else.
        """
        if not self.path.exists():
            return False
        self._check_key()
        self._read_checksums(exact=True)
        self._check_size(self.path, self.path.stat().st_size, self.n_bytes, exact=True)
        return True

    def _read_checksums(self, exact: bool) -> np.ndarray:
        """Return the texts' checksums, after a check of the key's."""
        file, key = self.checksum_path, self.key_path.read_bytes()
        content = file.read_bytes() if file.exists() else b""
        self._check_size(file, len(content), 4 * (1 + len(self.ends)), exact)
        checksums = np.frombuffer(content[: len(content) // 4 * 4], "<u4")
        if not len(checksums) or checksums[0] != zlib.crc32(key):
            raise ValueError(f"{self.key_path} changed after it was written (its CRC-32 is another). {self._remedy}")
        return checksums[1:]

    @contextlib.contextmanager
    def writing(self) -> Iterator[UnfinishedStates | None]:
        """Open the unfinished file for one process at a time; the others wait.

        Yields:
            The unfinished file, at the end of the last complete text; None if another process has finished it
            meanwhile. When the block ends without an error, the file is finished.

        Raises:
            OSError: If there is not enough disk.
            ValueError: If `is_complete` raises one, or states that are in the file already are damaged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock():
            if self.is_complete():
                yield None
                return
            n_texts = self._resume()
            # Without a buffer: what is written is the system's, which keeps it when this process is killed.
            with open(self.part, "ab", 0) as states, open(self.checksum_path, "ab", 0) as checksums:
                unfinished = UnfinishedStates(self, n_texts, states, checksums)
                yield unfinished
                unfinished.synchronise()  # before it is called finished
            self._check_size(self.part, self.part.stat().st_size, self.n_bytes, exact=True)
            os.replace(self.part, self.path)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        # The system takes it from a process that ends, however it ends.
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("Another process computes the hidden states in %s; waiting for it.", self.folder)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _resume(self) -> int:
        """Make the unfinished files end with a complete text, and return the number of its texts."""
        found = self.part.stat().st_size if self.part.exists() else 0
        if found or self.key_path.exists():
            self._check_key()
            self._check_size(self.part, found, self.n_bytes, exact=False)
        n_texts = int(np.searchsorted(self.ends, found // self.n_token_bytes, side="right"))
        if found:
            checksums = self._read_checksums(exact=False)[:n_texts]
            n_texts = len(checksums)
            for _ in self.pieces(self._map(self.part, self._end_of(n_texts)), checksums):
                pass  # checked
        self._check_disk(self.n_bytes - found, n_texts)
        with self.naming_faults():
            with open(self.part, "ab") as file:
                file.truncate(self._end_of(n_texts) * self.n_token_bytes)
            if not found:
                write_json(self.key_path, {"format": FORMAT, **self.key})
                no_states = bytes(4 * n_texts)  # the checksums of texts without tokens
                self.checksum_path.write_bytes(zlib.crc32(self.key_path.read_bytes()).to_bytes(4, "little") + no_states)
            os.truncate(self.checksum_path, 4 * (1 + n_texts))
        return n_texts

    @contextlib.contextmanager
    def naming_faults(self) -> Iterator[None]:
        """Turn a failure to write into an `OSError` that names the file, its size and what to do."""
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"The hidden states could not be written ({error.strerror}): all take {gigabytes(self.n_bytes)}, and "
                f"{gigabytes(shutil.disk_usage(self.folder).free)} are free; free some and run again, which goes on "
                "from the last complete text, or give a cache_dir on another disk",
                str(self.part),
            ) from error

    def _end_of(self, n_texts: int) -> int:
        return int(self.ends[n_texts - 1]) if n_texts else 0

    def _check_disk(self, needed: int, n_texts: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"The hidden states of {len(self.ends):,} texts take {gigabytes(needed)} more on disk, and there are "
                f"{gigabytes(free)} free; free some, give a cache_dir on another disk, use fewer layers, or train "
                "without the cache",
                str(self.folder),
            )
        logger.warning(
            "Computing the hidden states of %s texts%s: they take %s more of the %s of disk that are free, in %s.",
            f"{len(self.ends):,}",
            f" ({n_texts:,} are done)" if n_texts else "",
            gigabytes(needed),
            gigabytes(free),
            self.folder,
        )

    def _check_key(self) -> None:
        file = self.key_path
        expected = {"format": FORMAT, **self.key}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{self.folder} has states without a key.json. {self._remedy}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON ({error}). {self._remedy}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{file} holds a {type(found).__name__}, not keys and values. {self._remedy}")
        for name in sorted((expected.keys() | found.keys()) - {ABOUT}):
            if found.get(name) != expected.get(name):
                raise ValueError(
                    f"{self.folder} holds the hidden states of something else: {name} is {found.get(name)!r} in its "
                    f"key.json, expected {expected.get(name)!r}. {self._remedy}"
                )

    def _check_size(self, file: Path, found: int, expected: int, exact: bool) -> None:
        if found > expected or (exact and found < expected):
            raise ValueError(
                f"{file} has {found:,} bytes, expected {expected:,}: it was "
                f"{'cut short' if found < expected else 'written to by something else'}. {self._remedy}"
            )

    @property
    def _remedy(self) -> str:
        return f"Delete the folder {self.folder} to have them computed again, or give another cache_dir."


@dataclass
class UnfinishedStates:
    """States that are being written, one text after another.

    Args:
        file: what they become.
        n_texts: number of texts that are there.
        states: the unfinished file.
        checksums: the file of checksums.
    """

    file: StateFile
    n_texts: int
    states: FileIO
    checksums: FileIO

    def append(self, states: np.ndarray, lengths: Sequence[int] | np.ndarray) -> None:
        """Add the states `[tokens, layers, hidden_size]` of the next texts, of these numbers of tokens.

        Raises:
            OSError: If they cannot be written.
        """
        checksums = [zlib.crc32(x.data) for x in np.split(states, np.cumsum(lengths)[:-1])]
        with self.file.naming_faults():
            _write(self.states, states)
            _write(self.checksums, np.array(checksums, "<u4"))
        self.n_texts += len(lengths)

    def discard(self) -> None:
        """Remove all states."""
        self.states.truncate(0)
        self.checksums.truncate(0)

    def synchronise(self) -> None:
        """Wait until the disk has all states."""
        with self.file.naming_faults():
            os.fsync(self.states.fileno())
            os.fsync(self.checksums.fileno())


def _write(file: FileIO, values: np.ndarray) -> None:
    rest = values.reshape(-1).view(np.uint8).data
    while len(rest):
        rest = rest[file.write(rest) :]


def gigabytes(n_bytes: int) -> str:
    """Return a number of bytes for a message."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.1f} MB"
