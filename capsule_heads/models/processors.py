"""The processor of a model: its tokenizer, image processor or feature extractor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..backbones.processors import MODALITIES, load_processor
from .modeling_capsule_head import CapsuleHeadClassifier

FILES = ("tokenizer_config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json")


def modality_of(model: CapsuleHeadClassifier) -> str:
    """Return what a classifier classifies: "text", "image" or "audio"."""
    return next(name for name in MODALITIES if name in model.input_modalities)


def processor_of(model: CapsuleHeadClassifier) -> Any:
    """Load the processor that is saved with a model, or with its backbone.

    Raises:
        OSError: If neither has a processor, or the model's own is damaged.
        ValueError: If the processor comes with code of its own.
    """
    config = model.config
    revisions = {config.name_or_path: None, config.base_model_name_or_path: config.base_model_revision}
    names = [name for name in revisions if name]
    for name in names:
        try:
            processor = load_processor(name, modality_of(model), revisions[name])
        except OSError:
            if any(Path(name, file).is_file() for file in FILES):
                raise
            continue
        # Where there are no files of a tokenizer, transformers makes one that knows no words.
        if not isinstance(processor, PreTrainedTokenizerBase) or len(processor) > len(processor.all_special_ids):
            return processor
    raise OSError(
        f"There is no processor in {' or '.join(names) or 'the model'}; pass it: explain(model, inputs, processor)."
    )
