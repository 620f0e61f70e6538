"""Putting head and backbone together: from a pretrained backbone, and from checkpoints with or without one."""

from __future__ import annotations

import inspect
import os
from typing import Any

from transformers import AutoConfig, AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.hub import cached_file, extract_commit_hash

from .backbones import drop_pooler
from .configuration_capsule_head import CapsuleHeadConfig

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
# What from_pretrained takes that concerns the backbone as much as the head.
BACKBONE_KWARGS = (
    *HUB_KWARGS,
    "attn_implementation",
    "device_map",
    "dtype",
    "max_memory",
    "torch_dtype",
    "trust_remote_code",
    "use_safetensors",
)


def load_pretrained_backbone(
    name_or_path: str | os.PathLike, revision: str | None, config: PreTrainedConfig | None = None, **kwargs
) -> tuple[PreTrainedModel, str | None]:
    """Loads a backbone's pretrained weights.

    Args:
        name_or_path: a model on the Hub or a local directory.
        revision: branch, tag or commit; None for the default branch.
        config: the configuration object for it to keep; None to load the checkpoint's own.
        **kwargs: those of `BACKBONE_KWARGS`.

    Returns:
        The backbone, and the commit its weights are of (None for a local directory).

    Raises:
        ValueError: if the checkpoint is itself a capsule-head model, or lacks weights of the backbone.
    """
    hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
    commit = extract_commit_hash(cached_file(name_or_path, "config.json", revision=revision, **hub_kwargs), None)
    if config is None:
        config_kwargs = {name: kwargs[name] for name in ("trust_remote_code",) if name in kwargs}
        config = AutoConfig.from_pretrained(name_or_path, revision=commit or revision, **hub_kwargs, **config_kwargs)
    if isinstance(config, CapsuleHeadConfig):
        raise ValueError(
            f"{name_or_path} is a capsule-head checkpoint, not a backbone; load it with from_pretrained, or name the "
            f"backbone it was made from ({config.base_model_name_or_path})."
        )
    backbone, loading_info = AutoModel.from_pretrained(
        name_or_path, config=config, revision=commit or revision, output_loading_info=True, **kwargs
    )
    drop_pooler(backbone)
    missing = sorted(set(loading_info["missing_keys"]) & set(backbone.state_dict()))
    if missing:
        raise ValueError(
            f"The checkpoint of {name_or_path} has no weights for {len(missing)} tensors of the "
            f"{config.model_type} backbone, among them {missing[0]}; expected a checkpoint with all of them."
        )
    return backbone, commit


def check_checkpoint_type(name_or_path: str | os.PathLike, **kwargs) -> None:
    """Refuses a checkpoint that says it is of another kind of model.

    Raises:
        ValueError: naming the kind and the way to put a head on it.
    """
    config_dict, _ = PreTrainedConfig.get_config_dict(name_or_path, **kwargs)
    CapsuleHeadConfig.check_model_type(config_dict, name_or_path)


def check_config_kwargs(kwargs: dict[str, Any]) -> None:
    """Refuses keyword arguments that are no field of `CapsuleHeadConfig`: transformers would keep them, unused.

    Raises:
        TypeError: naming the unknown ones.
    """
    known = {*inspect.signature(CapsuleHeadConfig.__init__).parameters, *vars(PreTrainedConfig()), "num_labels"}
    unknown = sorted(set(kwargs) - known)
    if unknown:
        raise TypeError(f"Unknown arguments {', '.join(unknown)}; expected fields of CapsuleHeadConfig.")
