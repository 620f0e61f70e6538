"""Whether an explanation of a text is faithful: does the probability fall when the tokens that it names are removed?

Tokens are removed by masking, special ones never. Two numbers (DeYoung et al., 2020, arXiv 1911.03429), each a mean
over the shares `SHARES` of a text's tokens that are named first: *comprehensiveness*, by how much the probability of
the predicted class falls without them (more is better), and *sufficiency*, by how much it falls with them alone (less
is better).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)  # of a text's tokens, at least one
DELETED = tuple(n / 10 for n in range(11))  # shares of tokens along a deletion curve
N_STEPS = 50  # of integrated gradients


class Text(NamedTuple):
    """One text, as the model takes it.

    Attributes:
        inputs: of `forward`, `[1, tokens]` each.
        candidates: places of the tokens that may be removed.
        target: the class that is predicted.
        pad_token_id: of the token that says nothing, the baseline of integrated gradients.
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
        deletion: `[len(DELETED)]`, the probability without so many tokens.
        seconds: that the explanation took.
    """

    comprehensiveness: float
    sufficiency: float
    deletion: tuple[float, ...]
    seconds: float


def prepare_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Text:
    """Tokenizes a text, and finds the class that a model predicts for it."""
    inputs = dict(tokenizer(text, truncation=True, return_tensors="pt", return_special_tokens_mask=True))
    candidates = (inputs.pop("special_tokens_mask")[0] == 0).nonzero()[:, 0]
    with torch.no_grad():
        target = int(model(**inputs).logits.argmax())
    return Text(inputs, candidates, target, tokenizer.pad_token_id)


def measure(model: PreTrainedModel, text: Text, explain: Callable[[PreTrainedModel, Text], Tensor]) -> Faithfulness:
    """Times an explanation of a text, and measures how faithful it is.

    Args:
        model: a classifier, in evaluation mode.
        text: as `prepare_text` returns it.
        explain: one of `METHODS`: from both to a number for each token, the larger the more it speaks for the class.
    """
    start = time.perf_counter()
    credits = explain(model, text)
    seconds = time.perf_counter() - start
    ranking = text.candidates[credits[text.candidates].argsort(descending=True)]
    n = len(ranking)
    whole = text.inputs["attention_mask"][0]
    masks = []
    for share in SHARES:
        named = ranking[: max(1, math.ceil(share * n))]
        masks += [whole.index_fill(0, named, 0), whole.index_fill(0, text.candidates, 0).index_fill(0, named, 1)]
    masks += [whole.index_fill(0, ranking[: round(share * n)], 0) for share in DELETED]
    found = _probabilities(model, text, torch.stack(masks))
    of_whole = float(found[len(masks) - len(DELETED)])
    without, alone = (found[first : 2 * len(SHARES) : 2] for first in (0, 1))
    return Faithfulness(
        of_whole - float(without.mean()),
        of_whole - float(alone.mean()),
        tuple(found[2 * len(SHARES) :].tolist()),
        seconds,
    )


@torch.no_grad()
def _probabilities(model: PreTrainedModel, text: Text, masks: Tensor) -> Tensor:
    """Of the predicted class, for each mask `[n, tokens]`."""
    inputs = {name: x.expand(len(masks), -1) for name, x in text.inputs.items()}
    return model(**{**inputs, "attention_mask": masks}).logits.softmax(-1)[:, text.target]


# Methods


def credit_chain(model: PreTrainedModel, text: Text) -> Tensor:
    """This package's own: `model.explain`, all layers together, against the other classes."""
    (explanation,) = model.explain(text.inputs)
    return explanation.against_others(explanation.by_token())[:, text.target]


def leave_one_out(model: PreTrainedModel, text: Text) -> Tensor:
    """How far the log of the probability falls without each token: a forward pass for each."""
    whole = text.inputs["attention_mask"]
    masks = torch.cat([whole, whole.expand(whole.shape[1], -1) * (1 - torch.eye(whole.shape[1], dtype=whole.dtype))])
    found = _probabilities(model, text, masks).log()
    return found[0] - found[1:]


def _log_probability(model: PreTrainedModel, text: Text) -> Callable[[Tensor], Tensor]:
    """From embeddings of tokens `[n, tokens, width]` to the log of the probability of the predicted class `[n]`."""
    others = {name: x for name, x in text.inputs.items() if name != "input_ids"}

    def compute(embeddings: Tensor) -> Tensor:
        inputs = {name: x.expand(len(embeddings), -1) for name, x in others.items()}
        return model(inputs_embeds=embeddings, **inputs).logits.log_softmax(-1)[:, text.target]

    return compute


def integrated_gradients(model: PreTrainedModel, text: Text) -> Tensor:
    """Captum's, in `N_STEPS` steps from the embedding of padding; special tokens stay (Sundararajan et al., 2017)."""
    from captum.attr import IntegratedGradients

    ids = text.inputs["input_ids"]
    embed = model.get_input_embeddings()
    with torch.no_grad():
        embeddings = embed(ids)
        baseline = embed(ids.index_fill(1, text.candidates, text.pad_token_id))
    attribute = IntegratedGradients(_log_probability(model, text)).attribute
    return attribute(embeddings, baseline, n_steps=N_STEPS, internal_batch_size=N_STEPS)[0].sum(-1)


def gradient_x_input(model: PreTrainedModel, text: Text) -> Tensor:
    """Captum's, of the embeddings."""
    from captum.attr import InputXGradient

    with torch.no_grad():
        embeddings = model.get_input_embeddings()(text.inputs["input_ids"])
    attribute = InputXGradient(_log_probability(model, text)).attribute
    return attribute(embeddings.requires_grad_())[0].sum(-1)


@torch.no_grad()
def attention_rollout(model: PreTrainedModel, text: Text) -> Tensor:
    """Attention from all tokens to each, through all layers (Abnar and Zuidema, 2020); it knows no class."""
    backbone = model.backbone
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


def random_order(model: PreTrainedModel, text: Text) -> Tensor:
    """The control."""
    return torch.rand(text.inputs["input_ids"].shape[1])


METHODS: Mapping[str, Callable[[PreTrainedModel, Text], Tensor]] = {
    "credits (this package)": credit_chain,
    f"integrated gradients, {N_STEPS} steps": integrated_gradients,
    "gradient x input": gradient_x_input,
    "leave one out": leave_one_out,
    "attention rollout": attention_rollout,
    "random": random_order,
}


def compare_methods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> dict[str, list[Faithfulness]]:
    """Measures every method on every text.

    Args:
        model: a classifier of texts whose backbone was loaded with `freeze_backbone=False`: gradients go through it.
        tokenizer: the backbone's.
        texts: to explain.

    Returns:
        By method, one `Faithfulness` for each text.

    Raises:
        ImportError: if Captum is not installed.
        ValueError: for a model with a frozen backbone, which keeps no gradient.
    """
    try:
        import captum  # noqa: F401
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
