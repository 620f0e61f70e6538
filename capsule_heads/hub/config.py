"""The configuration of a checkpoint, as its directory has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..backbones.loading import check_model_type
from ..files import read_json
from ..heads import EnsembleHead, get_head

CLASSES = {
    "AutoConfig": "CapsuleHeadConfig",
    "AutoModel": "CapsuleHeadModel",
    "AutoModelForAudioClassification": "CapsuleHeadForAudioClassification",
    "AutoModelForImageClassification": "CapsuleHeadForImageClassification",
    "AutoModelForSequenceClassification": "CapsuleHeadForSequenceClassification",
}


def auto_class_of(config: dict[str, Any]) -> str:
    """Return the name of transformers' auto class for a checkpoint, from its configuration."""
    return next(name for name, class_name in CLASSES.items() if class_name == config["architectures"][0])


def read_config(directory: Path) -> dict[str, Any]:
    """Return the configuration of a checkpoint.

    Raises:
        OSError: If the directory has none.
        ValueError: If it is that of another kind of model, its head is not registered, or `save_pretrained` did not
            write it; the message names what is wrong.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise OSError(f"{directory} holds no config.json; expected a directory that save_pretrained wrote.")
    config = read_json(path)
    check_model_type(config, directory)
    is_right = {
        "architectures": lambda x: isinstance(x, list) and len(x) == 1 and x[0] in CLASSES.values(),
        "base_config": lambda x: isinstance(x, dict) and "model_type" in x,
        "base_model_name_or_path": lambda x: isinstance(x, str | None),
        "base_model_revision": lambda x: isinstance(x, str | None),
        "head_only": lambda x: isinstance(x, bool),
        "head_type": lambda x: isinstance(x, str),
        "id2label": lambda x: isinstance(x, dict) and all(map(str.isdecimal, x)),
    }
    config.setdefault("id2label", {})  # transformers leaves it out for two classes without names
    for key, check in is_right.items():
        if key not in config or not check(config[key]):
            found = f"is {config[key]!r}" if key in config else "is missing"
            raise ValueError(f"{key} {found} in {path}; expected what save_pretrained writes: save the model again.")
    members_of(config)
    return config


def members_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the descriptions of the heads of an ensemble, from a configuration; empty for another head.

    Raises:
        ValueError: If a head is not registered, or a description is not what `make_ensemble` writes.
        TypeError: If it names an unknown option.
    """
    if not issubclass(get_head(config["head_type"]), EnsembleHead):
        return []
    return list(EnsembleHead.Options(members=config.get("members")).members or ())
