"""A module's weights as plain tensors, whatever they are kept as, and a check that they are still the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

N_SAMPLED = 64  # numbers of each weight


def plain_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and values of all weights and buffers; of a quantised one, the tensors that it is made of."""
    for name, x in module.state_dict().items():
        yield from _plain(name, x)


def _plain(name: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    if is_traceable_wrapper_subclass(x):
        for part in x.__tensor_flatten__()[0]:
            inner = getattr(x, part)
            if isinstance(inner, Tensor):  # a sharded one also names the mesh of its processes
                yield from _plain(f"{name}.{part}", inner)
    else:
        yield name, x


@torch.no_grad()
def sample_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of some numbers of every weight and buffer, which show whether training or merging changed any.

    Those on the meta device, which have no numbers, are left out.
    """
    weights = {name: x for name, x in plain_weights(module) if x.device.type != "meta"}
    return {name: x.flatten()[:: max(1, x.numel() // N_SAMPLED)].cpu().clone() for name, x in weights.items()}


def same_weights(module: nn.Module, sample: dict[str, Tensor]) -> bool:
    """Return whether a module still has the weights of a sample, up to a cast to another dtype.

    Weights that have other names by now, as when they are split over processes, are not compared.
    """
    found = sample_weights(module)
    return all(torch.equal(found[name], x.to(found[name].dtype)) for name, x in sample.items() if name in found)


def digest_weights(module: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Return a digest of some numbers of every weight and buffer, and their names.

    Args:
        module: with the weights.
        dtype: to cast the numbers to first, so that the digest does not depend on the dtype of the module; None to take
            them as they are.
    """
    digest = hashlib.sha256()
    for name, x in sample_weights(module).items():
        digest.update(name.encode() + x.to(dtype or x.dtype).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
