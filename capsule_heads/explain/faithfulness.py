"""Faithfulness of explanations of texts: does the probability fall when the tokens that they rank highest are removed?

Tokens are removed in two ways: masked, as if they were not there, or replaced by the tokenizer's mask token. Special
tokens stay. *Comprehensiveness* is the fall of the predicted class's probability without the tokens that are ranked
highest; more is better. *Sufficiency* is the fall with these tokens alone; less is better (DeYoung et al., 2020, arXiv
1911.03429). *Log-odds* is the log of the probability without these tokens, less the log of the one with all tokens;
less is better. Each measure is a mean over the fractions `FRACTIONS` of a text's tokens.

The largest possible fall of the probability differs from model to model. *NAOPC* is the mean fall over all numbers of
tokens removed, as a fraction of the possible fall. It is 0 for the worst order of tokens and 1 for the best, which are
found by beam search (Edin et al., 2025, arXiv 2408.08137). It can compare models. The number of forward passes of the
search grows with the square of the number of tokens, so texts longer than `MOST_TOKENS` have no NAOPC.

*Sanity* is the rank correlation of an explanation with the explanation of the same model after its head's weights were
shuffled, each tensor by itself (Adebayo et al., 2018). It is low for a method that explains the head.
"""

from __future__ import annotations

import copy
import importlib
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..models.modeling_capsule_head import CapsuleHeadForSequenceClassification
from .methods import METHODS, Method, Text, probabilities

FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)  # fractions of a text's tokens, at least one token
DELETED = tuple(n / 10 for n in range(11))  # fractions of tokens along a deletion curve
MOST_TOKENS = 16  # most tokens of a text whose best and worst order are searched
BEAM = 3  # number of orders of tokens that the search for the best and the worst order keeps


class Removal(NamedTuple):
    """The faithfulness of an explanation when tokens are removed in one way.

    Attributes:
        comprehensiveness: mean fall of the probability without the tokens ranked highest.
        sufficiency: mean fall of the probability with these tokens alone.
        log_odds: mean log of the probability without these tokens, less the log of the one with all tokens.
        deletion: `[len(DELETED)]`, the probability without each fraction of the tokens.
    """

    comprehensiveness: float
    sufficiency: float
    log_odds: float
    deletion: tuple[float, ...]


class Faithfulness(NamedTuple):
    """The faithfulness of one explanation of one text.

    Attributes:
        masked: the measures when tokens are masked.
        replaced: the measures when tokens are replaced by the mask token; None for a tokenizer without a mask token.
        naopc: the mean fall when tokens are masked, as a fraction of the possible fall; NaN if that is unknown.
        sanity: rank correlation with the explanation of a head with shuffled weights; NaN for a single token.
        seconds: the time that the explanation took.
    """

    masked: Removal
    replaced: Removal | None
    naopc: float
    sanity: float
    seconds: float


def prepare_text(model: CapsuleHeadForSequenceClassification, tokenizer: PreTrainedTokenizerBase, text: str) -> Text:
    """Tokenize a text, and find the class that a model predicts for it."""
    inputs = dict(tokenizer(text, truncation=True, return_tensors="pt", return_special_tokens_mask=True))
    candidates = (inputs.pop("special_tokens_mask")[0] == 0).nonzero()[:, 0]
    with torch.no_grad():
        target = int(model(**inputs).logits.argmax())
    pad = tokenizer.pad_token_id
    return Text(inputs, candidates, target, pad, pad if tokenizer.mask_token_id is None else tokenizer.mask_token_id)


def measure_removal(
    model: CapsuleHeadForSequenceClassification, text: Text, ranking: Tensor, is_replaced: bool = False
) -> tuple[Removal, Tensor]:
    """Measure the probability as tokens are removed.

    Args:
        model: a classifier, in evaluation mode.
        text: as `prepare_text` returns it.
        ranking: positions of its tokens, the highest-ranked first.
        is_replaced: whether tokens are replaced by the mask token instead of masked.

    Returns:
        A `Removal`, and the probability `[n + 1]` without the first 0, 1 and so on up to all tokens.
    """
    n, mask = len(ranking), text.inputs["attention_mask"][0]
    named = [max(1, math.ceil(fraction * n)) for fraction in FRACTIONS]
    kept = [mask.index_fill(0, ranking[:k], 0) for k in range(n + 1)]
    kept += [mask.index_fill(0, ranking[k:], 0) for k in named]
    masks = torch.stack(kept)
    if is_replaced:
        replaced = torch.where(masks == mask, text.inputs["input_ids"], text.mask_token_id)
        found = probabilities(model, text, input_ids=replaced)
    else:
        found = probabilities(model, text, attention_mask=masks)
    curve, alone = found[: n + 1], found[n + 1 :]
    without = curve[named]
    return Removal(
        float(curve[0] - without.mean()),
        float(curve[0] - alone.mean()),
        float((without.log() - curve[0].log()).mean()),
        tuple(curve[[round(fraction * n) for fraction in DELETED]].tolist()),
    ), curve


def extreme_fall(model: CapsuleHeadForSequenceClassification, text: Text, sign: int) -> float:
    """Return the largest or the smallest mean fall of the probability over orders of tokens, by beam search.

    Args:
        model: a classifier, in evaluation mode.
        text: as `prepare_text` returns it.
        sign: 1 for the largest, -1 for the smallest.
    """
    mask = text.inputs["attention_mask"]
    masks, totals = mask, -sign * probabilities(model, text, attention_mask=mask)
    start, n = float(totals[0]) * -sign, len(text.candidates)
    for _ in range(n):
        next_masks = torch.cat(
            [x.index_fill(0, position, 0)[None] for x in masks for position in text.candidates if x[position]]
        )
        totals = totals.repeat_interleave(len(next_masks) // len(masks))
        totals = totals - sign * probabilities(model, text, attention_mask=next_masks)
        # Orders that removed the same tokens continue alike, so only the best of them is kept.
        best: dict[bytes, int] = {}
        for index in totals.argsort(descending=True).tolist():
            best.setdefault(next_masks[index].numpy().tobytes(), index)
            if len(best) == BEAM:
                break
        masks, totals = next_masks[list(best.values())], totals[list(best.values())]
    return start - float(totals.max()) * -sign / (n + 1)


def measure(
    model: CapsuleHeadForSequenceClassification,
    shuffled: CapsuleHeadForSequenceClassification,
    text: Text,
    method: Method,
    limits: tuple[float, float],
    has_mask: bool,
) -> Faithfulness:
    """Time an explanation of a text, and measure its faithfulness.

    Args:
        model: a classifier, in evaluation mode.
        shuffled: the same classifier with the weights of its head shuffled.
        text: as `prepare_text` returns it.
        method: one of `METHODS`.
        limits: the smallest and the largest mean fall; NaN if they are unknown.
        has_mask: whether the tokenizer has a mask token.
    """
    start = time.perf_counter()
    attributions = method(model, text)[text.candidates].detach()
    seconds = time.perf_counter() - start
    ranking = text.candidates[attributions.argsort(descending=True)]
    masked, curve = measure_removal(model, text, ranking)
    low, high = limits
    fall = float(curve[0] - curve.mean())
    others = method(shuffled, text)[text.candidates].detach()
    is_constant = attributions.unique().numel() < 2 or others.unique().numel() < 2
    return Faithfulness(
        masked,
        measure_removal(model, text, ranking, is_replaced=True)[0] if has_mask else None,
        (fall - low) / (high - low) if high > low else math.nan,
        math.nan if is_constant else float(spearmanr(attributions, others).statistic),
        seconds,
    )


def shuffle_head(model: CapsuleHeadForSequenceClassification) -> CapsuleHeadForSequenceClassification:
    """Return a copy of a model whose head and linear term have the same weights in another order."""
    shuffled = copy.deepcopy(model)
    with torch.no_grad():
        for module in (shuffled.head, shuffled.linear_term):
            for parameter in () if module is None else module.parameters():
                order = torch.randperm(parameter.numel())
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return shuffled


def compare_methods(
    model: CapsuleHeadForSequenceClassification, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> dict[str, list[Faithfulness]]:
    """Measure every method on every text.

    Args:
        model: a classifier of texts whose backbone was loaded with `freeze_backbone=False`, so that gradients go
            through it.
        tokenizer: the backbone's tokenizer.
        texts: the texts to explain.

    Returns:
        By method, one `Faithfulness` for each text.

    Raises:
        ImportError: If Captum is not installed.
        ValueError: If the model has a frozen backbone, which gradients do not pass.
    """
    try:
        importlib.import_module("captum")
    except ImportError as error:
        raise ImportError('Comparing explanations needs Captum: pip install "capsule-heads[explanations]".') from error
    if model.config.freeze_backbone:
        raise ValueError("The backbone is frozen, and gradients stop there; load it with freeze_backbone=False.")
    model.eval()
    shuffled = shuffle_head(model)
    has_mask = tokenizer.mask_token_id is not None
    found: dict[str, list[Faithfulness]] = {name: [] for name in METHODS}
    for text in texts:
        prepared = prepare_text(model, tokenizer, text)
        limits = math.nan, math.nan
        if len(prepared.candidates) <= MOST_TOKENS:
            limits = extreme_fall(model, prepared, -1), extreme_fall(model, prepared, 1)
        for name, method in METHODS.items():
            found[name].append(measure(model, shuffled, prepared, method, limits, has_mask))
    return found
