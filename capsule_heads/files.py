"""Text and JSON files, written completely or not at all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json(path: str | Path, kind: type[dict | list] = dict) -> Any:
    """Read a JSON file that holds keys and values, or a list.

    Raises:
        ValueError: If `parse_json` raises one.
    """
    return parse_json(path, Path(path).read_bytes(), kind)


def parse_json(path: str | Path, given: bytes, kind: type[dict | list] = dict) -> Any:
    """Return the keys and values, or the list, of a JSON file that was read.

    Args:
        path: the file, for messages.
        given: its bytes.
        kind: of what it holds.

    Raises:
        ValueError: If it is not JSON, is nested too deeply to read, or holds something else.
    """
    try:
        content = json.loads(given.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # also of bytes that are not UTF-8
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(content, kind):
        expected = {dict: "keys and values", list: "a list"}[kind]
        raise ValueError(f"{path}: expected {expected}, found {type(content).__name__}.")
    return content


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file, completely or not at all.

    Raises:
        OSError: If it cannot be written; an earlier file is as it was.
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, completely or not at all: under another name first.

    Raises:
        OSError: If it cannot be written; an earlier file is as it was.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        with writing(path, "make room, or choose another place"):
            part.write_text(text, encoding="utf-8")
            part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


@contextlib.contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Name the file in the error of a full disk, which names none.

    Args:
        path: the file that is written.
        remedy: what to do, for the message.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}; {remedy}.") from error


@contextlib.contextmanager
def holding(path: Path, seconds: float, otherwise: str) -> Iterator[None]:
    """Hold a lock; a process that ends, however it ends, holds it no more.

    Args:
        path: the file of the lock.
        seconds: to wait for it.
        otherwise: the message if another process holds it.

    Raises:
        OSError: If another process holds it, or nothing can be written there.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise OSError(otherwise) from None
    try:
        yield
    finally:
        lock.release()
