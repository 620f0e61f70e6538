"""The parts of a model that can be a backbone, and the names of its inputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

from ..checks import check_choice

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel

STACKS = ("encoder", "decoder")
TOWERS = {
    "text": ("text_config",),
    "vision": ("vision_config", "image_config"),
    "audio": ("audio_config", "speech_config"),
}
TEXT_INPUTS = ("input_ids",)
IMAGE_INPUTS = ("pixel_values",)
AUDIO_INPUTS = ("input_values", "input_features")
# Names that backbones have for inputs of ours. A backbone's name for an input is the first one here that it takes.
NAMES = {
    "pixel_values": ("pixel_values", "pixel_values_videos", "flattened_patches", "hidden_states"),
    "image_grid_thw": ("image_grid_thw", "grid_thw"),
    "image_position_ids": ("image_position_ids", "pixel_position_ids"),
    "input_features": ("input_features", "audio_mel"),
    "attention_mask": (
        "attention_mask",
        "input_features_mask",
        "feature_attention_mask",
        "padding_mask",
        "audio_mel_mask",
    ),
}
INVERTED_MASKS = ("audio_mel_mask",)  # these are true for padding


MODELS = {
    "text": "CapsuleHeadForSequenceClassification",
    "images": "CapsuleHeadForImageClassification",
    "audio": "CapsuleHeadForAudioClassification",
}


class Part(NamedTuple):
    """The part of a model that is the backbone.

    Attributes:
        stack: "encoder" or "decoder", for an encoder-decoder.
        tower: one of `TOWERS`, for a model of several towers; None for the complete model.
    """

    stack: str = "encoder"
    tower: str | None = None


ENCODER = Part()

Inputs = Mapping[str, Tensor | bool | None]  # inputs of a backbone, by our names; None for an input that is not given


class Windowing(NamedTuple):
    """The windows that texts are cut into.

    Attributes:
        length: tokens of a window, special tokens included.
        overlap: least number of tokens that neighbouring windows share, special tokens excluded.
        n_before: special tokens at the beginning of every text; every window begins with them.
        n_after: special tokens at the end of every text; every window ends with them.
    """

    length: int
    overlap: int
    n_before: int
    n_after: int


def part_of(model: PreTrainedModel, part: Part = ENCODER) -> PreTrainedModel:
    """Return the part of a model that a head needs: one tower, only the encoder of an encoder-decoder, no pooler.

    A head on hidden states never uses a pooler or a decoder after them, and DDP stops on weights without a gradient.

    Raises:
        ValueError: If the model has no such tower.
    """
    from transformers.modeling_utils import PreTrainedModel  # here, as that module imports our configuration

    if part.tower is not None:
        model = _tower(model, part.tower)
    if "add_pooling_layer" in inspect.signature(type(model).__init__).parameters and hasattr(model, "pooler"):
        model.pooler = None  # type: ignore[assignment]  # an attribute of some models
    if not model.config.is_encoder_decoder or part.stack == "decoder":
        return model
    encoder = model.get_encoder()
    # Some encoders take the outputs of a convolutional backbone before them, and not the inputs.
    takes_inputs = isinstance(encoder, PreTrainedModel) and main_input_name(encoder) == main_input_name(model)
    return encoder if takes_inputs else model


def build_on_meta(config: PreTrainedConfig, part: Part = ENCODER) -> PreTrainedModel:
    """Build the part of a model that a head needs, with tensors that have shapes and no data."""
    from transformers import AutoModel  # here: see Backbone.candidates

    config = copy.deepcopy(config)
    config._experts_implementation = "batched_mm"  # shapes in mixtures of experts then do not depend on data
    with torch.device("meta"):
        backbone = part_of(AutoModel.from_config(config, trust_remote_code=False), part)
    nn.Module.to(backbone, "meta")  # torch.Tensor(size) makes tensors on the CPU despite torch.device("meta")
    return backbone


def tower_config(config: PreTrainedConfig, tower: str) -> PreTrainedConfig | None:
    """Return the configuration of one tower, or None if the model has no such tower."""
    configs = (getattr(config, name, None) for name in TOWERS[tower])
    return next((found for found in configs if isinstance(found, PreTrainedConfig)), None)


def _tower(model: PreTrainedModel, tower: str) -> PreTrainedModel:
    from transformers.modeling_utils import PreTrainedModel

    config = tower_config(model.config, tower)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and config is not None and type(module.config) is type(config):
            base: PreTrainedModel = module.base_model  # type: ignore[assignment]  # a language model without output
            return base
    raise ValueError(f"{model.config.model_type} has no {tower} tower; leave tower out, or name another.")


def main_input_name(backbone: PreTrainedModel) -> str:
    """Return the name of a backbone's main input.

    It is one of our names, "input_ids", "pixel_values", "input_values" or "input_features", or else the backbone's own
    name. Packed patches and videos are "pixel_values" too.
    """
    accepted = list(inspect.signature(backbone.forward).parameters)
    name = backbone.main_input_name
    name = name if isinstance(name, str) and name in accepted else accepted[0]
    if name == "hidden_states":
        return "pixel_values" if name_in(accepted, "image_grid_thw") else name
    return next((ours for ours, names in NAMES.items() if name in names), name)


def name_in(accepted: Container[str], ours: str) -> str | None:
    """Return the name that a backbone accepts for an input of ours; None if it takes no such input."""
    return next((name for name in NAMES.get(ours, (ours,)) if name in accepted), None)


def check_part(part: Part, config: PreTrainedConfig) -> None:
    """Check that a model has a part.

    Raises:
        ValueError: If the part is a decoder and the model is no encoder-decoder, or if the model has no such tower.
    """
    check_choice("stack", part.stack, STACKS)
    if part.stack == "decoder" and not config.is_encoder_decoder:
        raise ValueError(
            f'stack is "decoder", but {config.model_type} is no encoder-decoder and has one stack only; '
            "leave stack out."
        )
    if part.tower is not None and (part.tower not in TOWERS or tower_config(config, part.tower) is None):
        has = [name for name in TOWERS if tower_config(config, name) is not None]
        raise ValueError(
            f"tower is {part.tower!r}; expected None, or a tower of {config.model_type}, which has "
            f"{', '.join(has) or 'none'}."
        )


def check_main_input(backbone: PreTrainedModel, expected: Sequence[str]) -> None:
    """Check that the main input of a backbone is one that a model of ours provides.

    Raises:
        ValueError: If the backbone takes another input.
    """
    name = main_input_name(backbone)
    if name not in expected:
        models = ", ".join(f"for {kind} there is {model}" for kind, model in MODELS.items())
        raise ValueError(
            f"{backbone.config.model_type} takes {name}; expected a backbone that takes {' or '.join(expected)}: "
            f"{models}."
        )
