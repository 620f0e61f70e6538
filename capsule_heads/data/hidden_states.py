"""Hidden states computed once: those of a frozen backbone never change, so training need not compute them again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ..weights import plain_weights
from .splits import check_dataset
from .state_file import ABOUT, StateFile, gigabytes

if TYPE_CHECKING:
    import datasets
    from transformers.modeling_utils import PreTrainedModel

    from ..models.base import CapsuleHeadPreTrainedModel

# The fields of a configuration that name the backbone, and change nothing that it computes.
NAMES_OF_BACKBONE = ("_name_or_path", "architectures", "transformers_version")


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
    padded = torch.empty(shape, dtype=torch.float16, pin_memory=torch.cuda.is_initialized())
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
    may move) and configuration, their dtype, the layers, and the tokens. Texts with the same tokens are computed and
    stored once. A computation that is killed is resumed by the next. Several processes may ask for the same states at
    once: one computes, the others wait.

    Row `i` has the states of the dataset's row `i`, as `hidden_states` `[tokens, layers, hidden_size]` (float16,
    without padding), its `length` in tokens, and its `labels`, if any. `CapsuleCollator` makes batches of them. States
    are read when they are asked for, in each worker of a data loader on its own; only `length` and `labels` are in
    memory. `CapsuleTrainer` groups them by length. transformers' own Trainer does that with its own datasets only, and
    needs `train_sampling_strategy="random"` here.

    Each text's states have a checksum beside them, which is compared when a process first reads them.

    `to(device)` keeps them on a GPU, or in memory. Batches are then made there: no states are read or copied in a step.

    It takes `2 * layers * hidden_size` bytes of disk a token: see `estimate`. To have a cache of several datasets at
    once (folds, or splits), concatenate them. Nothing is deleted; a folder that is not needed any more can be.

    Args:
        dataset: tokenized, as `tokenize` returns it.
        model: a capsule-head model with a frozen backbone. It is not kept.
        tokenizer: the backbone's.
        cache_dir: where the folders are. Default: `capsule_heads` in the cache folder of `datasets`.
        batch_tokens: tokens, with padding, to run the backbone on at once; a longer text is a batch of its own.

    Attributes:
        folder: where the states are.
        n_bytes: what they take on disk.
        n_unique: number of different texts.

    Raises:
        ValueError: If the backbone is not frozen; if its states exceed half precision, or differ in hidden size or
            tokens by layer; or if a cache was cut short, is damaged, or is of something else.
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
    ) -> None:
        check_dataset("dataset", dataset, "Dataset")
        backbone = _frozen_backbone(model, tokenizer)
        names = _input_names(dataset, tokenizer)
        texts = _find_texts(dataset, names)
        if cache_dir is None:
            from datasets.config import HF_DATASETS_CACHE

            cache_dir = Path(HF_DATASETS_CACHE, "capsule_heads")
        key = _key(model, backbone, tokenizer, names, texts)
        file = StateFile(Path(cache_dir).expanduser(), key, texts.ends, _token_shape(model))
        if not file.is_complete():
            rows = dataset.with_format(None).select_columns(names).select(texts.rows)
            _compute(file, rows, model, CapsuleCollator(tokenizer), batch_tokens)
        self.folder, self.n_bytes, self.n_unique = file.folder, file.n_bytes, len(texts.rows)
        self._file = file
        self._states: np.ndarray | Tensor | None = None  # opened when a row is read
        self._checksums = np.zeros(0, np.uint32)
        self._is_checked = np.zeros(len(texts.rows), bool)
        self._texts, self._ends, self._lengths = texts.indices, texts.ends[texts.indices], texts.lengths
        self._labels = dataset.with_format("numpy")["labels"][:] if "labels" in dataset.column_names else None

    @staticmethod
    def estimate(
        dataset: datasets.Dataset, model: CapsuleHeadPreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> int:
        """Return the bytes of disk that the cache takes, found out from the lengths of texts alone.

        Raises:
            ValueError: If the hidden states differ in hidden size.
        """
        texts = _find_texts(dataset, _input_names(dataset, tokenizer))
        return StateFile(Path(), {}, texts.ends, _token_shape(model)).n_bytes

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
        free = _free_memory(device)
        if free is not None and free < self.n_bytes:
            raise ValueError(
                f"The hidden states take {gigabytes(self.n_bytes)}, and {device} has {gigabytes(free)} of memory free; "
                "leave them on disk (cache_on_device=False), or use fewer layers."
            )
        source, checksums = self._file.open()
        states = torch.empty(source.shape, dtype=torch.float16, device=device)
        for start, piece in self._file.pieces(source, checksums):
            states[start : start + len(piece)] = torch.from_numpy(piece)
        self._states = states
        self._is_checked[:] = True
        return self

    @property
    def column_names(self) -> list[str]:
        """The columns of a row."""
        return ["hidden_states", "length"] + ["labels"] * (self._labels is not None)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int | str) -> Any:
        """Return a row by its number; or `length` or `labels` of all rows by that name, as a list."""
        if isinstance(index, str):
            column = {"length": self._lengths, "labels": self._labels}.get(index)
            if column is None:
                raise KeyError(f"No column {index!r} in memory; there are {', '.join(self.column_names[1:])}.")
            return column.tolist()
        if self._states is None:
            self._states, self._checksums = self._file.open()
        text, end, length = self._texts[index], self._ends[index], self._lengths[index]
        states = self._states[end - length : end]
        if not self._is_checked[text]:
            self._file.check(text, np.asarray(states), self._checksums)
            self._is_checked[text] = True
        row = {"hidden_states": states, "length": int(length)}
        if self._labels is not None:
            row["labels"] = self._labels[index]
        return row

    def __getstate__(self) -> dict[str, Any]:
        # The process that gets it maps the file anew.
        return {**self.__dict__, "_states": None, "_is_checked": np.zeros_like(self._is_checked)}


def _free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device; None if it does not say."""
    module = torch.get_device_module(device)
    return module.mem_get_info(device)[0] if hasattr(module, "mem_get_info") else None


def _frozen_backbone(model: CapsuleHeadPreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the backbone whose hidden states can be cached.

    Raises:
        ValueError: If there is none, it is not frozen, or there is no tokenizer.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"{type(tokenizer).__name__} is not a tokenizer; the cache of hidden states is for texts.")
    if model.backbone is None:
        raise ValueError("This model has no backbone to compute hidden states with; load it with load_backbone=True.")
    if not model.config.freeze_backbone or any(x.requires_grad for x in model.backbone.parameters()):  # adapters
        raise ValueError("The backbone is not frozen: its hidden states change in training and cannot be cached.")
    return model.backbone


def _input_names(dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the columns that the backbone gets."""
    names = [name for name in tokenizer.model_input_names if name in dataset.column_names]
    if not names:
        raise ValueError(
            f"The dataset has the columns {', '.join(dataset.column_names)}; expected a tokenized one, with "
            f"{', '.join(tokenizer.model_input_names)}."
        )
    return names


def _token_shape(model: CapsuleHeadPreTrainedModel) -> tuple[int, int]:
    """Return the number of layers and the hidden size of a token's states."""
    sizes = [model.config.hidden_sizes[layer] for layer in model.config.layers]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"The layers in use have the hidden sizes {sizes}; the cache expects the same for all. Train without it."
        )
    return len(sizes), sizes[0]


class _Texts(NamedTuple):
    """The different texts among a dataset's rows.

    Attributes:
        rows: `[texts]`, the first row with each text, shortest first, in an order that follows from the texts alone.
        lengths: `[rows]`, in tokens.
        indices: `[rows]`, which of the texts each row has.
        digest: of the texts.
    """

    rows: np.ndarray
    lengths: np.ndarray
    indices: np.ndarray
    digest: str

    @property
    def ends(self) -> np.ndarray:
        """`[texts]`, the token at which each text ends, counted through all of them."""
        return np.cumsum(self.lengths[self.rows])


def _find_texts(dataset: datasets.Dataset, names: Sequence[str]) -> _Texts:
    first_rows: dict[tuple[int, bytes], int] = {}
    texts: list[tuple[int, bytes]] = []
    for batch in dataset.with_format(None).select_columns(list(names)).iter(1000):
        for values in zip(*(batch[name] for name in names)):
            inputs = dict(zip(names, values))
            digest = hashlib.blake2b(digest_size=16)
            for name, value in inputs.items():
                digest.update(f"{name} {len(value)} ".encode())
                digest.update(np.asarray(value).tobytes())
            length = sum(inputs["attention_mask"]) if "attention_mask" in inputs else len(values[0])
            text = (length, digest.digest())
            first_rows.setdefault(text, len(texts))
            texts.append(text)
    ordered = sorted(first_rows)
    indices = {text: index for index, text in enumerate(ordered)}
    return _Texts(
        rows=np.array([first_rows[text] for text in ordered], dtype=np.int64),
        lengths=np.array([length for length, _ in texts], dtype=np.int64),
        indices=np.array([indices[text] for text in texts], dtype=np.int64),
        digest=hashlib.sha256(b"".join(digest for _, digest in ordered)).hexdigest(),
    )


def _key(
    model: CapsuleHeadPreTrainedModel,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    texts: _Texts,
) -> dict[str, Any]:
    """Return all that the hidden states depend on; of the tokenizer, that is the tokens."""
    base_config = model.config.base_config
    config = {name: value for name, value in base_config.to_dict().items() if name not in NAMES_OF_BACKBONE}
    weights = hashlib.sha256()  # they alone say nothing of, for example, the number of heads
    for name, tensor in plain_weights(backbone):
        weights.update(f"{name} {tensor.dtype} ".encode())
        weights.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return {
        "backbone_type": base_config.model_type,
        "backbone_config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "backbone_weights": weights.hexdigest(),
        "backbone_dtype": str(backbone.dtype),
        "layers": list(model.config.layers),
        "hidden_size": _token_shape(model)[1],
        "dtype": "float16",
        "inputs": list(names),
        **({} if model.config.windowing is None else {"windows": list(model.config.windowing)}),
        "texts": texts.digest,
        "n_texts": len(texts.rows),
        "n_tokens": int(texts.lengths[texts.rows].sum()),
        ABOUT: {
            "backbone": model.config.base_model_name_or_path,
            "revision": model.config.base_model_revision,
            "tokenizer": tokenizer.name_or_path,
        },
    }


def _compute(
    file: StateFile,
    texts: datasets.Dataset,
    model: CapsuleHeadPreTrainedModel,
    collator: CapsuleCollator,
    batch_tokens: int,
) -> None:
    """Compute the states that are not in the file yet, of texts in order of length."""
    with file.writing() as unfinished:
        if unfinished is None:
            return
        start = unfinished.n_texts
        lengths = np.diff(file.ends, prepend=0)
        with transformers_logging.tqdm(
            desc="Computing hidden states",
            total=file.shape[0],
            initial=int(lengths[:start].sum()),
            unit=" tokens",
            unit_scale=True,
        ) as progress:
            while start < len(texts):
                ahead = lengths[start : start + batch_tokens]
                padded = ahead * np.arange(1, len(ahead) + 1)  # tokens in a batch that ends there
                stop = start + max(1, int(np.searchsorted(padded, batch_tokens, side="right")))
                batch = texts[start:stop]
                inputs = collator([dict(zip(batch, values)) for values in zip(*batch.values())])
                try:
                    states = _half_states(model, inputs, int(lengths[start:stop].sum()))
                except ValueError:
                    unfinished.discard()  # nobody will ever finish it
                    raise
                unfinished.append(states, lengths[start:stop])
                progress.update(len(states))
                start = stop


@torch.inference_mode()  # what it makes never meets autograd: it goes to disk
def _half_states(model: CapsuleHeadPreTrainedModel, inputs: Mapping[str, Tensor], n_tokens: int) -> np.ndarray:
    """Return a batch's states `[tokens, layers, hidden_size]`, in half precision, without padding."""
    states, masks = model.compute_hidden_states(**{name: x.to(model.device) for name, x in inputs.items()})
    mask = masks[0].bool()
    if any(not torch.equal(other.bool(), mask) for other in masks[1:]) or mask.sum() != n_tokens:
        raise ValueError(
            f"The backbone made hidden states of {', '.join(str(int(m.sum())) for m in masks)} tokens, by layer, of "
            f"{n_tokens} tokens; the cache expects one each. Train without it."
        )
    half = torch.stack([x[mask].half() for x in states], dim=1)
    if not half.isfinite().all():
        raise ValueError("The backbone's hidden states exceed half precision (65,504); train without the cache.")
    return half.cpu().numpy()
