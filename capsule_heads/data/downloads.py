"""Files of object stores, copied to this machine once: what else reads files need not know of them."""

from __future__ import annotations

import os
from pathlib import Path

from .stores import ObjectStore, is_url


def local_copy(place: str | os.PathLike[str]) -> Path:
    """Return a file as it is on a disk: a URL's is copied into the cache folder of `datasets`, unless it is there.

    Args:
        place: a path, or a URL such as s3://bucket/reviews.csv.

    Raises:
        FileNotFoundError: If there is no such file in the store.
        ImportError: If a package is not installed that the store needs.
        OSError: If the store cannot be reached, or the copy cannot be written.
        ValueError: If the kind of store is not known.
    """
    text = os.fspath(place)
    if not is_url(text):
        return Path(text.removeprefix("file://")).expanduser()
    from datasets.config import HF_DATASETS_CACHE

    folder, _, name = text.rpartition("/")
    store = ObjectStore(folder)
    try:
        version = store.version(name)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {text}.") from None
    copy = Path(HF_DATASETS_CACHE, "capsule_heads", "downloads", version, name)
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        part = copy.with_name(f"{name}.{os.getpid()}.part")
        store.copy(name, part)
        part.replace(copy)
    return copy
