"""The versions that this package needs, and the refusal of others."""

from __future__ import annotations

import platform
from importlib import metadata

from packaging.requirements import Requirement


def refuse_other_versions() -> None:
    """Raise if Python or an installed library is outside the range that this package declares.

    The bounds are those of the installed package's own metadata. A checkout that is not installed has none, and a
    library that is missing says so itself where it is imported.

    Raises:
        ImportError: If a version is outside its range.
    """
    try:
        own = metadata.metadata("capsule-heads")
    except metadata.PackageNotFoundError:
        return
    python = Requirement(f"Python{own['Requires-Python']}")
    if not python.specifier.contains(platform.python_version(), prereleases=True):
        raise ImportError(
            f"found Python {platform.python_version()}, but capsule_heads needs {python}: "
            "install it into an environment of such a Python"
        )
    needed, present = [], []
    for library in map(Requirement, own.get_all("Requires-Dist") or ()):
        if library.marker is None or library.marker.evaluate({"extra": ""}):
            version = _version(library.name)
            if version and not library.specifier.contains(version, prereleases=True):
                needed.append(f"{library.name}{library.specifier}")
                present.append(f"{library.name} {version}")
    if needed:
        command = " ".join(f'"{library}"' for library in needed)
        raise ImportError(
            f"found {', '.join(present)}, but capsule_heads needs {', '.join(needed)}: pip install {command}"
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
