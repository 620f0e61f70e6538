"""A folder with hidden states in one half-precision file, written once, and the key of what they depend on."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

FORMAT = 1  # of what is on disk; another number is another folder
ABOUT = "about"  # the part of a key that is for people, and is not compared

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StateFile:
    """Hidden states of some texts, one text after another, in a folder that is named by what they depend on.

    The folder has `key.json`, what the states depend on; `states.f16`, all of them, or `states.f16.part`, those that
    are computed so far; and `lock`, held by the process that computes them. A state is written once and never changed,
    so that the length of the unfinished file says what is done, also after the process was killed.

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

    def open(self) -> np.ndarray:
        """Return the states `[tokens, layers, hidden_size]`, float16, mapped into memory: they are read when used."""
        if not self.n_bytes:  # an empty file cannot be mapped
            return np.zeros(self.shape, np.float16)
        # As a plain array: a slice of a memmap object takes ten times as long.
        return np.asarray(np.memmap(self.path, np.float16, "r", shape=self.shape))

    def is_complete(self) -> bool:
        """Return whether the states are all there.

        Raises:
            ValueError: If the file is cut short, or holds something else.
        """
        if not self.path.exists():
            return False
        self._check_key()
        self._check_size(self.path, self.path.stat().st_size, exact=True)
        return True

    @contextlib.contextmanager
    def writing(self) -> Iterator[tuple[BinaryIO, int] | None]:
        """Open the unfinished file for one process at a time; the others wait.

        Yields:
            The unfinished file, at the end of the last complete text, and the number of texts in it; None if another
            process has finished it meanwhile. When the block ends without an error, the file is finished.

        Raises:
            OSError: If there is not enough disk.
            ValueError: If `is_complete` raises one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock():
            if self.is_complete():
                yield None
                return
            n_texts = self._resume()
            with open(self.part, "r+b") as file:
                file.seek(self._size_of(n_texts))
                yield file, n_texts
                file.flush()
                os.fsync(file.fileno())  # before it is called finished
            self._check_size(self.part, self.part.stat().st_size, exact=True)
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
        """Make the unfinished file end with a complete text, and return the number of its texts."""
        found = self.part.stat().st_size if self.part.exists() else 0
        if found or (self.folder / "key.json").exists():
            self._check_key()
            self._check_size(self.part, found, exact=False)
        n_texts = int(np.searchsorted(self.ends, found // self.n_token_bytes, side="right"))
        self._check_disk(self.n_bytes - found, n_texts)
        if not found:
            text = json.dumps({"format": FORMAT, **self.key}, indent=1)
            (self.folder / "key.json.part").write_text(text + "\n", encoding="utf-8")
            os.replace(self.folder / "key.json.part", self.folder / "key.json")
        with open(self.part, "ab") as file:
            file.truncate(self._size_of(n_texts))
        return n_texts

    def _size_of(self, n_texts: int) -> int:
        return int(self.ends[n_texts - 1]) * self.n_token_bytes if n_texts else 0

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
        file = self.folder / "key.json"
        expected = {"format": FORMAT, **self.key}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{self.folder} has states without a key.json. {self._remedy}") from None
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}). {self._remedy}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{file} holds a {type(found).__name__}, not keys and values. {self._remedy}")
        for name in sorted((expected.keys() | found.keys()) - {ABOUT}):
            if found.get(name) != expected.get(name):
                raise ValueError(
                    f"{self.folder} holds the hidden states of something else: {name} is {found.get(name)!r} in its "
                    f"key.json, expected {expected.get(name)!r}. {self._remedy}"
                )

    def _check_size(self, file: Path, found: int, exact: bool) -> None:
        if found > self.n_bytes or (exact and found < self.n_bytes):
            raise ValueError(
                f"{file} has {found:,} bytes, expected {self.n_bytes:,}: it was "
                f"{'cut short' if found < self.n_bytes else 'written to by something else'}. {self._remedy}"
            )

    @property
    def _remedy(self) -> str:
        return f"Delete the folder {self.folder} to have them computed again, or give another cache_dir."


def gigabytes(n_bytes: int) -> str:
    """Return a number of bytes for a message."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.1f} MB"
