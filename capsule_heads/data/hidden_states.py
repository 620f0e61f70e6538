"""Hidden states computed once: those of a frozen backbone never change, so training need not compute them again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from .computing_states import BackboneStates, compute
from .shards import LENGTHS, Shard
from .splits import check_dataset
from .state_folder import StateFolder, gigabytes
from .state_keys import (
    encoding_of,
    find_folder,
    find_texts,
    input_names,
    key_of_model,
    token_shape,
)
from .state_sources import StateSources

if TYPE_CHECKING:
    import datasets

    from ..models.base import CapsuleHeadPreTrainedModel


class CapsuleCollator(DataCollatorWithPadding):
    """Pads a batch of texts, or of cached hidden states, to its longest.

    Args:
        tokenizer: the backbone's; pads texts, on its own side.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)

    def __call__(self, features: list[dict[str, Any]]) -> Mapping[str, Tensor]:  # type: ignore[override]  # wider: cached
        """Return what the model takes: `input_ids ...`, or `hidden_states` and `attention_mask`; and `labels`."""
        if "hidden_states" not in features[0]:
            return super().__call__(features)
        states = [feature["hidden_states"] for feature in features]
        lengths = np.array([len(x) for x in states])
        pad = _pad_on_device if isinstance(states[0], Tensor) else _pad
        mask = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None])
        batch = _Batch(hidden_states=pad(states, lengths), attention_mask=mask.long())
        if "labels" in features[0]:
            batch["labels"] = torch.from_numpy(np.asarray([feature["labels"] for feature in features]))
        return batch


class _Batch(dict):
    """A batch of which hidden states may be on a device: a data loader can pin the others alone."""

    def pin_memory(self) -> _Batch:
        return _Batch({name: x.pin_memory() if x.device.type == "cpu" else x for name, x in self.items()})


def _pad(states: Sequence[np.ndarray], lengths: np.ndarray) -> Tensor:
    """Return `[texts, longest, layers, hidden_size]`, zero behind each text."""
    shape = len(states), int(lengths.max()), *states[0].shape[1:]
    # In a process that uses a GPU, straight to memory that it copies from: a data loader need not copy it once more.
    dtype = torch.float16 if states[0].dtype == np.float16 else torch.float32
    padded = torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_initialized())
    for row, x in zip(padded.numpy(), states):  # read from disk straight to where they stay
        row[: len(x)] = x
        row[len(x) :] = 0
    return padded


def _pad_on_device(states: Sequence[Tensor], lengths: np.ndarray) -> Tensor:
    """Return the same as `_pad`, of states on one device, by few launches and without waiting for the device."""
    if torch.utils.data.get_worker_info() is not None and states[0].device.type != "cpu":
        raise ValueError(
            f"The hidden states are on {states[0].device}, which worker processes of a data loader cannot share; set "
            "dataloader_num_workers to 0."
        )
    packed = torch.cat([*states, states[0].new_zeros(1, *states[0].shape[1:])])  # the last one is for padding
    starts, positions = np.cumsum(lengths) - lengths, np.arange(lengths.max())
    rows = np.where(positions < lengths[:, None], starts[:, None] + positions, len(packed) - 1)
    index = torch.from_numpy(rows.reshape(-1)).to(packed.device, non_blocking=True)
    return packed.index_select(0, index).unflatten(0, (len(states), len(positions)))


class HiddenStateCache(Dataset):
    """The hidden states of a tokenized dataset under a frozen backbone, on disk, as a dataset to train on.

    They are computed once, and any later run on the same texts and the same backbone, at the same layers, finds them,
    whatever its head and labels are. A folder is keyed on the backbone's weights (not on their name or revision: those
    may move) and configuration, their dtype, the layers, the encoding, and the tokens. Texts with the same tokens are
    computed and stored once. A folder has shards, of which each is written completely or not at all: a computation that
    is killed is resumed by the next, at the shard it was in. Several processes that ask for the same states share the
    shards among them. The states do not depend on how many processes there were. docs/reference/cache_format.md
    specifies the files.

    Row `i` has the states of the dataset's row `i`, as `hidden_states` `[tokens, layers, hidden_size]` (float16 or
    float32, without padding), its `length` in tokens, and its `labels`, if any. `CapsuleCollator` makes batches of
    them. States are read when they are asked for, in each worker of a data loader on its own; only `length` and
    `labels` are in memory. `CapsuleTrainer` groups them by length. transformers' own Trainer does that with its own
    datasets only, and needs `train_sampling_strategy="random"` here.

    Each text's states have a checksum beside them, which is compared when a process first reads them.

    `to(device)` keeps them on a GPU, or in memory. Batches are then made there: no states are read or copied in a step.

    It takes `2 * layers * hidden_size` bytes of disk a token, or half of that as int8: see `estimate`. Nothing is
    deleted; a folder that is not needed any more can be.

    Args:
        dataset: tokenized, as `tokenize` returns it.
        model: a capsule-head model with a frozen backbone. It is not kept.
        tokenizer: the backbone's.
        cache_dir: where the folders are. Default: `capsule_heads` in the cache folder of `datasets`.
        batch_tokens: tokens, with padding, to run the backbone on at once; a longer text is a batch of its own.
        states_dtype: how states are kept: "float16" (the default), "bfloat16", or "int8" with a scale for each token at
            each layer.
        sources: folders with states of the same backbone, made with whatever texts, or folders that have such in them.
            If there are any, all states are read from them, however they are kept, and none are computed: a part of
            the texts of one folder, or those of several.

    Attributes:
        folder: where the states are; None where they are read from `sources`.
        n_bytes: what they take on disk.
        n_unique: number of different texts.

    Raises:
        ValueError: If the backbone is not frozen; if its states exceed their dtype, or differ in hidden size or tokens
            by layer; if a cache was cut short, is damaged, or is of something else; or if sources lack a text.
        TypeError: If the dataset is a stream, or something else than a `Dataset`.
        OSError: If there is not enough disk.

    Example:
        >>> train = HiddenStateCache(tokenized["train"], model, tokenizer)
        >>> CapsuleTrainer(model, arguments, train_dataset=train, data_collator=CapsuleCollator(tokenizer))
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        model: CapsuleHeadPreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache_dir: str | os.PathLike[str] | None = None,
        batch_tokens: int = 2048,
        states_dtype: str | None = None,
        sources: Sequence[str | os.PathLike[str]] = (),
    ) -> None:
        # The shards, in one folder or several; opened when a row is read.
        self._files: Sequence[tuple[StateFolder, int]]
        self.folder: str | None = None
        if sources:
            check_dataset("dataset", dataset, "Dataset")
            names = input_names(dataset.column_names, tokenizer)
            found = StateSources(sources, key_of_model(model, tokenizer, names), states_dtype)
            texts = find_texts(dataset, names)
            self._files, self._encoding = found.shards, found.encoding
            self._places, self._rows = found.find(texts.digests)
        else:
            texts, folder = find_folder(dataset, model, tokenizer, cache_dir, states_dtype)
            if not folder.is_complete():
                source = BackboneStates(model, CapsuleCollator(tokenizer))
                compute(folder, texts.select(dataset, tokenizer), source, batch_tokens)
            self._files, self._encoding = [(folder, shard) for shard in range(folder.n_shards)], folder.encoding
            self._places, self._rows = folder.places()
            self.folder = folder.place
        self._shards: dict[int, Shard] = {}
        self._kept: tuple[Tensor, np.ndarray] | None = None  # on a device, and where each text begins there
        self._token_shape, self.n_unique = token_shape(model), len(texts.rows)
        self.n_bytes = int(texts.lengths[texts.rows].sum()) * self._encoding.token_bytes(self._token_shape)
        self._is_checked = np.zeros(len(texts.rows), bool)
        self._texts, self._lengths = texts.indices, texts.lengths
        self._labels = dataset.with_format("numpy")["labels"][:] if "labels" in dataset.column_names else None

    @staticmethod
    def estimate(
        dataset: datasets.Dataset,
        model: CapsuleHeadPreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        states_dtype: str | None = None,
    ) -> int:
        """Return the bytes of disk that the cache takes, found out from the lengths of texts alone.

        Raises:
            ValueError: If the hidden states differ in hidden size.
        """
        texts = find_texts(dataset, input_names(dataset.column_names, tokenizer))
        n_tokens = int(texts.lengths[texts.rows].sum())
        return n_tokens * encoding_of(states_dtype).token_bytes(token_shape(model))

    def to(self, device: torch.device | str) -> HiddenStateCache:
        """Keep all hidden states on a device; rows then have them as tensors there.

        A data loader cannot have worker processes then, unless the device is the CPU.

        Args:
            device: such as "cuda", or "cpu" to keep them in memory.

        Returns:
            The cache itself.

        Raises:
            ValueError: If the device has less memory free than they take, or they are damaged.
        """
        device = torch.device(device)
        shards = [folder.open(number) for folder, number in self._files]
        n_tokens = sum(int(shard.ends[-1]) for shard in shards)
        dtype = torch.float16 if self._encoding.row is np.float16 else torch.float32
        free, needed = _free_memory(device), n_tokens * int(np.prod(self._token_shape)) * dtype.itemsize
        if free is not None and free < needed:
            raise ValueError(
                f"The hidden states take {gigabytes(needed)}, and {device} has {gigabytes(free)} of memory free; "
                "leave them on disk (cache_on_device=False), or use fewer layers."
            )
        states = torch.empty((n_tokens, *self._token_shape), dtype=dtype, device=device)
        starts, first = np.zeros(len(self._places), np.int64), 0
        for place, shard in enumerate(shards):
            for start, piece in shard.pieces():
                states[first + start : first + start + len(piece)] = torch.tensor(piece)
            here = self._places == place
            starts[here] = first + (shard.ends - shard.index[LENGTHS])[self._rows[here]]
            first += int(shard.ends[-1])
        self._kept = states, starts
        return self

    @property
    def column_names(self) -> list[str]:
        """The columns of a row."""
        return ["hidden_states", "length"] + ["labels"] * (self._labels is not None)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int | str) -> Any:
        """Return a row by its number; or `length` or `labels` of all rows by that name, as a list."""
        if isinstance(index, str):
            column = {"length": self._lengths, "labels": self._labels}.get(index)
            if column is None:
                raise KeyError(f"No column {index!r} in memory; there are {', '.join(self.column_names[1:])}.")
            return column.tolist()
        text, length = self._texts[index], int(self._lengths[index])
        if self._kept is not None:
            kept, starts = self._kept
            states: Any = kept[starts[text] : starts[text] + length]
        else:
            place = int(self._places[text])
            if place not in self._shards:
                folder, number = self._files[place]
                self._shards[place] = folder.open(number)
            states = self._shards[place].read(int(self._rows[text]), check=not self._is_checked[text])
            self._is_checked[text] = True
        row = {"hidden_states": states, "length": length}
        if self._labels is not None:
            row["labels"] = self._labels[index]
        return row

    def __getstate__(self) -> dict[str, Any]:
        # The process that gets it maps the files anew.
        return {**self.__dict__, "_shards": {}, "_is_checked": np.zeros_like(self._is_checked)}


def _free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device; None if it does not say."""
    module = torch.get_device_module(device)
    return module.mem_get_info(device)[0] if hasattr(module, "mem_get_info") else None
