"""Folders of images or audio: a folder for each class, or a table with the names of files."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .inputs import AUDIO_SUFFIXES, count_kinds
from .tables import KINDS, open_table, suffix_of

logger = logging.getLogger(__name__)

# Names of a split's folder or file, as `datasets` knows them.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
FILE_COLUMNS = ("file_name", "filename", "file", "path", "image", "audio")
METADATA = tuple(f"metadata{suffix}" for suffix in KINDS)
LAYOUT = "CLASS/FILE or train/CLASS/FILE, or a metadata.csv with the columns file_name and label"
Columns = Mapping[str, list]


def split_of(name: str) -> str | None:
    """Return "train", "validation" or "test" for a name of that split's folder or file; None for another."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def kind_of_folder(root: Path) -> str | None:
    """Return "image" or "audio" for a folder that holds files of them; None for one that holds neither.

    Raises:
        ValueError: If it holds both, or a name is not UTF-8.
    """
    kinds = count_kinds(root)
    found = [kind for kind in ("image", "audio") if kinds[kind]]
    if len(found) == 2:
        raise ValueError(
            f"{root} has {kinds['image']} images and {kinds['audio']} audio files; expected one kind: take the others "
            "away."
        )
    return found[0] if found else None


def kind_of_file(name: str) -> str | None:
    """Return "image" or "audio" for the name of a file of one; None for another."""
    from PIL import Image

    suffix = Path(name).suffix.lower()
    return "audio" if suffix in AUDIO_SUFFIXES else "image" if suffix in Image.registered_extensions() else None


def read_folder(root: Path, kind: str) -> dict[str, Columns]:
    """Return columns by split: the path of each file under the name of its kind, and `label` or those of a table.

    A folder for each split (train, validation, test) may stand above those of classes; without any, all is train.

    Args:
        root: the folder.
        kind: "image" or "audio".

    Raises:
        ValueError: If a file is in no class's folder, or a table names files that are not there.
    """
    shown = shown_files(root)
    files = [path for path in shown if kind_of_file(path.name) == kind]
    tables = [path for path in shown if path.name.lower() in METADATA]
    if not tables:
        return _by_class(root, files, kind)
    splits: dict[str, dict[str, list]] = {}
    for table in tables:
        columns = complete_paths(open_table(table).read(), table, kind)
        for row in zip(*columns.values()):
            values = dict(zip(columns, row))
            parts = Path(values[kind]).relative_to(root).parts
            of_split = splits.setdefault(split_of(parts[0]) or "train", {name: [] for name in columns})
            if of_split.keys() != values.keys():
                raise ValueError(
                    f"{table} has the columns {', '.join(values)}, and another table of the split "
                    f"{', '.join(of_split)}; expected the same."
                )
            for name, value in values.items():
                of_split[name].append(value)
    n_left = len(files) - len({path for columns in splits.values() for path in columns[kind]})
    if n_left:
        logger.warning("%d of the %d files in %s are left out: no table names them.", n_left, len(files), root)
    return dict(splits)


def shown_files(root: Path) -> list[Path]:
    """Return all files in a folder and those within, sorted, without hidden ones."""
    paths = (path for path in root.rglob("*") if not any(x.startswith(".") for x in path.relative_to(root).parts))
    return sorted(path for path in paths if path.is_file())


def _by_class(root: Path, files: list[Path], kind: str) -> dict[str, Columns]:
    splits: dict[str, Columns] = {}
    has_splits = all(split_of(path.relative_to(root).parts[0]) for path in files)
    for path in files:
        parts = path.relative_to(root).parts
        split = split_of(parts[0]) if has_splits else "train"
        folders = parts[has_splits:-1]
        if not folders:
            raise ValueError(f"{path} is not in the folder of a class; expected {LAYOUT}.")
        columns = splits.setdefault(split or "train", {kind: [], "label": []})
        columns[kind].append(str(path))
        columns["label"].append(folders[0])
    return splits


def file_column(columns: Mapping[str, Any], kind: str | None = None) -> str | None:
    """Return the column of a table that holds names of images or audio files; None if no column does.

    Args:
        columns: values by name.
        kind: "image" or "audio"; None for either.
    """
    for name in (x for x in columns if x.lower() in FILE_COLUMNS):
        first = next((x for x in columns[name] if isinstance(x, str) and x.strip()), "")
        found = kind_of_file(first)
        if found is not None and kind in (None, found):
            return name
    return None


def complete_paths(columns: dict[str, list], table: Path, kind: str | None = None) -> dict[str, list]:
    """Return the columns of a table of images or audio files, of which one becomes "image" or "audio": complete paths.

    Args:
        columns: what the table holds.
        table: its file, to whose folder the names of files are relative.
        kind: "image" or "audio"; None for what the names are of.

    Raises:
        ValueError: If no column holds names of such files, or one names a file that is not there.
    """
    column = file_column(columns, kind)
    if column is None:
        raise ValueError(
            f"{table} has the columns {', '.join(columns)}, of which none holds names of {kind or 'media'} files; "
            "expected file_name, relative to the table's folder."
        )
    paths = []
    for row, value in enumerate(columns.pop(column), start=1):
        path = table.parent / str(value)
        if not value or not path.is_file():
            raise ValueError(f"{column} of row {row} of {table} is {value!r}, and there is no such file; leave it out.")
        paths.append(os.path.normpath(path))
    return {str(kind_of_file(paths[0])): paths, **columns}


def read_tables(root: Path) -> dict[str, Path]:
    """Return the tables of a folder that are named after splits, such as train.csv and test.csv.

    Raises:
        ValueError: If two are of one split.
    """
    found: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        split = split_of(path.name.partition(".")[0])
        if split is None or suffix_of(path) not in KINDS:
            continue
        if split in found:
            raise ValueError(
                f"{found[split]} and {path} are both of the split {split}; expected one: rename the other."
            )
        found[split] = path
    return found
