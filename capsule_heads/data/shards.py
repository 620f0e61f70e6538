"""A shard: a safetensors file with the hidden states of some texts, and their checksums. See docs/cache_format.md."""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .encodings import Encoding

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
    """Hidden states of some texts, one text after another, mapped into memory: they are read when they are used.

    Args:
        path: the file.
        encoding: of the states.
        tensors: of the file, by name.
    """

    path: Path
    encoding: Encoding
    tensors: Mapping[str, np.ndarray]

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """`[texts]`, the token at which each text ends, counted from the beginning of the shard."""
        return np.cumsum(self.tensors[LENGTHS])

    def encoded(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Return the tensors that keep some tokens' states."""
        return {name: self.tensors[name][start:stop] for name in self.encoding.tensors}

    def read(self, text: int, check: bool) -> np.ndarray:
        """Return the states of a text, `[tokens, layers, hidden_size]`.

        Args:
            text: its number in the shard.
            check: whether to compare its checksum.

        Raises:
            ValueError: If the states are not those that were written.
        """
        end = int(self.ends[text])
        encoded = self.encoded(end - int(self.tensors[LENGTHS][text]), end)
        if check:
            self.check(text, encoded)
        return self.encoding.decode(encoded)

    def check(self, text: int, encoded: Mapping[str, np.ndarray]) -> None:
        """Check the encoded states of a text.

        Raises:
            ValueError: If they are not those that were written.
        """
        if checksum(encoded) != self.tensors[CHECKSUMS][text]:
            raise ValueError(
                f"The cached hidden states in {self.path} are damaged: those of text {text:,} changed after they were "
                f"written (their CRC-32 is another). {remedy_of(self.path)}"
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
            stop = int(ends[last - 1])
            encoded = {name: np.array(x) for name, x in self.encoded(start, stop).items()}
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


def write_shard(
    file: BinaryIO,
    layout: Layout,
    metadata: Mapping[str, str],
    lengths: np.ndarray,
    digests: np.ndarray,
    encoded: Mapping[str, np.ndarray],
) -> None:
    """Write a shard.

    Args:
        file: to write to.
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
    file.write(len(text).to_bytes(8, "little") + text)
    for name in layout:
        file.write(np.ascontiguousarray(tensors[name]).data)


def open_shard(path: Path, encoding: Encoding, layout: Layout, metadata: Mapping[str, str]) -> Shard:
    """Open a shard, after a check of all but its states.

    Args:
        path: the file.
        encoding: of its states.
        layout: of its tensors, which is expected.
        metadata: of its header, which is expected.

    Raises:
        ValueError: If it was cut short, is damaged, or is of another folder.
    """
    tensors = _map_tensors(path, layout, metadata)
    if index_checksum(tensors)[0] != tensors[INDEX_CHECKSUM][0]:
        raise ValueError(f"The index of {path} changed after it was written (its CRC-32 is another). {remedy_of(path)}")
    if any(len(tensors[name]) != tensors[LENGTHS].sum() for name in encoding.tensors):
        raise ValueError(f"{path} has states of another number of tokens than its texts. {remedy_of(path)}")
    return Shard(path, encoding, tensors)


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


def _map_tensors(path: Path, layout: Layout, metadata: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Return the tensors of a file of the format safetensors, mapped into memory.

    Args:
        path: the file.
        layout: the tensors that are expected, in order: dtypes, and shapes with None for any size.
        metadata: that is expected.

    Raises:
        ValueError: If the file has something else.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        text = file.read(min(n_header, size))
    try:
        header = json.loads(text)
        if not isinstance(header, dict) or size < 8 + n_header:
            raise ValueError("its header is no keys and values")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. {remedy_of(path)}") from None
    if header.pop("__metadata__", None) != metadata:
        raise ValueError(f"{path} and the {MANIFEST} beside it do not fit: one changed. {remedy_of(path.parent)}")
    if list(header) != list(layout):
        raise ValueError(f"{path} is damaged: its header has tensors that were not written. {remedy_of(path)}")
    offset, places = 0, {}
    for name, (code, kind, shape) in layout.items():
        entry = header[name]
        found = entry.get("shape") if isinstance(entry, dict) else None
        n_tokens = found[0] if isinstance(found, list) and found and isinstance(found[0], int) else 0
        expected = [n_tokens if n is None else n for n in shape]
        n_bytes = int(np.prod(expected)) * np.dtype(kind).itemsize
        if entry != {"dtype": code, "shape": expected, "data_offsets": [offset, offset + n_bytes]}:
            raise ValueError(
                f"{path} is damaged: its header does not describe {name} as it was written. {remedy_of(path)}"
            )
        places[name] = (offset, n_bytes, kind, expected)
        offset += n_bytes
    if size != 8 + n_header + offset:
        raise ValueError(
            f"{path} has {size:,} bytes, expected {8 + n_header + offset:,}: it was "
            f"{'cut short' if size < 8 + n_header + offset else 'written to by something else'}. {remedy_of(path)}"
        )
    # As a plain array: a slice of a memmap object takes ten times as long.
    data = np.asarray(np.memmap(path, np.uint8, "r"))[8 + n_header :]
    return {
        name: data[begin : begin + n_bytes].view(kind).reshape(shape)
        for name, (begin, n_bytes, kind, shape) in places.items()
    }


def remedy_of(path: Path) -> str:
    """Return what to do about a damaged file or folder."""
    kind = "file" if path.suffix == ".safetensors" else "folder"
    return f"Delete the {kind} {path} to have its states computed again, or give another cache_dir."
