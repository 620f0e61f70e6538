"""Heads: what turns a backbone's hidden states into class scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_size, check_widths
from .layers import Routing


class HeadOutput(NamedTuple):
    """What a head returns.

    Attributes:
        a_out: `[batch, n_out]`, scores of the output capsules, as logits.
        mu_out: `[batch, n_out, d_cov, d_cap]`, their poses (means); None for a head without capsules.
        sig2_out: `[batch, n_out, d_cov, d_cap]`, their variances; None for a head without capsules.
        routing_probabilities: per routing `[batch, n_inp, n_out]`, or None if not asked for.
    """

    a_out: Tensor
    mu_out: Tensor | None = None
    sig2_out: Tensor | None = None
    routing_probabilities: tuple[Tensor, ...] | None = None


class PartDetector(nn.Module):
    """Makes capsules of the hidden states of one width: depth embedding, affine map, swish, layer normalisation.

    Args:
        n_depths: number of hidden states of that width.
        d_emb: the width.
        d_inp: width of the capsules.
    """

    def __init__(self, n_depths: int, d_emb: int, d_inp: int) -> None:
        super().__init__()
        self.depth_emb = nn.Parameter(torch.empty(n_depths, d_emb))
        self.affine = nn.Linear(d_emb, d_inp)
        self.norm = nn.LayerNorm(d_inp)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as the paper does: depth embeddings and biases zero, the affine map Kaiming normal."""
        nn.init.zeros_(self.depth_emb)
        nn.init.kaiming_normal_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)
        self.norm.reset_parameters()

    def project(self, hidden_states: Sequence[Tensor]) -> list[Tensor]:
        """Depth embedding and affine map: `n_depths` tensors `[batch, tokens, d_emb]` to `[batch, tokens, d_inp]`.

        Hidden states may be of any dtype. Those in half precision stay so in memory, but for one at a time.
        """
        # W (x + e) + b = W x + (W e + b): nothing of the width of the hidden states is made.
        offsets = self.affine(self.depth_emb)
        projected, scratch = [], None
        for x, offset in zip(hidden_states, offsets, strict=True):
            if _is_kept_in_half(x, self.affine.weight):
                if scratch is None or scratch.shape != x.shape:
                    scratch = torch.empty_like(x, dtype=self.affine.weight.dtype)
                projected.append(_LinearOfHalf.apply(x, self.affine.weight, scratch) + offset)
            else:
                projected.append(F.linear(x.to(self.affine.weight.dtype), self.affine.weight) + offset)
        return projected

    def project_together(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Return what `project` does as one tensor, `[batch, tokens, n_depths, d_inp]`, for states of one shape.

        On a GPU it takes a few launches for all of them, instead of several for each.
        """
        first = hidden_states[0]
        if first.device.type != "cuda" or torch.compiler.is_compiling():
            return torch.stack(self.project(hidden_states), dim=2)
        offsets, weight = self.affine(self.depth_emb), self.affine.weight
        if torch.is_autocast_enabled("cuda"):  # it does not see products that are written to where they stay
            weight = weight.to(torch.get_autocast_dtype("cuda"))
        return _ProjectTogether.apply(weight, offsets.to(weight.dtype), *hidden_states)

    def activate(self, projected: Tensor) -> Tensor:
        """Swish and layer normalisation, `[..., d_inp]`."""
        return self.norm(F.silu(projected))


class TokenDepthInputs(nn.Module):
    """What heads on all tokens at all depths have in common: the vectors that hidden states become.

    Hidden states of several widths, such as those of hierarchical image models, have a `PartDetector` per width. The
    vectors are ordered `token * d_depth + depth` where all hidden states have one shape, and depth after depth where
    they do not.

    Args:
        d_emb: width of each hidden state.
        d_inp: width of the vectors.
    """

    def __init__(self, d_emb: Sequence[int], d_inp: int) -> None:
        super().__init__()
        check_size("d_inp", d_inp)
        self.d_emb = check_widths(d_emb)
        self.widths = list(dict.fromkeys(self.d_emb))
        self.detect_parts = nn.ModuleList(
            [PartDetector(self.d_emb.count(width), width, d_inp) for width in self.widths]
        )

    def detect(
        self,
        hidden_states: Sequence[Tensor],
        mask: Tensor | Sequence[Tensor],
        mix: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The inputs of the head: scores `[batch, n_inp]`, as logits, and poses `[batch, n_inp, 1, d_inp]`.

        Arguments and errors as in `TokenDepthHead.forward`.
        """
        masks = check_inputs(hidden_states, mask, self.d_emb)
        if len(self.widths) == 1 and all(x.shape == hidden_states[0].shape for x in hidden_states):
            # What mixes samples commutes with the affine map, and has less to mix behind it.
            x = mixed(self.detect_parts[0].project_together(hidden_states), mix)
            x = self.detect_parts[0].activate(x).flatten(1, 2)
            if all(m is masks[0] for m in masks):
                a = _logit(masks[0], x)[:, :, None].expand(-1, -1, len(masks)).flatten(1)
            else:
                a = _logit(torch.stack(masks, dim=2), x).flatten(1)
        else:
            projected = [None] * len(self.d_emb)
            for width, detector in zip(self.widths, self.detect_parts):
                depths = [depth for depth, d_emb in enumerate(self.d_emb) if d_emb == width]
                for depth, x in zip(depths, detector.project([hidden_states[depth] for depth in depths])):
                    projected[depth] = x
            detectors = [self.detect_parts[self.widths.index(width)] for width in self.d_emb]
            x = torch.cat([detector.activate(mixed(x, mix)) for detector, x in zip(detectors, projected)], dim=1)
            a = _logit(torch.cat(masks, dim=1), x)
        return a, x.unsqueeze(-2)

    def split_by_depth(self, values: Tensor, n_tokens: Sequence[int]) -> list[Tensor]:
        """Values of the inputs, `[batch, n_inp, ...]`, as `[batch, tokens, ...]` per depth."""
        if len(self.widths) == 1 and len(set(n_tokens)) == 1:
            return list(values.unflatten(1, (n_tokens[0], len(n_tokens))).unbind(2))
        return list(values.split(list(n_tokens), dim=1))


class TokenDepthHead(TokenDepthInputs):
    """The paper's text head: every token at every depth is a capsule, routed to parts, routed to classes.

    A learned embedding of depth is added to the hidden states; an affine map, swish and layer normalisation make each
    one a capsule of `1 x d_inp`, with its token's mask as score; these are routed to `n_parts` capsules of `1 x d_cap`,
    and those to `n_out` capsules of `1 x d_cap`, whose scores are the logits (Heinsen, 2019, section 4.2). Hidden
    states of several widths, such as those of hierarchical image models, have one affine map and normalisation per
    width.

    Args:
        d_emb: width of each hidden state.
        n_out: number of output capsules; None to stop at the parts, which are then the output.
        d_inp: width of the capsules that hidden states become.
        n_parts: number of part capsules.
        d_cap: width of part and output capsules.
        strategy: of the first routing, which does almost all the work. That of the parts, each with its own weights, is
            "auto".
        **options: of both routings: `n_iters`, `p_model`, `single_beta`, `eps`; see `Routing`.
    """

    def __init__(
        self,
        *,
        d_emb: Sequence[int],
        n_out: int | None,
        d_inp: int = 64,
        n_parts: int = 64,
        d_cap: int = 2,
        strategy: str = "auto",
        **options,
    ) -> None:
        super().__init__(d_emb, d_inp)
        self.routings = _routings(n_out, n_parts, Routing(1, d_inp, d_cap, n_out=n_parts, strategy=strategy, **options))

    def reset_parameters(self) -> None:
        """Initialises all parameters anew."""
        _reset(*self.detect_parts, *self.routings)

    def forward(
        self,
        hidden_states: Sequence[Tensor],
        mask: Tensor | Sequence[Tensor],
        return_routing_probabilities: bool = False,
        mix: Callable[[Tensor], Tensor] | None = None,
    ) -> HeadOutput:
        """Scores each class.

        Args:
            hidden_states: one tensor `[batch, tokens, width]` per depth.
            mask: `[batch, tokens]`, in [0, 1]: 1 for a token, 0 for padding, a fraction for a share of a token (mixup);
                or one per depth.
            return_routing_probabilities: whether to return those of each routing.
            mix: mixes the samples of a batch (mixup). The hidden states are mixed with it; the mask is as it is given.

        Returns:
            A `HeadOutput`.

        Raises:
            ValueError: for another number of hidden states than the head was built for, or shapes that do not fit.
        """
        a, x = self.detect(hidden_states, mask, mix)
        return _route(self.routings, a, x, return_routing_probabilities)


class PlaceConv(nn.Conv1d):
    """A 1x1 convolution on `[batch, channels, places]`, initialised as the paper does: Kaiming normal, bias zero."""

    def __init__(self, d_inp: int, d_out: int) -> None:
        super().__init__(d_inp, d_out, kernel_size=1)

    def reset_parameters(self) -> None:
        """Initialises anew."""
        nn.init.kaiming_normal_(self.weight)
        nn.init.zeros_(self.bias)


class SpatialPoseHead(nn.Module):
    """The paper's vision head: scores and poses of parts at every place of a feature map, routed to parts, to classes.

    Batch normalisation and a 1x1 convolution give `n_parts` scores at each place; another pair gives as many poses of
    `d_cov x d_cap`. All are routed to `n_parts` capsules, and those to `n_out` capsules of the same shape, whose scores
    are the logits (Heinsen, 2019, section 4.1). To 1x1 convolutions places are what tokens are to an affine map:
    the head takes feature maps flattened to `[batch, places, channels]`, or the tokens of any backbone.

    The inputs of the first routing are ordered `part * places + place`.

    Args:
        d_emb: width of the one hidden state that it takes, as a sequence.
        n_out: number of output capsules; None to stop at the parts, which are then the output.
        n_parts: number of parts at a place, and of part capsules that they are routed to.
        d_cov: rows of a pose.
        d_cap: columns of a pose.
        strategy: of the first routing; see `TokenDepthHead`.
        **options: of both routings: `n_iters`, `p_model`, `single_beta`, `eps`; see `Routing`.
    """

    def __init__(
        self,
        *,
        d_emb: Sequence[int],
        n_out: int | None,
        n_parts: int = 64,
        d_cov: int = 4,
        d_cap: int = 4,
        strategy: str = "auto",
        **options,
    ) -> None:
        super().__init__()
        check_size("n_parts", n_parts)
        self.d_emb = check_widths(d_emb, at_most=1)
        (width,) = self.d_emb
        self.n_parts, self.d_cov, self.d_cap = n_parts, d_cov, d_cap
        self.compute_a = nn.Sequential(nn.BatchNorm1d(width), PlaceConv(width, n_parts))
        self.compute_mu = nn.Sequential(nn.BatchNorm1d(width), PlaceConv(width, n_parts * d_cov * d_cap))
        first = Routing(d_cov, d_cap, d_cap, n_out=n_parts, strategy=strategy, **options)
        self.routings = _routings(n_out, n_parts, first)

    def reset_parameters(self) -> None:
        """Initialises all parameters anew."""
        _reset(*self.compute_a, *self.compute_mu, *self.routings)

    def forward(
        self,
        hidden_states: Sequence[Tensor],
        mask: Tensor | Sequence[Tensor],
        return_routing_probabilities: bool = False,
        mix: Callable[[Tensor], Tensor] | None = None,
    ) -> HeadOutput:
        """Scores each class. Arguments, returns and errors as in `TokenDepthHead.forward`, with a single hidden state.

        The logarithm of the mask is added to the scores: a masked place has none.
        """
        a, x = self.detect(hidden_states, mask, mix)
        return _route(self.routings, a, x, return_routing_probabilities)

    def detect(
        self,
        hidden_states: Sequence[Tensor],
        mask: Tensor | Sequence[Tensor],
        mix: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The inputs of the first routing: scores `[batch, n_inp]` and poses `[batch, n_inp, d_cov, d_cap]`.

        Arguments and errors as in `forward`.
        """
        (mask,) = check_inputs(hidden_states, mask, self.d_emb)
        x = mixed(hidden_states[0].to(self.compute_a[0].weight.dtype), mix).mT  # [batch, channels, places]
        scores = self.compute_a(x)
        a = scores + mask.to(torch.promote_types(scores.dtype, torch.float32)).log()[:, None]
        poses = self.compute_mu(x).unflatten(1, (self.n_parts, self.d_cov, self.d_cap)).movedim(-1, 2)
        return a.flatten(1), poses.flatten(1, 2)

    def split_by_depth(self, values: Tensor, n_tokens: Sequence[int]) -> list[Tensor]:
        """As in `TokenDepthHead.split_by_depth`; the values of all parts at a place are summed."""
        return [values.unflatten(1, (self.n_parts, *n_tokens)).sum(1)]


class _LinearOfHalf(torch.autograd.Function):
    """An affine map's product that keeps its input for the backward pass as it is, in half precision.

    Autograd by itself would keep the input converted to the dtype of the weight: twice the memory. One scratch
    tensor `[..., d_emb]` of that dtype serves all depths, one after another: a new one each time fragments the heap.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scratch: Tensor) -> Tensor:
        return F.linear(scratch.copy_(x), weight)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.scratch = inputs[2]  # not saved: what is in it changes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, None]:
        (x,) = ctx.saved_tensors
        return None, grad.flatten(0, -2).mT @ ctx.scratch.copy_(x).flatten(0, -2), None


class _ProjectTogether(torch.autograd.Function):
    """The products of an affine map with many hidden states, and its offsets, in few launches.

    Some states at a time are copied side by side, in the dtype of the weight, and multiplied in one batched product.
    What they are copied to is small: for the backward pass the states are kept as they were given.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, offsets: Tensor, *states: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *states)
        n_rows = states[0].shape[:-1].numel()
        projected = weight.new_empty(n_rows, len(states), weight.shape[0])
        for part, x in _side_by_side(states, weight.dtype):
            by_depth = projected.transpose(0, 1)[part]
            torch.bmm(x, weight.mT.expand(len(x), -1, -1), out=by_depth)
        return projected.add_(offsets).view(*states[0].shape[:-1], len(states), -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *states = ctx.saved_tensors
        by_depth = grad.flatten(0, -3).transpose(0, 1)  # [depths,rows,d_inp]
        d_weight, d_offsets = None, by_depth.sum(1)
        if ctx.needs_input_grad[0]:
            d_weight = torch.zeros_like(weight)
            for part, x in _side_by_side(states, weight.dtype):
                d_weight.addmm_(by_depth[part].flatten(0, 1).mT, x.flatten(0, 1))
        needed = ctx.needs_input_grad[2:]
        d_states = ((d @ weight).view(x.shape).to(x.dtype) if need else None
                    for d, x, need in zip(by_depth, states, needed))  # fmt: skip
        return d_weight, d_offsets, *d_states


_SIDE_BY_SIDE = 2**24  # numbers of hidden states that are copied at a time: 64 MiB in float32


def _side_by_side(states: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield some states at a time: which they are, and `[states, batch * tokens, d_emb]` in a buffer used again."""
    flat = [x.flatten(0, -2) for x in states]
    n_together = min(len(flat), max(1, _SIDE_BY_SIDE // max(1, flat[0].numel())))
    buffer = flat[0].new_empty(n_together, *flat[0].shape, dtype=dtype)
    for start in range(0, len(flat), n_together):
        part = slice(start, min(len(flat), start + n_together))
        yield part, torch.stack(flat[part], out=buffer[: part.stop - start])


def _is_kept_in_half(x: Tensor, weight: Tensor) -> bool:
    """Whether a hidden state is of less precision than the weight, and is kept so until the backward pass."""
    is_narrower = x.dtype.itemsize < weight.dtype.itemsize
    has_gradient = torch.is_grad_enabled() and weight.requires_grad
    return is_narrower and has_gradient and not x.requires_grad and not torch.is_autocast_enabled(x.device.type)


def mixed(x: Tensor, mix: Callable[[Tensor], Tensor] | None) -> Tensor:
    return x if mix is None else mix(x)


def check_inputs(
    hidden_states: Sequence[Tensor], mask: Tensor | Sequence[Tensor], d_emb: tuple[int, ...]
) -> list[Tensor]:
    """Checks the inputs of a head, and returns one mask per depth."""
    if not isinstance(hidden_states, Sequence | Tensor):
        raise TypeError(f"hidden_states is a {type(hidden_states).__name__}; expected a sequence of tensors.")
    if len(hidden_states) != len(d_emb):
        raise ValueError(
            f"{len(hidden_states)} hidden states were passed to a head built for {len(d_emb)}; expected one per depth: "
            "the embeddings, say, and the output of every layer."
        )
    masks = [mask] * len(d_emb) if isinstance(mask, Tensor) else list(mask or ())
    if len(masks) != len(d_emb) or not all(isinstance(x, Tensor) for x in [*hidden_states, *masks]):
        raise ValueError(
            f"The hidden states are {len(hidden_states)} of {_types(hidden_states)} and the masks {len(masks)} of "
            f"{_types(masks)}; expected tensors, a hidden state per depth and one mask for all or for each."
        )
    for x, m, width in zip(hidden_states, masks, d_emb, strict=True):
        if x.ndim != 3 or x.shape[-1] != width or x.shape[:-1] != m.shape:
            raise ValueError(
                f"A hidden state has shape {tuple(x.shape)} and its mask {tuple(m.shape)}; expected [batch, tokens, "
                f"{width}] and [batch, tokens]."
            )
        if x.device != m.device:
            raise ValueError(
                f"A hidden state is on {x.device} and its mask on {m.device}; expected both on one device."
            )
    return masks


def _types(values: Sequence[object]) -> str:
    return ", ".join(sorted({type(value).__name__ for value in values})) or "nothing"


def _logit(mask: Tensor, like: Tensor) -> Tensor:
    """The logit of a mask, in float32 also where hidden states are bfloat16, which would round a mixed mask."""
    return torch.logit(mask.to(torch.promote_types(like.dtype, torch.float32)))


def _routings(n_out: int | None, n_parts: int, first: Routing) -> nn.ModuleList:
    """The routing to parts and, unless `n_out` is None, one like it from parts to outputs."""
    if n_out is None:
        return nn.ModuleList([first])
    options = {name: getattr(first, name) for name in ("n_iters", "p_model", "single_beta", "eps")}
    return nn.ModuleList([first, Routing(first.d_cov, first.d_out, first.d_out, n_parts, n_out, **options)])


def _reset(*modules: nn.Module) -> None:
    for module in modules:
        module.reset_parameters()


def _route(routings: nn.ModuleList, a: Tensor, x: Tensor, return_routing_probabilities: bool) -> HeadOutput:
    """Through one routing after another: scores `[batch, i]`, poses `[batch, i, c, d]`."""
    probabilities = []
    for routing in routings:
        a, x, sig2, *R = routing(a, x, return_R=return_routing_probabilities)
        probabilities += R
    return HeadOutput(a, x, sig2, tuple(probabilities) if return_routing_probabilities else None)
