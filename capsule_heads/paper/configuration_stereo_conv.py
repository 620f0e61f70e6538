"""The configuration of the paper's convolutional backbone for stereo pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from ..checks import check_size


class StereoConvConfig(PreTrainedConfig):
    """Configuration of a `StereoConvModel`.

    Args:
        num_channels: channels of an image, by default the two views of a pair.
        image_size: height and width of images.
        hidden_sizes: channels after each block.
        strides: stride of each block's convolution.

    Raises:
        ValueError: If a size is not a positive whole number, or the numbers of sizes and strides differ.
    """

    model_type = "stereo_conv"

    def __init__(
        self,
        num_channels: int = 2,
        image_size: int = 96,
        hidden_sizes: Sequence[int] = (64, 64, 64, 64, 64, 64),
        strides: Sequence[int] = (1, 2, 1, 2, 1, 2),
        **kwargs: Any,
    ) -> None:
        are_lists = isinstance(hidden_sizes, list | tuple) and isinstance(strides, list | tuple)
        if not are_lists or len(hidden_sizes) != len(strides) or not hidden_sizes:
            raise ValueError(f"hidden_sizes is {hidden_sizes} and strides {strides}; expected one of each per block.")
        for name, size in {"num_channels": num_channels, "image_size": image_size}.items():
            check_size(name, size)
        for name, sizes in {"hidden_sizes": hidden_sizes, "strides": strides}.items():
            for index, size in enumerate(sizes):
                check_size(f"{name}[{index}]", size)
        self.num_channels = num_channels
        self.image_size = image_size
        self.hidden_sizes = list(hidden_sizes)
        self.strides = list(strides)
        super().__init__(**kwargs)


AutoConfig.register(StereoConvConfig.model_type, StereoConvConfig, exist_ok=True)
