"""The base of heads that take all tokens at all layers: it turns hidden states into vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Head, Mix, mixed


class PartDetector(nn.Module):
    """Turns hidden states of one size into vectors: layer embedding, affine map, swish, layer normalisation.

    Args:
        n_layers: number of hidden states of this size.
        hidden_size: size of the hidden states.
        d_inp: size of the vectors.
    """

    def __init__(self, n_layers: int, hidden_size: int, d_inp: int) -> None:
        super().__init__()
        self.depth_emb = nn.Parameter(torch.empty(n_layers, hidden_size))
        self.affine = nn.Linear(hidden_size, d_inp)
        self.norm = nn.LayerNorm(d_inp)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as in the paper: layer embeddings and biases zero, the affine map Kaiming normal."""
        nn.init.zeros_(self.depth_emb)
        nn.init.kaiming_normal_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)
        self.norm.reset_parameters()

    def project(self, hidden_states: Sequence[Tensor]) -> list[Tensor]:
        """Add the layer embeddings to hidden states, and return their affine map.

        Hidden states may have any dtype. Hidden states in half precision are converted one at a time.

        Args:
            hidden_states: `n_layers` tensors `[batch, tokens, hidden_size]`.

        Returns:
            `n_layers` tensors `[batch, tokens, d_inp]`.
        """
        # W (x + e) + b = W x + (W e + b) makes no tensor of the size of the hidden states.
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
        """Do what `project` does for states of one shape, and return one tensor, `[batch, tokens, n_layers, d_inp]`.

        On a GPU this takes a few launches for all states, instead of several for each.
        """
        first = hidden_states[0]
        if first.device.type != "cuda" or torch.compiler.is_compiling():
            return torch.stack(self.project(hidden_states), dim=2)
        offsets, weight = self.affine(self.depth_emb), self.affine.weight
        if torch.is_autocast_enabled("cuda"):  # autocast does not apply to products that write to `out=`
            weight = weight.to(torch.get_autocast_dtype("cuda"))
        return _ProjectTogether.apply(weight, offsets.to(weight.dtype), *hidden_states)

    def activate(self, projected: Tensor) -> Tensor:
        """Return swish and layer normalisation of projected states, `[..., d_inp]`."""
        return self.norm(F.silu(projected))


class TokenHead(Head):
    """A head on vectors, one for each token at each layer.

    Hidden states of several sizes, as in hierarchical image models, have a `PartDetector` per size. If all hidden
    states have one shape, the vectors are ordered `token * n_layers + layer`. Otherwise one layer follows another.

    Attributes:
        detect_parts: one `PartDetector` for each size of hidden states; a subclass makes them with `make_detectors`.
    """

    detect_parts: nn.ModuleList

    def make_detectors(self, d_inp: int) -> nn.ModuleList:
        """Return the modules that make vectors of size `d_inp`, one for each size of hidden states."""
        sizes = dict.fromkeys(self.hidden_sizes)
        return nn.ModuleList([PartDetector(self.hidden_sizes.count(size), size, d_inp) for size in sizes])

    def detect(
        self, hidden_states: Sequence[Tensor], masks: Sequence[Tensor], mix: Mix | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the vectors as capsules of one row.

        Args:
            hidden_states: as in `forward`.
            masks: one per layer.
            mix: as in `forward`.

        Returns:
            Scores `[batch, n_inp]`, as logits, and poses `[batch, n_inp, 1, d_inp]`.
        """
        detectors: Sequence[PartDetector] = list(self.detect_parts)  # type: ignore[arg-type]  # what is in a ModuleList
        if len(detectors) == 1 and all(x.shape == hidden_states[0].shape for x in hidden_states):
            # Mixing samples commutes with the affine map, and has less to mix after it.
            x = mixed(detectors[0].project_together(hidden_states), mix)
            x = detectors[0].activate(x).flatten(1, 2)
            if all(m is masks[0] for m in masks):
                a = _logit(masks[0], x)[:, :, None].expand(-1, -1, len(masks)).flatten(1)
            else:
                a = _logit(torch.stack(list(masks), dim=2), x).flatten(1)
        else:
            vectors: dict[int, Tensor] = {}
            for size, detector in zip(dict.fromkeys(self.hidden_sizes), detectors):
                layers = [layer for layer, of_layer in enumerate(self.hidden_sizes) if of_layer == size]
                projected = detector.project([hidden_states[layer] for layer in layers])
                vectors |= {layer: detector.activate(mixed(x, mix)) for layer, x in zip(layers, projected)}
            x = torch.cat([vectors[layer] for layer in range(len(vectors))], dim=1)
            a = _logit(torch.cat(list(masks), dim=1), x)
        return a, x.unsqueeze(-2)

    def split_by_layer(self, values: Tensor, n_tokens: Sequence[int]) -> list[Tensor]:
        """Split values of the vectors, `[batch, n_inp, ...]`, into `[batch, tokens, ...]` per layer."""
        if len(self.detect_parts) == 1 and len(set(n_tokens)) == 1:
            return list(values.unflatten(1, (n_tokens[0], len(n_tokens))).unbind(2))
        return list(values.split(list(n_tokens), dim=1))


def attend(scores: Tensor, a: Tensor) -> Tensor:
    """Return the weights of inputs: the softmax of their scores, with their mask as a factor.

    Args:
        scores: `[..., n_inp]`.
        a: logit of the mask, of the same shape or one that expands to it; -inf for a masked input.

    Returns:
        `[..., n_inp]`; if all inputs are masked, the weights are 0.
    """
    masked = scores + F.logsigmoid(a).clamp_min(torch.finfo(torch.float32).min)
    return masked.softmax(-1) * (a > -torch.inf)


class _LinearOfHalf(torch.autograd.Function):
    """Product of an affine map that keeps its half-precision input for the backward pass, without converting it.

    Autograd by itself would keep the input converted to the dtype of the weight, which takes twice the memory. One
    scratch tensor `[..., hidden_size]` of that dtype serves all layers in turn. A new one each time would fragment the
    heap.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scratch: Tensor) -> Tensor:
        return F.linear(scratch.copy_(x), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.scratch = inputs[2]  # not saved: its values change

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (x,) = ctx.saved_tensors
        return None, grad.flatten(0, -2).mT @ ctx.scratch.copy_(x).flatten(0, -2), None


class _ProjectTogether(torch.autograd.Function):
    """The products of an affine map with many hidden states, plus its offsets, in few launches.

    A few states at a time are copied side by side into a small buffer, in the dtype of the weight, and multiplied in
    one batched product. For the backward pass the states are kept as they were given.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, offsets: Tensor, *states: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *states)
        n_rows = states[0].shape[:-1].numel()
        projected = weight.new_empty(n_rows, len(states), weight.shape[0])
        for part, x in _side_by_side(states, weight.dtype):
            by_layer = projected.transpose(0, 1)[part]
            torch.bmm(x, weight.mT.expand(len(x), -1, -1), out=by_layer)
        return projected.add_(offsets).view(*states[0].shape[:-1], len(states), -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *states = ctx.saved_tensors
        by_layer = grad.flatten(0, -3).transpose(0, 1)  # [layers,rows,d_inp]
        d_weight, d_offsets = None, by_layer.sum(1)
        if ctx.needs_input_grad[0]:
            d_weight = torch.zeros_like(weight)
            for part, x in _side_by_side(states, weight.dtype):
                d_weight.addmm_(by_layer[part].flatten(0, 1).mT, x.flatten(0, 1))
        needed = ctx.needs_input_grad[2:]
        d_states = ((d @ weight).view(x.shape).to(x.dtype) if need else None
                    for d, x, need in zip(by_layer, states, needed))  # fmt: skip
        return d_weight, d_offsets, *d_states


_SIDE_BY_SIDE = 2**24  # how many numbers of hidden states are copied at a time: 64 MiB in float32


def _side_by_side(states: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield a few states at a time: their slice of all states, and a buffer `[states, batch * tokens, hidden_size]`."""
    flat = [x.flatten(0, -2) for x in states]
    n_together = min(len(flat), max(1, _SIDE_BY_SIDE // max(1, flat[0].numel())))
    buffer = flat[0].new_empty(n_together, *flat[0].shape, dtype=dtype)
    for start in range(0, len(flat), n_together):
        part = slice(start, min(len(flat), start + n_together))
        yield part, torch.stack(flat[part], out=buffer[: part.stop - start])


def _is_kept_in_half(x: Tensor, weight: Tensor) -> bool:
    """Return whether a hidden state has a narrower dtype than the weight, and keeps it until the backward pass."""
    is_narrower = x.dtype.itemsize < weight.dtype.itemsize
    has_gradient = torch.is_grad_enabled() and weight.requires_grad
    return is_narrower and has_gradient and not x.requires_grad and not torch.is_autocast_enabled(x.device.type)


def _logit(mask: Tensor, like: Tensor) -> Tensor:
    """Return the logit of a mask, in float32 or wider: bfloat16 would round a mixed mask."""
    return torch.logit(mask.to(torch.promote_types(like.dtype, torch.float32)))
