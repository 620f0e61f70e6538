"""Folders where benchmarks keep what they measured, so that one that was stopped goes on."""

import json
from pathlib import Path
from typing import Any

from capsule_heads.files import read_json, write_json


def keep_settings(folder: Path | str, **settings: Any) -> None:
    """Note what all runs in a folder share.

    Args:
        folder: the runs'; it is created if it does not exist.
        settings: by the name of the option, as JSON has them.

    Raises:
        ValueError: If the runs that are there have others.
    """
    file = Path(folder, "settings.json")
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, settings)
        return
    kept = read_json(file)
    others = [name for name, value in json.loads(json.dumps(settings)).items() if kept.get(name) != value]
    if others:
        differ = ", ".join(f"{name} {json.dumps(kept.get(name))}, not {json.dumps(settings[name])}" for name in others)
        raise ValueError(
            f"The runs in {folder} have {differ}; expected the same settings, or --runs with another folder."
        )
