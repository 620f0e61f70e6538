"""The small convolutional backbone of the paper's smallNORB network, for stereo pairs of grey images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithNoAttention
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from ..checks import check_size


class StereoConvConfig(PreTrainedConfig):
    """Configuration of a `StereoConvModel`.

    Args:
        num_channels: channels of an image: the two views of a pair.
        image_size: height and width of images.
        hidden_sizes: channels after each block.
        strides: of each block's convolution.

    Raises:
        ValueError: for sizes that are not positive whole numbers, or another number of them than of strides.
    """

    model_type = "stereo_conv"

    def __init__(
        self,
        num_channels: int = 2,
        image_size: int = 96,
        hidden_sizes: Sequence[int] = (64, 64, 64, 64, 64, 64),
        strides: Sequence[int] = (1, 2, 1, 2, 1, 2),
        **kwargs,
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


class StereoConvModel(PreTrainedModel):
    """Blocks of batch normalisation, 3x3 convolution without padding, and swish, on images with their coordinates.

    Two channels are appended to an image: the row and the column of each pixel, from -1 to 1 (Heinsen, 2019, section
    4.1). The hidden states are the feature maps after each block.
    """

    config_class = StereoConvConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: StereoConvConfig) -> None:
        super().__init__(config)
        sizes = [config.num_channels + 2, *config.hidden_sizes]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(d_inp), nn.Conv2d(d_inp, d_out, kernel_size=3, stride=stride), nn.SiLU())
            for d_inp, d_out, stride in zip(sizes, sizes[1:], config.strides)
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, return_dict: bool | None = None
    ) -> BaseModelOutputWithNoAttention:
        """Computes feature maps.

        Args:
            pixel_values: `[batch, num_channels, height, width]`, grey values from 0 to 1.
            output_hidden_states: whether to return the feature maps after each block.
            return_dict: False for a tuple, as in transformers.

        Returns:
            `last_hidden_state [batch, channels, height, width]`, and `hidden_states` on request.

        Raises:
            ValueError: for images of another shape.
        """
        size = self.config.image_size
        if pixel_values.shape[1:] != (self.config.num_channels, size, size):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected [batch, {self.config.num_channels}, "
                f"{size}, {size}]."
            )
        x = torch.cat([pixel_values, _coordinates(pixel_values)], dim=1)
        feature_maps = []
        for block in self.blocks:
            x = block(x)
            feature_maps.append(x)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithNoAttention(
            last_hidden_state=x, hidden_states=tuple(feature_maps) if output_hidden_states else None
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: see `CapsuleHeadPreTrainedModel`."""
        return False


def _coordinates(images: Tensor) -> Tensor:
    """The row and the column of each pixel, from -1 to 1, `[batch, 2, height, width]`."""
    n, _, height, width = images.shape
    # Always float32, as in the original: a float64 network then agrees with it to the last digit.
    rows, columns = (torch.linspace(-1.0, 1.0, size, device=images.device) for size in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).to(images.dtype).expand(n, -1, -1, -1)
