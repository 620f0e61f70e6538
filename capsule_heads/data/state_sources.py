"""Hidden states that are read from folders, whatever texts those were made with."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .shards import DIGEST_BYTES, MANIFEST, Shard
from .state_folder import ABOUT, PREFIX, StateFolder, read_manifest
from .state_keys import digest_text
from .stores import open_store

OF_TEXTS = ("dtype", "texts", "n_texts", "n_tokens")  # parts of a folder's key that are not the backbone's
TEXT = f"S{DIGEST_BYTES}"


class StateSources:
    """Hidden states in some folders, found by their texts.

    Args:
        places: folders of hidden states, or folders that have such in them, of which those of other backbones or layers
            are left out.
        key: what the states are to depend on, see `state_keys.key_of_model`.
        states_dtype: how they are to be kept; None for however they are.

    Attributes:
        shards: the folder of each shard, and its number there: those of one folder after another.
        encoding: of all states.

    Raises:
        ValueError: If a place is no folder of hidden states, is not complete, or is of another backbone; or if the
            folders keep states in different ways.
        OSError: If a place is in a store that cannot be reached.
    """

    def __init__(
        self, places: Iterable[str | os.PathLike[str]], key: Mapping[str, Any], states_dtype: str | None = None
    ) -> None:
        folders = [folder for place in places for folder in _open_folders(place, key, states_dtype)]
        for folder in folders:
            expected = states_dtype or folders[0].encoding.name
            if folder.encoding.name != expected:
                raise ValueError(
                    f"{folder.place} keeps hidden states as {folder.encoding.name}, expected {expected}"
                    + (f", as in {folders[0].place}." if states_dtype is None else ": change states_dtype.")
                )
        self.encoding = folders[0].encoding
        self.names = ", ".join(folder.place for folder in folders)
        self.shards = [(folder, shard) for folder in folders for shard in range(folder.n_shards)]
        places_in_folders = [folder.places() for folder in folders]
        first = np.cumsum([0, *(folder.n_shards for folder in folders)])
        self._places = np.concatenate([n + shards for n, (shards, _) in zip(first, places_in_folders)])
        self._rows = np.concatenate([rows for _, rows in places_in_folders])
        digests = np.concatenate([folder.digests for folder in folders])
        self._digests = np.ascontiguousarray(digests).view(TEXT).ravel()
        self._order = np.argsort(self._digests, kind="stable")
        self._open: dict[int, Shard] = {}

    def find(self, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where texts are: the number of the shard in `shards`, and the text's number in it.

        Args:
            digests: `[texts, 16]`, bytes.

        Raises:
            ValueError: If a text is in no folder.
        """
        asked, known = np.ascontiguousarray(digests).view(TEXT).ravel(), self._digests
        at = np.minimum(np.searchsorted(known, asked, sorter=self._order), max(0, len(known) - 1))
        found = self._order[at] if len(known) else np.zeros(len(asked), int)
        is_there = known[found] == asked if len(known) else np.zeros(len(asked), bool)
        if not is_there.all():
            raise ValueError(
                f"{np.count_nonzero(~is_there):,} of {len(asked):,} texts have no hidden states in {self.names}; "
                "expected all: compute them with capsule-heads cache."
            )
        return self._places[found], self._rows[found]

    def read(self, texts: Sequence[Mapping[str, Sequence[int]]]) -> list[np.ndarray]:
        """Return the states of texts, `[tokens, layers, hidden_size]` each, after a check of their checksums.

        Args:
            texts: what the backbone gets of each.

        Raises:
            ValueError: If a text is in no folder, or its states are damaged.
        """
        digests = np.frombuffer(b"".join(map(digest_text, texts)), np.uint8).reshape(-1, DIGEST_BYTES)
        states = []
        for place, row in zip(*(x.tolist() for x in self.find(digests))):
            if place not in self._open:
                folder, number = self.shards[place]
                self._open[place] = folder.open(number)
            states.append(self._open[place].read(row, check=True))
        return states


def _open_folders(place: str | os.PathLike[str], key: Mapping[str, Any], states_dtype: str | None) -> list[StateFolder]:
    """Return the folder at a place; or of those in it the ones that fit."""
    store = open_store(place)
    names = [] if store.exists(MANIFEST) else [name for name in store.folders() if name.startswith(PREFIX)]
    # One without a manifest was not begun.
    inner = [each for each in (open_store(store.file(name)) for name in names) if each.exists(MANIFEST)]
    stores = inner or [store]
    fitting, differing = [], []
    for each in stores:
        manifest = read_manifest(each)
        fault = _difference(manifest["key"], key)
        if fault is not None:
            differing.append(f"{each.place} holds the hidden states of something else: {fault}")
        elif not inner or states_dtype in (None, manifest["encoding"]):
            fitting.append(StateFolder.load(each.place))
    if not fitting and differing:
        raise ValueError(f"{differing[0]}; give folders of the same backbone and layers.")
    if not fitting:
        raise ValueError(f"{store.place} has no hidden states as {states_dtype}; change states_dtype, or leave it out.")
    return fitting


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """Describe the first part of a folder's key that is not as expected, or return None."""
    for name in sorted((found.keys() | expected.keys()) - {ABOUT, *OF_TEXTS}):
        if found.get(name) != expected.get(name):
            return f"{name} is {found.get(name)!r}, expected {expected.get(name)!r}"
    return None
