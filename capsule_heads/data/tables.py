"""Tables in files: CSV, TSV, JSON, JSON Lines and Parquet, read row by row and as they stand."""

from __future__ import annotations

import abc
import csv
import gzip
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

BOMS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
GZIP = ".gz"
Batch = dict[str, list]


class Table(abc.ABC):
    """Rows of a file, each with the same columns.

    Attributes:
        path: the file.
        columns: names of the columns, in the file's order.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is not what its name says, or two columns have one name.
    """

    path: Path
    columns: list[str]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = self._read_columns()
        twice = next((name for name in self.columns if self.columns.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{path} has two columns named {twice!r}; expected different names: rename one.")

    @abc.abstractmethod
    def _read_columns(self) -> list[str]:
        """Return the names of the columns."""

    @abc.abstractmethod
    def batches(self, size: int) -> Iterator[Batch]:
        """Yield rows as lists by column, `size` rows at a time, as they stand in the file.

        Values of CSV and TSV are strings, and "" where a field is empty. A field that a row of JSON does not have is
        None.

        Raises:
            ValueError: If a row cannot be read; the message names its line.
        """

    def read(self) -> dict[str, list]:
        """Return all rows, as lists by column.

        Raises:
            ValueError: If there are none, or one cannot be read.
        """
        columns: dict[str, list] = {name: [] for name in self.columns}
        for batch in self.batches(10_000):
            for name, values in batch.items():
                columns[name].extend(values)
        if not any(columns.values()):
            raise ValueError(f"{self.path} has no rows; expected one for each example.")
        return columns

    def count_rows(self) -> int:
        """Return the number of rows."""
        return sum(len(next(iter(batch.values()))) for batch in self.batches(10_000))


class _Text(Table):
    """Rows in a file of text."""

    def _open(self) -> IO[str]:
        opened: Callable[..., Any] = gzip.open if self.path.suffix.lower() == GZIP else open
        with opened(self.path, "rb") as file:
            start = file.read(3)
        encoding = next((name for bom, name in BOMS.items() if start.startswith(bom)), "utf-8")
        file = opened(self.path, "rt", encoding=encoding, newline="")
        return file

    def _lines(self) -> Iterator[str]:
        """Yield lines with their ends."""
        number = 0
        try:
            with self._open() as file:
                for line in file:
                    number += 1
                    yield line
        except UnicodeError as error:
            raise ValueError(
                f"{self.path} is not UTF-8 text, after line {number} ({error}); expected UTF-8, which iconv -f LATIN1 "
                "-t UTF-8 makes of Latin-1."
            ) from None
        except EOFError as error:
            raise ValueError(f"{self.path} is damaged, after line {number}: {error}.") from None


class _Delimited(_Text):
    """Rows of fields between delimiters, below a header: CSV, and TSV with quotes or without."""

    delimiters = ",;\t"

    def _read_columns(self) -> list[str]:
        csv.field_size_limit(sys.maxsize)  # a field is a text of any length
        first = next(self._lines(), "")
        usual = self.delimiters[0]
        self._delimiter = usual if usual in first else max(self.delimiters, key=first.count)
        self._quoting = self._find_quoting()
        columns = next(self._fields(), None)
        if columns is None:
            raise ValueError(f"{self.path} is empty; expected a header, with the names of the columns, and rows.")
        return columns

    def _find_quoting(self) -> Literal[0, 3]:
        return csv.QUOTE_MINIMAL

    def _fields(self) -> Iterator[list[str]]:
        """Yield the fields of each row, those of the header first."""
        reader = csv.reader(self._lines(), delimiter=self._delimiter, quoting=self._quoting, strict=True)
        try:
            for fields in reader:
                yield fields or [""]
        except csv.Error as error:
            raise ValueError(
                f"Line {reader.line_num} of {self.path} cannot be read ({error}); expected fields between "
                f"{_name(self._delimiter)}, and those with quotation marks or line breaks in quotes."
            ) from None

    def _rows(self) -> Iterator[list[str]]:
        rows = self._fields()
        header = next(rows)
        for number, fields in enumerate(rows, start=1):
            if fields == [""] and len(header) > 1:  # a blank line
                continue
            if len(fields) != len(header):
                raise ValueError(
                    f"Row {number} of {self.path} has {count_of(len(fields), 'field')}, and the header {len(header)}; "
                    f"expected as many: a text with {_name(self._delimiter)} or line breaks in it stands in quotes."
                )
            yield fields

    def batches(self, size: int) -> Iterator[Batch]:
        rows = self._rows()
        while batch := list(itertools.islice(rows, size)):
            yield {name: list(values) for name, values in zip(self.columns, zip(*batch))}


class _TabSeparated(_Delimited):
    delimiters = "\t"

    def _find_quoting(self) -> Literal[0, 3]:
        # Some programs write quotation marks of a text as they are, and some put the text in quotes.
        self._quoting = csv.QUOTE_MINIMAL
        try:
            rows = self._fields()
            width = len(next(rows, ()))
            if all(len(fields) in (width, 1) for fields in rows):
                return csv.QUOTE_MINIMAL
        except ValueError:
            pass
        return csv.QUOTE_NONE


class _JsonLines(_Text):
    """Rows as objects: one a line, or all in one list."""

    def _read_columns(self) -> list[str]:
        with self._open() as file:
            is_list = next((line.lstrip()[0] for line in file if line.strip()), "") == "["
        # A list can only be parsed as a whole, and stays in memory.
        self._list = self._parse("".join(self._lines()), str(self.path)) if is_list else None
        columns = dict.fromkeys(name for row in self._objects() for name in row)
        if not columns:
            raise ValueError(f"{self.path} has no objects; expected one with names and values for each row.")
        return list(columns)

    def _objects(self) -> Iterator[dict[str, Any]]:
        rows = self._list
        for number, value in self._of_lines() if rows is None else enumerate(rows, start=1):
            if not isinstance(value, dict):
                place = f"{'Line' if rows is None else 'Row'} {number} of {self.path}"
                raise ValueError(
                    f"{place} is {type(value).__name__}; expected an object for each row, such as "
                    '{"text": "...", "label": "..."}.'
                )
            yield value

    def _of_lines(self) -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(self._lines(), start=1):
            if line.strip():
                yield number, self._parse(line, f"Line {number} of {self.path}")

    def _parse(self, text: str, name: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{name} is not JSON ({error}); expected one object a line, or a list of objects."
            ) from None

    def batches(self, size: int) -> Iterator[Batch]:
        rows = self._objects()
        while batch := list(itertools.islice(rows, size)):
            yield {name: [row.get(name) for row in batch] for name in self.columns}


class _Parquet(Table):
    def _read_columns(self) -> list[str]:
        import pyarrow
        from pyarrow import parquet

        try:
            self._file = parquet.ParquetFile(self.path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{self.path} is not a Parquet file that can be read: {error}.") from None
        return list(self._file.schema_arrow.names)

    def batches(self, size: int) -> Iterator[Batch]:
        try:
            for batch in self._file.iter_batches(batch_size=size):
                yield batch.to_pydict()
        except OSError as error:  # of pages that are damaged
            raise ValueError(f"{self.path} is damaged: {error}.") from None

    def count_rows(self) -> int:
        return self._file.metadata.num_rows


KINDS: dict[str, type[Table]] = {
    ".csv": _Delimited,
    ".tsv": _TabSeparated,
    ".json": _JsonLines,
    ".jsonl": _JsonLines,
    ".ndjson": _JsonLines,
    ".parquet": _Parquet,
}


def suffix_of(path: str | os.PathLike[str]) -> str:
    """Return the suffix that says what kind of table a file holds, in lower case; that before .gz."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    return "".join(suffixes[-2:-1] if suffixes[-1:] == [GZIP] else suffixes[-1:])


def open_table(path: str | os.PathLike[str]) -> Table:
    """Open a file of rows.

    A CSV file may have semicolons or tabs instead of commas, and a .json file one object a line; those of text may be
    compressed (.csv.gz).

    Args:
        path: a file with one of the suffixes .csv, .tsv, .json, .jsonl, .ndjson and .parquet.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be opened.
        ValueError: If its suffix is another, it is not what that says, or it has no columns.
    """
    path = Path(path)
    kind = KINDS.get(suffix_of(path))
    if kind is None or (kind is _Parquet and path.suffix.lower() == GZIP):
        raise ValueError(f"{path} is no table by its name; expected {', '.join(KINDS)}, or the text ones with .gz.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    return kind(path)


def _name(delimiter: str) -> str:
    return {",": "commas", ";": "semicolons", "\t": "tabs"}[delimiter]


def count_of(number: int, noun: str) -> str:
    """Return a number of things for a message, such as "1 row" or "1,000 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
