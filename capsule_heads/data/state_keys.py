"""What hidden states depend on: digests of the texts, and the backbone. See docs/reference/cache_format.md."""

from __future__ import annotations

import array
import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..weights import plain_weights
from .encodings import ENCODINGS, Encoding, Float16
from .shards import DIGEST_BYTES
from .splits import check_dataset
from .state_folder import ABOUT, StateFolder

if TYPE_CHECKING:
    import datasets
    from transformers.modeling_utils import PreTrainedModel

    from ..models.base import CapsuleHeadPreTrainedModel

# The fields of a configuration that name the backbone, and change nothing that it computes.
NAMES_OF_BACKBONE = ("_name_or_path", "architectures", "transformers_version")


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


def input_names(columns: Collection[str], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return those of a tokenized dataset's columns that the backbone gets."""
    names = [name for name in tokenizer.model_input_names if name in columns]
    if not names:
        raise ValueError(
            f"The dataset has the columns {', '.join(columns)}; expected a tokenized one, with "
            f"{', '.join(tokenizer.model_input_names)}."
        )
    return names


def token_shape(model: CapsuleHeadPreTrainedModel) -> tuple[int, int]:
    """Return the number of layers and the hidden size of a token's states."""
    sizes = [model.config.hidden_sizes[layer] for layer in model.config.layers]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"The layers in use have the hidden sizes {sizes}; the cache expects the same for all. Train without it."
        )
    return len(sizes), sizes[0]


class Texts(NamedTuple):
    """The different texts among a dataset's rows.

    Attributes:
        rows: `[texts]`, the first row with each text, shortest first, in an order that follows from the texts alone.
        lengths: `[rows]`, in tokens.
        indices: `[rows]`, which of the texts each row has.
        digests: `[texts, 16]`, bytes that tell the texts apart.
    """

    rows: np.ndarray
    lengths: np.ndarray
    indices: np.ndarray
    digests: np.ndarray

    def select(self, dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
        """Return the different texts, with what the backbone gets of them."""
        return dataset.with_format(None).select_columns(input_names(dataset.column_names, tokenizer)).select(self.rows)


def find_texts(dataset: datasets.Dataset, names: Sequence[str]) -> Texts:
    """Return the different texts of a dataset, by some of its columns."""
    # As arrays, not as objects: of a million texts these would take some hundred megabytes.
    numbers, content = array.array("q"), bytearray()
    for batch in dataset.with_format(None).select_columns(list(names)).iter(1000):
        for values in zip(*(batch[name] for name in names)):
            inputs = dict(zip(names, values))
            numbers.append(sum(inputs["attention_mask"]) if "attention_mask" in inputs else len(values[0]))
            content += digest_text(inputs)
    lengths = np.array(numbers, np.int64)
    digests = np.frombuffer(bytes(content), np.uint8).reshape(-1, DIGEST_BYTES)
    high, low = digests.view(">u8").astype(np.uint64).T  # big-endian: in the order of the bytes
    order = np.lexsort((low, high, lengths))  # stable: the first row of a text comes first
    is_new = np.ones(len(order), bool)
    is_new[1:] = np.any([x[order][1:] != x[order][:-1] for x in (lengths, high, low)], axis=0)
    indices = np.empty(len(order), np.int64)
    indices[order] = np.cumsum(is_new) - 1
    rows = order[is_new]
    return Texts(rows=rows, lengths=lengths, indices=indices, digests=digests[rows])


def digest_text(inputs: Mapping[str, Sequence[int]]) -> bytes:
    """Return what tells a text apart: a digest of what the backbone gets of it."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, value in inputs.items():
        digest.update(f"{name} {len(value)} ".encode())
        digest.update(np.asarray(value).tobytes())
    return digest.digest()


def key_of_model(
    model: CapsuleHeadPreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]
) -> dict[str, Any]:
    """Return all that hidden states depend on, but for the texts and how the states are kept.

    Args:
        model: with a frozen backbone.
        tokenizer: the backbone's; of it, states depend on the tokens alone.
        names: of what the backbone gets.

    Raises:
        ValueError: If the states cannot be cached.
    """
    backbone = _frozen_backbone(model, tokenizer)
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
        "hidden_size": token_shape(model)[1],
        "inputs": list(names),
        **({} if model.config.windowing is None else {"windows": list(model.config.windowing)}),
        ABOUT: {
            "backbone": model.config.base_model_name_or_path,
            "revision": model.config.base_model_revision,
            "tokenizer": tokenizer.name_or_path,
        },
    }


def find_folder(
    dataset: datasets.Dataset,
    model: CapsuleHeadPreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | os.PathLike[str] | None,
    states_dtype: str | None,
) -> tuple[Texts, StateFolder]:
    """Return the different texts of a dataset, and the folder that their hidden states are in, or will be.

    Args:
        dataset: see `HiddenStateCache`, for the others too.
        model: with the backbone.
        tokenizer: the backbone's.
        cache_dir: where the folders are.
        states_dtype: name of how states are kept; None for the default.

    Raises:
        ValueError: If the states cannot be cached.
        TypeError: If the dataset is something else than a `Dataset`.
    """
    check_dataset("dataset", dataset, "Dataset")
    _frozen_backbone(model, tokenizer)
    kept_as, names = encoding_of(states_dtype), input_names(dataset.column_names, tokenizer)
    texts = find_texts(dataset, names)
    if cache_dir is None:
        from datasets.config import HF_DATASETS_CACHE

        cache_dir = os.path.join(HF_DATASETS_CACHE, "capsule_heads")
    lengths = texts.lengths[texts.rows]
    key = {
        **key_of_model(model, tokenizer, names),
        "dtype": kept_as.name,
        "texts": hashlib.sha256(texts.digests.tobytes()).hexdigest(),
        "n_texts": len(texts.rows),
        "n_tokens": int(lengths.sum()),
    }
    return texts, StateFolder.of_key(cache_dir, key, lengths, texts.digests, token_shape(model), kept_as)


def encoding_of(states_dtype: str | None) -> Encoding:
    """Return an encoding by its name; half precision by default.

    Raises:
        ValueError: If there is no such encoding.
    """
    if states_dtype is None:
        return ENCODINGS[Float16.name]
    if states_dtype not in ENCODINGS:
        raise ValueError(f"states_dtype is {states_dtype!r}; expected one of {', '.join(ENCODINGS)}.")
    return ENCODINGS[states_dtype]
