"""Hidden states of the texts of a folder, shard by shard, by one process or several."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from .state_folder import StateFolder

if TYPE_CHECKING:
    import datasets

    from ..models.base import CapsuleHeadPreTrainedModel

SECONDS_BETWEEN_LOOKS = 5.0  # at what other processes have written to an object store
Collator = Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]
# From the columns of some texts, and the number of their tokens: their states, one text after another,
# `[tokens, layers, hidden_size]`.
StatesOf = Callable[[Mapping[str, list], int], Tensor]


@dataclass(frozen=True)
class BackboneStates:
    """The hidden states that a model's backbone makes of texts.

    Args:
        model: with the backbone.
        collator: of batches.
    """

    model: CapsuleHeadPreTrainedModel
    collator: Collator

    @torch.inference_mode()  # what it makes never meets autograd: it goes to disk
    def __call__(self, texts: Mapping[str, list], n_tokens: int) -> Tensor:
        """Return the states of texts, `[tokens, layers, hidden_size]`, without padding.

        Raises:
            ValueError: If the backbone makes states of another number of tokens.
        """
        inputs = self.collator([dict(zip(texts, values)) for values in zip(*texts.values())])
        device = self.model.device
        states, masks = self.model.compute_hidden_states(**{name: x.to(device) for name, x in inputs.items()})
        mask = masks[0].bool()
        if any(not torch.equal(other.bool(), mask) for other in masks[1:]) or mask.sum() != n_tokens:
            raise ValueError(
                f"The backbone made hidden states of {', '.join(str(int(m.sum())) for m in masks)} tokens, by layer, "
                f"of {n_tokens} tokens; the cache expects one each. Train without it."
            )
        return torch.stack([x[mask] for x in states], dim=1)


def compute(
    folder: StateFolder,
    texts: datasets.Dataset,
    source: StatesOf,
    batch_tokens: int,
    part: tuple[int, int] | None = None,
    wait: bool = True,
) -> None:
    """Compute the shards of a folder that are not there yet.

    A process computes its own shards first, and then those that no other process has begun, where it can know that: an
    object store has no locks. What a shard holds depends on its texts alone, not on who computes it.

    Args:
        folder: of the states.
        texts: the folder's, in its order.
        source: of their states.
        batch_tokens: tokens, with padding, of a batch.
        part: number of this process, from 0 on, and of all processes that compute. Default: those of
            torch.distributed, where it was begun.
        wait: whether to return when all shards are there, not when other processes hold what is left.

    Raises:
        ValueError: If states exceed the encoding.
        OSError: If there is not enough disk.
    """
    number, n_processes = part or _part_of_process()
    folder.begin()
    missing = folder.missing()
    own = [shard for shard in missing if shard % n_processes == number]
    others = [shard for shard in missing if shard % n_processes != number]
    computer = ShardComputer(folder, source, batch_tokens)
    with progress_bar(folder, missing) as progress:
        for may_wait in (False, True) if wait else (False,):
            for shard in own + others if folder.store.has_locks else own:
                with folder.claim(shard, may_wait) as is_ours:
                    if is_ours:
                        computer.compute(shard, texts_of(folder, shard, texts), progress.update)
    while wait and not folder.store.has_locks and folder.missing():  # which the other processes compute
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _part_of_process() -> tuple[int, int]:
    """Return the number of this process and of all, where torch.distributed was begun."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def progress_bar(folder: StateFolder, missing: Sequence[int]) -> Any:
    """Return a bar of the tokens whose states are computed, of which those of the missing shards are not."""
    n_tokens = int(folder.lengths.sum())
    done = n_tokens - folder.n_tokens(missing)
    return transformers_logging.tqdm(
        desc="Computing hidden states", total=n_tokens, initial=done, unit=" tokens", unit_scale=True
    )


def texts_of(folder: StateFolder, shard: int, texts: datasets.Dataset) -> datasets.Dataset:
    """Return the texts of a shard, of all of the folder's."""
    within = folder.texts_of(shard)
    return texts.select(range(within.start, within.stop))


class ShardComputer:
    """Computes the states of a shard's texts, in batches of like length, and writes them.

    Args:
        folder: of the states, with its manifest.
        source: of their states.
        batch_tokens: tokens, with padding, of a batch.
    """

    def __init__(self, folder: StateFolder, source: StatesOf, batch_tokens: int) -> None:
        self.folder, self.source, self.batch_tokens = folder, source, batch_tokens

    def compute(self, shard: int, texts: datasets.Dataset, show: Callable[[int], object] = lambda n: None) -> None:
        """Compute and write a shard.

        Args:
            shard: that `StateFolder.claim` holds.
            texts: those of the shard, in its order.
            show: called with a number of tokens as soon as their states are computed.

        Raises:
            ValueError: If states exceed the encoding.
            OSError: If the shard cannot be written.
        """
        self.folder.write(shard, self._encode(shard, texts, show))

    def _encode(self, shard: int, texts: datasets.Dataset, show: Callable[[int], object]) -> dict[str, np.ndarray]:
        lengths, encoding = self.folder.lengths[self.folder.texts_of(shard)], self.folder.encoding
        layers, size = self.folder.token_shape
        encoded = {
            name: np.empty((int(lengths.sum()), layers, *((size,) if is_full else ())), kind)
            for name, (_, kind, is_full) in encoding.tensors.items()
        }
        start, token = 0, 0
        while start < len(lengths):
            ahead = lengths[start : start + self.batch_tokens]
            padded = ahead * np.arange(1, len(ahead) + 1)  # tokens in a batch that ends there
            stop = start + max(1, int(np.searchsorted(padded, self.batch_tokens, side="right")))
            batch = texts[start:stop]
            n_tokens = int(lengths[start:stop].sum())
            for name, x in encoding.encode(self.source(batch, n_tokens)).items():
                encoded[name][token : token + n_tokens] = x
            show(n_tokens)
            start, token = stop, token + n_tokens
        return encoded
