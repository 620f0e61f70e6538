"""Hidden states computed once: those of a frozen backbone never change, so training need not compute them again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import List as ListFeature
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

# What a configuration says of where the backbone comes from, not of what it computes.
NAMES_OF_BACKBONE = ("_name_or_path", "architectures", "transformers_version")


class CapsuleCollator(DataCollatorWithPadding):
    """Pads a batch of texts, or of cached hidden states, to its longest.

    Args:
        tokenizer: the backbone's; pads texts, on its own side.
        n_depths: number of depths in cached hidden states.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, n_depths: int) -> None:
        super().__init__(tokenizer)
        self.n_depths = n_depths

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns what the model takes: `input_ids ...`, or `hidden_states` and `attention_mask`; and `labels`."""
        if "hidden_states" not in features[0]:
            return super().__call__(features)
        lengths = [len(feature["attention_mask"]) for feature in features]
        states = [torch.from_numpy(np.asarray(feature["hidden_states"], dtype=np.float16)) for feature in features]
        states = [x.view(length, self.n_depths, -1) for x, length in zip(states, lengths)]
        return {
            "hidden_states": torch.nn.utils.rnn.pad_sequence(states, batch_first=True),
            "attention_mask": (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long(),
            "labels": torch.from_numpy(np.asarray([feature["labels"] for feature in features])),
        }


def cache_hidden_states(
    dataset: Dataset, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
) -> Dataset:
    """Computes a frozen backbone's hidden states for a tokenized dataset, in half precision, on disk.

    They are stored in `datasets`' cache folder, in one file that any later run on the same tokens, labels and backbone
    finds and maps into memory. It takes `2 * n_depths * width` bytes a token.

    Args:
        dataset: tokenized, with `length` and `labels`.
        model: a capsule-head model with a frozen backbone.
        tokenizer: its tokenizer.
        batch_size: texts per batch.

    Returns:
        A dataset with `hidden_states` (flat), `attention_mask`, `length` and `labels`, in order of length.

    Raises:
        ValueError: if the backbone is not frozen.
    """
    if not model.config.freeze_backbone:
        raise ValueError("The backbone is not frozen: its hidden states change in training and cannot be cached.")
    collator = DataCollatorWithPadding(tokenizer)
    dataset = dataset.select(np.argsort(dataset.with_format(None)["length"][:], kind="stable"))

    @torch.no_grad()
    def compute(batch: dict) -> dict:
        inputs = collator([dict(zip(batch, values)) for values in zip(*batch.values())]).to(model.device)
        lengths, labels = inputs["length"], inputs["labels"]
        inputs = {name: inputs[name] for name in tokenizer.model_input_names if name in inputs}
        states = torch.stack(model(**inputs, output_hidden_states=True).hidden_states, dim=2).half()
        if not states.isfinite().all():
            raise ValueError("The backbone's hidden states exceed half precision (65,504); train without the cache.")
        masks = inputs["attention_mask"].bool()
        return {
            "hidden_states": [x[mask].flatten().cpu().numpy() for x, mask in zip(states, masks)],
            "attention_mask": [[1] * int(length) for length in lengths],
            "length": lengths.tolist(),
            "labels": labels.tolist(),
        }

    features = Features(
        hidden_states=ListFeature(Value("float16")),
        attention_mask=ListFeature(Value("int8")),
        length=Value("int64"),
        labels=dataset.features["labels"],
    )
    digest = _digest(dataset, model)
    folder = Path(datasets.config.HF_DATASETS_CACHE, "capsule_heads")
    folder.mkdir(parents=True, exist_ok=True)
    return dataset.map(
        compute,
        batched=True,
        batch_size=batch_size,
        remove_columns=dataset.column_names,
        features=features,
        cache_file_name=str(folder / f"hidden_states_{digest}.arrow"),
        new_fingerprint=digest,
        desc="Computing hidden states",
    ).with_format("numpy")


def _digest(dataset: Dataset, model: torch.nn.Module) -> str:
    """Of all that the hidden states, and what is stored with them, depend on."""
    config = model.config.base_config.to_dict()  # weights alone say nothing of, for example, the number of heads
    config = {name: value for name, value in config.items() if name not in NAMES_OF_BACKBONE}
    digest = hashlib.sha256(json.dumps([model.config.depths, config], sort_keys=True, default=str).encode())
    for name, tensor in model.backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    columns = dataset.with_format("numpy")
    for name in sorted(dataset.column_names):
        digest.update(name.encode())
        digest.update(np.concatenate([np.atleast_1d(value) for value in columns[name][:]]).tobytes())
    return digest.hexdigest()[:16]
