"""Credits traced through the backbone to the embeddings of tokens, by a backward pass of the backbone per class.

A backbone mixes tokens, so the state that a head reads at a token in a later layer also came from other tokens. The
credit of a state, with all that it takes as given, is a linear function of the vectors that the head makes from the
state. Tracing follows this function back to the output of the embeddings, as gradient x input, by the rules of AttnLRP
(Achtibat et al., 2024, arXiv 2402.05602):

- a normalisation scales by a constant (the identity rule for its variance);
- an activation function scales each number by a constant, `f(x) / x` (the identity rule);
- a product of two tensors gives each of them half (the uniform rule). This holds for queries and keys, attention and
  values, and the two branches of a gated layer. The softmax of attention keeps its derivative.

Parts of a credit that do not depend on the state stay with its token. Contributions of the backbone's biases belong to
no token. They are in the baseline, so credits still add up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from ..models.modeling_capsule_head import CapsuleHeadClassifier

ATTENTION = "capsule_heads_traced"  # name of an implementation of attention in transformers
# Layers of one module whose outputs are multiplied with each other, or one layer, if the halves of its output are.
GATED = (("gate_proj", "up_proj"), ("Wi",))
ACTIVATIONS: Any = (nn.GELU, nn.SiLU, nn.ReLU, *(x[0] if isinstance(x, tuple) else x for x in ACT2CLS.values()))


class TracedStates(NamedTuple):
    """Hidden states of a batch, with a graph down to the embeddings by the rules of this module.

    Attributes:
        embeddings: `[batch, tokens, hidden_size]`, hidden state 0.
        states: the states that the head takes, per layer `[batch, tokens, hidden_size]`.
        masks: per layer `[batch, tokens]`.
    """

    embeddings: Tensor
    states: list[Tensor]
    masks: list[Tensor]


def check_traceable(model: CapsuleHeadClassifier) -> None:
    """Check that credits can be traced to the embeddings of a model.

    Raises:
        ValueError: If the model has no backbone, cuts texts into windows, or reads a decoder that an encoder feeds, or
            if the backbone's attention cannot be replaced.
    """
    config, backbone = model.config, model.backbone
    reason = None
    if backbone is None:
        reason = "has no backbone"
    elif config.windowing is not None:
        reason = "cuts texts into windows"
    elif config.stack == "decoder":
        reason = "is read from a decoder whose tokens come through an encoder too"
    elif not backbone._supports_attention_backend:
        reason = f"has a {backbone.config.model_type} backbone, whose attention transformers cannot exchange"
    if reason is not None:
        raise _not_traced(reason)


def _not_traced(reason: str) -> ValueError:
    return ValueError(
        f"through_backbone is True, and the model {reason}; leave through_backbone out, to explain by the states that "
        "the head reads."
    )


@contextlib.contextmanager
def traced(model: CapsuleHeadClassifier, inputs: Mapping[str, Any]) -> Iterator[TracedStates]:
    """Run a backbone with the rules of this module, which hold until the end of the context.

    Args:
        model: a model that `check_traceable` accepts.
        inputs: inputs of `forward`, on the model's device.

    Raises:
        ValueError: If the inputs are hidden states.
    """
    if "hidden_states" in inputs:
        raise _not_traced("was given hidden states instead of inputs of its backbone")
    backbone = model.backbone
    assert backbone is not None  # check_traceable refuses such a model
    # Text comes as ids of tokens, so the graph begins after the embeddings.
    given = {name: x.detach().requires_grad_() if _is_float(name, x) else x for name, x in inputs.items()}
    with contextlib.ExitStack() as until_the_end, attention_of(backbone, ATTENTION):
        for module, hook in _rules(model):
            until_the_end.callback(module.register_forward_hook(hook).remove)
        if "input_ids" in inputs:
            embeddings = backbone.get_input_embeddings()
            until_the_end.callback(embeddings.register_forward_hook(_as_leaf).remove)
        layers = sorted({0, *model.config.layers})
        with torch.enable_grad():
            output = model.config.backbone.run(backbone, layers, given, trains=True)
            device = next(model.head.parameters()).device
            states = {layer: x.to(device) for layer, x in zip(layers, output.states)}
            masks = {layer: x.to(device) for layer, x in zip(layers, output.masks)}
            taken = model.config.layers
            yield TracedStates(states[0], [states[n] for n in taken], [masks[n] for n in taken])


@contextlib.contextmanager
def attention_of(backbone: Any, implementation: str) -> Iterator[None]:
    """Use another of transformers' implementations of attention in a backbone, until the end of the context."""
    before = backbone.config._attn_implementation
    backbone.set_attn_implementation(implementation)
    try:
        yield
    finally:
        backbone.set_attn_implementation(before)


def trace(credits: Sequence[Tensor], read: Sequence[Tensor], run: TracedStates) -> Tensor:
    """Trace credits of states to credits of embeddings, `[batch, tokens, n_out]`.

    Args:
        credits: per layer `[batch, tokens, n_out]`, with a graph down to `read`.
        read: the states of `run` as the head read them, without a graph of their own.
        run: the states that `traced` yielded.

    Raises:
        ValueError: If layers of the backbone do not read hidden state 0, or differ in tokens.
    """
    shapes = {x.shape[:2] for x in (*read, run.embeddings)}
    if len(shapes) > 1:
        raise _not_traced("has a backbone whose layers differ in tokens")
    later = [n for n, state in enumerate(run.states) if state is not run.embeddings]
    found = []
    for k in range(credits[0].shape[-1]):
        of_class = [x[..., k] for x in credits]
        slopes = torch.autograd.grad([x.sum() for x in of_class], read, retain_graph=True)
        total = torch.zeros_like(of_class[0])
        for x, slope, state in zip(of_class, slopes, read):  # all traced layers have one shape
            total = total + x.detach() - (slope * state.detach()).sum(-1)
        of_embeddings = sum(slopes[n] for n in range(len(read)) if n not in later)
        if later:
            states = [run.states[n] for n in later]
            (through,) = torch.autograd.grad(
                states, run.embeddings, [slopes[n] for n in later], retain_graph=True, allow_unused=True
            )
            if through is None:
                raise _not_traced("has a backbone whose layers do not read hidden state 0")
            of_embeddings = of_embeddings + through
        found.append((total + (of_embeddings * run.embeddings).sum(-1)).detach())
    return torch.stack(found, dim=-1)


def _is_float(name: str, x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and not name.endswith("mask")


def _rules(model: CapsuleHeadClassifier) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
    """Yield the modules whose derivatives are replaced, and the hooks that replace them."""
    for module in model.modules():
        children = dict(module.named_children())
        yield from ((children[name], _halved) for names in GATED if children.keys() >= set(names) for name in names)
        if isinstance(module, nn.LayerNorm):
            yield module, _centred
        elif isinstance(module, ACTIVATIONS) or type(module).__name__.endswith(("RMSNorm", "LayerNorm")):
            yield module, _scaled


def _as_leaf(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.detach().requires_grad_()


def _with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    """Return the value of a tensor with the gradient of another tensor."""
    return value.detach() + (other - other.detach())


def _centred(module: nn.LayerNorm, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
    (x,) = given
    dims = tuple(range(-len(module.normalized_shape), 0))
    with torch.no_grad():
        scale = (x.float().var(dims, correction=0, keepdim=True) + module.eps).rsqrt().to(x.dtype)
    scaled = (x - x.mean(dims, keepdim=True)) * scale
    return _with_gradient_of(output, scaled if module.weight is None else scaled * module.weight)


def _scaled(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x = given[0]
    with torch.no_grad():
        scale = torch.where(x == 0, 0, output / x)
    return _with_gradient_of(output, x * scale)


def _halved(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return _with_gradient_of(output, output / 2)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Compute attention such that values get half of the gradient, and queries and keys a quarter each."""
    query, key = (_with_gradient_of(x, x / 4) for x in (query, key))
    return sdpa_attention_forward(module, query, key, _with_gradient_of(value, value / 2), attention_mask, **options)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
