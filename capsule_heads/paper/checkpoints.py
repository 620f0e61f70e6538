"""Conversion of the published checkpoints of the original implementation to directories for `from_pretrained`."""

from __future__ import annotations

import os
import pickle
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config

from ..checks import check_choice
from ..data.sst import BINARY_NAMES, FINE_GRAINED_NAMES
from ..models import CapsuleHeadConfig, CapsuleHeadForImageClassification, CapsuleHeadForSequenceClassification
from ..models.base import CapsuleHeadPreTrainedModel
from ..models.configuration_capsule_head import label_fields
from . import PAPER
from .configuration_stereo_conv import StereoConvConfig
from .image_processing_stereo import StereoImageProcessor
from .stereo import CATEGORIES

NETWORKS = ("sst2_root", "sst5_root", "smallnorb")
GPT2_LARGE = "openai-community/gpt2-large"
# Patterns in our names of weights, and replacements that give the original's names. The original numbers the layers of
# all convolution blocks in sequence: normalisation, convolution, swish.
Names = tuple[tuple[str, str | Callable[[re.Match], str]], ...]
TEXT_NAMES: Names = (
    (r"^head\.detect_parts\.0\.depth_emb$", "depth_emb"),
    (r"^head\.detect_parts\.0\.affine\.", "detect_parts.0."),
    (r"^head\.detect_parts\.0\.norm\.", "detect_parts.2."),
    (r"^head\.", ""),
)
VISION_NAMES: Names = (
    (r"^backbone\.blocks\.(\d+)\.(\d+)\.", lambda match: f"convolve.{3 * int(match[1]) + int(match[2])}."),
    (r"^head\.", ""),
)


def build_network(network: str) -> CapsuleHeadPreTrainedModel:
    """Build one of the networks of Heinsen (2019), section 4, with random weights.

    Args:
        network: "sst2_root" or "sst5_root" for a head on the hidden states of GPT-2-large, without the backbone; or
            "smallnorb".

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If there is no such network.
    """
    check_choice("network", network, NETWORKS)
    names = {"smallnorb": CATEGORIES, "sst5_root": FINE_GRAINED_NAMES, "sst2_root": BINARY_NAMES}[network]
    fields: dict[str, Any] = {**PAPER, **label_fields(names)}
    if network == "smallnorb":
        backbone = StereoConvConfig()
        config = CapsuleHeadConfig(
            backbone,
            hidden_sizes=backbone.hidden_sizes,
            head_type="spatial_pose",
            freeze_backbone=False,
            **fields,
        )
        return CapsuleHeadForImageClassification(config).eval()
    config = CapsuleHeadConfig(
        GPT2Config(n_embd=1280, n_layer=36, n_head=20, architectures=["GPT2LMHeadModel"]),
        base_model_name_or_path=GPT2_LARGE,
        hidden_sizes=[1280] * 37,
        head_only=True,
        **fields,
    )
    return CapsuleHeadForSequenceClassification(config, build=False).eval()


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read a state dict that `torch.save` wrote, without executing anything in the file.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not such a file, or holds anything but tensors by name.
    """
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or ["It is empty."])[0]
        raise ValueError(
            f"{path} is not a state dict; expected a file of tensors by name, as torch.save(model.state_dict(), path) "
            f"writes it. Nothing else is read, as a pickle could execute code. {reason}"
        ) from error
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(
            f"{path} holds a {type(state_dict).__name__} that is not tensors by name; expected a state dict."
        )
    return dict(state_dict)


def convert_state_dict(state_dict: dict[str, Tensor], network: str) -> CapsuleHeadPreTrainedModel:
    """Put the weights of an original network into one of ours.

    Args:
        state_dict: tensors by their original names.
        network: one of `NETWORKS`.

    Returns:
        The model, in evaluation mode, with the dtype of the weights.

    Raises:
        ValueError: If a tensor is missing, unexpected, or of another shape. The message names all such tensors.
    """
    model = build_network(network)
    own = model.state_dict()
    names = {key: _original_name(key, VISION_NAMES if network == "smallnorb" else TEXT_NAMES) for key in own}
    # Our networks do not need the original's constants.
    given = {name: tensor for name, tensor in state_dict.items() if not name.endswith(".CONST_one")}
    problems = [f"{name} is missing" for name in names.values() if name not in given]
    problems += [f"{name} is unexpected" for name in given.keys() - set(names.values())]
    converted = {}
    for key, name in names.items():
        if name not in given:
            continue
        tensor, expected = given[name], _original_shape(key, own[key])
        if tensor.shape != expected:
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(expected)}")
        else:
            converted[key] = tensor.view(own[key].shape)
    if problems:
        raise ValueError(f"These are not the weights of the {network} network: {'; '.join(sorted(problems))}.")
    model.load_state_dict(converted, assign=True)
    return model


def convert_checkpoint(path: str | os.PathLike, network: str, output: str | os.PathLike) -> None:
    """Convert a published state dict to a directory that `from_pretrained` loads.

    Args:
        path: the state dict.
        network: one of `NETWORKS`.
        output: directory to write; it must be new, or empty.

    Raises:
        OSError: If the file cannot be read, or the directory cannot be written.
        ValueError: If the file is not the network's state dict, or the directory is not empty.
    """
    output = Path(output)
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; expected a new or empty directory: name another one.")
    model = convert_state_dict(read_state_dict(path), network)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as folder:
        complete = Path(folder, "model")  # an incomplete directory never has the name of the output
        model.save_pretrained(complete)
        if network == "smallnorb":
            StereoImageProcessor().save_pretrained(complete)
        complete.replace(output)


def _original_name(key: str, names: Names) -> str:
    """Return the original's name of one of our weights."""
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    return key


def _original_shape(key: str, tensor: Tensor) -> torch.Size:
    """Return the shape of one of our weights in the original, whose head has two-dimensional convolutions."""
    return torch.Size([*tensor.shape, 1]) if re.match(r"^head\.compute_\w+\.1\.weight$", key) else tensor.shape
