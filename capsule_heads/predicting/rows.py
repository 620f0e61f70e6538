"""The inputs of a prediction: in the columns of a table, or in the files of a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.columns import usual_texts
from ..data.folders import kind_of_file, shown_files
from ..data.tables import Batch, Table, open_table

FILE = "file"  # the column of a folder's files
READ_AT_ONCE = 1 << 20  # bytes


class TableRows:
    """Rows of a table, with a text or a pair of texts in each.

    Args:
        path: the file.
        text: names of the columns of texts; None for the columns of training, or those with usual names.
        trained: names of the columns that the model was trained on; None if they are not known.

    Attributes:
        noun: word for a row in messages.
        lacks: why some rows may have no answer.
        table: the table.
        columns: names of its columns.
        texts: names of the columns that are read.

    Raises:
        OSError: If there is no such file.
        ValueError: If the file is not a table, has no rows, or lacks the columns.
    """

    noun, lacks = "row", "which have no text"

    def __init__(self, path: Path, text: Sequence[str] | None, trained: Sequence[str] | None) -> None:
        self.table: Table | None = open_table(path)
        self.path, self.columns = path, self.table.columns
        self.texts = self._choose(text, trained)
        self.n = self.table.count_rows()
        if not self.n:
            raise ValueError(f"{path} has a header and no rows; expected one row for each text.")

    def _choose(self, given: Sequence[str] | None, trained: Sequence[str] | None) -> list[str]:
        columns = ", ".join(self.columns)
        if given is not None and len(given) not in (1, 2):
            raise ValueError(f"text is {','.join(given)}; expected one column, or two for pairs of texts.")
        for names, whose in ((given, "text is {}"), (trained, "the model was trained on {}")):
            if names is None:
                continue
            missing = [name for name in names if name not in self.columns]
            if not missing:
                return list(names)
            of = whose.format(", ".join(names))
            raise ValueError(f"{self.path} has the columns {columns}, and {of}; expected --text with columns it has.")
        found = usual_texts(self.columns) or (self.columns if len(self.columns) == 1 else None)
        if found is None:
            raise ValueError(
                f"{self.path} has the columns {columns}, and none has a usual name for texts; expected --text COLUMN."
            )
        return list(found)

    def digest(self) -> str:
        """Return a digest of the file's content."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while block := file.read(READ_AT_ONCE):
                digest.update(block)
        return digest.hexdigest()

    def batches(self, size: int) -> Iterator[tuple[Batch, list[Any]]]:
        """Yield rows by column, and their inputs: a text, a tuple of two, or None for an empty row.

        Raises:
            ValueError: If a value is not a text.
        """
        assert self.table is not None
        start = 0
        for batch in self.table.batches(size):
            rows = list(zip(*(batch[name] for name in self.texts)))
            for number, row in enumerate(rows, start=start + 1):
                self._check(number, row)
            start += len(rows)
            texts = [tuple(x or "" for x in row) for row in rows]
            has_text = [any(x.strip() for x in row) for row in texts]
            yield batch, [(row if len(row) > 1 else row[0]) if has else None for row, has in zip(texts, has_text)]

    def _check(self, number: int, row: Sequence[Any]) -> None:
        for name, text in zip(self.texts, row):
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"{name} of row {number} of {self.path} is {text!r:.99}, a {type(text).__name__}; expected a text: "
                    "choose another column with --text."
                )
            if text is not None and not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise ValueError(
                        f"{name} of row {number} of {self.path} has half of a character, {text!r:.100}; expected text "
                        "that UTF-8 can hold."
                    ) from None


class FolderRows:
    """The files of images or audio in a folder, sorted, with their paths in the folder.

    Args:
        folder: the folder. Hidden files are left out, and so are those of other kinds.
        modality: "image" or "audio".

    Attributes:
        noun: word for a row in messages.
        lacks: why some files may have no answer.
        n_left: number of files of other kinds.

    Raises:
        ValueError: If there is no file of the modality.
    """

    noun, lacks = "file", "which cannot be read"

    def __init__(self, folder: Path, modality: str) -> None:
        self.table: Table | None = None
        self.texts: list[str] = []
        self.path, self.columns = folder, [FILE]
        files = shown_files(folder)
        self.files = [path for path in files if kind_of_file(path.name) == modality]
        self.n, self.n_left = len(self.files), len(files) - len(self.files)
        if not self.files:
            raise ValueError(
                f"{folder} has {self.n_left} files, and no {modality} file among them by name; expected a folder of "
                f"{modality} files, which may be in subfolders."
            )

    def digest(self) -> str:
        """Return a digest of the names, sizes and times of the files."""
        found = ((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.files)
        return hashlib.sha256(repr(list(found)).encode(errors="surrogateescape")).hexdigest()

    def batches(self, size: int) -> Iterator[tuple[Batch, list[Any]]]:
        """Yield paths relative to the folder, and complete paths."""
        for start in range(0, self.n, size):
            paths = self.files[start : start + size]
            yield {FILE: [path.relative_to(self.path).as_posix() for path in paths]}, [str(path) for path in paths]
