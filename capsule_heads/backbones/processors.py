"""The processor of a backbone: its tokenizer, image processor or feature extractor."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from .loading import resolve_backbone

MODALITIES = {"text": "tokenizer", "image": "image processor", "audio": "feature extractor"}


def load_processor(modality: str, name_or_path: str, revision: str | None = None, pad_token: str | None = None) -> Any:
    """Load what prepares texts, images or audio for a backbone.

    Args:
        modality: one of `MODALITIES`.
        name_or_path: of the backbone, or of a model that was saved with its processor.
        revision: branch, tag or commit.
        pad_token: the padding token, for a tokenizer that has none.

    Returns:
        A tokenizer, image processor or feature extractor. A feature extractor makes a mask of padding: transformers'
        pipeline, which never asks for one, then sees what training sees.

    Raises:
        OSError: If it is not found, or cannot be read.
        ValueError: If the padding token is not in the tokenizer's vocabulary, or the processor is no tokenizer.
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer  # each takes a second to import

    loaders: dict[str, Any] = {"text": AutoTokenizer, "image": AutoImageProcessor, "audio": AutoFeatureExtractor}
    with _reading(MODALITIES[modality], name_or_path):
        processor = loaders[modality].from_pretrained(resolve_backbone(name_or_path), revision=revision)
    if modality == "audio" and hasattr(processor, "return_attention_mask"):
        processor.return_attention_mask = True
    if pad_token is not None:
        if not isinstance(processor, PreTrainedTokenizerBase):
            raise ValueError(f"pad_token is {pad_token!r}, and a {MODALITIES[modality]} pads no tokens; leave it out.")
        if pad_token not in processor.get_vocab():
            raise ValueError(
                f"pad_token is {pad_token!r}, which is not in the vocabulary of {name_or_path}'s tokenizer."
            )
        processor.pad_token = pad_token
    return processor


@contextlib.contextmanager
def _reading(what: str, name_or_path: str) -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OSError(
            f"The {what} of {name_or_path} cannot be read: one of its JSON files is damaged, or holds something else "
            f"({error}). Fetch or save it again."
        ) from error
