"""Strategy "votes": planes of votes in plain torch, for narrow outputs. README.md explains it."""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import StreamingStrategy
from .blocks import block_size, blocks, d_logits_of_R, exp_, use, use_backward, workspace
from .terms import EStep, Inputs, Statistics, UseGradient

_SMALLEST_SUM = 1e-9  # least sum of an input's weights, far above the weights that `exp_` sets to 0


class Votes(StreamingStrategy):
    """Routing by `u_ijch` as few contiguous `[j,i]` planes, one for each `c` and `h`."""

    name = "votes"

    def statistics(self, inputs: Inputs, e_step: EStep, R: Tensor | None) -> Statistics:
        """Add up statistics; see `Passes`."""
        n, i, c, d = inputs.mu_inp.shape
        h, j, _ = inputs.W.shape
        planes = _Planes(inputs, e_step)
        scale, mean = e_step.scale.flatten(1, 2), e_step.mean.flatten(1, 2)  # [npj], float64
        n_used = scale.new_zeros(n, j)
        mean_u, scatter = torch.zeros_like(scale), torch.zeros_like(scale)
        for samples, part in blocks(n, i, block_size(inputs.mu_inp, (c * h + 2) * j + c * (d + 1))):
            f = inputs.f_inp[samples, None, part]
            _, z, weights, sum_weights = planes.e_step(samples, part)
            D = use(weights, sum_weights, f, None if R is None else R[samples, part])
            n_block = D.sum(-1)  # [nj]
            # The scatter is about the block's own mean: about another, it would lose digits to the distance.
            mean_z = _weighted_sum(D, z) / n_block.clamp_min(torch.finfo(D.dtype).tiny)[:, None]  # [npj]
            scatter_z = _weighted_sum(D, z.sub_(mean_z[..., None]).square_())
            _merge(
                (n_used[samples], mean_u[samples], scatter[samples]),
                (n_block.double(), mean[samples] + mean_z / scale[samples], scatter_z / scale[samples].square()),
            )
        return Statistics(n_used, mean_u.unflatten(1, (c, h)), scatter.unflatten(1, (c, h)))

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
        h, j, _ = inputs.W.shape
        planes, scale = _Planes(inputs, e_step), e_step.scale

        offset, linear, square = d_use.in_z(e_step)  # [nchj]
        offset_, linear_, square_ = (planes.per_plane(x) for x in (offset, linear, square))  # [npj1]
        constant_ = d_use.constant.to(offset_.dtype)[..., None]  # [nj1]

        d_log_prior = torch.zeros_like(d_use.constant)
        d_weights = torch.zeros_like(planes.weights)
        for samples, part in blocks(n, i, block_size(inputs.mu_inp, (4 * c * h + 2) * j + c * (d + 1))):
            f = inputs.f_inp[samples, None, part]
            x, z, weights, sum_weights = planes.e_step(samples, part)
            of_R = d_logits_of_R(weights, sum_weights, None if d_R is None else d_R[samples, part])
            D = use(weights, sum_weights, f, None)

            v = torch.sub(z, offset_[samples], out=workspace.like("v", z))
            square_v = torch.mul(v, square_[samples], out=workspace.like("square_v", z))
            slope = torch.add(square_v, linear_[samples], out=workspace.like("slope", z))
            d_D = torch.mul(v[:, 0], slope[:, 0], out=workspace.like("d_D", D)).add_(constant_[samples])
            for p in range(1, c * h):
                d_D.addcmul_(v[:, p], slope[:, p])
            d_z = square_v.add_(slope).mul_(D[:, None])  # through the M-step: D (linear + 2 square v)

            d_logits = use_backward(D, d_D, f, d_f_inp[samples, part], of_R)
            d_log_prior[samples] += d_logits.sum(-1)
            d_z.addcmul_(z, d_logits[:, None], value=-2.0)  # and through the E-step

            # Back through z = weights x, summed into place
            for sample, d_z_c in zip(range(samples.start, samples.stop), d_z.view(len(x), c, h * j, -1)):
                d_mu_inp[sample, part].transpose(0, 1).baddbmm_(d_z_c.mT, planes.weights[sample, ..., :d])
                d_weights[sample].baddbmm_(d_z_c, x[sample - samples.start])

        # d_weights has the gradients of the E-step's scale and mean. It also has a part through the M-step, which
        # averages u. That part is subtracted.
        n_used = statistics.n_used[:, None, None]
        gap = statistics.mean - d_use.mean
        sum_v = scale * n_used * gap
        sum_v2 = scale.square() * (statistics.scatter + n_used * gap.square())
        d_sum = linear * n_used + 2.0 * square * sum_v
        d_sum_z = linear * sum_v + 2.0 * square * sum_v2 + offset * d_sum
        d_sum_z = (d_weights * planes.weights).sum(-1, dtype=torch.float64).view_as(d_sum_z) - d_sum_z
        d_sum = d_weights[..., d].view_as(d_sum) - d_sum
        d_W = (d_weights[..., :d] * scale.flatten(2)[..., None].to(d_weights.dtype)).sum((0, 1)).view(h, j, d)
        return EStep(d_log_prior, -scale * d_sum, d_sum_z / scale), d_W


class _Planes:
    """Makes the planes `z [n,p,j,i]` of a block, where `p` counts `c` and `h`, and the weights of its softmax."""

    def __init__(self, inputs: Inputs, e_step: EStep) -> None:
        self.inputs = inputs
        W, dtype = inputs.W, inputs.W.dtype
        weights = torch.empty(*e_step.scale.shape, W.shape[-1] + 1, dtype=dtype, device=W.device)
        torch.mul(e_step.scale.to(dtype)[..., None], W, out=weights[..., :-1])
        weights[..., -1] = -e_step.scale * e_step.mean
        self.weights = weights.flatten(2, 3)  # [n,c,hj,d+1]
        # No logit is above the largest prior, so this softmax cannot overflow, and it rarely underflows.
        log_prior = e_step.log_prior - e_step.log_prior.amax(1, keepdim=True)
        self.log_prior = log_prior.to(dtype)[..., None]  # [nj1]

    def per_plane(self, x: Tensor) -> Tensor:
        """Return `[n,c,h,j]` as `[n,p,j,1]`, of the dtype of the inputs."""
        return x.flatten(1, 2).to(self.weights.dtype)[..., None]

    def e_step(self, samples: slice, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Do a block's E-step: `R = weights / sum_weights`.

        Returns:
            `x [n,c,i,d+1]`, centred, with a column of ones; `z [n,p,j,i]`; `weights [n,j,i]`; `sum_weights [n,1,i]`.
        """
        h, j, _ = self.inputs.W.shape
        x = self.inputs.centred(samples, part)
        n, c, i, _ = x.shape
        z = torch.matmul(self.weights[samples], x.mT, out=workspace.like("z", x, (n, c, h * j, i))).view(n, c * h, j, i)
        weights = exp_(self._logits(samples, z))
        sum_weights = weights.sum(1, keepdim=True)
        if sum_weights.amin() < _SMALLEST_SUM:  # an input far from every output
            logits = self._logits(samples, z)
            weights = exp_(logits.sub_(logits.amax(1, keepdim=True)))
            sum_weights = weights.sum(1, keepdim=True)
        return x, z, weights, sum_weights

    def _logits(self, samples: slice, z: Tensor) -> Tensor:
        logits = torch.mul(z[:, 0], z[:, 0], out=workspace.like("logits", z[:, 0]))
        for p in range(1, z.shape[1]):
            logits.addcmul_(z[:, p], z[:, p])
        return torch.sub(self.log_prior[samples], logits, out=logits)


def _weighted_sum(D: Tensor, z: Tensor) -> Tensor:
    """Return `sum_i D_nji z_npji`, `[npj]`."""
    if z.shape[1] == 1:
        return (D[:, None] * z).sum(-1)
    # For each j, one product of [1,i] and [i,p] writes no product of planes. For a single plane that would be slow.
    return torch.stack([torch.bmm(D_[:, None], z_.permute(1, 2, 0))[:, 0].mT for D_, z_ in zip(D, z)])


def _merge(into: tuple[Tensor, Tensor, Tensor], block: tuple[Tensor, Tensor, Tensor]) -> None:
    """Add the count `[nj]`, mean and scatter `[npj]` of a block to those of the blocks before it."""
    count, mean, scatter = into
    n_block, mean_block, scatter_block = block
    total = count + n_block
    fraction = (n_block / total.clamp_min(torch.finfo(total.dtype).tiny))[:, None]
    distance = mean_block - mean
    scatter += scatter_block + distance.square() * count[:, None] * fraction
    mean += distance * fraction
    count.copy_(total)
