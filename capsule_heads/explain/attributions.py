"""Where a class score comes from: credits of parts, and of tokens at layers, for the price of a forward pass.

The score of a capsule IS a sum over its inputs, `a_out_j = sum_i credit_ij`, with `credit_ij = beta_use_ij D_use_ij -
beta_ign_ij D_ign_ij` (Heinsen, 2019, section 2). Of two routings, one after another:

- **Parts to classes** is exact: the credits of all parts for a class add up to its score, to rounding.
- **Tokens to parts** is exact too: the credits of all tokens at all layers for a part add up to the part's score.
- **Tokens to classes** is a chain of the two. A class score is a smooth function of the scores and poses of parts, `a`
  and `mu`, and both are sums over tokens and layers once routing probabilities are settled: `a_j = sum_i credit_ij`,
  and `mu_j = sum_i share_ij V_ij`, with shares `D_use_ij / n_j` that add up to 1. The credit of input `i` for class `k`
  is its part of each, times what the class score makes of it at the margin: `sum_j credit_ij da_k/da_j + share_ij (V_ij
  - mu_j) da_k/dmu_j`. Exact are the two sums and the derivatives, through all iterations of the second routing. Not
  exact is the rest: a class score is no linear function of the parts, so these credits add up to `sum_j a_j da_k/da_j`
  and not to the score; the probabilities of the first routing are taken as given; and a backbone mixes tokens, so that
  the state of one token at a later layer speaks of others too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..heads import Head, RoutingHead, registered_heads
from ..models.modeling_capsule_head import CapsuleHeadClassifier
from ..models.processors import modality_of, processor_of

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_SPECIAL = 8  # tokens before the patches of an image: its class, registers


class Credits(NamedTuple):
    """Where the scores of a batch come from, in logits.

    Attributes:
        scores: `[batch, n_out]`, the class scores.
        parts: `[batch, n_parts, n_out]`, exact: their sum over parts is `scores`.
        inputs: per layer `[batch, tokens, n_out]`, the chain of the two routings, to first order.
    """

    scores: Tensor
    parts: Tensor
    inputs: list[Tensor]


class Word(NamedTuple):
    """A word of a text, and its credit for each class `[classes]`, in logits."""

    text: str
    start: int
    end: int
    credit: Tensor


def compute_credits(head: Head, hidden_states: Sequence[Tensor], masks: Sequence[Tensor]) -> Credits:
    """The credits of parts and of all tokens at all layers, for all classes.

    It costs a forward pass of the head and, for each class, a backward pass of its second routing, which is small. Its
    memory is `[n_inp, n_parts]` numbers for each sample.

    Args:
        head: with two routings: `TokenDepthHead`, `SpatialPoseHead`.
        hidden_states: per layer `[batch, tokens, width]`, as the head takes them.
        masks: per layer `[batch, tokens]`.

    Returns:
        `Credits`, in float32 or wider.

    Raises:
        ValueError: If the head does not route to classes.
    """
    if not isinstance(head, RoutingHead) or len(head.routings) != 2:
        can = [name for name, known in registered_heads().items() if known.explains]
        raise ValueError(
            f"A {type(head).__name__} has no credits to explain; expected a head with capsules of classes, such as "
            f'head_type="{can[0]}".'
        )
    first, second = head.routings
    with torch.no_grad():
        a_inp, mu_inp = head.detect(hidden_states, masks)
        a, mu, _, R = first(a_inp, mu_inp, return_R=True)  # of the parts
        to_parts = first.credits(a_inp, R)  # [bij]
        shares = a_inp.to(R.dtype).sigmoid().unsqueeze(-1) * R
        shares /= shares.sum(-2, keepdim=True) + first.eps
    with torch.enable_grad():
        a, mu = a.detach().requires_grad_(), mu.detach().requires_grad_()
        scores, _, _, R = second(a, mu, return_R=True)
        slopes = [
            torch.autograd.grad(score.sum(), (a, mu), retain_graph=True, materialize_grads=True)
            for score in scores.unbind(-1)
        ]
    with torch.no_grad():
        to_classes = second.credits(a, R)
        inputs = [
            (to_parts * d_a.unsqueeze(-2)).sum(-1) + _along_poses(first, mu_inp, mu, shares, d_mu)
            for d_a, d_mu in slopes
        ]
        by_layer = head.split_by_layer(torch.stack(inputs, dim=-1), [x.shape[1] for x in hidden_states])
    return Credits(scores.detach(), to_classes, by_layer)


def _along_poses(routing: nn.Module, mu_inp: Tensor, mu: Tensor, shares: Tensor, d_mu: Tensor) -> Tensor:
    """`sum_jch share_ij (V_ijch - mu_jch) d_mu_jch`, `[bi]`, without the votes `V`."""
    weights = torch.einsum("jdh,bjch->bjcd", routing.W[0].to(d_mu.dtype), d_mu)
    votes = torch.einsum("bicd,bjcd->bij", mu_inp.to(d_mu.dtype), weights)  # along d_mu, but for what inputs share
    of_all = ((routing.B[0].to(d_mu.dtype) - mu) * d_mu).sum((-2, -1))  # [bj]
    return (shares * (votes + of_all.unsqueeze(-2))).sum(-1)


@dataclass(frozen=True)
class Explanation:
    """The scores of one text, image or sound, and where they come from.

    Attributes:
        labels: names of the classes.
        logits: `[classes]`, their scores.
        probabilities: `[classes]`, that the model gives them.
        is_multi_label: whether each class has a probability of its own; else they add up to 1.
        parts: `[n_parts, classes]`, credits of parts, in logits: exact, their sum over parts is `logits`.
        credits: per layer `[tokens, classes]`, credits of tokens, in logits, to first order (see the module).
        layers: which hidden state each is.
        tokens: their texts; None for an image or a sound.
        is_special: which of them the tokenizer has added.
        spans: of each word, its first and last character in `text`, and its tokens; empty without a fast tokenizer.
        text: the text, or its first part and its second.
        image: the image as it was given; of a stereo pair the left view, as the backbone takes it.
        n_pixels: rows and columns of the image as the backbone takes it.
        patch_size: rows and columns of a patch, where the backbone says them.
    """

    labels: tuple[str, ...]
    logits: Tensor
    probabilities: Tensor
    is_multi_label: bool
    parts: Tensor
    credits: tuple[Tensor, ...]
    layers: tuple[int, ...]
    tokens: tuple[str, ...] | None = None
    is_special: tuple[bool, ...] | None = None
    spans: tuple[tuple[int, int, tuple[int, ...]], ...] = ()
    text: str | None = None
    image: Image | None = None
    n_pixels: tuple[int, int] | None = None
    patch_size: tuple[int, int] | None = None

    @property
    def predicted(self) -> int:
        """The class with the highest score."""
        return int(self.logits.argmax())

    def against_others(self, credits: Tensor) -> Tensor:
        """Credits for each class against the others: what the log of its odds gains, to first order.

        Args:
            credits: `[..., classes]`, in logits, such as `by_token` returns.

        Returns:
            Of the same shape and unit: less their mean over the other classes, weighted by their probabilities. Where
            each class has a probability of its own its logit is the log of its odds, and credits are as they were.
        """
        if self.is_multi_label or len(self.logits) == 1:
            return credits
        others = self.logits.repeat(len(self.logits), 1).fill_diagonal_(-torch.inf).softmax(-1)  # [class, other]
        return credits - credits @ others.mT

    def by_token(self) -> Tensor:
        """Credits of tokens, of all layers together, `[tokens, classes]`.

        Raises:
            ValueError: if hidden states differ in tokens, as those of hierarchical backbones do.
        """
        return self.by_token_and_layer().sum(1)

    def by_token_and_layer(self) -> Tensor:
        """Credits `[tokens, layers, classes]`.

        Raises:
            ValueError: if hidden states differ in tokens, as those of hierarchical backbones do.
        """
        counts = [len(x) for x in self.credits]
        if len(set(counts)) > 1:
            raise ValueError(
                f"Hidden states have {', '.join(map(str, counts))} tokens, by layer, which are not the same ones; "
                "use by_patch() or by_layer()."
            )
        return torch.stack(self.credits, dim=1)

    def by_layer(self) -> Tensor:
        """Credits of layers, of all tokens together, `[layers, classes]`."""
        return torch.stack([x.sum(0) for x in self.credits])

    def by_word(self) -> list[Word]:
        """Credits of the words of a text: of all their tokens, at all layers. Special tokens are in none.

        Raises:
            ValueError: where it is not known which tokens make a word.
        """
        if not self.spans:
            raise ValueError(
                "Words are not known: expected an explanation of a text, by a fast tokenizer, which has their places."
            )
        credits = self.by_token()
        return [
            Word(self.text[start:end], start, end, credits[list(tokens)].sum(0)) for start, end, tokens in self.spans
        ]

    def by_patch(self) -> Tensor:
        """Credits of the patches of an image, of all layers together, `[rows, columns, classes]`.

        The grid is that of the finest hidden state; the credit of a patch that covers several of its cells is shared
        out evenly. Tokens before the patches (class, registers) are in none.

        Raises:
            ValueError: where there is no image, or its tokens make no grid.
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
                    f"Patches make grids of {shape[0]}x{shape[1]} and {rows}x{columns}, which do not nest."
                )
            by = rows // shape[0], columns // shape[1]
            finest += grid.repeat_interleave(by[0], 0).repeat_interleave(by[1], 1) / (by[0] * by[1])
        return finest


def _as_grid(credits: Tensor, n_pixels: tuple[int, int], patch_size: tuple[int, int] | None) -> Tensor:
    """Credits of tokens, `[tokens, classes]`, as those of patches, `[rows, columns, classes]`."""
    n_tokens = len(credits)
    if patch_size is not None:
        rows, columns = (pixels // size for pixels, size in zip(n_pixels, patch_size))
        if 0 <= n_tokens - rows * columns <= MOST_SPECIAL:
            return credits[n_tokens - rows * columns :].unflatten(0, (rows, columns))
    for n_special in range(1 if patch_size else min(MOST_SPECIAL, n_tokens)):  # places of a feature map have none
        n = n_tokens - n_special
        rows = round(math.sqrt(n * n_pixels[0] / n_pixels[1]))
        if rows and n % rows == 0 and rows * n_pixels[1] == n // rows * n_pixels[0]:
            return credits[n_special:].unflatten(0, (rows, n // rows))
    raise ValueError(
        f"{n_tokens} tokens make no grid of the shape of the image, {n_pixels[0]}x{n_pixels[1]} pixels; use by_layer()."
    )


def explain(
    model: CapsuleHeadClassifier, inputs: Any, processor: Any | None = None, batch_size: int = 16
) -> list[Explanation]:
    """Explain the scores of a classifier.

    Args:
        model: a capsule-head classifier, of texts, images or sounds.
        inputs: texts (a pair of texts is a tuple), images or sounds: one, or a list of them. Or what `forward` takes,
            as a mapping of tensors: hidden states, or what a processor returned.
        processor: tokenizer, image processor or feature extractor; not needed for a mapping. Default: the one that is
            saved with the model, or with its backbone.
        batch_size: number of inputs to explain at once.

    Returns:
        One `Explanation` for each input. The model is left in the mode that it was in.

    Raises:
        TypeError: for other inputs.
        ValueError: for a regression, a head without capsules, or inputs that do not fit the model.
    """
    if model.config.problem_type == "regression":
        raise ValueError("Explanations are of class scores, and this model is a regression; its values have none.")
    was_training = model.training
    model.eval()
    try:
        if isinstance(inputs, Mapping):
            return _explain_batch(model, inputs)
        processor = processor_of(model) if processor is None else processor
        batch = [inputs] if isinstance(inputs, str | tuple) or not isinstance(inputs, Sequence) else list(inputs)
        prepare = {"text": _prepare_texts, "image": _prepare_images, "audio": _prepare_sounds}[modality_of(model)]
        explanations = []
        for start in range(0, len(batch), batch_size):
            explanations += _explain_batch(model, *prepare(model, batch[start : start + batch_size], processor))
        return explanations
    finally:
        model.train(was_training)


def _prepare_texts(
    model: CapsuleHeadClassifier, texts: list, tokenizer: Any
) -> tuple[Mapping[str, Tensor], list[dict]]:
    """Inputs of the model, and what is known of each text."""
    pairs = [text if isinstance(text, tuple) else (text,) for text in texts]
    for pair in pairs:
        if not all(isinstance(text, str) for text in pair) or len(pair) not in (1, 2):
            raise TypeError(f"An input is {pair[0] if len(pair) == 1 else pair!r}; expected a text, or a tuple of two.")
    # One by one: a batch may not mix texts and pairs.
    is_cut = model.config.windowing is None
    encodings = [tokenizer(*pair, truncation=is_cut, return_offsets_mapping=tokenizer.is_fast) for pair in pairs]
    known = []
    for pair, encoding in zip(pairs, encodings):
        ids = encoding["input_ids"]
        known.append(
            {
                "tokens": tuple(tokenizer.convert_ids_to_tokens(ids)),
                "is_special": tuple(map(bool, tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True))),
                "spans": _spans(encoding, [0, len(pair[0]) + 1]) if tokenizer.is_fast else (),
                "text": "\t".join(pair),
            }
        )
        encoding.pop("offset_mapping", None)
    return tokenizer.pad(encodings, return_tensors="pt"), known


def _spans(encoding: Any, starts: Sequence[int]) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """Where each word is, of texts that begin at `starts` of a whole, and which tokens make it."""
    words: dict[tuple[int, int], list[int]] = {}
    for token, (word, sequence) in enumerate(zip(encoding.word_ids(), encoding.sequence_ids())):
        if word is not None and sequence is not None:
            words.setdefault((sequence, word), []).append(token)
    spans = []
    for (sequence, _), tokens in words.items():
        ends = [encoding["offset_mapping"][token] for token in tokens]
        start, end = starts[sequence] + min(x for x, _ in ends), starts[sequence] + max(x for _, x in ends)
        spans.append((start, end, tuple(tokens)))
    return tuple(spans)


def _prepare_images(
    model: CapsuleHeadClassifier, images: list, processor: Any
) -> tuple[Mapping[str, Tensor], list[dict]]:
    """Inputs of the model, and what is known of each image."""
    batch = processor(images, return_tensors="pt")
    size = getattr(model.config.base_config, "patch_size", None)
    if isinstance(size, list | tuple):
        size = tuple(size) if len(size) == 2 else None
    elif size is not None:
        size = (size, size)
    known = {"patch_size": size}
    pixels = batch.get("pixel_values")
    if pixels is not None and pixels.ndim == 4:
        known["n_pixels"] = tuple(pixels.shape[-2:])
        if pixels.shape[1] == 2:  # stereo pairs
            images = list(pixels[:, 0].numpy())
    return batch, [{**known, "image": image} for image in images]


def _prepare_sounds(
    model: CapsuleHeadClassifier, sounds: list, processor: Any
) -> tuple[Mapping[str, Tensor], list[dict]]:
    """Inputs of the model, and what is known of each sound: nothing."""
    batch = processor(sounds, sampling_rate=processor.sampling_rate, padding=True, return_tensors="pt")
    return batch, [{}] * len(sounds)


def _explain_batch(
    model: CapsuleHeadClassifier, inputs: Mapping[str, Tensor], known: list[dict] | None = None
) -> list[Explanation]:
    given = {name: x.to(model.device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    with torch.no_grad():
        states, masks = model.compute_hidden_states(**given)
    found = compute_credits(model.head, states, masks)
    is_multi_label = model.config.problem_type == "multi_label_classification"
    probabilities = found.scores.sigmoid() if is_multi_label else found.scores.softmax(-1)
    labels = tuple(model.config.id2label[k] for k in range(model.config.num_labels))
    is_token = [mask.bool().cpu() for mask in masks]
    explanations = []
    for row, of_row in enumerate(known or [{}] * len(found.scores)):
        credits = tuple(x[row].cpu()[mask[row]] for x, mask in zip(found.inputs, is_token))
        if any(len(x) != len(of_row.get("tokens", x)) for x in credits):  # of a backbone that merges tokens
            of_row = {"text": of_row["text"]}
        explanations.append(
            Explanation(
                labels=labels,
                logits=found.scores[row].cpu(),
                probabilities=probabilities[row].cpu(),
                is_multi_label=is_multi_label,
                parts=found.parts[row].cpu(),
                credits=credits,
                layers=tuple(model.config.layers),
                **of_row,
            )
        )
    return explanations
