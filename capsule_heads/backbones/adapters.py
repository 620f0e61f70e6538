"""Adapters (LoRA): low-rank matrices that are trained in a frozen backbone and then added to its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D


class Adapters(nn.Module):
    """Trained changes to the weights of a backbone's linear layers, a product of two matrices for each layer.

    The matrices are buffers here. `training_in` trains such matrices, and this class keeps them.

    Args:
        shapes: by name of the linear layer, the number of its outputs, the rank, and the number of its inputs.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.shapes = {name: list(shape) for name, shape in shapes.items()}
        for name, (n_out, rank, n_in) in self.shapes.items():
            self.register_buffer(_key(name, "up"), torch.zeros(n_out, rank))
            self.register_buffer(_key(name, "down"), torch.zeros(rank, n_in))

    @classmethod
    def of(cls, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> Adapters:
        """Make adapters from the matrices `[outputs, rank]` and `[rank, inputs]` of each linear layer."""
        adapters = cls({name: [*up.shape, down.shape[1]] for name, (up, down) in matrices.items()})
        for own, given in zip(adapters.matrices().values(), matrices.values(), strict=True):
            for x, value in zip(own, given, strict=True):
                x.copy_(value.detach())
        return adapters

    def matrices(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the matrices `[outputs, rank]` and `[rank, inputs]` by name of the linear layer."""
        return {name: (getattr(self, _key(name, "up")), getattr(self, _key(name, "down"))) for name in self.shapes}

    @torch.no_grad()
    def add_to(self, backbone: nn.Module) -> None:
        """Add the products to a backbone's weights.

        Raises:
            ValueError: If the backbone has no such linear layers.
        """
        layers, changes = linear_layers(backbone), self.matrices()
        for name, (up, down) in changes.items():
            if name not in layers or sizes_of(layers[name]) != (len(up), down.shape[1]):
                raise ValueError(
                    f"The adapters belong to a linear layer {name} from {down.shape[1]} to {len(up)} numbers, which "
                    "the backbone does not have; expected the backbone that they were trained in."
                )
        for name, (up, down) in changes.items():
            weight: Any = layers[name].weight
            change = (up.float() @ down.float()).to(weight)
            weight.add_(change if isinstance(layers[name], nn.Linear) else change.T)


def _key(layer: str, matrix: str) -> str:
    return f"{layer}.{matrix}".replace(".", "/")  # a buffer's name has no dots


def linear_layers(backbone: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Return by name a backbone's linear layers with floating-point weights, which adapters can change."""
    from transformers.pytorch_utils import Conv1D  # the linear layer of GPT-2 and similar models

    named = backbone.named_modules()
    return {name: x for name, x in named if isinstance(x, nn.Linear | Conv1D) and x.weight.is_floating_point()}


def sizes_of(layer: nn.Linear | Conv1D) -> tuple[int, int]:
    """Return the numbers of a linear layer's outputs and inputs."""
    rows, columns = layer.weight.shape
    return (rows, columns) if isinstance(layer, nn.Linear) else (columns, rows)


class Adapter(nn.Module):
    """The matrices of one linear layer during training: `[outputs, rank]`, which starts at 0, and `[rank, inputs]`.

    Args:
        layer: the linear layer.
        rank: rank of the product.
        generator: generator that draws the second matrix.
    """

    def __init__(self, layer: nn.Linear | Conv1D, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        n_out, n_in = sizes_of(layer)
        self.up = nn.Parameter(torch.zeros(n_out, rank))
        self.down = nn.Parameter((2 * torch.rand(rank, n_in, generator=generator) - 1) / n_in**0.5)
        self.to(layer.weight.device)

    def add(self, layer: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        """Add the adapter's outputs to those of a linear layer, as a forward hook."""
        change = F.linear(F.linear(inputs[0].to(self.down.dtype), self.down), self.up)
        return outputs + change.to(outputs.dtype)


@contextlib.contextmanager
def training_in(backbone: nn.Module, rank: int, seed: int) -> Iterator[dict[str, Adapter]]:
    """Put an adapter into each linear layer of a frozen backbone, and remove the adapters at the end.

    Args:
        backbone: the backbone.
        rank: rank of each adapter.
        seed: random seed of the matrices.

    Yields:
        The adapters by name of the linear layer. Only they require gradients in the backbone.
    """
    generator, adapters, hooks = torch.Generator().manual_seed(seed), {}, []
    layers = linear_layers(backbone)
    try:
        for name, layer in layers.items():
            layer.adapter = adapters[name] = Adapter(layer, rank, generator)
            hooks.append(layer.register_forward_hook(layer.adapter.add))
        yield adapters
    finally:
        for hook in hooks:
            hook.remove()
        for name in adapters:
            del layers[name].adapter
