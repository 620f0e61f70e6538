"""The scores of texts, images and audio, the same as transformers' pipelines give for the same inputs."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.audio import AudioCollator, as_audio, audio_features, check_length, least_samples
from ..data.hidden_states import CapsuleCollator
from ..data.images import as_image, is_scaled, process_images, resizes, warn_of_scaled
from ..data.state_keys import input_names, key_of_model
from ..data.state_sources import StateSources
from ..data.tokenization import describe_cuts, encode_texts, token_limit
from ..models.modeling_capsule_head import CapsuleHeadClassifier
from ..models.processors import modality_of, processor_of

logger = logging.getLogger(__name__)


@dataclass
class Scored:
    """Scores of inputs.

    Attributes:
        scores: `[inputs, num_labels]`, probabilities, or the values of a regression; NaN for an input without scores.
        faults: why an input has no scores, by its index.
        lengths: number of tokens of each text, before it is cut.
        n_scaled: number of images that were scaled to 8 bits.
    """

    scores: Tensor
    faults: dict[int, Exception] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    n_scaled: int = 0


class Scorer:
    """Scores inputs with a classifier, on the accelerator if there is one.

    Args:
        model: the classifier. It is put in evaluation mode.
        processor: the model's processor; None to load it.
        batch_size: number of inputs that are scored at once.
        show: function that is called with the number of inputs of each batch when it is scored.
        hidden_states: folders to read the hidden states of all texts from, instead of computing them; see
            `HiddenStateCache`.

    Attributes:
        modality: what the model classifies: "text", "image" or "audio".
        most_tokens: number of tokens that texts are cut to; None if they are not.

    Raises:
        ValueError: If folders of hidden states are of another backbone, or the model does not classify texts.
        OSError: If a folder cannot be read.
    """

    def __init__(
        self,
        model: CapsuleHeadClassifier,
        processor: Any = None,
        batch_size: int = 32,
        show: Callable[[int], object] = lambda n: None,
        hidden_states: Sequence[str] = (),
    ) -> None:
        self.model, self.modality = model.eval(), modality_of(model)
        self.processor = processor_of(model) if processor is None else processor
        self.batch_size, self.show = batch_size, show
        if torch.accelerator.is_available() and model.device.type == "cpu":
            torch.nn.Module.to(model, torch.accelerator.current_accelerator())  # PreTrainedModel.to has no type
        self.most_tokens = tokens_at_most(model, self.processor)
        self._sources = self._open(hidden_states) if hidden_states else None

    def __call__(self, inputs: Sequence[Any]) -> Scored:
        """Score inputs: texts and tuples of two, or what `as_image` or `as_audio` reads.

        An input that cannot be read, or a text without tokens, has no scores; `faults` says why.
        """
        found = Scored(torch.full((len(inputs), self.model.config.num_labels or 0), torch.nan))
        run = {"text": self._score_texts, "image": self._score_images, "audio": self._score_audio}[self.modality]
        run(inputs, found)
        return found

    def _open(self, folders: Sequence[str]) -> StateSources:
        if self.modality != "text":
            raise ValueError(
                f"hidden_states is {', '.join(folders)}, and the model classifies {self.modality}; leave it out."
            )
        (encoding,), _ = encode_texts(self.processor, [("",)], None)
        self._names = input_names(encoding, self.processor)
        return StateSources(folders, key_of_model(self.model, self.processor, self._names))

    def _run(self, batch: Mapping[str, Any], rows: Sequence[int], found: Scored) -> None:
        """Score a batch, and write its scores to some rows."""
        config, device = self.model.config, self.model.device
        with torch.no_grad():
            logits = self.model(**{k: x.to(device) if isinstance(x, Tensor) else x for k, x in batch.items()}).logits
        if config.problem_type == "multi_label_classification":
            logits = logits.sigmoid()
        elif config.problem_type != "regression":
            logits = logits.softmax(-1)
        found.scores[list(rows)] = logits.float().cpu()
        self.show(len(rows))

    def _score_texts(self, texts: Sequence[Any], found: Scored) -> None:
        given = [text if isinstance(text, tuple) else (text,) for text in texts]
        encodings, found.lengths = encode_texts(self.processor, given, self.most_tokens)
        features = {row: encoding for row, encoding in enumerate(encodings) if found.lengths[row]}
        for row in set(range(len(texts))) - set(features):
            found.faults[row] = ValueError("the tokenizer makes no token of the text")
        by_length = sorted(features, key=lambda row: -len(features[row]["input_ids"]))  # little padding
        for rows in in_batches(by_length, 1 if self.processor.pad_token is None else self.batch_size):
            self._run(self._pad([features[row] for row in rows]), rows, found)

    def _pad(self, features: list[dict[str, Any]]) -> Mapping[str, Any]:
        if self._sources is not None:
            states = self._sources.read([{name: x[name] for name in self._names} for x in features])
            return CapsuleCollator(self.processor)([{"hidden_states": x} for x in states])
        if len(features) > 1:
            return CapsuleCollator(self.processor)(features)
        return {name: torch.tensor([values]) for name, values in features[0].items()}

    def _read(self, inputs: Sequence[Any], read: Callable[[Any], Any], found: Scored) -> Iterator[tuple[int, Any]]:
        """Yield rows and their inputs, reading one input after another, as files may be large."""
        for row, given in enumerate(inputs):
            try:
                yield row, read(given)
            except (OSError, ValueError) as error:
                found.faults[row] = error

    def _score_images(self, images: Sequence[Any], found: Scored) -> None:
        step = self.batch_size if resizes(self.processor) else 1
        for batch in in_batches(self._read(images, as_image, found), step):
            found.n_scaled += sum(is_scaled(image) for _, image in batch)
            self._run(process_images(self.processor, [image for _, image in batch]), [row for row, _ in batch], found)

    def _score_audio(self, recordings: Sequence[Any], found: Scored) -> None:
        # Prepared as in training: transformers' pipeline needs ffmpeg for files.
        extractor = self.processor
        collate, least = AudioCollator(extractor), least_samples(extractor, self.model)

        def read(given: Any) -> dict[str, Any]:
            samples = as_audio(given, extractor.sampling_rate)
            check_length(samples, least, given if isinstance(given, str) else "The audio")
            return audio_features(samples, extractor)

        features = self._read(recordings, read, found)
        # Without padding, which would change the scores of some backbones.
        for _, alike in itertools.groupby(features, key=lambda entry: [x.shape for x in entry[1].values()]):
            for batch in in_batches(alike, self.batch_size):
                self._run(collate([x for _, x in batch]), [row for row, _ in batch], found)


def tokens_at_most(model: CapsuleHeadClassifier, processor: Any) -> int | None:
    """Return the number of tokens that texts are cut to; None if they are not."""
    is_cut = modality_of(model) == "text" and model.config.windowing is None
    return token_limit(processor) if is_cut else None


def in_batches(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield values in lists of `size`, the last of which may be shorter."""
    values = iter(values)
    while batch := list(itertools.islice(values, size)):
        yield batch


def score_inputs(
    model: CapsuleHeadClassifier, inputs: Sequence[Any], processor: Any, batch_size: int = 1, where: str = "input"
) -> Tensor:
    """Return the scores of inputs, `[inputs, num_labels]`: probabilities, or the values of a regression.

    The log counts texts that are cut, and images that are scaled.

    Args:
        model: the classifier.
        inputs: texts, and tuples of two; or what `as_image` or `as_audio` reads.
        processor: the model's processor.
        batch_size: number of inputs that are scored at once.
        where: words for an input in messages, before its number.

    Raises:
        OSError: If a file is not found.
        ValueError: If an input cannot be read, or a text has no tokens.
    """
    scorer = Scorer(model, processor, batch_size)
    found = scorer(inputs)
    for row, fault in sorted(found.faults.items()):
        if scorer.modality != "text":
            raise fault
        raise ValueError(
            f"The text of {where} {row + 1} is {inputs[row]!r}, and the tokenizer makes no token of it; leave it out."
        )
    cut = describe_cuts({"": found.lengths}, scorer.most_tokens)
    if cut:
        logger.warning("%s", cut)
    warn_of_scaled(found.n_scaled)
    return found.scores
