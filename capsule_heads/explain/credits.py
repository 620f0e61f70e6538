"""Credits: what tokens, layers and parts add to class scores, in logits, at the cost of a forward pass.

The score of a capsule IS a sum over its inputs, `a_out_j = sum_i credit_ij`, with `credit_ij = beta_use_ij D_use_ij -
beta_ign_ij D_ign_ij` (Heinsen, 2019, section 2). The terms of this sum are called credits. There are two routings, one
after another:

- **Parts to classes** is exact. The credits of all parts for a class add up to its score, within rounding.
- **Tokens to parts** is exact too. The credits of all tokens at all layers for a part add up to the part's score.
- **Tokens to classes** goes through both routings. Credits add up to the score less its baseline, within `TOLERANCE`.

The baseline is the score of an input with all tokens masked. The first routing then returns `a = 0` and `mu = 0` for
every part, in any model, which means no evidence. Take the straight path from there to the parts of an input, `t a` and
`t mu` with `t` from 0 to 1. Along it a class score gains `sum_j a_j A_jk + mu_j M_jk`, where `A` and `M` are the means
of its derivatives with respect to `a` and `mu` (integrated gradients, Sundararajan et al., 2017). Both `a_j` and `mu_j`
are sums over tokens and layers: `a_j = sum_i credit_ij`, and `mu_j = sum_i f_ij V_ij`, with `f_ij = D_use_ij /
(n_j + eps)`. So input `i` has the credit `sum_j credit_ij A_jk + f_ij V_ij M_jk` for class `k`.

Two things are taken as given, though removing a token changes both. One is the probabilities of the first routing,
`R_ij`. The other is the hidden states: a backbone mixes tokens, so a token's state at a later layer also depends on
other tokens.

Heads without capsules whose scores are sums have exact credits of tokens too (`Head.credits`), with the same baseline:
linear, attentive pooling and scalar mix. Attention weights are taken as given.

A linear term (`capsule_heads.heads.linear_term`) is a sum over tokens and layers, plus a bias, for each class. The
logits of a model with this term are the mean of the scores of term and head, so all credits are halved. The exact
credits of the term are added to those of the tokens, and its bias to the baseline. Halved, the credits of parts, of the
term and of its bias add up to the logit.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..heads import Head, RoutingHead, get_head, registered_heads
from ..layers import Routing
from ..models.configuration_capsule_head import CapsuleHeadConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

TOLERANCE = 1e-4  # logits by which credits of tokens may miss the score less its baseline, before rounding
RELATIVE_TOLERANCE = 1e-6  # fraction of the largest gain, used if it is more: float32 has no more digits
CUTS = (0, 1 / 16, 1 / 4, 1)  # ends of the first stretches of the path, which are shorter where scores change faster
N_NODES = 9  # nodes of a stretch of the path, including both ends
MOST_HALVINGS = 12  # halvings of a stretch; after that it is used even if it misses its tolerance
MOST_VOTES = 2**22  # numbers in the votes of one call of the routing, to limit memory


class Credits(NamedTuple):
    """The credits for the scores of a batch, in logits.

    Attributes:
        scores: `[batch, n_out]`, the class scores.
        parts: `[batch, n_parts, n_out]`, exact credits, whose sum over parts is `scores`. A head without capsules has
            no parts.
        inputs: per layer `[batch, tokens, n_out]`; empty if they are left out. With `baseline` they add up to `scores`,
            within `TOLERANCE` for a head with capsules and exactly for others.
        baseline: `[batch, n_out]`, scores of a completely masked input; None if `inputs` are left out.
    """

    scores: Tensor
    parts: Tensor
    inputs: list[Tensor]
    baseline: Tensor | None = None


@torch.no_grad()
def compute_credits(
    head: Head, hidden_states: Sequence[Tensor], masks: Sequence[Tensor], parts_only: bool = False
) -> Credits:
    """Compute the credits of parts, and of all tokens at all layers, for all classes.

    This costs a forward pass of the head and, for each class, some tens of backward passes of its second routing, which
    is small. It takes memory for `[n_inp, n_parts]` numbers per sample. A head without capsules costs only forward
    passes.

    Args:
        head: a head that explains tokens (`Head.explains`).
        hidden_states: per layer `[batch, tokens, hidden_size]`, as the head takes them.
        masks: per layer `[batch, tokens]`.
        parts_only: whether to leave out the credits of tokens, and with them the backward passes.

    Returns:
        `Credits`, in float32 or wider.

    Raises:
        ValueError: If the head explains no class scores.
    """
    if not parts_only:
        return credits_with_graph(head, hidden_states, masks)
    _check_explains(head)
    if not isinstance(head, RoutingHead):
        scores = head(hidden_states, masks).a_out
        return Credits(scores, scores.new_empty(len(scores), 0, scores.shape[-1]), [])
    first, second = _routings(head)
    a, mu, _ = first(*head.detect(hidden_states, masks))
    scores, _, _, R = second(a, mu, return_R=True)
    return Credits(scores, second.credits(a, R), [])


def credits_with_graph(head: Head, hidden_states: Sequence[Tensor], masks: Sequence[Tensor]) -> Credits:
    """Compute the result of `compute_credits` in the caller's gradient mode.

    Quantities that are taken as given are constants in the graph of `inputs` too: probabilities, attention weights,
    slopes.
    """
    _check_explains(head)
    if not isinstance(head, RoutingHead):
        with torch.no_grad():
            scores = head(hidden_states, masks).a_out
            # All masked inputs score alike, so one token is enough.
            nothing = head([x[:, :1] for x in hidden_states], [torch.zeros_like(mask[:, :1]) for mask in masks]).a_out
        parts = scores.new_empty(len(scores), 0, scores.shape[-1])
        return Credits(scores, parts, [x.to(scores.dtype) for x in head.credits(hidden_states, masks)], nothing)
    first, second = _routings(head)
    a_inp, mu_inp = head.detect(hidden_states, masks)
    with torch.no_grad():
        a, mu, _, R = first(a_inp, mu_inp, return_R=True)  # scores and poses of the parts
        to_parts = first.credits(a_inp, R)  # [bij]
        fractions = a_inp.to(R.dtype).sigmoid().unsqueeze(-1) * R
        fractions /= fractions.sum(-2, keepdim=True) + first.eps
        scores, _, _, R = second(a, mu, return_R=True)
        to_classes = second.credits(a, R)
    slopes = integrate_slopes(second, a, mu)
    inputs = [
        (to_parts * of_a.unsqueeze(-2)).sum(-1) + _along_poses(first, mu_inp, fractions, of_mu)
        for of_a, of_mu in zip(slopes.a.to(R.dtype).unbind(-1), slopes.mu.to(R.dtype).unbind(-1))
    ]
    by_layer = head.split_by_layer(torch.stack(inputs, dim=-1), [x.shape[1] for x in hidden_states])
    return Credits(scores, to_classes, by_layer, slopes.start.to(R.dtype))


def _check_explains(head: Head) -> None:
    """Check that the scores of a head can be explained.

    Raises:
        ValueError: If it explains no class scores.
    """
    if not head.explains or head.n_out is None:
        raise _no_credits(type(head))


def _routings(head: RoutingHead) -> tuple[Routing, Routing]:
    """Return the routing to the parts, and the routing to the classes."""
    first, second = (routing for routing in head.routings if isinstance(routing, Routing))
    return first, second


class Slopes(NamedTuple):
    """Means of the derivatives of class scores along the path from no evidence to the parts of each sample, in float64.

    Attributes:
        a: `[batch, n_parts, n_out]`, with respect to the scores of parts.
        mu: `[batch, n_parts, d_cov, d_cap, n_out]`, with respect to their poses.
        start: `[batch, n_out]`, the class scores where the path starts.
    """

    a: Tensor
    mu: Tensor
    start: Tensor


def integrate_slopes(routing: Routing, a: Tensor, mu: Tensor) -> Slopes:
    """Integrate the derivatives of class scores along the straight path from `a = 0` and `mu = 0`.

    Stretches of the path are integrated by Gauss-Lobatto quadrature. The scores at the ends of a stretch give the exact
    gain along it. If the integral misses this gain, the stretch is halved. Variances of votes are small where a path
    starts, and derivatives change fast there, so a few texts need many nodes. The computation is in float64, as
    `TOLERANCE` is small beside the terms of the sum.

    Args:
        routing: the routing from parts to classes.
        a: `[batch, n_parts]`, scores of the parts.
        mu: `[batch, n_parts, d_cov, d_cap]`, poses of the parts.

    Returns:
        `Slopes`. A warning is logged if they miss the gain by more than `TOLERANCE`.
    """
    a, mu = a.detach().double(), mu.detach().double()
    weights = {name: x.detach().double() for name, x in routing.named_parameters()}
    with torch.no_grad():
        start, end = (torch.func.functional_call(routing, weights, (t * a, t * mu))[0] for t in (0, 1))
    of_a, of_mu = a.new_zeros(*a.shape, start.shape[-1]), mu.new_zeros(*mu.shape, start.shape[-1])
    allowed = (RELATIVE_TOLERANCE * (end - start).abs().amax(-1)).clamp(min=TOLERANCE)
    per_call = max(1, MOST_VOTES // (N_NODES * mu[0].numel() * start.shape[-1]))
    # A stretch is its sample, its start and its length.
    cuts = a.new_tensor(CUTS)
    rows = torch.arange(len(a), device=a.device).repeat_interleave(len(CUTS) - 1)
    stretches: list[tuple[Tensor, ...]] = [(rows, cuts[:-1].repeat(len(a)), cuts.diff().repeat(len(a)))]
    for halvings in range(MOST_HALVINGS + 1):
        missed = []
        for rows, low, length in (x for found in stretches for x in zip(*(part.split(per_call) for part in found))):
            slopes_a, slopes_mu, gain = _integrate_stretch(routing, weights, a[rows], mu[rows], low, length)
            is_off = (_gain(slopes_a, slopes_mu, a[rows], mu[rows]) - gain).abs().amax(-1) > allowed[rows] * length
            if halvings == MOST_HALVINGS:
                is_off.zero_()
            of_a.index_add_(0, rows[~is_off], slopes_a[~is_off])
            of_mu.index_add_(0, rows[~is_off], slopes_mu[~is_off])
            rows, low, half = rows[is_off], low[is_off], length[is_off] / 2
            missed += [(rows, low, half), (rows, low + half, half)]
        stretches = [tuple(torch.cat(x) for x in zip(*missed))]
        if not len(stretches[0][0]):
            break
    off = ((_gain(of_a, of_mu, a, mu) - (end - start)).abs().amax(-1) - allowed).max()
    if off > 0:
        logger.warning("The sum of token credits misses scores by %.1e logits, as the scores change fast.", off)
    return Slopes(of_a, of_mu, start)


def _gain(of_a: Tensor, of_mu: Tensor, a: Tensor, mu: Tensor) -> Tensor:
    """Return the gain of class scores from parts with these slopes, `[n, n_out]`."""
    return torch.einsum("njk,nj->nk", of_a, a) + torch.einsum("njchk,njch->nk", of_mu, mu)


def _lobatto(n: int) -> tuple[NDArray, NDArray]:
    """Return `n` nodes from 0 to 1, including both ends, and their weights."""
    polynomial = np.polynomial.Legendre.basis(n - 1)
    nodes = np.concatenate([[-1.0], polynomial.deriv().roots(), [1.0]])
    return (nodes + 1) / 2, 1 / (n * (n - 1) * polynomial(nodes) ** 2)


def _integrate_stretch(
    routing: Routing, weights: dict[str, Tensor], a: Tensor, mu: Tensor, low: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Integrate derivatives along one stretch of each path, and return the gain of the scores there too.

    Args:
        routing: the routing from parts to classes.
        weights: its parameters, in float64.
        a: `[n, n_parts]`, the scores of parts at the end of each path.
        mu: `[n, n_parts, d_cov, d_cap]`, the poses of parts at the end of each path.
        low: `[n]`, the start of the stretch on a path from 0 to 1.
        length: `[n]`, the length of the stretch.

    Returns:
        Slopes `[n, n_parts, n_out]` and `[n, n_parts, d_cov, d_cap, n_out]`, and gains `[n, n_out]`, in logits.
    """
    nodes, shares = (a.new_tensor(x) for x in _lobatto(N_NODES))
    at = low[:, None] + length[:, None] * nodes
    shares = length[:, None] * shares
    with torch.enable_grad():
        path = (at[..., None] * a[:, None]).requires_grad_(), (at[..., None, None, None] * mu[:, None]).requires_grad_()
        scores = torch.func.functional_call(routing, weights, path)[0]
        slopes = [
            torch.autograd.grad(score.sum(), path, retain_graph=True, materialize_grads=True)
            for score in scores.unbind(-1)
        ]
    of_a = torch.stack([torch.einsum("nq,nqj->nj", shares, x) for x, _ in slopes], dim=-1)
    of_mu = torch.stack([torch.einsum("nq,nqjch->njch", shares, x) for _, x in slopes], dim=-1)
    return of_a, of_mu, (scores[:, -1] - scores[:, 0]).detach()


def check_explained(config: CapsuleHeadConfig) -> None:
    """Check that the scores of a classifier can be explained, before it is loaded.

    Raises:
        ValueError: If it is a regression, or its head explains nothing.
    """
    if config.problem_type == "regression":
        raise ValueError(
            "Explanations are of class scores, and this model is a regression, which has none; expected a classifier."
        )
    head = get_head(config.head_type)
    if not head.explains:
        raise _no_credits(head)


def _no_credits(head: type[Head]) -> ValueError:
    names = [name for name, known in registered_heads().items() if known.explains]
    article = "An" if head.__name__[0] in "AEIOU" else "A"
    return ValueError(
        f"{article} {head.__name__} has no credits to explain; expected a classifier with one of the heads "
        f"{', '.join(names)}."
    )


def _along_poses(routing: Routing, mu_inp: Tensor, fractions: Tensor, of_mu: Tensor) -> Tensor:
    """Compute `sum_jch f_ij V_ijch of_mu_jch`, `[bi]`, without the votes `V`."""
    weights = torch.einsum("jdh,bjch->bjcd", routing.W[0].to(of_mu.dtype), of_mu)
    votes = torch.einsum("bicd,bjcd->bij", mu_inp.to(of_mu.dtype), weights)  # along of_mu, without the shared bias
    of_all = (routing.B[0].to(of_mu.dtype) * of_mu).sum((-2, -1))  # [bj]
    return (fractions * (votes + of_all.unsqueeze(-2))).sum(-1)
