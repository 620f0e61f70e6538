"""A shard: a safetensors file with hidden states of some texts, and checksums. See docs/reference/cache_format.md."""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .encodings import Encoding
from .stores import Store

FORMAT = 3  # of what is on disk; another number is another folder
TOKENS_AT_ONCE = 10_000  # that are checked, and copied to a device
MANIFEST = "manifest.json"
LENGTHS, CHECKSUMS, INDEX_CHECKSUM, DIGESTS = "lengths", "checksums", "index_crc32", "digests"  # tensors of a shard
DIGEST_BYTES = 16

# Of each tensor, in the order of the file: its dtype in safetensors' words and in NumPy's, and its shape, with None for
# any size.
Layout = Mapping[str, tuple[str, Any, tuple[int | None, ...]]]


@dataclass(frozen=True)
class Shard:
    """Hidden states of some texts, one text after another. They are read when they are used.

    Args:
        store: the folder.
        name: of the file in it.
        encoding: of the states.
        index: the tensors that say which texts there are, by name.
        places: of each tensor that keeps states: the byte at which it begins, and the shape and dtype of a token's.
    """

    store: Store
    name: str
    encoding: Encoding
    index: Mapping[str, np.ndarray]
    places: Mapping[str, tuple[int, tuple[int, ...], np.dtype]]

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """`[texts]`, the token at which each text ends, counted from the beginning of the shard."""
        return np.cumsum(self.index[LENGTHS])

    def encoded(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Return the tensors that keep some tokens' states."""
        found = {}
        for name, (begin, shape, kind) in self.places.items():
            n_bytes = int(np.prod(shape)) * kind.itemsize
            content = self.store.read(self.name, begin + start * n_bytes, begin + stop * n_bytes)
            if len(content) != (stop - start) * n_bytes:
                raise ValueError(f"{self.store.file(self.name)} was cut short. {remedy_of(self.store, self.name)}")
            found[name] = np.frombuffer(content, kind).reshape(stop - start, *shape)
        return found

    def read(self, text: int, check: bool) -> np.ndarray:
        """Return the states of a text, `[tokens, layers, hidden_size]`.

        Args:
            text: its number in the shard.
            check: whether to compare its checksum.

        Raises:
            ValueError: If the states are not those that were written.
        """
        end = int(self.ends[text])
        encoded = self.encoded(end - int(self.index[LENGTHS][text]), end)
        if check:
            self.check(text, encoded)
        return self.encoding.decode(encoded)

    def check(self, text: int, encoded: Mapping[str, np.ndarray]) -> None:
        """Check the encoded states of a text.

        Raises:
            ValueError: If they are not those that were written.
        """
        if checksum(encoded) != self.index[CHECKSUMS][text]:
            raise ValueError(
                f"The cached hidden states in {self.store.file(self.name)} are damaged: those of text {text:,} changed "
                f"after they were written (their CRC-32 is another). {remedy_of(self.store, self.name)}"
            )

    def pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the states of all texts after a check, some complete texts at a time, and the token each begins at.

        Raises:
            ValueError: If `check` raises one.
        """
        first, ends = 0, self.ends
        while first < len(ends):
            start = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, start + TOKENS_AT_ONCE, side="right")))
            encoded = self.encoded(start, int(ends[last - 1]))
            for text in range(first, last):
                begin, end = int(ends[text - 1]) - start if text else 0, int(ends[text]) - start
                self.check(text, {name: x[begin:end] for name, x in encoded.items()})
            yield start, self.encoding.decode(encoded)
            first = last


def layout_of(encoding: Encoding, token_shape: tuple[int, int], n_texts: int) -> Layout:
    """Return the tensors of a shard in order: those with large numbers first, so that all are aligned."""
    layers, size = token_shape
    states = {
        name: (code, kind, (None, layers, size) if is_full else (None, layers))
        for name, (code, kind, is_full) in encoding.tensors.items()
    }
    return {
        LENGTHS: ("I64", "<i8", (n_texts,)),
        CHECKSUMS: ("I64", "<i8", (n_texts,)),
        INDEX_CHECKSUM: ("I64", "<i8", (1,)),
        **states,
        DIGESTS: ("U8", np.uint8, (n_texts, DIGEST_BYTES)),
    }


def shard_pieces(
    layout: Layout,
    metadata: Mapping[str, str],
    lengths: np.ndarray,
    digests: np.ndarray,
    encoded: Mapping[str, np.ndarray],
) -> Iterator[Any]:
    """Yield the bytes of a shard, piece by piece.

    Args:
        layout: of its tensors.
        metadata: of its header.
        lengths: `[texts]`, in tokens.
        digests: `[texts, 16]`.
        encoded: the encoded states of the texts, one after another.
    """
    lengths, digests = lengths.astype("<i8"), np.ascontiguousarray(digests)
    ends = np.cumsum(lengths).tolist()
    checksums = [
        checksum({name: x[end - length : end] for name, x in encoded.items()})
        for length, end in zip(lengths.tolist(), ends)
    ]
    index = {LENGTHS: lengths, CHECKSUMS: np.array(checksums, "<i8"), DIGESTS: digests}
    tensors = {**index, INDEX_CHECKSUM: index_checksum(index), **encoded}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (code, _, _) in layout.items():
        x = tensors[name]
        header[name] = {"dtype": code, "shape": list(x.shape), "data_offsets": [offset, offset + x.nbytes]}
        offset += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers of eight bytes are then aligned
    yield len(text).to_bytes(8, "little") + text
    for name in layout:
        yield np.ascontiguousarray(tensors[name]).data


def open_shard(store: Store, name: str, encoding: Encoding, layout: Layout, metadata: Mapping[str, str]) -> Shard:
    """Open a shard, after a check of all but its states.

    Args:
        store: the folder.
        name: of the file in it.
        encoding: of its states.
        layout: of its tensors, which is expected.
        metadata: of its header, which is expected.

    Raises:
        ValueError: If it was cut short, is damaged, or is of another folder.
    """
    places = _read_header(store, name, layout, metadata)
    index = {
        tensor: np.frombuffer(store.read(name, begin, begin + int(np.prod(shape)) * kind.itemsize), kind).reshape(shape)
        for tensor, (begin, shape, kind) in places.items()
        if tensor not in encoding.tensors
    }
    path, remedy = store.file(name), remedy_of(store, name)
    if index_checksum(index)[0] != index[INDEX_CHECKSUM][0]:
        raise ValueError(f"The index of {path} changed after it was written (its CRC-32 is another). {remedy}")
    if any(places[tensor][1][0] != index[LENGTHS].sum() for tensor in encoding.tensors):
        raise ValueError(f"{path} has states of another number of tokens than its texts. {remedy}")
    of_states = {x: (begin, shape[1:], kind) for x, (begin, shape, kind) in places.items() if x in encoding.tensors}
    return Shard(store, name, encoding, index, of_states)


def checksum(encoded: Mapping[str, np.ndarray]) -> int:
    """Return the CRC-32 of the encoded states of a text."""
    value = 0
    for x in encoded.values():
        value = zlib.crc32(np.ascontiguousarray(x).data.cast("B") if x.size else b"", value)
    return value


def index_checksum(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the CRC-32 of what a shard has beside its states, `[1]`."""
    value = 0
    for name in (LENGTHS, CHECKSUMS, DIGESTS):
        value = zlib.crc32(tensors[name].tobytes(), value)
    return np.array([value], "<i8")


def _read_header(
    store: Store, name: str, layout: Layout, metadata: Mapping[str, str]
) -> dict[str, tuple[int, tuple[int, ...], np.dtype]]:
    """Return where each tensor of a safetensors file begins, its shape and its dtype.

    Args:
        store: the folder.
        name: of the file in it.
        layout: the tensors that are expected, in order: dtypes, and shapes with None for any size.
        metadata: that is expected.

    Raises:
        ValueError: If the file has something else.
    """
    path, size, remedy = store.file(name), store.size(name), remedy_of(store, name)
    n_header = int.from_bytes(store.read(name, 0, 8), "little")
    try:
        header = json.loads(store.read(name, 8, min(8 + n_header, size)) if size > 8 else b"")
        if not isinstance(header, dict) or size < 8 + n_header:
            raise ValueError("its header is no keys and values")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. {remedy}") from None
    if header.pop("__metadata__", None) != metadata:
        raise ValueError(f"{path} and the {MANIFEST} beside it do not fit: one changed. {remedy_of(store)}")
    if list(header) != list(layout):
        raise ValueError(f"{path} is damaged: its header has tensors that were not written. {remedy}")
    offset, places = 0, {}
    for tensor, (code, kind, shape) in layout.items():
        entry = header[tensor]
        found = entry.get("shape") if isinstance(entry, dict) else None
        n_tokens = found[0] if isinstance(found, list) and found and isinstance(found[0], int) else 0
        expected = [n_tokens if n is None else n for n in shape]
        n_bytes = int(np.prod(expected)) * np.dtype(kind).itemsize
        if entry != {"dtype": code, "shape": expected, "data_offsets": [offset, offset + n_bytes]}:
            raise ValueError(f"{path} is damaged: its header does not describe {tensor} as it was written. {remedy}")
        places[tensor] = (8 + n_header + offset, tuple(expected), np.dtype(kind))
        offset += n_bytes
    if size != 8 + n_header + offset:
        raise ValueError(
            f"{path} has {size:,} bytes, expected {8 + n_header + offset:,}: it was "
            f"{'cut short' if size < 8 + n_header + offset else 'written to by something else'}. {remedy}"
        )
    return places


def remedy_of(store: Store, name: str | None = None) -> str:
    """Return what to do about a damaged folder, or a file in it."""
    what = f"folder {store.place}" if name is None else f"file {store.file(name)}"
    return f"Delete the {what} to have its states computed again, or give another cache_dir."
