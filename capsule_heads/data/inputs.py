"""Inputs as users have them: one or several objects of any kind, and folders of files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

TEXT_KEYS = ("text",)
FILE_KEYS = ("array", "raw", "bytes", "path")  # of a mapping with an image or audio, as pipelines and datasets have it
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


def is_input(given: Mapping[str, Any]) -> bool:
    """Return whether a mapping is one text, image or audio, and not what `forward` takes."""
    return any(key in given for key in (*TEXT_KEYS, *FILE_KEYS))


def list_inputs(given: Any, modality: str) -> list[Any]:
    """Return a list of inputs: of one input, or of all in a list, a NumPy array of texts, a pandas Series, a generator.

    Args:
        given: one input, or several.
        modality: "text", where a tuple is one pair of texts, "image" or "audio".
    """
    if hasattr(given, "to_numpy"):  # a Series of pandas
        given = given.to_numpy()
    if isinstance(given, np.ndarray) and given.dtype.kind not in "biufc":  # texts, or objects
        given = given.tolist()
    is_pair = isinstance(given, tuple) and modality == "text"
    is_one = is_pair or isinstance(given, str | bytes | os.PathLike | Mapping | np.ndarray | Tensor)
    return [given] if is_one or not isinstance(given, Iterable) else list(given)


def download(address: str) -> bytes:
    """Return what is at an address.

    Raises:
        OSError: If there is nothing, or no connection.
    """
    import httpx

    try:
        return httpx.get(address, follow_redirects=True).raise_for_status().content
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OSError(f"{address} cannot be downloaded ({error}); expected the address of a file.") from None


def is_address(given: str) -> bool:
    """Return whether a text is an address on the network."""
    return given.startswith(("http://", "https://"))


def count_kinds(root: Path) -> Counter[str]:
    """Count the files of a folder that are "image", "audio" or "other", hidden ones aside.

    Raises:
        ValueError: If a name is not UTF-8, which tables of files cannot hold.
    """
    from PIL import Image

    images = Image.registered_extensions()
    kinds: Counter[str] = Counter()
    for path in root.rglob("*"):
        name, suffix = str(path), path.suffix.lower()
        if not name.isascii() and name.encode(errors="replace") != name.encode(errors="surrogateescape"):
            shown = os.fsencode(path).decode(errors="replace")
            raise ValueError(f"{shown} has a name that is not UTF-8; rename it.")
        if not any(part.startswith(".") for part in path.relative_to(root).parts) and path.is_file():
            kinds["image" if suffix in images else "audio" if suffix in AUDIO_SUFFIXES else "other"] += 1
    return kinds
