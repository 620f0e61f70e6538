"""smallNORB (LeCun, Huang and Bottou, 2004), read from its original binary files."""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError

from .stereo import CATEGORIES, stereo_features

SMALLNORB_URL = "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/"

_STEMS = {
    "train": "smallnorb-5x46789x9x18x6x2x96x96-training",
    "test": "smallnorb-5x01235x9x18x6x2x96x96-testing",
}
_KINDS = ("dat", "cat", "info")  # images, categories, other factors
_FACTORS = ("instance", "elevation", "azimuth", "lighting")
_TYPES: dict[int, np.dtype] = {0x1E3D4C55: np.dtype("u1"), 0x1E3D4C54: np.dtype("<i4")}  # by magic number
_MAGIC = {"dat": 0x1E3D4C55, "cat": 0x1E3D4C54, "info": 0x1E3D4C54}
_N_PAIRS_AT_ONCE = 64


def load_smallnorb(
    source: str | os.PathLike[str],
    *,
    validation_instances: Collection[int] = (9,),
    cache_dir: str | os.PathLike[str] | None = None,
) -> datasets.DatasetDict:
    """Load smallNORB: 24,300 stereo pairs of 25 toys for training, and as many pairs of 25 other toys for testing.

    Pairs are copied one by one from a memory-mapped or gzipped file into the cache of datasets (about 450 MB each for
    training and testing), which is memory-mapped too. Files that have changed are read again. Pairs keep the order of
    the files, which is shuffled.

    Validation: The five toys of each category in the training files are its instances 4, 6, 7, 8 and 9. The validation
    split has all pairs of some of these instances, by default of the last one, 9. So the model is validated on toys
    that it was not trained on, as in testing. The test split is for testing only. Heinsen's 2019 training notebook
    validated on the images it tested on, "to match other papers", and trained on all 24,300 pairs, as
    `validation_instances=()` does.

    Args:
        source: A directory with the six original files, `smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat` and so on,
            as published at `SMALLNORB_URL`, each plain or gzipped (`.mat.gz`).
        validation_instances: Numbers of the training instances of each category that make up the validation split. If
            empty, there is no validation split.
        cache_dir: Folder for the pairs; by default the cache folder of datasets.

    Returns:
        The splits `train`, `validation` and `test` with the columns of `capsule_heads.paper.stereo.stereo_features`.

    Raises:
        FileNotFoundError: If the directory or one of its files does not exist.
        ValueError: If a file is truncated, does not match its name, or has another number of pairs than the others; if
            a validation instance is not in the training files, or no instance is left to train on; or if an instance is
            in both the training and the test files.
    """
    directory = Path(source).expanduser()
    files = {split: _find_files(directory, stem) for split, stem in _STEMS.items()}
    labels = {split: _read_labels(files[split]) for split in files}
    for split, array in labels.items():
        _check_images(files[split]["dat"], len(array))
    toys = {split: set(map(tuple, array[:, :2].tolist())) for split, array in labels.items()}
    if toys["train"] & toys["test"]:
        category, instance = min(toys["train"] & toys["test"])
        raise ValueError(
            f"{directory}: instance {instance} of the category {CATEGORIES[category]} is in the training and in the "
            "test files; expected instances of each to be in one of them. Fetch the files again."
        )
    held_out = _check_validation_instances(validation_instances, labels["train"][:, 1])
    train, test = (_read_pairs(files[split], split, cache_dir) for split in ("train", "test"))
    if not held_out.any():
        return datasets.DatasetDict({"train": train, "test": test})
    splits = {"train": train.select(np.flatnonzero(~held_out)), "validation": train.select(np.flatnonzero(held_out))}
    return datasets.DatasetDict({**splits, "test": test})


def _find_files(directory: Path, stem: str) -> dict[str, Path]:
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is not a directory; give the one with smallNORB's six files, published at {SMALLNORB_URL}."
        )
    found = {}
    for kind in _KINDS:
        names = (f"{stem}-{kind}.mat", f"{stem}-{kind}.mat.gz")
        present = [directory / name for name in names if (directory / name).is_file()]
        if not present:
            raise FileNotFoundError(
                f"{directory} has neither {names[0]} nor {names[1]}; smallNORB's six files are published at "
                f"{SMALLNORB_URL}."
            )
        found[kind] = present[0]
    return found


def _check_validation_instances(wanted: Collection[int], instances: np.ndarray) -> np.ndarray:
    """Return a mask of the training pairs that are for validation."""
    present = sorted(set(instances.tolist()))
    for instance in wanted:
        if instance not in present:
            raise ValueError(
                f"validation_instances has {instance}, which is not among the training files' instances "
                f"{', '.join(map(str, present))}; test instances are for testing only."
            )
    if set(wanted) == set(present):
        raise ValueError(f"validation_instances are {present}, all of them; leave at least one to train on.")
    return np.isin(instances, list(wanted))


# The files. A matrix is a magic number for its type, its number of dimensions, its dimensions, and its values in C
# order, all little endian. At least three dimensions are stored; those beyond the number of dimensions mean nothing.


@dataclass(frozen=True)
class _Matrix:
    """The header of a matrix: its shape and type, and where its values begin in the file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def n_bytes(self) -> int:
        """Return the number of bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def _read_header(path: Path, kind: str) -> _Matrix:
    """Read the header of a file, and check that it fits the kind of the file."""
    expected = _MAGIC[kind]
    with _open(path) as file:
        start = _read(file, 8, path)
        magic, n_dims = struct.unpack("<Ii", start)
        if magic != expected:
            (swapped,) = struct.unpack(">I", start[:4])
            hint = " Its bytes are in big-endian order: convert them." if swapped == expected else ""
            raise ValueError(
                f"{path} begins with the magic number 0x{magic:08X}; expected 0x{expected:08X} of a little-endian "
                f"{_TYPES[expected].name} matrix.{hint or ' It is not the file its name says: fetch it again.'}"
            )
        n_expected = {"dat": 4, "cat": 1, "info": 2}[kind]
        if n_dims != n_expected:
            raise ValueError(f"{path} is a matrix of {n_dims} dimensions; expected {n_expected}. Fetch it again.")
        n_stored = max(n_dims, 3)
        shape = struct.unpack(f"<{n_stored}i", _read(file, 4 * n_stored, path))[:n_dims]
    fits = {"dat": shape[1:2] == (2,), "cat": True, "info": shape[1:] == (len(_FACTORS),)}[kind]
    if not fits or min(shape) < 1:
        layout = {"dat": "pairs x 2 x height x width", "cat": "pairs", "info": f"pairs x {len(_FACTORS)}"}[kind]
        raise ValueError(f"{path} is a matrix of {' x '.join(map(str, shape))}; expected {layout}. Fetch it again.")
    return _Matrix(shape, _TYPES[magic], 8 + 4 * n_stored)


def _read(file: io.BufferedIOBase, n_bytes: int, path: Path) -> bytes:
    """Read exactly `n_bytes`."""
    payload = _read_at_most(file, n_bytes, path)
    if len(payload) < n_bytes:
        raise ValueError(f"{path} is truncated: {n_bytes - len(payload):,} bytes or more are missing; fetch it again.")
    return payload


def _read_at_most(file: io.BufferedIOBase, n_bytes: int, path: Path) -> bytes:
    try:
        return file.read(n_bytes)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}); fetch it again.") from error


def _expect_end(file: io.BufferedIOBase, path: Path) -> None:
    """Check that a file was read to its end; this also checks the checksum of a gzipped file."""
    if _read_at_most(file, 1, path):
        raise ValueError(f"{path} is too long: it holds more than its header says; fetch it again.")


def _read_labels(files: dict[str, Path]) -> np.ndarray:
    """Read category, instance, elevation, azimuth and lighting, `[n_pairs, 5]`."""
    columns = {}
    for kind in ("cat", "info"):
        header = _read_header(files[kind], kind)
        with _open(files[kind]) as file:
            _read(file, header.offset, files[kind])
            values = np.frombuffer(_read(file, header.n_bytes, files[kind]), header.dtype)
            _expect_end(file, files[kind])
        columns[kind] = values.reshape(header.shape[0], -1)
    n_categories, n_info = len(columns["cat"]), len(columns["info"])
    if n_categories != n_info:
        raise ValueError(
            f"{files['cat']} has {n_categories:,} pairs and {files['info']} has {n_info:,}; expected the same number "
            "in both. Fetch them again."
        )
    unknown = set(columns["cat"].ravel().tolist()) - set(range(len(CATEGORIES)))
    if unknown:
        raise ValueError(
            f"{files['cat']} has the category {min(unknown)}; expected 0 to {len(CATEGORIES) - 1}. Fetch it again."
        )
    return np.concatenate([columns["cat"], columns["info"]], axis=1)


def _check_images(path: Path, n_labels: int) -> None:
    """Check a file of images against the labels and, unless it is gzipped, its own size."""
    header = _read_header(path, "dat")
    if header.shape[0] != n_labels:
        raise ValueError(
            f"{path} has {header.shape[0]:,} pairs, and the cat and info files beside it have {n_labels:,}; expected "
            "the same number in all three. Fetch them again."
        )
    expected, found = header.offset + header.n_bytes, path.stat().st_size
    if path.suffix != ".gz" and found != expected:
        what = "truncated" if found < expected else "too long"
        raise ValueError(f"{path} is {what}: it has {found:,} bytes, expected {expected:,}; fetch it again.")


def _read_pairs(files: dict[str, Path], split: str, cache_dir: str | os.PathLike[str] | None) -> datasets.Dataset:
    """Read all pairs of a split into the cache, or find them there."""
    stats = {kind: files[kind].resolve().stat() for kind in _KINDS}
    settings = {
        "files": {kind: str(files[kind].resolve()) for kind in _KINDS},
        # datasets names its cache after these, so a changed file counts as another file.
        "identity": tuple((stats[kind].st_size, stats[kind].st_mtime_ns) for kind in _KINDS),
    }
    height, width = _read_header(files["dat"], "dat").shape[2:]
    try:
        return datasets.Dataset.from_generator(
            _generate_pairs,
            features=stereo_features(height, width),
            gen_kwargs=settings,
            split=datasets.NamedSplit(split),
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):  # a damaged gzip file is noticed while it is read
            raise error.__cause__ from None
        raise


def _generate_pairs(files: dict[str, str], identity: tuple) -> Iterator[dict[str, Any]]:
    paths = {kind: Path(path) for kind, path in files.items()}
    labels = _read_labels(paths)
    for image, (label, *factors) in zip(_generate_images(paths["dat"]), labels.tolist(), strict=True):
        yield {"image": image, "label": label, **dict(zip(_FACTORS, factors))}


def _generate_images(path: Path) -> Iterator[np.ndarray]:
    header = _read_header(path, "dat")
    if path.suffix != ".gz":
        yield from np.memmap(path, header.dtype, mode="r", offset=header.offset, shape=header.shape)
        return
    n_pairs, *shape = header.shape
    with _open(path) as file:
        _read(file, header.offset, path)
        for start in range(0, n_pairs, _N_PAIRS_AT_ONCE):
            n_read = min(_N_PAIRS_AT_ONCE, n_pairs - start)
            payload = _read(file, n_read * math.prod(shape), path)
            yield from np.frombuffer(payload, header.dtype).reshape(n_read, *shape)
        _expect_end(file, path)
