"""Explanations: the scores of texts, images and audio, and the tokens, layers and parts that scores come from."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice
from ..data.audio import LONGEST_FRAME, AudioCollator, as_audio, audio_features, check_length, least_samples
from ..data.images import as_image, is_scaled, process_images, resizes, warn_of_scaled
from ..data.inputs import is_input, list_inputs
from ..data.tokenization import without_empty_pair
from ..models.configuration_capsule_head import DEFAULT_THRESHOLD
from ..models.modeling_capsule_head import CapsuleHeadClassifier
from ..models.processors import modality_of, processor_of
from .credits import Credits, check_explained, compute_credits, credits_with_graph
from .tracing import check_traceable, trace, traced

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

logger = logging.getLogger(__name__)

MOST_SPECIAL = 8  # tokens before the patches of an image: its class, registers
COLOUR_CHANNELS = (1, 3)  # channels of a grey and of a coloured image

Known = dict[str, Any]  # fields of an `Explanation` that are known before it is computed


class Word(NamedTuple):
    """A word of a text, and its credit for each class `[classes]`, in logits."""

    text: str
    start: int
    end: int
    credit: Tensor


@dataclass(frozen=True)
class Explanation:
    """The scores of one text, image or audio, and the attributions of these scores.

    Attributes:
        labels: names of the classes.
        logits: `[classes]`, the model's scores. Like these, all credits are divided by the model's temperature.
        probabilities: `[classes]`, the model's probabilities.
        is_multi_label: whether each class has a probability of its own; otherwise probabilities add up to 1.
        parts: `[n_parts, classes]`, exact credits of parts, in logits. Their sum over parts plus `linear` is `logits`.
            Empty for a head without capsules.
        credits: per layer `[tokens, classes]`, credits of tokens, in logits, the linear term's included. Empty if they
            are left out. Credits that are traced through the backbone belong to the embeddings alone.
        layers: the index of each hidden state.
        linear: `[classes]`, what the linear term and its bias add, in logits; None for a model without one.
        baseline: `[classes]`, the logits of a completely masked input. If credits are traced through the backbone, it
            includes what the backbone's biases add. Baseline and all `credits` add up to `logits`, within 1e-4
            (`credits.TOLERANCE`) for a head with capsules and within rounding for others. None if credits of tokens are
            left out.
        tokens: the text that each token stands for, or the name of a special token; None for an image or audio.
        is_special: for each token, whether the tokenizer added it.
        spans: for each word, its first and last character in `text`, and its tokens; empty without a fast tokenizer.
        text: the text; for a pair, the two texts with a tab between them.
        n_cut: number of tokens that were cut off the end of the text because it is too long for the model.
        thresholds: for each class, the probability above which a multi-label model predicts it; None for 0.5.
        image: the image as the processor gets it (see `capsule_heads.data.images.as_image`). If its channels are not
            colours, the first channel, as the backbone takes it.
        n_pixels: rows and columns of the image as the backbone takes it.
        patch_size: rows and columns of a patch, if the backbone's configuration has them.
        seconds: time from one token of audio to the next, for a backbone whose tokens are frames of convolutions; None
            for others.
    """

    labels: tuple[str, ...]
    logits: Tensor
    probabilities: Tensor
    is_multi_label: bool
    parts: Tensor
    credits: tuple[Tensor, ...]
    layers: tuple[int, ...]
    linear: Tensor | None = None
    baseline: Tensor | None = None
    tokens: tuple[str, ...] | None = None
    is_special: tuple[bool, ...] | None = None
    spans: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    text: str | None = None
    n_cut: int = 0
    thresholds: tuple[float, ...] | None = None
    image: Image | NDArray | Tensor | None = None
    n_pixels: tuple[int, int] | None = None
    patch_size: tuple[int, int] | None = None
    seconds: float | None = None

    @property
    def predicted(self) -> int:
        """Return the class with the highest score."""
        return int(self.logits.argmax())

    @property
    def predicted_classes(self) -> tuple[int, ...]:
        """Return the predicted classes; a multi-label model predicts all whose probability is above its threshold."""
        if not self.is_multi_label:
            return (self.predicted,)
        thresholds = self.thresholds or (DEFAULT_THRESHOLD,) * len(self.labels)
        return tuple(k for k, p in enumerate(self.probabilities.tolist()) if p > thresholds[k])

    @property
    def predicted_labels(self) -> tuple[str, ...]:
        """Return the names of the predicted classes."""
        return tuple(self.labels[k] for k in self.predicted_classes)

    @property
    def is_uniform(self) -> bool:
        """Return whether all layers have the same tokens, unlike the layers of hierarchical backbones."""
        return len({len(x) for x in self.credits}) == 1

    def against_others(self, credits: Tensor) -> Tensor:
        """Return credits for each class against the others: the change of its log odds, to first order.

        Args:
            credits: `[..., classes]`, in logits, such as `by_token` returns.

        Returns:
            Credits in the same shape and unit. From each is subtracted the mean over the other classes, weighted by
            their probabilities. If each class has a probability of its own, its logit is its log odds, and credits are
            not changed.
        """
        if self.is_multi_label or len(self.logits) == 1:
            return credits
        others = self.logits.repeat(len(self.logits), 1).fill_diagonal_(-torch.inf).softmax(-1)  # [class, other]
        return credits - credits @ others.mT

    def between(self, credits: Tensor, label: str, other: str) -> Tensor:
        """Return credits for one class against another one.

        Args:
            credits: `[..., classes]`, in logits, such as `by_token` returns.
            label: name of the class that credits are for.
            other: name of the class that credits are against.

        Returns:
            Credits `[...]`, in logits. With the difference of baselines they add up to the difference of logits.

        Raises:
            ValueError: If there is no such class.
        """
        for name in (label, other):
            check_choice("label", name, self.labels)
        return credits[..., self.labels.index(label)] - credits[..., self.labels.index(other)]

    def by_token(self) -> Tensor:
        """Return credits of tokens, summed over layers, `[tokens, classes]`.

        Raises:
            ValueError: If hidden states differ in tokens, as in hierarchical backbones.
        """
        return self.by_token_and_layer().sum(1)

    def by_token_and_layer(self) -> Tensor:
        """Return credits `[tokens, layers, classes]`.

        Raises:
            ValueError: If hidden states differ in tokens, as in hierarchical backbones.
        """
        if not self.is_uniform:
            counts = ", ".join(str(len(x)) for x in self.credits)
            raise ValueError(
                f"Hidden states have {counts} tokens, by layer; expected the same tokens at all layers: use by_patch() "
                "or by_layer()."
            )
        return torch.stack(self.credits, dim=1)

    def by_layer(self) -> Tensor:
        """Return credits of layers, summed over tokens, `[layers, classes]`."""
        return torch.stack([x.sum(0) for x in self.credits])

    def by_word(self) -> list[Word]:
        """Return credits of the words of a text, summed over their tokens and all layers. Special tokens are left out.

        Raises:
            ValueError: If the tokens of words are not known.
        """
        if not self.spans or self.text is None:
            raise ValueError(
                "Words are not known: expected an explanation of a text by a fast tokenizer, which has their positions."
            )
        credits = self.by_token()
        return [
            Word(self.text[start:end], start, end, credits[list(tokens)].sum(0)) for start, end, tokens in self.spans
        ]

    def by_patch(self) -> Tensor:
        """Return credits of the patches of an image, summed over layers, `[rows, columns, classes]`.

        The grid is the one of the finest hidden state. If a patch covers several cells of the grid, its credit is
        divided evenly among them. Tokens before the patches (class, registers) are left out.

        Raises:
            ValueError: If there is no image, or its tokens form no grid.
        """
        if self.n_pixels is None:
            raise ValueError("There is no image: expected an explanation of pixel_values [channels, rows, columns].")
        grids = [_as_grid(x, self.n_pixels, self.patch_size) for x in self.credits]
        rows, columns = (max(grid.shape[dim] for grid in grids) for dim in (0, 1))
        finest = torch.zeros(rows, columns, len(self.labels))
        for grid in grids:
            shape = grid.shape[:2]
            if rows % shape[0] or columns % shape[1]:
                raise ValueError(
                    f"Patches make grids of {shape[0]}x{shape[1]} and {rows}x{columns}, which do not nest; use "
                    "by_layer()."
                )
            by = rows // shape[0], columns // shape[1]
            finest += grid.repeat_interleave(by[0], 0).repeat_interleave(by[1], 1) / (by[0] * by[1])
        return finest


def _as_grid(credits: Tensor, n_pixels: tuple[int, int], patch_size: tuple[int, int] | None) -> Tensor:
    """Arrange credits of tokens, `[tokens, classes]`, as credits of patches, `[rows, columns, classes]`."""
    n_tokens = len(credits)
    if patch_size is not None:
        rows, columns = (pixels // size for pixels, size in zip(n_pixels, patch_size))
        if 0 <= n_tokens - rows * columns <= MOST_SPECIAL:
            return credits[n_tokens - rows * columns :].unflatten(0, (rows, columns))
    for n_special in range(1 if patch_size else min(MOST_SPECIAL, n_tokens)):  # a feature map has no special tokens
        n = n_tokens - n_special
        rows = round(math.sqrt(n * n_pixels[0] / n_pixels[1]))
        if rows and n % rows == 0 and rows * n_pixels[1] == n // rows * n_pixels[0]:
            return credits[n_special:].unflatten(0, (rows, n // rows))
    raise ValueError(
        f"{n_tokens} tokens make no grid of the shape of the image, {n_pixels[0]}x{n_pixels[1]} pixels; use by_layer()."
    )


def explain(
    model: CapsuleHeadClassifier,
    inputs: Any,
    processor: Any | None = None,
    batch_size: int = 16,
    parts_only: bool = False,
    through_backbone: bool = False,
) -> list[Explanation]:
    """Explain the scores of a classifier, which are the scores of transformers' pipeline for the same inputs.

    Args:
        model: a capsule-head classifier of text, images or audio.
        inputs: one input or several, in a list, a NumPy array or a Series of pandas. A text is a string. A pair of
            texts is a tuple, or `{"text": ..., "text_pair": ...}`. Images and audio are paths, bytes, arrays and
            mappings; see `capsule_heads.data.images.as_image` and `capsule_heads.data.audio.as_audio`. Audio in an
            array has the sampling rate of the feature extractor, or stands in `{"array": ..., "sampling_rate": ...}`.
            The inputs of `forward` also serve, as a mapping of tensors: hidden states, or the result of a processor.
        processor: tokenizer, image processor or feature extractor, by default the one saved with the model or with its
            backbone; not needed for a mapping.
        batch_size: number of inputs to explain at once. Audio, and images that are not resized, are explained one at a
            time, without padding.
        parts_only: whether to leave out the credits of tokens, which cost backward passes for each class.
        through_backbone: whether to trace credits through the backbone, from the states that the head reads to the
            embeddings of tokens (see `capsule_heads.explain.tracing`). This costs a backward pass of the backbone for
            each class, and gives no credits of layers.

    Returns:
        One `Explanation` for each input. The mode of the model is not changed. A warning counts texts that are
        truncated and images that are scaled to 8 bits.

    Raises:
        TypeError: If an input is not a text, image or audio.
        ValueError: If the model is a regression, its head has no credits, inputs do not fit the model, or credits
            cannot be traced through the backbone.
        OSError: If a file is not found.
    """
    check_explained(model.config)
    if through_backbone:
        if parts_only:
            raise ValueError(
                "parts_only and through_backbone are True; expected one of them, as parts belong to the head alone."
            )
        check_traceable(model)
    explain_batch = partial(_explain_batch, parts_only=parts_only, through_backbone=through_backbone)
    was_training = model.training
    model.eval()
    try:
        if isinstance(inputs, Mapping) and not is_input(inputs):
            return explain_batch(model, inputs)
        processor = processor_of(model) if processor is None else processor
        modality = modality_of(model)
        given = list_inputs(inputs, modality)
        names = ["The input"] if len(given) == 1 else [f"Input {index}" for index in range(len(given))]
        prepare = {"text": _prepare_texts, "image": _prepare_images, "audio": _prepare_audio}[modality]
        step = batch_size if modality == "text" or (modality == "image" and resizes(processor)) else 1
        explanations = []
        for start in range(0, len(given), step):
            batch = dict(zip(names[start : start + step], given[start : start + step]))
            explanations += explain_batch(model, *prepare(model, batch, processor))
    finally:
        model.train(was_training)
    _warn_of_losses(explanations)
    return explanations


def _warn_of_losses(explanations: Sequence[Explanation]) -> None:
    """Warn of the parts of inputs that the model does not see."""
    cut = [explanation.n_cut for explanation in explanations if explanation.n_cut]
    if cut:
        logger.warning(
            "%d of %d texts are longer than the model takes: %d tokens are cut off, and are not explained.",
            len(cut),
            len(explanations),
            sum(cut),
        )
    warn_of_scaled(sum(is_scaled(explanation.image) for explanation in explanations))


def _prepare_texts(
    model: CapsuleHeadClassifier, texts: Mapping[str, Any], tokenizer: Any
) -> tuple[Mapping[str, Any], list[Known]]:
    """Return inputs of the model, and the known fields of each text's explanation."""
    pairs = [_as_pair(text, name) for name, text in texts.items()]
    # One by one, as a batch may not mix texts and pairs.
    is_cut = model.config.windowing is None
    encodings = [tokenizer(*pair, truncation=is_cut, return_offsets_mapping=tokenizer.is_fast) for pair in pairs]
    known = []
    for pair, encoding in zip(pairs, encodings):
        ids = encoding["input_ids"]
        n_tokens = len(tokenizer(*pair, verbose=False)["input_ids"])  # verbose would warn of long texts
        known.append(
            {
                "tokens": tuple(_token_texts(tokenizer, pair, encoding)),
                "is_special": tuple(map(bool, tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True))),
                "spans": _spans(encoding, "\t".join(pair), [0, len(pair[0]) + 1]) if tokenizer.is_fast else (),
                "text": "\t".join(pair),
                "n_cut": n_tokens - len(ids),
            }
        )
        encoding.pop("offset_mapping", None)
    return tokenizer.pad(encodings, return_tensors="pt"), known


def _as_pair(given: Any, name: str) -> tuple[str, ...]:
    """Return a text, or the two texts of a pair."""
    pair = given if isinstance(given, tuple) else (given,)
    if isinstance(given, Mapping) and {"text"} <= set(given) <= {"text", "text_pair"}:
        pair = (given["text"], given.get("text_pair") or "")
    if len(pair) not in (1, 2) or not all(isinstance(text, str) for text in pair):
        raise TypeError(
            f'{name} is {given!r:.200}; expected a text, or a pair: a tuple of two, or {{"text": ..., "text_pair": '
            "...}."
        )
    return without_empty_pair(pair)


def _token_texts(tokenizer: Any, pair: Sequence[str], encoding: Any) -> Iterator[str]:
    """Yield the text that each token stands for, without spaces, or its name if it stands for no text.

    The text is preferred because names of byte tokens, such as GPT-2's, are not readable.
    """
    names = tokenizer.convert_ids_to_tokens(encoding["input_ids"])
    if not tokenizer.is_fast:
        yield from (tokenizer.convert_tokens_to_string([name]).strip() or name for name in names)
        return
    for name, sequence, (start, end) in zip(names, encoding.sequence_ids(), encoding["offset_mapping"]):
        text = "" if sequence is None else pair[sequence][start:end]
        yield text.strip() if text else name


def _spans(encoding: Any, text: str, starts: Sequence[int]) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """Return the span of each word of a text without the spaces around it, and its tokens.

    Args:
        encoding: encoding of one text, or two.
        text: the text, or both texts joined.
        starts: where each text begins in `text`.
    """
    words: dict[tuple[int, int], list[int]] = {}
    for token, (word, sequence) in enumerate(zip(encoding.word_ids(), encoding.sequence_ids())):
        if word is not None and sequence is not None:
            words.setdefault((sequence, word), []).append(token)
    spans = []
    for (sequence, _), tokens in words.items():
        ends = [encoding["offset_mapping"][token] for token in tokens]
        start, end = starts[sequence] + min(x for x, _ in ends), starts[sequence] + max(x for _, x in ends)
        word = text[start:end]
        if word.strip():  # GPT-2's words begin with the space before them
            start, end = start + len(word) - len(word.lstrip()), end - len(word) + len(word.rstrip())
        spans.append((start, end, tuple(tokens)))
    return tuple(spans)


def _prepare_images(
    model: CapsuleHeadClassifier, given: Mapping[str, Any], processor: Any
) -> tuple[Mapping[str, Any], list[Known]]:
    """Return inputs of the model, and the known fields of each image's explanation."""
    images = [as_image(image, name) for name, image in given.items()]
    batch = process_images(processor, images)
    size = getattr(model.config.base_config, "patch_size", None)
    if isinstance(size, list | tuple):
        size = tuple(size) if len(size) == 2 else None
    elif size is not None:
        size = (size, size)
    known: Known = {"patch_size": size}
    pixels = batch.get("pixel_values")
    if pixels is not None and pixels.ndim == 4:
        known["n_pixels"] = tuple(pixels.shape[-2:])
        if pixels.shape[1] not in COLOUR_CHANNELS:
            images = list(pixels[:, 0].numpy())
    return batch, [{**known, "image": image} for image in images]


def _prepare_audio(
    model: CapsuleHeadClassifier, given: Mapping[str, Any], extractor: Any
) -> tuple[Mapping[str, Any], list[Known]]:
    """Return inputs of the model, and the known field of each audio's explanation, the seconds of a token."""
    rows = []
    for name, audio in given.items():
        samples = as_audio(audio, extractor.sampling_rate, name)
        if len(samples) < LONGEST_FRAME * extractor.sampling_rate:
            check_length(samples, least_samples(extractor, model), name)
        rows.append(audio_features(samples, extractor, name))
    n_samples = getattr(model.config.base_config, "inputs_to_logits_ratio", None)
    seconds = n_samples / extractor.sampling_rate if n_samples else None
    return AudioCollator(extractor)(rows), [{"seconds": seconds} for _ in rows]


def _credits_of_model(
    model: CapsuleHeadClassifier, found: Credits, states: Sequence[Tensor], masks: Sequence[Tensor]
) -> tuple[Credits, Tensor | None]:
    """Turn credits of the head into credits of the model's logits, and return what the linear term adds, or None."""
    linear = None
    scores, parts, inputs, baseline = found
    if model.linear_term is not None:
        linear = model.linear_term(states, masks).detach()
        own = model.linear_term.credits(states, masks) if inputs else []
        inputs = [x + y for x, y in zip(inputs, own, strict=True)]
        if baseline is not None:
            baseline = baseline + model.linear_term.affine.bias.detach().to(baseline.dtype)
        scores = scores + linear
    # With a linear term the logits are the mean of both scores.
    scale = model.config.calibration_temperature * (1 if linear is None else 2)
    found = Credits(
        scores / scale, parts / scale, [x / scale for x in inputs], None if baseline is None else baseline / scale
    )
    return found, None if linear is None else linear / scale


def _explain_batch(
    model: CapsuleHeadClassifier,
    inputs: Mapping[str, Any],
    known: list[Known] | None = None,
    parts_only: bool = False,
    through_backbone: bool = False,
) -> list[Explanation]:
    given = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    layers = tuple(model.config.layers)
    if through_backbone:
        with traced(model, given) as run:
            read = [x.detach().requires_grad_() for x in run.states]
            of_head = credits_with_graph(model.head, read, run.masks)
            found, linear = _credits_of_model(model, of_head, read, run.masks)
            of_tokens = trace(found.inputs, read, run)
        masks, layers = run.masks[:1], (0,)
        found = found._replace(inputs=[of_tokens], baseline=found.scores - of_tokens.sum(1))
    else:
        with torch.no_grad():
            states, masks = model.compute_hidden_states(**given)
            of_head = compute_credits(model.head, states, masks, parts_only)
            found, linear = _credits_of_model(model, of_head, states, masks)
    known = [{} for _ in found.scores] if known is None else known
    if len(known) != len(found.scores):
        raise ValueError(
            f"The processor made {len(found.scores)} samples of {len(known)} inputs; expected one sample of each "
            "input: pass a list of single texts, images or audio."
        )
    is_multi_label = model.config.problem_type == "multi_label_classification"
    probabilities = found.scores.sigmoid() if is_multi_label else found.scores.softmax(-1)
    labels = tuple(model.config.class_names)
    is_token = [mask.bool().cpu() for mask in masks]
    explanations = []
    for row, of_row in enumerate(known):
        credits = tuple(x[row].cpu()[mask[row]] for x, mask in zip(found.inputs, is_token))
        if any(len(x) != len(of_row.get("tokens", x)) for x in credits):  # the backbone merges tokens
            of_row = {name: of_row[name] for name in ("text", "n_cut")}
        explanations.append(
            Explanation(
                labels=labels,
                logits=found.scores[row].cpu(),
                probabilities=probabilities[row].cpu(),
                is_multi_label=is_multi_label,
                thresholds=tuple(model.config.label_thresholds),
                parts=found.parts[row].cpu(),
                credits=credits,
                layers=layers,
                linear=None if linear is None else linear[row].cpu(),
                baseline=None if found.baseline is None else found.baseline[row].cpu(),
                **of_row,
            )
        )
    return explanations
