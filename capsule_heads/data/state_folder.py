"""A folder of shards of hidden states, and the key of what they depend on. See docs/reference/cache_format.md."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..files import parse_json
from .encodings import ENCODINGS, Encoding
from .shards import (
    DIGEST_BYTES,
    DIGESTS,
    FORMAT,
    LENGTHS,
    MANIFEST,
    Layout,
    Shard,
    layout_of,
    open_shard,
    remedy_of,
    shard_pieces,
)
from .stores import Store, open_store

SHARD_BYTES = 2**28  # that the states of a shard take at most, if it has more than one text
PREFIX = "hidden_states_"  # of a folder's name
SUFFIX = ".safetensors"  # of a shard's file
ABOUT = "about"  # the part of a key that is for people, and is not compared

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StateFolder:
    """Hidden states of some texts in a folder that is named by what they depend on.

    Args:
        store: the folder.
        key: what the states depend on, as JSON; under "about" are facts that are not compared.
        lengths: `[texts]`, in tokens.
        digests: `[texts, 16]`, bytes, which tell the texts apart.
        token_shape: number of layers and hidden size of a token's states.
        encoding: of the states.
    """

    store: Store
    key: Mapping[str, Any]
    lengths: np.ndarray
    digests: np.ndarray
    token_shape: tuple[int, int]
    encoding: Encoding

    @classmethod
    def of_key(cls, cache_dir: str | os.PathLike[str], key: Mapping[str, Any], *texts: Any) -> StateFolder:
        """Return the folder in a cache that is named by a key; see the class for the others."""
        compared = {name: value for name, value in key.items() if name != ABOUT}
        name = hashlib.sha256(json.dumps({"format": FORMAT, **compared}, sort_keys=True).encode()).hexdigest()[:16]
        return cls(open_store(cache_dir, f"{PREFIX}{name}"), key, *texts)

    @classmethod
    def load(cls, place: str | os.PathLike[str]) -> StateFolder:
        """Return a complete folder, by what is in it.

        Raises:
            ValueError: If it is none, is not complete, or is damaged.
            OSError: If it is in a store that cannot be reached.
        """
        store = open_store(place)
        manifest = read_manifest(store)
        shape, encoding = (manifest["layers"], manifest["hidden_size"]), ENCODINGS[manifest["encoding"]]
        empty = cls(store, {**manifest["key"], ABOUT: manifest[ABOUT]}, np.zeros(0, int), np.zeros(0), shape, encoding)
        names, there = [name_of(shard) for shard in range(len(manifest["shards"]))], store.names()
        missing = [name for name in names if name not in there]
        if missing:
            raise ValueError(
                f"{store.place} lacks {len(missing)} of its {len(names)} shards, {missing[0]} among them; expected a "
                "complete folder: compute the others with capsule-heads cache."
            )
        shards = [empty._open(name, n) for name, n in zip(names, manifest["shards"], strict=True)]
        lengths = [x.index[LENGTHS] for x in shards] or [np.zeros(0, np.int64)]
        digests = [x.index[DIGESTS] for x in shards] or [np.zeros((0, DIGEST_BYTES), np.uint8)]
        found = cls(store, empty.key, np.concatenate(lengths), np.concatenate(digests), shape, encoding)
        if found.manifest() != manifest:
            raise ValueError(f"{store.file(MANIFEST)} does not fit the shards beside it. {remedy_of(store)}")
        return found

    @property
    def place(self) -> str:
        """The folder, as messages name it."""
        return self.store.place

    @functools.cached_property
    def starts(self) -> list[int]:
        """The first text of each shard, and the number of all texts: what follows from the lengths alone."""
        ends, at_most = np.cumsum(self.lengths), max(1, SHARD_BYTES // self.n_token_bytes)
        starts = [0]
        while starts[-1] < len(ends):
            first = starts[-1]
            before = int(ends[first - 1]) if first else 0
            starts.append(max(first + 1, int(np.searchsorted(ends, before + at_most, side="right"))))
        return starts

    @property
    def n_shards(self) -> int:
        """The number of shards."""
        return len(self.starts) - 1

    @property
    def n_token_bytes(self) -> int:
        """Number of bytes of a token's states."""
        return self.encoding.token_bytes(self.token_shape)

    @property
    def n_bytes(self) -> int:
        """Number of bytes of all states."""
        return int(self.lengths.sum()) * self.n_token_bytes

    def n_tokens(self, shards: Iterable[int]) -> int:
        """Return the number of tokens of some shards."""
        return sum(int(self.lengths[self.texts_of(shard)].sum()) for shard in shards)

    def texts_of(self, shard: int) -> slice:
        """Return the texts of a shard."""
        return slice(self.starts[shard], self.starts[shard + 1])

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the shard of each text, and the text's number in it."""
        shards = np.repeat(np.arange(self.n_shards), np.diff(self.starts))
        return shards, np.arange(len(shards)) - np.asarray(self.starts)[shards]

    def missing(self) -> list[int]:
        """Return the shards that are not there."""
        there = self.store.names()
        return [shard for shard in range(self.n_shards) if name_of(shard) not in there]

    def manifest(self) -> dict[str, Any]:
        """Return what the manifest has."""
        layers, hidden_size = self.token_shape
        return {
            "format": FORMAT,
            "key": {name: value for name, value in self.key.items() if name != ABOUT},
            "encoding": self.encoding.name,
            "layers": layers,
            "hidden_size": hidden_size,
            "shards": np.diff(self.starts).tolist(),
            ABOUT: self.key.get(ABOUT, {}),
        }

    def is_complete(self) -> bool:
        """Return whether all shards are there. Their states are for `Shard.check`.

        Raises:
            ValueError: If a file was cut short, is damaged, or is of something else.
        """
        there = self.store.names()
        if MANIFEST not in there:
            if any(name.endswith(SUFFIX) for name in there):
                raise ValueError(f"{self.place} has states without a {MANIFEST}. {remedy_of(self.store)}")
            return False
        self._check_manifest()
        found = [shard for shard in range(self.n_shards) if name_of(shard) in there]
        for shard in found:
            self.open(shard)
        return len(found) == self.n_shards

    def begin(self) -> None:
        """Write the manifest, if there is none, and check that there is disk for what is missing.

        Raises:
            ValueError: If there is another manifest.
            OSError: If there is not enough disk.
        """
        with self.store.lock("manifest"):
            is_there = self.store.exists(MANIFEST)
            if is_there:
                self._check_manifest()
            self._check_disk(self.missing())
            if not is_there:
                with self.naming_faults():
                    text = json.dumps(self.manifest(), indent=2, ensure_ascii=False) + "\n"
                    self.store.write(MANIFEST, [text.encode()])

    @contextlib.contextmanager
    def claim(self, shard: int, wait: bool) -> Iterator[bool]:
        """Hold a shard, so that no other process computes it, where the store has locks.

        Args:
            shard: its number.
            wait: whether to wait for a process that holds it.

        Yields:
            Whether the shard is to be computed here: it is not there, and no other process holds it.
        """
        name = name_of(shard)
        if self.store.exists(name):
            yield False
            return
        with self.store.lock(f"{shard:05d}", wait=False) as is_held:
            if is_held or not wait:
                yield is_held and not self.store.exists(name)
                return
        logger.warning("Another process computes hidden states in %s; waiting for it.", self.place)
        with self.store.lock(f"{shard:05d}"):
            yield not self.store.exists(name)

    def write(self, shard: int, encoded: Mapping[str, np.ndarray]) -> None:
        """Write a shard, completely or not at all.

        Args:
            shard: that `claim` holds.
            encoded: the encoded states of its texts, one after another.

        Raises:
            OSError: If it cannot be written.
        """
        texts = self.texts_of(shard)
        lengths, digests = self.lengths[texts], self.digests[texts]
        with self.naming_faults():
            pieces = shard_pieces(self._layout(len(lengths)), self._metadata, lengths, digests, encoded)
            self.store.write(name_of(shard), pieces)

    def open(self, shard: int) -> Shard:
        """Open a shard of these texts.

        Raises:
            ValueError: If it was cut short, is damaged, or has other texts.
        """
        texts, name = self.texts_of(shard), name_of(shard)
        found = self._open(name, texts.stop - texts.start)
        for tensor, expected in ((LENGTHS, self.lengths[texts]), (DIGESTS, self.digests[texts])):
            if not np.array_equal(found.index[tensor], expected):
                raise ValueError(
                    f"{self.store.file(name)} holds the hidden states of other texts. {remedy_of(self.store, name)}"
                )
        return found

    def _open(self, name: str, n_texts: int) -> Shard:
        return open_shard(self.store, name, self.encoding, self._layout(n_texts), self._metadata)

    def _layout(self, n_texts: int) -> Layout:
        return layout_of(self.encoding, self.token_shape, n_texts)

    @functools.cached_property  # the manifest is written once
    def _metadata(self) -> dict[str, str]:
        return {"format": str(FORMAT), "manifest_crc32": str(zlib.crc32(self.store.read(MANIFEST)))}

    @contextlib.contextmanager
    def naming_faults(self) -> Iterator[None]:
        """Turn a failure to write into an `OSError` that names the folder, its size and what to do."""
        try:
            yield
        except OSError as error:
            free = self.store.free()
            if free is None:  # the store's own message says what there is to say
                raise
            raise OSError(
                error.errno,
                f"The hidden states could not be written ({error.strerror}): all take {gigabytes(self.n_bytes)}, and "
                f"{gigabytes(free)} are free; free some and run again, which goes on with the shards that are missing, "
                "or give a cache_dir on another disk",
                self.place,
            ) from error

    def _check_disk(self, missing: Sequence[int]) -> None:
        needed, free = self.n_tokens(missing) * self.n_token_bytes, self.store.free()
        n_done = len(self.lengths) - sum(len(self.lengths[self.texts_of(shard)]) for shard in missing)
        if free is not None and needed > free:
            raise OSError(
                errno.ENOSPC,
                f"The hidden states of {len(self.lengths):,} texts take {gigabytes(needed)} more on disk, and there "
                f"are {gigabytes(free)} free; free some, give a cache_dir on another disk, use fewer layers or "
                "states_dtype int8, or train without the cache",
                self.place,
            )
        logger.warning(
            "Computing the hidden states of %s texts%s: they take %s more%s, in %s.",
            f"{len(self.lengths):,}",
            f" ({n_done:,} are done)" if n_done else "",
            gigabytes(needed),
            "" if free is None else f" of the {gigabytes(free)} of disk that are free",
            self.place,
        )

    def _check_manifest(self) -> None:
        expected, found = self.manifest(), read_manifest(self.store)
        for name in sorted((expected.keys() | found.keys()) - {ABOUT}):
            ours, theirs = expected.get(name), found.get(name)
            if ours != theirs:
                if isinstance(ours, dict) and isinstance(theirs, dict):  # the key
                    part = min(x for x in ours.keys() | theirs.keys() if ours.get(x) != theirs.get(x))
                    name, ours, theirs = part, ours.get(part), theirs.get(part)
                raise ValueError(
                    f"{self.place} holds the hidden states of something else: {name} is {theirs!r} in its {MANIFEST}, "
                    f"expected {ours!r}. {remedy_of(self.store)}"
                )


def name_of(shard: int) -> str:
    """Return the name of a shard's file."""
    return f"shard-{shard:05d}{SUFFIX}"


def read_manifest(store: Store) -> dict[str, Any]:
    """Return the manifest of a folder.

    Raises:
        ValueError: If it has none, or none that can be read.
    """
    path, remedy = store.file(MANIFEST), remedy_of(store)
    try:
        found = parse_json(path, store.read(MANIFEST))
    except FileNotFoundError:
        raise ValueError(f"{store.place} has no {MANIFEST}; expected a folder of hidden states.") from None
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}. {remedy}") from None
    kinds = {
        "format": int,
        "key": dict,
        "encoding": str,
        "layers": int,
        "hidden_size": int,
        "shards": list,
        ABOUT: dict,
    }
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind):
            raise ValueError(f"{path} has {name} {found.get(name)!r}. {remedy}")
    if found["format"] != FORMAT or found["encoding"] not in ENCODINGS:
        raise ValueError(
            f"{path} has format {found['format']} and encoding {found['encoding']}, expected {FORMAT} and one of "
            f"{', '.join(ENCODINGS)}: it is damaged, or of another version. {remedy}"
        )
    return found


def gigabytes(n_bytes: int) -> str:
    """Return a number of bytes for a message."""
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.1f} MB"
