"""Faithfulness of explanations of texts: does the probability fall when the tokens that they name are removed?

Tokens are removed by masking. Special tokens stay. Two numbers say how faithful an explanation is (DeYoung et al.,
2020, arXiv 1911.03429). *Comprehensiveness* is how far the probability of the predicted class falls without the tokens
that are named first: more is better. *Sufficiency* is how far it falls with these tokens alone: less is better. Each is
a mean over the fractions `FRACTIONS` of a text's tokens.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..models.modeling_capsule_head import CapsuleHeadForSequenceClassification
from .attributions import explain

FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)  # of a text's tokens, at least one token
DELETED = tuple(n / 10 for n in range(11))  # fractions of tokens along a deletion curve
N_STEPS = 50  # of integrated gradients


class Text(NamedTuple):
    """One text, as the model takes it.

    Attributes:
        inputs: of `forward`, `[1, tokens]` each.
        candidates: positions of the tokens that may be removed.
        target: the class that is predicted.
        pad_token_id: the id of the padding token, the baseline of integrated gradients.
    """

    inputs: dict[str, Tensor]
    candidates: Tensor
    target: int
    pad_token_id: int


class Faithfulness(NamedTuple):
    """How faithful one explanation of one text is.

    Attributes:
        comprehensiveness: mean fall of the probability without the tokens named first.
        sufficiency: mean fall with them alone.
        deletion: `[len(DELETED)]`, the probability without each fraction of the tokens.
        seconds: the time that the explanation took.
    """

    comprehensiveness: float
    sufficiency: float
    deletion: tuple[float, ...]
    seconds: float


Method = Callable[[CapsuleHeadForSequenceClassification, Text], Tensor]


def prepare_text(model: CapsuleHeadForSequenceClassification, tokenizer: PreTrainedTokenizerBase, text: str) -> Text:
    """Tokenize a text, and find the class that a model predicts for it."""
    inputs = dict(tokenizer(text, truncation=True, return_tensors="pt", return_special_tokens_mask=True))
    candidates = (inputs.pop("special_tokens_mask")[0] == 0).nonzero()[:, 0]
    with torch.no_grad():
        target = int(model(**inputs).logits.argmax())
    return Text(inputs, candidates, target, tokenizer.pad_token_id)


def measure(model: CapsuleHeadForSequenceClassification, text: Text, method: Method) -> Faithfulness:
    """Time an explanation of a text, and measure how faithful it is.

    Args:
        model: a classifier, in evaluation mode.
        text: as `prepare_text` returns it.
        method: one of `METHODS`. It returns a number for each token: the larger, the more it is for the class.
    """
    start = time.perf_counter()
    attributions = method(model, text)
    seconds = time.perf_counter() - start
    ranking = text.candidates[attributions[text.candidates].argsort(descending=True)]
    n = len(ranking)
    all_tokens = text.inputs["attention_mask"][0]
    masks = []
    for fraction in FRACTIONS:
        named = ranking[: max(1, math.ceil(fraction * n))]
        special = all_tokens.index_fill(0, text.candidates, 0)
        masks += [all_tokens.index_fill(0, named, 0), special.index_fill(0, named, 1)]
    masks += [all_tokens.index_fill(0, ranking[: round(fraction * n)], 0) for fraction in DELETED]
    found = _probabilities(model, text, torch.stack(masks))
    with_all = float(found[len(masks) - len(DELETED)])
    without, alone = (found[first : 2 * len(FRACTIONS) : 2] for first in (0, 1))
    return Faithfulness(
        with_all - float(without.mean()),
        with_all - float(alone.mean()),
        tuple(found[2 * len(FRACTIONS) :].tolist()),
        seconds,
    )


@torch.no_grad()
def _probabilities(model: CapsuleHeadForSequenceClassification, text: Text, masks: Tensor) -> Tensor:
    """Return the probability of the predicted class for each mask, `[n, tokens]` to `[n]`."""
    inputs = {name: x.expand(len(masks), -1) for name, x in text.inputs.items()}
    return model(**{**inputs, "attention_mask": masks}).logits.softmax(-1)[:, text.target]


# Methods


def credit_chain(model: CapsuleHeadForSequenceClassification, text: Text) -> Tensor:
    """Return this package's credits, of all layers together, against the other classes."""
    (explanation,) = explain(model, text.inputs)
    return explanation.against_others(explanation.by_token())[:, text.target]


def leave_one_out(model: CapsuleHeadForSequenceClassification, text: Text) -> Tensor:
    """Return how far the log of the probability falls without each token: a forward pass for each."""
    mask = text.inputs["attention_mask"]
    without_one = mask.expand(mask.shape[1], -1) * (1 - torch.eye(mask.shape[1], dtype=mask.dtype))
    found = _probabilities(model, text, torch.cat([mask, without_one])).log()
    return found[0] - found[1:]


def log_probability(model: CapsuleHeadForSequenceClassification, text: Text) -> Callable[[Tensor], Tensor]:
    """Return the function from embeddings of tokens to the log of the probability of the predicted class.

    It takes `[n, tokens, hidden_size]` and returns `[n]`.
    """
    others = {name: x for name, x in text.inputs.items() if name != "input_ids"}

    def compute(embeddings: Tensor) -> Tensor:
        inputs = {name: x.expand(len(embeddings), -1) for name, x in others.items()}
        return model(inputs_embeds=embeddings, **inputs).logits.log_softmax(-1)[:, text.target]

    return compute


def integrated_gradients(model: CapsuleHeadForSequenceClassification, text: Text) -> Tensor:
    """Return Captum's integrated gradients (Sundararajan et al., 2017).

    They go from the embedding of padding to that of the text, in `N_STEPS` steps. Special tokens stay.
    """
    from captum.attr import IntegratedGradients

    ids = text.inputs["input_ids"]
    embed = model.get_input_embeddings()
    with torch.no_grad():
        embeddings = embed(ids)
        baseline = embed(ids.index_fill(1, text.candidates, text.pad_token_id))
    attribute = IntegratedGradients(log_probability(model, text)).attribute
    return attribute(embeddings, baseline, n_steps=N_STEPS, internal_batch_size=N_STEPS)[0].sum(-1)


def gradient_x_input(model: CapsuleHeadForSequenceClassification, text: Text) -> Tensor:
    """Return Captum's gradient x input, of the embeddings."""
    from captum.attr import InputXGradient

    with torch.no_grad():
        embeddings = model.get_input_embeddings()(text.inputs["input_ids"])
    attribute = InputXGradient(log_probability(model, text)).attribute
    return attribute(embeddings.requires_grad_())[0].sum(-1)


@torch.no_grad()
def attention_rollout(model: CapsuleHeadForSequenceClassification, text: Text) -> Tensor:
    """Return the attention from all tokens to each, through all layers (Abnar and Zuidema, 2020); it knows no class."""
    backbone = model.backbone
    assert backbone is not None  # it has predicted the class
    implementation = backbone.config._attn_implementation
    backbone.set_attn_implementation("eager")  # the others return none
    try:
        attentions = backbone(**text.inputs, output_attentions=True).attentions
    finally:
        backbone.set_attn_implementation(implementation)
    rollout = torch.eye(text.inputs["input_ids"].shape[1])
    for attention in attentions:
        with_residual = attention[0].mean(0) + torch.eye(len(rollout))
        rollout = with_residual / with_residual.sum(-1, keepdim=True) @ rollout
    return rollout.mean(0)


def random_order(model: CapsuleHeadForSequenceClassification, text: Text) -> Tensor:
    """Return random numbers: the control."""
    return torch.rand(text.inputs["input_ids"].shape[1])


METHODS: Mapping[str, Method] = {
    "credits (this package)": credit_chain,
    f"integrated gradients, {N_STEPS} steps": integrated_gradients,
    "gradient x input": gradient_x_input,
    "leave one out": leave_one_out,
    "attention rollout": attention_rollout,
    "random": random_order,
}


def compare_methods(
    model: CapsuleHeadForSequenceClassification, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> dict[str, list[Faithfulness]]:
    """Measure every method on every text.

    Args:
        model: a classifier of texts whose backbone was loaded with `freeze_backbone=False`: gradients go through it.
        tokenizer: the backbone's.
        texts: to explain.

    Returns:
        By method, one `Faithfulness` for each text.

    Raises:
        ImportError: If Captum is not installed.
        ValueError: If the model has a frozen backbone, which keeps no gradient.
    """
    try:
        importlib.import_module("captum")
    except ImportError as error:
        raise ImportError('Comparing explanations needs Captum: pip install "capsule-heads[explanations]".') from error
    if model.config.freeze_backbone:
        raise ValueError("The backbone is frozen, and gradients stop there; load it with freeze_backbone=False.")
    model.eval()
    found: dict[str, list[Faithfulness]] = {name: [] for name in METHODS}
    for text in texts:
        prepared = prepare_text(model, tokenizer, text)
        for name, method in METHODS.items():
            found[name].append(measure(model, prepared, method))
    return found
