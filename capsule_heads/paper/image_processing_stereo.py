"""The image processor of stereo pairs: from images, arrays or tensors to `pixel_values`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from ..hub import refuse_auto_class
from .configuration_stereo_conv import StereoConvConfig

Pair = Image.Image | np.ndarray | Tensor


class StereoImageProcessor(BaseImageProcessor):
    """Turn stereo pairs into the model's `pixel_values`, `[batch, 2, height, width]` in [0, 1].

    A pair is one of:

    - an image of both views side by side, the left one on the left, as `side_by_side` makes it. Colours become grey, so
      pipelines can be used, which load images in colour;
    - an array or tensor `[2, height, width]`, the left view first, of integers from 0 to 255 or of floats in [0, 1].

    Pairs of another size are resized bilinearly. Pairs of the model's size are not changed, as in training.

    Args:
        size: Height and width of the model's images: a number of pixels, or `{"height": ..., "width": ...}`.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, size: int | dict[str, int] = 96, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        sides = size if isinstance(size, dict) else {"height": size, "width": size}
        if set(sides) != {"height", "width"} or not all(type(n) is int and n >= 1 for n in sides.values()):
            raise ValueError(f"size is {size!r}; expected a number of pixels, or a height and a width, of at least 1.")
        self.size = dict(sides)

    @classmethod
    def register_for_auto_class(cls, auto_class: object = None) -> NoReturn:
        """Refuse; see `hub.refuse_auto_class`."""
        refuse_auto_class(cls)

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the fields of a processor; arguments as in transformers.

        Raises:
            OSError: If there is no file, or it does not hold keys and values.
        """
        fields, kwargs = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        if not isinstance(fields, dict):
            raise OSError(
                f"{pretrained_model_name_or_path} has a preprocessor_config.json without keys and values; expected "
                "the file that save_pretrained wrote."
            )
        return fields, kwargs

    def preprocess(
        self, images: Pair | Sequence[Pair], return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Prepare one pair, or several.

        Args:
            images: A pair, a list of pairs, or an array or tensor `[batch, 2, height, width]` of them.
            return_tensors: `"pt"` or `"np"`; lists of arrays without it.
            kwargs: No other options are known. Options of other processors, such as `do_resize`, raise an error.

        Returns:
            `pixel_values`, float32 `[batch, 2, height, width]`.

        Raises:
            TypeError: If an option is unknown, or a pair is not an image, an array or a tensor.
            ValueError: If there is no pair, or a pair has another shape or range of values.
        """
        if kwargs:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(kwargs)}; expected only return_tensors.")
        if isinstance(images, Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim != 4):
            images = [images]
        if not len(images):
            raise ValueError("There are no images; expected one stereo pair or more.")
        pixels = [self._resize(_read_pair(image)) for image in images]
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def _resize(self, pair: np.ndarray) -> np.ndarray:
        height, width = self.size["height"], self.size["width"]
        if pair.shape == (2, height, width):
            return pair
        views = [Image.fromarray(view).resize((width, height), Image.Resampling.BILINEAR) for view in pair]
        return np.stack([np.asarray(view) for view in views])


def side_by_side(pair: np.ndarray | Tensor) -> Image.Image:
    """Make one grey image of a stereo pair, the left view on the left, to look at or to pass to a pipeline.

    Args:
        pair: `[2, height, width]`, integers from 0 to 255 or floats in [0, 1], which are rounded to 256 steps.

    Returns:
        An image of `height` and twice the `width`.

    Raises:
        TypeError: If `pair` is neither an array nor a tensor.
        ValueError: If it does not have the shape or range of values of a pair.
    """
    if isinstance(pair, Image.Image):
        raise TypeError("pair is an image already; expected an array or a tensor [2, height, width].")
    views = np.rint(255 * _read_pair(pair)).astype(np.uint8)
    return Image.fromarray(np.concatenate(list(views), axis=1))


def _read_pair(pair: Pair) -> np.ndarray:
    """Return both views, float32 `[2, height, width]` in [0, 1]."""
    if isinstance(pair, Image.Image):
        _check_mode(pair)
        if pair.width != 2 * pair.height:
            raise ValueError(
                f"The image is {pair.width} pixels wide and {pair.height} high; expected both views of a stereo pair "
                "side by side, so twice as wide as high (side_by_side makes such an image of two views)."
            )
        grey = np.asarray(pair.convert("L"), np.float32) / 255
        return np.stack(np.split(grey, 2, axis=1))
    if isinstance(pair, Tensor):
        pair = pair.detach().cpu().float().numpy() if pair.is_floating_point() else pair.cpu().numpy()
    if not isinstance(pair, np.ndarray):
        raise TypeError(f"A stereo pair is a {type(pair).__name__}; expected an image, an array or a tensor.")
    if pair.ndim != 3 or len(pair) != 2 or not pair.size:
        raise ValueError(
            f"A stereo pair is of shape {list(pair.shape)}; expected [2, height, width], the left view first."
        )
    is_integer = np.issubdtype(pair.dtype, np.integer)
    limit = 255 if is_integer else 1
    if not (is_integer or np.issubdtype(pair.dtype, np.floating)) or not ((pair >= 0) & (pair <= limit)).all():
        raise ValueError(
            f"A stereo pair holds {pair.dtype} values from {pair.min()} to {pair.max()}; expected integers from 0 to "
            "255, or floats from 0 to 1."
        )
    return pair.astype(np.float32) / np.float32(limit)


def _check_mode(pair: Image.Image) -> None:
    if pair.mode.startswith("I") or pair.mode == "F":
        raise ValueError(
            f"The image is of mode {pair.mode}, whose values may not fit in 8 bits; expected an image of 8 bits, as "
            "capsule_heads.data.images.as_image makes it."
        )


AutoImageProcessor.register(StereoConvConfig, StereoImageProcessor, exist_ok=True)
