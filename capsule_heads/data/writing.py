"""Tables that are written in parts, so that a part that is done is kept, and then joined: CSV, JSON Lines, Parquet."""

from __future__ import annotations

import abc
import csv
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tables import Table, suffix_of

if TYPE_CHECKING:
    import pyarrow

Columns = Mapping[str, Sequence[Any]]
CHUNK = 10_000  # rows that are read at once, for the types of their values


class Writer(abc.ABC):
    """Writes rows to files.

    Args:
        table: where the rows are from; None for a list of files.
        columns: kinds of the new columns, by name: "text", "texts" (lists of them) or "number".
    """

    def __init__(self, table: Table | None, columns: Mapping[str, str]) -> None:
        self.table, self.columns = table, columns

    @abc.abstractmethod
    def write_part(self, path: Path, rows: Columns) -> None:
        """Write some rows.

        Raises:
            ValueError: If the format cannot hold a value.
        """

    @abc.abstractmethod
    def join(self, names: Sequence[str], parts: Iterable[Path], path: Path) -> None:
        """Write a file of all parts.

        Args:
            names: of the columns.
            parts: files of `write_part`.
            path: the file to write.
        """


class _Csv(Writer):
    def write_part(self, path: Path, rows: Columns) -> None:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([_as_field(x, name) for name, x in zip(rows, row)] for row in zip(*rows.values()))

    def join(self, names: Sequence[str], parts: Iterable[Path], path: Path) -> None:
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(names)
        _append(parts, path)


class _JsonLines(Writer):
    def write_part(self, path: Path, rows: Columns) -> None:
        with open(path, "w", encoding="utf-8", newline="") as file:
            for row in zip(*rows.values()):
                of_row = {name: _as_json(x, name) for name, x in zip(rows, row)}
                file.write(json.dumps(of_row, ensure_ascii=False, default=str) + "\n")

    def join(self, names: Sequence[str], parts: Iterable[Path], path: Path) -> None:
        path.write_bytes(b"")
        _append(parts, path)


class _Parquet(Writer):
    def __init__(self, table: Table | None, columns: Mapping[str, str]) -> None:
        import pyarrow

        super().__init__(table, columns)
        types = {"text": pyarrow.string(), "texts": pyarrow.list_(pyarrow.string()), "number": pyarrow.float64()}
        self.schema = _schema_of(table)
        for name, kind in columns.items():
            self.schema = self.schema.append(pyarrow.field(name, types[kind]))

    def write_part(self, path: Path, rows: Columns) -> None:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pydict(dict(rows), schema=self.schema), path)

    def join(self, names: Sequence[str], parts: Iterable[Path], path: Path) -> None:
        from pyarrow import parquet

        with parquet.ParquetWriter(path, self.schema) as writer:
            for part in parts:
                writer.write_table(parquet.ParquetFile(part).read())


WRITERS: dict[str, type[Writer]] = {".csv": _Csv, ".jsonl": _JsonLines, ".parquet": _Parquet}


def writer_for(path: Path) -> type[Writer]:
    """Return what writes a file of the kind that its suffix says.

    Raises:
        ValueError: If it is another suffix.
    """
    kind = WRITERS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path} is no table by its name; expected {', '.join(WRITERS)}.")
    return kind


def _append(parts: Iterable[Path], path: Path) -> None:
    with open(path, "ab") as file:
        for part in parts:
            with open(part, "rb") as of_part:
                shutil.copyfileobj(of_part, file)


def _as_field(value: Any, name: str) -> str:
    """Return a value as a field of CSV: texts as they are, nothing for None, lists and the like as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list | dict):
        return json.dumps(_as_json(value, name), ensure_ascii=False, default=str)
    return str(_as_json(value, name))


def _as_json(value: Any, name: str) -> Any:
    """Return a value, unless it is one that text cannot hold."""
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for x in nested:
        _as_json(x, name)
    if isinstance(value, bytes):
        raise ValueError(f"{name} holds bytes, which text cannot hold; expected an output that can: .parquet.")
    return value


def _schema_of(table: Table | None) -> pyarrow.Schema:
    """Return the columns of a table with their types: those of Parquet as they are, those of JSON by their values."""
    import pyarrow
    from pyarrow import parquet

    if table is None:
        return pyarrow.schema([("file", pyarrow.string())])
    kind = suffix_of(table.path)
    if kind == ".parquet":
        return parquet.read_schema(table.path).remove_metadata()
    if kind in (".csv", ".tsv"):
        return pyarrow.schema([(name, pyarrow.string()) for name in table.columns])
    schemas = []
    try:
        for batch in table.batches(CHUNK):
            schemas.append(pyarrow.Table.from_pydict(batch).schema)
        return pyarrow.unify_schemas(schemas, promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{table.path} has values of different kinds in one column ({error}), which Parquet cannot hold; expected "
            "another output: .csv or .jsonl."
        ) from None
