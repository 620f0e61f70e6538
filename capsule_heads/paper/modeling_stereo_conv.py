"""The small convolutional backbone of the paper's smallNORB network, for stereo pairs of grey images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithNoAttention
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_stereo_conv import StereoConvConfig


class StereoConvModel(PreTrainedModel):
    """Blocks of batch normalisation, 3x3 convolution without padding, and swish, on images with their coordinates.

    Two channels are appended to an image: the row and the column of each pixel, from -1 to 1 (Heinsen, 2019, section
    4.1). The hidden states are the feature maps after each block.
    """

    config_class = StereoConvConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ["image"]

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
        """Compute feature maps.

        Args:
            pixel_values: `[batch, num_channels, height, width]`, grey values from 0 to 1.
            output_hidden_states: whether to return the feature maps after each block.
            return_dict: False for a tuple, as in transformers.

        Returns:
            `last_hidden_state [batch, channels, height, width]`, and `hidden_states` on request.

        Raises:
            ValueError: If images have another shape.
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
            assert module.bias is not None
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False; see `CapsuleHeadPreTrainedModel`."""
        return False


def _coordinates(images: Tensor) -> Tensor:
    """Return the row and the column of each pixel, from -1 to 1, `[batch, 2, height, width]`."""
    n, _, height, width = images.shape
    # Always float32, as in the original, so a float64 network agrees with the original to the last digit.
    rows, columns = (torch.linspace(-1.0, 1.0, size, device=images.device) for size in (height, width))
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).to(images.dtype).expand(n, -1, -1, -1)


AutoModel.register(StereoConvConfig, StereoConvModel, exist_ok=True)
