"""Where the files of a folder are: on a disk, or in an object store such as S3, through fsspec."""

from __future__ import annotations

import abc
import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCKS = "locks"
MOST_OPEN = 128  # files, of the 1,024 that a process may have


class Store(abc.ABC):
    """The files of one folder, by name.

    Attributes:
        place: the folder, as the user names it.
        has_locks: whether a process can keep others from a file.
    """

    place: str
    has_locks: bool

    @abc.abstractmethod
    def exists(self, name: str) -> bool:
        """Return whether there is a file."""

    @abc.abstractmethod
    def names(self) -> set[str]:
        """Return the names of all files; none if there is no folder."""

    @abc.abstractmethod
    def folders(self) -> list[str]:
        """Return the names of the folders in it, in order."""

    @abc.abstractmethod
    def size(self, name: str) -> int:
        """Return the bytes of a file."""

    @abc.abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return some bytes of a file; fewer where it ends before `stop`."""

    @abc.abstractmethod
    def write(self, name: str, pieces: Iterable[Any]) -> None:
        """Write a file, completely or not at all, of pieces such as bytes."""

    @abc.abstractmethod
    def free(self) -> int | None:
        """Return the bytes that are free; None where nobody knows."""

    @contextlib.contextmanager
    def lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold a name, and yield whether it is held here: another process may have it, if `wait` is false."""
        yield True

    def file(self, name: str) -> str:
        """Return how a message names a file."""
        return f"{self.place.rstrip('/')}/{name}"


class LocalStore(Store):
    """A folder on a disk.

    Files are read, and not mapped into memory: so a process needs as much memory as what it reads at once, in whatever
    order it reads. The files that were read last stay open, as what is deleted meanwhile can then be read on.
    """

    has_locks = True

    def __init__(self, path: Path) -> None:
        self.path, self.place = path, str(path)
        self._open: dict[str, _OpenFile] = {}  # those that were read last at its end

    def names(self) -> set[str]:
        """See `Store.names`."""
        try:
            return {entry.name for entry in os.scandir(self.path) if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def folders(self) -> list[str]:
        """See `Store.folders`."""
        return sorted(entry.name for entry in os.scandir(self.path) if entry.is_dir()) if self.path.is_dir() else []

    def exists(self, name: str) -> bool:
        """See `Store.exists`."""
        return (self.path / name).is_file()

    def size(self, name: str) -> int:
        """See `Store.size`."""
        return (self.path / name).stat().st_size

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `Store.read`."""
        file = self._open.pop(name, None) or _OpenFile(self.path / name)
        self._open[name] = file
        if len(self._open) > MOST_OPEN:
            del self._open[next(iter(self._open))]
        n_bytes = (os.fstat(file.number).st_size if stop is None else stop) - start
        found = os.pread(file.number, n_bytes, start)
        while len(found) < n_bytes and (more := os.pread(file.number, n_bytes - len(found), start + len(found))):
            found += more  # a call reads two GB at most
        return found

    def write(self, name: str, pieces: Iterable[Any]) -> None:
        """Write a file under another name, wait until the disk has it, and give it its own."""
        self.path.mkdir(parents=True, exist_ok=True)
        part = self.path / f"{name}.part"
        with open(part, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path / name)
        self._open.pop(name, None)

    def free(self) -> int | None:
        """See `Store.free`."""
        return shutil.disk_usage(self.path).free

    @contextlib.contextmanager
    def lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        """See `Store.lock`. The system takes a lock from a process that ends, however it ends."""
        (self.path / LOCKS).mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / LOCKS / name)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


class _OpenFile:
    """A file that is open as long as somebody reads it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):  # it was opened
            os.close(self.number)


class ObjectStore(Store):
    """A folder in an object store. A file is there when all of it is; no process can keep others from one.

    Args:
        url: of the folder, such as s3://bucket/states.

    Raises:
        ImportError: If a package is not installed that the store needs.
        ValueError: If the kind of store is not known.
    """

    has_locks = False

    def __init__(self, url: str) -> None:
        self.place = url
        self._connection: tuple[int, Any, str] | None = None  # of this process
        self._connect()

    def _connect(self) -> tuple[Any, str]:
        """Return the file system of this process, and the folder in it: a connection does not survive a fork."""
        import fsspec

        if self._connection is None or self._connection[0] != os.getpid():
            try:
                system, path = fsspec.core.url_to_fs(self.place)
            except ImportError as error:
                raise ImportError(f"{self.place} needs another package: {str(error).rstrip('.')}.") from None
            except ValueError as error:
                raise ValueError(f"{self.place} is of no known kind of store: {str(error).rstrip('.')}.") from None
            self._connection = os.getpid(), system, path.rstrip("/")
        return self._connection[1:]

    def names(self) -> set[str]:
        """See `Store.names`."""
        return {name for name, kind in self._list() if kind == "file"}

    def folders(self) -> list[str]:
        """See `Store.folders`."""
        return sorted(name for name, kind in self._list() if kind == "directory")

    def exists(self, name: str) -> bool:
        """See `Store.exists`."""
        system, path = self._connect()
        with self._reaching():
            system.invalidate_cache()
            try:
                return bool(
                    system.info(f"{path}/{name}")["type"] == "file"
                )  # `exists` of fsspec is false for a lost store
            except FileNotFoundError:
                return False

    def _list(self) -> list[tuple[str, str]]:
        system, path = self._connect()
        with self._reaching():
            system.invalidate_cache()
            try:
                return [(x["name"].rstrip("/").rsplit("/", 1)[-1], x["type"]) for x in system.ls(path, detail=True)]
            except FileNotFoundError:
                return []

    def size(self, name: str) -> int:
        """See `Store.size`."""
        system, path = self._connect()
        with self._reaching():
            return int(system.size(f"{path}/{name}"))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """See `Store.read`."""
        system, path = self._connect()
        with self._reaching():
            return system.cat_file(f"{path}/{name}", start=start, end=stop)

    def version(self, name: str) -> str:
        """Return what tells the content of a file from earlier and later ones."""
        system, path = self._connect()
        with self._reaching():
            return str(system.ukey(f"{path}/{name}"))[:32]

    def copy(self, name: str, to: Path) -> None:
        """Copy a file to a disk."""
        system, path = self._connect()
        with self._reaching():
            system.get_file(f"{path}/{name}", str(to))

    def write(self, name: str, pieces: Iterable[Any]) -> None:
        """See `Store.write`."""
        system, path = self._connect()
        with self._reaching():
            system.makedirs(path, exist_ok=True)
            system.pipe_file(f"{path}/{name}", b"".join(pieces))

    def free(self) -> int | None:
        """See `Store.free`."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None}

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:  # each kind of store has errors of its own
            reason = " ".join(str(error).split()) or "no reason given"
            raise OSError(
                f"{self.place} could not be read or written ({type(error).__name__}: {reason}); check the address, the "
                "network and who may use it, and run again: what is complete is kept."
            ) from error


def open_store(place: str | os.PathLike[str], *names: str) -> Store:
    """Return a folder on a disk, or in an object store if the place is a URL.

    Args:
        place: a folder, or a URL such as s3://bucket/states.
        names: of a folder in it, and so on.

    Raises:
        ImportError: If a package is not installed that the store needs.
        ValueError: If the kind of store is not known.
    """
    text = os.fspath(place)
    if is_url(text):
        return ObjectStore("/".join([text.rstrip("/"), *names]))
    return LocalStore(Path(text.removeprefix("file://"), *names).expanduser())


def is_url(text: str) -> bool:
    """Return whether a text is the address of something in an object store."""
    return "://" in text and not text.startswith("file://")
