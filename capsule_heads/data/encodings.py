"""How hidden states are kept on disk: float16, bfloat16, or int8 with a scale for each token at each layer."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

STATES, SCALES = "states", "scales"  # names of tensors in a shard


class Encoding(abc.ABC):
    """A way of keeping hidden states.

    Attributes:
        name: the encoding's, in a manifest.
        tensors: of each tensor of a shard that holds states its dtype in safetensors' words, the dtype of NumPy that
            it is read as, and whether it has a number for each of a token's states, or one for each layer.
        row: the dtype of decoded states.
    """

    name: str
    tensors: Mapping[str, tuple[str, type, bool]]
    row: type = np.float32

    @abc.abstractmethod
    def encode(self, states: Tensor) -> dict[str, np.ndarray]:
        """Return the tensors that keep states `[tokens, layers, hidden_size]`.

        Raises:
            ValueError: If the states are not finite, or exceed the encoding.
        """

    @abc.abstractmethod
    def decode(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return states `[tokens, layers, hidden_size]` of the dtype `row`."""

    def token_bytes(self, token_shape: tuple[int, int]) -> int:
        """Return the bytes of a token's states, `layers, hidden_size`."""
        n_layers, size = token_shape
        return sum(
            n_layers * (size if is_full else 1) * np.dtype(kind).itemsize for _, kind, is_full in self.tensors.values()
        )


class Float16(Encoding):
    """Half precision, with 11 bits of each number, up to 65,504."""

    name = "float16"
    tensors = MappingProxyType({STATES: ("F16", np.float16, True)})
    row = np.float16

    def encode(self, states: Tensor) -> dict[str, np.ndarray]:
        """See `Encoding.encode`."""
        half = states.half()
        if not _are_finite(half):
            raise ValueError(
                "The backbone's hidden states exceed half precision (65,504); keep them as bfloat16 "
                "(states_dtype=bfloat16), or train without the cache."
            )
        return {STATES: half.cpu().numpy()}

    def decode(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Encoding.decode`."""
        return tensors[STATES]


class BFloat16(Encoding):
    """The range of float32, with 8 bits of each number."""

    name = "bfloat16"
    tensors = MappingProxyType({STATES: ("BF16", np.uint16, True)})  # NumPy has no bfloat16

    def encode(self, states: Tensor) -> dict[str, np.ndarray]:
        """See `Encoding.encode`."""
        _check_finite(states)
        return {STATES: states.bfloat16().cpu().view(torch.int16).numpy().view(np.uint16)}

    def decode(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Encoding.decode`."""
        return (tensors[STATES].astype(np.uint32) << 16).view(np.float32)


class Int8(Encoding):
    """Whole numbers from -127 to 127, times a scale for each token at each layer: half the size of half precision."""

    name = "int8"
    tensors = MappingProxyType({SCALES: ("F32", np.float32, False), STATES: ("I8", np.int8, True)})

    def encode(self, states: Tensor) -> dict[str, np.ndarray]:
        """See `Encoding.encode`."""
        _check_finite(states)
        x = states.float()
        scales = x.abs().amax(-1) / 127
        rounded = (x / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round_().to(torch.int8)
        return {SCALES: scales.cpu().numpy(), STATES: rounded.cpu().numpy()}

    def decode(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        """See `Encoding.decode`."""
        return tensors[STATES] * tensors[SCALES][..., None]


def _are_finite(states: Tensor) -> bool:
    # The extremes are NaN where any state is. Looking at each state takes 15 times as long, and longer than all else.
    return not states.numel() or bool(torch.stack(torch.aminmax(states)).isfinite().all())


def _check_finite(states: Tensor) -> None:
    if not _are_finite(states):
        raise ValueError("The backbone's hidden states are not finite; train without the cache to see where.")


ENCODINGS: Mapping[str, Encoding] = MappingProxyType({x.name: x for x in (Float16(), BFloat16(), Int8())})
