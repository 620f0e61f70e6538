"""Methods of explaining a text: this package's credits, and other methods to compare them with.

Each method takes a classifier and a text, and returns a number for each token. The larger the number, the more the
token supports the predicted class. The numbers of special tokens are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.modeling_capsule_head import CapsuleHeadForSequenceClassification
from .attributions import explain
from .tracing import attention_of, traced

N_STEPS = 50  # steps of integrated gradients
N_STEPS_OF_EACH = 10  # steps of sequential integrated gradients, for each token
N_PERMUTATIONS = (1, 10)  # of Shapley sampling: 1 takes as many forward passes as leave-one-out, 10 ten times as many


class Text(NamedTuple):
    """One text, as the model takes it.

    Attributes:
        inputs: inputs of `forward`, `[1, tokens]` each.
        candidates: positions of the tokens that may be removed.
        target: the predicted class.
        pad_token_id: the id of the padding token, the baseline of integrated gradients.
        mask_token_id: the id of the mask token, the baseline of sequential integrated gradients; the id of the padding
            token if a tokenizer has no mask token.
    """

    inputs: dict[str, Tensor]
    candidates: Tensor
    target: int
    pad_token_id: int
    mask_token_id: int


Method = Callable[[CapsuleHeadForSequenceClassification, Text], Tensor]


@torch.no_grad()
def probabilities(model: CapsuleHeadForSequenceClassification, text: Text, **changed: Tensor) -> Tensor:
    """Return the probability of the predicted class for each variant of a text, `[n]`.

    Args:
        model: a classifier, in evaluation mode.
        text: as `faithfulness.prepare_text` returns it.
        **changed: inputs that differ, `[n, tokens]`.
    """
    n = len(next(iter(changed.values())))
    inputs = {name: x.expand(n, -1) for name, x in text.inputs.items()}
    return model(**{**inputs, **changed}).logits.softmax(-1)[:, text.target]


def credits(model: CapsuleHeadForSequenceClassification, text: Text) -> Tensor:
    """Return this package's credits, summed over layers, against the other classes."""
    (explanation,) = explain(model, text.inputs)
    return explanation.against_others(explanation.by_token())[:, text.target]


def traced_credits(model: CapsuleHeadForSequenceClassification, text: Text) -> Tensor:
    """Return this package's credits, traced through the backbone, against the other classes."""
    (explanation,) = explain(model, text.inputs, through_backbone=True)
    return explanation.against_others(explanation.by_token())[:, text.target]


def leave_one_out(model: CapsuleHeadForSequenceClassification, text: Text) -> Tensor:
    """Return the fall of the log probability without each token, by a forward pass for each."""
    mask = text.inputs["attention_mask"]
    without_one = mask.expand(mask.shape[1], -1) * (1 - torch.eye(mask.shape[1], dtype=mask.dtype))
    found = probabilities(model, text, attention_mask=torch.cat([mask, without_one])).log()
    return found[0] - found[1:]


def shapley_sampling(n_permutations: int) -> Method:
    """Return Captum's sampled Shapley values (Castro et al., 2009) of the log of the probability."""

    def compute(model: CapsuleHeadForSequenceClassification, text: Text) -> Tensor:
        from captum.attr import ShapleyValueSampling

        mask = text.inputs["attention_mask"]
        groups = torch.zeros_like(mask).index_copy(1, text.candidates, torch.arange(1, 1 + len(text.candidates))[None])
        found = ShapleyValueSampling(lambda x: probabilities(model, text, attention_mask=x.long()).log()).attribute(
            mask.float(),
            baselines=mask.index_fill(1, text.candidates, 0).float(),
            feature_mask=groups,  # special tokens are one feature, which never changes
            n_samples=n_permutations,
            perturbations_per_eval=len(text.candidates) + 1,
        )
        return found[0]

    return compute


def log_probability(model: CapsuleHeadForSequenceClassification, text: Text) -> Callable[[Tensor], Tensor]:
    """Return the function from embeddings of tokens to the log of the predicted class's probability.

    The function takes `[n, tokens, hidden_size]` and returns `[n]`.
    """
    others = {name: x for name, x in text.inputs.items() if name != "input_ids"}

    def compute(embeddings: Tensor) -> Tensor:
        inputs = {name: x.expand(len(embeddings), -1) for name, x in others.items()}
        return model(inputs_embeds=embeddings, **inputs).logits.log_softmax(-1)[:, text.target]

    return compute


def integrated_gradients(model: CapsuleHeadForSequenceClassification, text: Text) -> Tensor:
    """Return Captum's integrated gradients (Sundararajan et al., 2017).

    The path goes from the embeddings of padding to those of the text, in `N_STEPS` steps. Special tokens stay.
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
    """Return Captum's gradient x input at the embeddings."""
    from captum.attr import InputXGradient

    with torch.no_grad():
        embeddings = model.get_input_embeddings()(text.inputs["input_ids"])
    attribute = InputXGradient(log_probability(model, text)).attribute
    return attribute(embeddings.requires_grad_())[0].sum(-1)


def sequential_integrated_gradients(model: CapsuleHeadForSequenceClassification, text: Text) -> Tensor:
    """Return sequential integrated gradients (Enguehard, 2023, arXiv 2305.15853).

    Each token has a path of its own, from the embedding of the mask token to its own embedding, while all others stay.
    """
    ids, n = text.inputs["input_ids"], len(text.candidates)
    embed, compute = model.get_input_embeddings(), log_probability(model, text)
    with torch.no_grad():
        embeddings = embed(ids)
        steps = embeddings[0, text.candidates] - embed(ids.new_tensor([text.mask_token_id]))  # [n, hidden_size]
    each, total = torch.arange(n), torch.zeros(n)
    for step in range(N_STEPS_OF_EACH):
        left = 1 - (step + 0.5) / N_STEPS_OF_EACH
        at = embeddings.repeat(n, 1, 1)
        at[each, text.candidates] -= left * steps
        (slopes,) = torch.autograd.grad(compute(at.requires_grad_()).sum(), at)
        total += (slopes[each, text.candidates] * steps).sum(-1) / N_STEPS_OF_EACH
    return torch.zeros(ids.shape[1]).index_copy(0, text.candidates, total)


def attn_lrp(model: CapsuleHeadForSequenceClassification, text: Text) -> Tensor:
    """Return AttnLRP (Achtibat et al., 2024) of the log of the probability, at the output of the embeddings.

    Gradients in the backbone follow the rules of `tracing`. Gradients through the routing of a head are the usual ones.
    """
    with traced(model, text.inputs) as run:
        outputs = model(hidden_states=run.states, attention_mask=text.inputs["attention_mask"])
        (slopes,) = torch.autograd.grad(outputs.logits.log_softmax(-1)[0, text.target], run.embeddings)
    return (slopes * run.embeddings.detach())[0].sum(-1)


@torch.no_grad()
def attention_rollout(model: CapsuleHeadForSequenceClassification, text: Text) -> Tensor:
    """Return the attention from all tokens to each, through all layers (Abnar and Zuidema, 2020), for no class."""
    backbone = model.backbone
    assert backbone is not None  # it has predicted the class
    with attention_of(backbone, "eager"):  # other implementations return no attentions
        attentions = backbone(**text.inputs, output_attentions=True).attentions
    rollout = torch.eye(text.inputs["input_ids"].shape[1])
    for attention in attentions:
        with_residual = attention[0].mean(0) + torch.eye(len(rollout))
        rollout = with_residual / with_residual.sum(-1, keepdim=True) @ rollout
    return rollout.mean(0)


def random_order(model: CapsuleHeadForSequenceClassification, text: Text) -> Tensor:
    """Return random numbers, as a control."""
    return torch.rand(text.inputs["input_ids"].shape[1])


CREDITS, THROUGH_BACKBONE, LEAVE_ONE_OUT = "credits", "credits, through the backbone", "leave one out"
METHODS: Mapping[str, Method] = {
    CREDITS: credits,
    THROUGH_BACKBONE: traced_credits,
    LEAVE_ONE_OUT: leave_one_out,
    **{f"Shapley sampling, {n} permutation{'s' * (n > 1)}": shapley_sampling(n) for n in N_PERMUTATIONS},
    f"integrated gradients, {N_STEPS} steps": integrated_gradients,
    f"sequential integrated gradients, {N_STEPS_OF_EACH} steps a token": sequential_integrated_gradients,
    "AttnLRP": attn_lrp,
    "gradient x input": gradient_x_input,
    "attention rollout": attention_rollout,
    "random": random_order,
}
