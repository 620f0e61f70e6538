"""Heads to compare capsules with: the same inputs, the same trainer, no capsules.

All take what `TokenDepthHead.forward` takes, and return a `HeadOutput` with scores alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_choice, check_size, check_widths
from .heads import HeadOutput, TokenDepthInputs, check_inputs, mixed

POOLINGS = ("mean", "first", "last")


class LinearHead(nn.Module):
    """One hidden state, pooled over tokens, and an affine map.

    Args:
        d_emb: width of the one hidden state that it takes, as a sequence.
        n_out: number of scores.
        pooling: "mean" of all tokens, or the "first" (BERT's [CLS]) or "last" one that is no padding.
    """

    def __init__(self, *, d_emb: Sequence[int], n_out: int, pooling: str = "mean") -> None:
        super().__init__()
        check_size("n_out", n_out)
        check_choice("pooling", pooling, POOLINGS)
        self.d_emb, self.pooling = check_widths(d_emb, at_most=1), pooling
        (width,) = self.d_emb
        self.affine = nn.Linear(width, n_out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises weight and bias to zero: all classes start alike."""
        nn.init.zeros_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)

    def forward(
        self,
        hidden_states: Sequence[Tensor],
        mask: Tensor | Sequence[Tensor],
        return_routing_probabilities: bool = False,
        mix: Callable[[Tensor], Tensor] | None = None,
    ) -> HeadOutput:
        """Scores each class. Arguments, returns and errors as in `TokenDepthHead.forward`; it has no probabilities."""
        (mask,) = check_inputs(hidden_states, mask, self.d_emb)
        x = mixed(hidden_states[0].to(self.affine.weight.dtype), mix)
        return HeadOutput(self.affine(_pool(x, mask, self.pooling)).float())


class ScalarMixHead(nn.Module):
    """A learned mix of all depths (Peters et al., 2018, arXiv 1802.05365), their mean over tokens, and a hidden layer.

    `gamma sum_l s_l h_l` with `s = softmax(w)`; swish between the two affine maps.

    Args:
        d_emb: width of each hidden state, all the same.
        n_out: number of scores.
        d_inp: width of the hidden layer.

    Raises:
        ValueError: for hidden states of several widths, which cannot be mixed.
    """

    def __init__(self, *, d_emb: Sequence[int], n_out: int, d_inp: int = 64) -> None:
        super().__init__()
        check_size("n_out", n_out)
        check_size("d_inp", d_inp)
        self.d_emb = check_widths(d_emb)
        if len(set(self.d_emb)) > 1:
            raise ValueError(
                f'Hidden states have widths {", ".join(map(str, self.d_emb))}; head_type="scalar_mix" adds them up, '
                "and expected one width: name depths that have it, or take another head."
            )
        self.w, self.gamma = nn.Parameter(torch.empty(len(d_emb))), nn.Parameter(torch.empty(()))
        self.hidden = nn.Linear(self.d_emb[0], d_inp)
        self.affine = nn.Linear(d_inp, n_out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises anew: all depths weigh the same, and all classes start alike."""
        nn.init.zeros_(self.w)
        nn.init.ones_(self.gamma)
        nn.init.kaiming_normal_(self.hidden.weight)
        for zeros in (self.hidden.bias, self.affine.weight, self.affine.bias):
            nn.init.zeros_(zeros)

    def forward(
        self,
        hidden_states: Sequence[Tensor],
        mask: Tensor | Sequence[Tensor],
        return_routing_probabilities: bool = False,
        mix: Callable[[Tensor], Tensor] | None = None,
    ) -> HeadOutput:
        """Scores each class. Arguments, returns and errors as in `TokenDepthHead.forward`; it has no probabilities."""
        masks = check_inputs(hidden_states, mask, self.d_emb)
        dtype = self.hidden.weight.dtype
        # A mean over tokens of a mix of depths is a mix of means, which are small.
        means = [_pool(mixed(x.to(dtype), mix), mask, "mean") for x, mask in zip(hidden_states, masks)]
        pooled = self.gamma * torch.einsum("l,lbd->bd", self.w.softmax(0), torch.stack(means))
        return HeadOutput(self.affine(F.silu(self.hidden(pooled))).float())


class AttentivePoolingHead(TokenDepthInputs):
    """A learned query that attends to all tokens at all depths, and an affine map of what it finds.

    Hidden states become vectors `x_i` as in `TokenDepthHead`: depth embedding, affine map, swish, normalisation. With
    a mask `f_i`, the weight of each is `f_i exp(q x_i / sqrt(d_inp))`, over the sum of all.

    Args:
        d_emb: width of each hidden state.
        n_out: number of scores.
        d_inp: width of the vectors and the query.
    """

    def __init__(self, *, d_emb: Sequence[int], n_out: int, d_inp: int = 64) -> None:
        super().__init__(d_emb, d_inp)
        check_size("n_out", n_out)
        self.query = nn.Parameter(torch.empty(d_inp))
        self.affine = nn.Linear(d_inp, n_out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises anew: the query attends to all alike, and all classes start alike."""
        for detector in self.detect_parts:
            detector.reset_parameters()
        for zeros in (self.query, self.affine.weight, self.affine.bias):
            nn.init.zeros_(zeros)

    def forward(
        self,
        hidden_states: Sequence[Tensor],
        mask: Tensor | Sequence[Tensor],
        return_routing_probabilities: bool = False,
        mix: Callable[[Tensor], Tensor] | None = None,
    ) -> HeadOutput:
        """Scores each class. Arguments, returns and errors as in `TokenDepthHead.forward`; it has no probabilities."""
        a, x = self.detect(hidden_states, mask, mix)
        x = x.squeeze(-2)  # [bid]
        scores = (x @ self.query) * x.shape[-1] ** -0.5
        # Where all is masked the weights are 0, not NaN.
        weights = (scores + F.logsigmoid(a).clamp_min(torch.finfo(torch.float32).min)).softmax(-1) * (a > -torch.inf)
        return HeadOutput(self.affine(torch.einsum("bi,bid->bd", weights.to(x.dtype), x)).float())


class VectorRouting(nn.Module):
    """Routes vectors to the vectors that best predict them (Heinsen, 2022, arXiv 2211.11754), in its efficient form.

    With inputs `x_i [d]`, outputs `y_j [h]`, a mask `m_i` and `n = sum_i m_i`, `N` for normalisation to mean 0 and
    variance 1, and `*` element by element:

        z_i = x_i / sqrt(n)          f_i = m_i sigmoid(w_A z_i + b_A)
        V_ij = (w_F1_j * z_i) W_F2 + b_F2_j                              votes
    then `n_iters` times
        E-step   R_ij = 1 / n_out; later softmax_j(logsigmoid(w_S_j (x_i u_j) + b_S_j)),
                 u_j = w_G2_j * (N(y_j) W_G1) + b_G2_j                   what output j predicts
        D-step   D_use_ij = f_i R_ij            D_ign_ij = f_i - D_use_ij
        M-step   credit_ij = beta_use_ij D_use_ij - beta_ign_ij D_ign_ij
                 y_j = sum_i credit_ij V_ij = (w_F1_j * sum_i credit_ij z_i) W_F2 + b_F2_j sum_i credit_ij

    The last form needs no votes: memory is linear in inputs and outputs. Without `n_inp`, one set of parameters serves
    any number of inputs, and the betas are affine functions of `x_i`. The equations are those of the author's published
    implementation, not checked line by line against the paper. It has no mask; with one, padding changes
    nothing. Outputs wider than 1 are normalised at the end.

    Args:
        n_out: number of outputs, 2 or more.
        d_inp: width of an input.
        d_out: width of an output.
        n_inp: number of inputs, each with parameters of its own; None for any number with shared ones.
        n_iters: iterations; the paper's are 2.
    """

    def __init__(self, *, n_out: int, d_inp: int, d_out: int, n_inp: int | None = None, n_iters: int = 2) -> None:
        super().__init__()
        for name, size in (("n_out", n_out), ("d_inp", d_inp), ("d_out", d_out), ("n_iters", n_iters)):
            check_size(name, size)
        check_size("n_inp", n_inp, or_none="variable")
        if n_out < 2:
            raise ValueError(f"n_out is {n_out}; expected 2 or more: a single output has nothing to compete with.")
        self.n_inp, self.n_iters, self.d_out = n_inp, n_iters, d_out
        i = n_inp or 1
        self.W_A, self.B_A = nn.Parameter(torch.empty(i, d_inp)), nn.Parameter(torch.empty(i))
        self.W_F1 = nn.Parameter(torch.empty(n_out, d_inp))
        self.W_F2, self.B_F2 = nn.Parameter(torch.empty(d_inp, d_out)), nn.Parameter(torch.empty(n_out, d_out))
        self.W_G1, self.W_G2 = nn.Parameter(torch.empty(d_out, d_inp)), nn.Parameter(torch.empty(n_out, d_inp))
        self.B_G2 = nn.Parameter(torch.empty(n_out, d_inp))
        self.W_S, self.B_S = nn.Parameter(torch.empty(i, n_out)), nn.Parameter(torch.empty(i, n_out))
        shape = (n_inp, n_out) if n_inp else (d_inp, n_out)
        self.beta_use, self.beta_ign = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape))
        self.B_use = self.B_ign = None
        if n_inp is None:
            self.B_use, self.B_ign = nn.Parameter(torch.empty(n_out)), nn.Parameter(torch.empty(n_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises anew, with the paper's scales; betas that are functions of the inputs as an affine map's."""
        d_inp, d_out = self.W_F2.shape
        for weight in (self.W_A, self.W_F2):
            nn.init.normal_(weight, std=2 * d_inp**-0.5)
        nn.init.normal_(self.W_G1, std=d_out**-0.5)
        nn.init.normal_(self.W_S, std=d_inp**-0.5)
        for weight in (self.W_F1, self.W_G2):
            nn.init.normal_(weight)
        for beta in (self.beta_use, self.beta_ign):
            nn.init.normal_(beta, std=1.0 if self.n_inp else (3 * d_inp) ** -0.5)
        for bias in (self.B_A, self.B_F2, self.B_G2, self.B_S, self.B_use, self.B_ign):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_inp: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Routes.

        Args:
            x_inp: `[...id]`.
            mask: `[...i]`, in [0, 1]; None for all ones.

        Returns:
            `x_out [...jh]`, and the credits `[...ij]` of the last iteration.

        Raises:
            ValueError: for another number of inputs than it was built for, or another width.
        """
        if x_inp.ndim < 2 or x_inp.shape[-1] != len(self.W_F2):
            raise ValueError(f"x_inp has shape {tuple(x_inp.shape)}; expected [..., n_inp, d_inp={len(self.W_F2)}].")
        if self.n_inp is not None and x_inp.shape[-2] != self.n_inp:
            raise ValueError(f"x_inp has {x_inp.shape[-2]} vectors; this layer was built for n_inp={self.n_inp}.")
        mask = x_inp.new_ones(x_inp.shape[:-1]) if mask is None else mask.to(x_inp.dtype)
        scaled = x_inp * mask.sum(-1).clamp_min(1.0)[..., None, None] ** -0.5
        f_inp = (mask * ((scaled * self.W_A).sum(-1) + self.B_A).sigmoid()).unsqueeze(-1)  # [...i1]
        if self.n_inp is None:
            beta_use, beta_ign = x_inp @ self.beta_use + self.B_use, x_inp @ self.beta_ign + self.B_ign  # [...ij]
        else:
            beta_use, beta_ign = self.beta_use, self.beta_ign
        x_out, n_out = None, len(self.W_F1)
        for _ in range(self.n_iters):
            # E-step
            if x_out is None:
                R = f_inp.new_full((n_out,), 1 / n_out)
            else:
                predicted = (self._normalised(x_out) @ self.W_G1) * self.W_G2 + self.B_G2  # [...jd]
                R = F.logsigmoid(x_inp @ predicted.mT * self.W_S + self.B_S).softmax(-1)
            # D-step
            D_use = f_inp * R
            D_ign = f_inp - D_use
            # M-step
            credits = beta_use * D_use - beta_ign * D_ign
            x_out = ((credits.mT @ scaled) * self.W_F1) @ self.W_F2 + credits.sum(-2).unsqueeze(-1) * self.B_F2
        return self._normalised(x_out), credits

    def _normalised(self, x_out: Tensor) -> Tensor:
        return F.layer_norm(x_out, x_out.shape[-1:]) if self.d_out > 1 else x_out


class VectorRoutingHead(TokenDepthInputs):
    """All tokens at all depths, routed as vectors to parts, and those to class scores (Heinsen, 2022).

    Hidden states become vectors as in `TokenDepthHead`, the mask is theirs; `n_parts` vectors of the same width are
    routed to one number for each class.

    Args:
        d_emb: width of each hidden state.
        n_out: number of scores, 2 or more.
        d_inp: width of the vectors, and of the parts.
        n_parts: number of parts.
        n_iters: iterations of both routings.
    """

    def __init__(
        self, *, d_emb: Sequence[int], n_out: int, d_inp: int = 64, n_parts: int = 64, n_iters: int = 2
    ) -> None:
        super().__init__(d_emb, d_inp)
        self.to_parts = VectorRouting(n_out=n_parts, d_inp=d_inp, d_out=d_inp, n_iters=n_iters)
        self.to_classes = VectorRouting(n_out=n_out, d_inp=d_inp, d_out=1, n_inp=n_parts, n_iters=n_iters)

    def reset_parameters(self) -> None:
        """Initialises all parameters anew."""
        for module in (*self.detect_parts, self.to_parts, self.to_classes):
            module.reset_parameters()

    def forward(
        self,
        hidden_states: Sequence[Tensor],
        mask: Tensor | Sequence[Tensor],
        return_routing_probabilities: bool = False,
        mix: Callable[[Tensor], Tensor] | None = None,
    ) -> HeadOutput:
        """Scores each class. Arguments, returns and errors as in `TokenDepthHead.forward`; it has no probabilities."""
        a, x = self.detect(hidden_states, mask, mix)
        parts, _ = self.to_parts(x.squeeze(-2), a.sigmoid())
        scores, _ = self.to_classes(parts)
        return HeadOutput(scores.squeeze(-1).float())


def _pool(x: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """`[batch, tokens, width]` to `[batch, width]`; zero where all is masked."""
    mask = mask.to(x.dtype)
    if pooling == "first":  # where the mask rises: of texts that were mixed there may be two
        mask = (mask - F.pad(mask, (1, 0))[:, :-1]).clamp_min(0)
    elif pooling == "last":  # where it falls
        mask = (mask - F.pad(mask, (0, 1))[:, 1:]).clamp_min(0)
    weights = mask / mask.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).eps)
    return (weights[:, None] @ x)[:, 0]
