"""Where a user's own data is: in a file, a folder, a dataset of the Hub, or memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets import Dataset, DatasetDict

from . import folders
from .columns import usual_texts
from .downloads import local_copy
from .tables import KINDS, open_table, suffix_of

logger = logging.getLogger(__name__)

Frame: TypeAlias = "Mapping[str, list] | Dataset"  # values by column
Source: TypeAlias = "str | os.PathLike[str] | Dataset | DatasetDict | Mapping[str, Any]"


def name_of(source: Source) -> str:
    """Return what a message calls a source."""
    return str(source) if isinstance(source, str | os.PathLike) else f"The {type(source).__name__}"


def read_source(source: Source, config: str | None) -> dict[str, Frame]:
    """Return what a source holds, by the names that it has for splits; one without is "train"."""
    if isinstance(source, DatasetDict):
        return dict(source)
    if isinstance(source, Dataset):
        return {"train": source}
    if not isinstance(source, str | os.PathLike):
        return {"train": _from_memory(source)}
    path = local_copy(source)
    if path.is_file():
        return {"train": _read_file(path)}
    if path.is_dir():
        return _read_folder(path, config)
    if suffix_of(path) in KINDS or path.is_absolute() or str(source).startswith((".", "~")) or len(path.parts) > 2:
        raise FileNotFoundError(f"There is no file or folder {source}.")
    return _read_hub(str(source), config)


def _from_memory(source: Any) -> Frame:
    given = {str(name): source[name] for name in source.columns} if hasattr(source, "columns") else source
    if not isinstance(given, Mapping):
        raise TypeError(
            f"source is a {type(source).__name__}; expected the path of a file or folder, the name of a dataset on the "
            "Hub, a Dataset, a DatasetDict, a DataFrame or a dict of columns."
        )
    columns = {name: values.tolist() if hasattr(values, "tolist") else list(values) for name, values in given.items()}
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"The columns have different numbers of rows ({found}); expected the same.")
    return columns


def _read_file(path: Path) -> Frame:
    columns = open_table(path).read()
    is_of_files = folders.file_column(columns) is not None and usual_texts(columns) is None
    return folders.complete_paths(columns, path) if is_of_files else columns


def _read_folder(path: Path, config: str | None) -> dict[str, Frame]:
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(str(path))
        return dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
    kind = folders.kind_of_folder(path)
    if kind is not None:
        return dict(folders.read_folder(path, kind))
    tables = folders.read_tables(path)
    if tables:
        return {name: _read_file(table) for name, table in tables.items()}
    if not any(path.iterdir()):
        raise FileNotFoundError(f"{path} has no files; expected {folders.LAYOUT}, or tables such as train.csv.")
    return _read_hub(str(path), config)


def _read_hub(name: str, config: str | None) -> dict[str, Frame]:
    try:
        return dict(datasets.load_dataset(name, config))
    except (datasets.exceptions.DatasetsError, OSError, ValueError, LookupError, RuntimeError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        where = (
            "is no folder of data" if os.path.isdir(name) else "is no file or folder here, and no dataset on the Hub"
        )
        raise FileNotFoundError(f"{name} {where} that can be read: {reason.rstrip('.')}.") from error


def name_splits(
    frames: dict[str, Frame], source: Source, split: str | None, others: Mapping[str, Source | None], config: str | None
) -> dict[str, Frame]:
    """Return frames under train, validation and test, as they were asked for or as they are usually called."""
    found = {} if split is None else {"train": pick_split(frames, source, split)[1]}
    for name in frames:
        usual = folders.split_of(name)
        if usual is not None and usual not in found and name != split:
            found[usual] = frames[name]
    if "train" not in found:
        raise ValueError(
            f"{name_of(source)} has the splits {', '.join(frames)}, and none is called train; expected split: the name "
            "of the one to train on (--data_split)."
        )
    for name, given in others.items():
        if given is None:
            continue
        is_split = isinstance(given, str) and given in frames and not Path(given).exists()
        found[name] = frames[str(given)] if is_split else pick_split(read_source(given, config), given, None)[1]
    ignored = [name for name in frames if not any(frame is frames[name] for frame in found.values())]
    if ignored:
        logger.warning("Not used of %s: the splits %s.", name_of(source), ", ".join(ignored))
    # Train first: what is in it says what is expected of the others.
    ordered = {name: found[name] for name in folders.SPLIT_NAMES if name in found}
    return {name: frame for name, frame in ordered.items() if name == "train" or not _is_unlabelled(frame)}


def pick_split(frames: Mapping[str, Frame], source: Source, split: str | None) -> tuple[str, Frame]:
    """Return one of a source's splits, and its name; "test" for the only one of a source without splits.

    Args:
        frames: what `read_source` returned.
        source: for messages.
        split: its name, or the usual one of its kind; None for the only one.

    Raises:
        ValueError: If there is no such split, or there are several and none was named.
    """
    if split is None and len(frames) == 1:
        (only,) = frames
        return ("test" if only == "train" else only), frames[only]
    usual = {folders.split_of(name): name for name in frames}
    found = split if split in frames else usual.get(split)
    if split is None or found is None:
        raise ValueError(
            f"{name_of(source)} has the splits {', '.join(frames)}; expected one of them"
            f"{'' if split is None else f', not {split}'}."
        )
    return found, frames[found]


def _is_unlabelled(frame: Frame) -> bool:
    """Return whether a split of a benchmark hides its labels: all are -1."""
    return isinstance(frame, Dataset) and any(
        isinstance(feature, datasets.ClassLabel) and set(frame.with_format(None)[name][:]) == {-1}
        for name, feature in frame.features.items()
    )


def column_names(frame: Frame) -> list[str]:
    """Return the names of the columns."""
    return frame.column_names if isinstance(frame, Dataset) else list(frame)


def column_values(frame: Frame, name: str) -> list:
    """Return the values of a column, as Python has them."""
    return frame.with_format(None)[name][:] if isinstance(frame, Dataset) else frame[name]
