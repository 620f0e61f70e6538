"""Strategy "moments": second moments of narrow inputs in plain torch, float64. README.md explains it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .autograd import StreamingStrategy
from .blocks import block_size, blocks, d_logits_of_R, exp_, use, use_backward, workspace
from .terms import EStep, Inputs, Statistics, UseGradient


class Quadratic(NamedTuple):
    """A form `constant_j + sum_ch u_ijch (linear_jch + square_jch u_ijch)`: `[n,j]`, `[n,c,h,j]` and `[n,c,h,j]`."""

    constant: Tensor
    linear: Tensor
    square: Tensor

    def coefficients(self, W: Tensor) -> Tensor:
        """Return the coefficients of the features, `[n,j,p]`."""
        square = torch.einsum("nchj,hjp->njcp", self.square, _products(W))
        linear = torch.einsum("nchj,hjd->njcd", self.linear, W)
        return torch.cat([square.flatten(2), linear.flatten(2), self.constant[..., None]], dim=2)

    def backward(self, W: Tensor, d_coefficients: Tensor) -> tuple[Quadratic, Tensor]:
        """Return the gradients of the form and of `W [h,j,d]`, from the gradient of the coefficients.

        Applied to the moments `D^T phi`, which have the same shape, it returns the moments of `u`.
        """
        c, d = self.linear.shape[1], W.shape[-1]
        square, linear, constant = d_coefficients.split([c * d * (d + 1) // 2, c * d, 1], dim=2)
        square, linear = square.unflatten(2, (c, -1)), linear.unflatten(2, (c, -1))
        d_form = Quadratic(
            constant[..., 0],
            torch.einsum("njcd,hjd->nchj", linear, W),
            torch.einsum("njcp,hjp->nchj", square, _products(W)),
        )
        d_products = torch.einsum("njcp,nchj->hjp", square, self.square)
        rows, columns = torch.triu_indices(d, d, device=W.device)
        symmetric = W.new_empty(*W.shape[:2], d, d)
        symmetric[..., rows, columns] = d_products
        symmetric[..., columns, rows] = d_products
        d_W = 2.0 * (symmetric @ W[..., None])[..., 0]  # `_products` counts each product off the diagonal twice
        return d_form, d_W + torch.einsum("njcd,nchj->hjd", linear, self.linear)


class Moments(StreamingStrategy):
    """Routing by features that are quadratic in the inputs: no vote is ever computed."""

    name = "moments"

    def n_kept(self, d_cov: int, d_inp: int) -> int:
        """Return the number of moments of an input."""
        return d_cov * (d_inp * (d_inp + 1) // 2 + d_inp) + 1

    def statistics(self, inputs: Inputs, e_step: EStep, R: Tensor | None) -> Statistics:
        """Add up statistics; see `Passes`."""
        n, i, c, d = inputs.mu_inp.shape
        W = inputs.W.double()
        form = _exponent(e_step)
        theta = form.coefficients(W)  # [njp]
        n_features = theta.shape[-1]
        moments = torch.zeros_like(theta)
        for samples, part in blocks(n, i, block_size(theta, n_features + theta.shape[1] + 2 * c * d)):
            f = inputs.f_inp[samples, None, part].double()
            phi = _features(inputs, samples, part)
            logits = torch.matmul(
                theta[samples], phi, out=workspace.like("logits", phi, (len(f), theta.shape[1], f.shape[2]))
            )
            weights, sum_weights = _softmax(logits)
            D = use(weights, sum_weights, f, None if R is None else R[samples, part])
            moments[samples] += D @ phi.mT
        of_u, _ = form.backward(W, moments)
        n_used = of_u.constant
        mean = of_u.linear / n_used.clamp_min(torch.finfo(n_used.dtype).tiny)[:, None, None]
        return Statistics(n_used, mean, (of_u.square - of_u.linear * mean).clamp_min(0.0), moments.mT)

    def gradients(
        self,
        inputs: Inputs,
        e_step: EStep,
        statistics: Statistics,
        d_use: UseGradient,
        d_R: Tensor | None,
        d_mu_inp: Tensor,
        d_f_inp: Tensor,
    ) -> tuple[EStep, Tensor]:
        """Go back through `statistics`; see `Passes`."""
        n, i, c, d = inputs.mu_inp.shape
        W = inputs.W.double()
        j = W.shape[1]
        forms = (_exponent(e_step), Quadratic(*d_use.in_u()))
        theta = torch.cat([form.coefficients(W) for form in forms], dim=1)  # [n,2j,p]: of the logits, and of d_D
        theta_swapped = theta.roll(j, dims=1)
        n_features = theta.shape[-1]
        d_theta = theta.new_zeros(n, j, n_features)
        for samples, part in blocks(n, i, block_size(theta, 2 * n_features + 2 * j + 3 * c * d)):
            f = inputs.f_inp[samples, None, part].double()
            phi = _features(inputs, samples, part)
            both = torch.matmul(theta[samples], phi, out=workspace.like("logits", phi, (len(f), 2 * j, f.shape[2])))
            logits, d_D = both[:, :j], both[:, j:]
            weights, sum_weights = _softmax(logits)
            of_R = d_logits_of_R(weights, sum_weights, None if d_R is None else d_R[samples, part])
            D = use(weights, sum_weights, f, None)
            d_logits = use_backward(D, d_D, f, d_f_inp[samples, part], of_R)
            d_theta[samples] += d_logits @ phi.mT
            # `both` now has D and d_logits. The coefficients of d_D multiply D, and those of the logits d_logits.
            d_phi = torch.matmul(theta_swapped[samples].mT, both, out=workspace.like("d_phi", phi))
            _features_backward(phi, d_phi, d_mu_inp[samples, part])

        d_form, d_W = forms[0].backward(W, d_theta)
        assert statistics.kept is not None
        _, d_W_of_use = forms[1].backward(W, statistics.kept.mT)
        mean, scale = e_step.mean, e_step.scale
        d_constant = d_form.constant[:, None, None]
        d_mean = 2.0 * scale.square() * (d_form.linear - mean * d_constant)
        d_scale = -2.0 * scale * (d_form.square - 2.0 * mean * d_form.linear + mean.square() * d_constant)
        return EStep(d_form.constant, d_mean, d_scale), d_W + d_W_of_use


def _exponent(e_step: EStep) -> Quadratic:
    """Return the exponent of an E-step, `log_prior - sum_ch (scale (u - mean))^2`, as a form."""
    log_prior, mean, scale = e_step
    return Quadratic(log_prior - (scale * mean).square().sum((1, 2)), 2.0 * scale.square() * mean, -scale.square())


def _products(W: Tensor) -> Tensor:
    """Return the coefficients `[h,j,p]` of `(x W)^2`, which is linear in the products `x_d x_e`, `d <= e`."""
    rows, columns = torch.triu_indices(W.shape[-1], W.shape[-1], device=W.device)
    return W[..., rows] * W[..., columns] * (2.0 - (rows == columns).to(W.dtype))


def _features(inputs: Inputs, samples: slice, part: slice) -> Tensor:
    """Return `phi [n,p,i]` of a block, float64: products of two columns of each row, all entries, 1."""
    mu_inp = inputs.mu_inp[samples, part]
    n, i, c, d = mu_inp.shape
    n_products = c * d * (d + 1) // 2
    phi = workspace("phi", (n, n_products + c * d + 1, i), torch.float64, mu_inp.device)
    x = phi[:, n_products:-1].unflatten(1, (c, d)).copy_(mu_inp.permute(0, 2, 3, 1))  # [ncdi]
    x -= inputs.centre[samples].permute(0, 2, 3, 1)
    products = phi[:, :n_products].unflatten(1, (c, -1))
    start = 0
    for row in range(d):
        torch.mul(x[:, :, row:], x[:, :, row : row + 1], out=products[:, :, start : start + d - row])
        start += d - row
    phi[:, -1] = 1.0
    return phi


def _features_backward(phi: Tensor, d_phi: Tensor, d_mu_inp: Tensor) -> None:
    """Add to the gradient of a block of inputs `[n,i,c,d]`. Overwrite `d_phi`."""
    c, d = d_mu_inp.shape[2:]
    n_products = c * d * (d + 1) // 2
    x, d_x = (y[:, n_products:-1].unflatten(1, (c, d)) for y in (phi, d_phi))
    d_products = d_phi[:, :n_products].unflatten(1, (c, -1))
    start = 0
    for row in range(d):
        d_product = d_products[:, :, start : start + d - row]
        d_x[:, :, row + 1 :].addcmul_(d_product[:, :, 1:], x[:, :, row : row + 1])
        d_product[:, :, 0] *= 2.0
        d_x[:, :, row] += d_product.mul_(x[:, :, row:]).sum(2)
        start += d - row
    d_mu_inp += d_x.permute(0, 3, 1, 2)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Do a softmax over `j` in place but for the division, and return weights `[n,j,i]` and their sum `[n,1,i]`."""
    weights = exp_(logits.sub_(logits.amax(1, keepdim=True)))
    return weights, weights.sum(1, keepdim=True)
