"""Routing by fused Triton kernels, for CUDA: planes of votes, as in `votes`, that are never written to memory.

A program takes some blocks of one sample's inputs, one after another. It computes each plane `z_ijch` of a block, with
the E-step's scale and mean folded into the weights as in `votes`, anew wherever it needs it: that is a short matrix
product, where all planes together would not fit. What a program adds up goes to its own part of a buffer. The number of
programs is bounded, so the buffer does not grow with the number of inputs. Torch merges the parts in float64, in the
same order every time: there are no atomics, so results are deterministic.

It has not been run or timed on a GPU: only in Triton's interpreter, and compiled for sm_80 and sm_90.
"""

import torch
from torch import Tensor

from .passes import EStep, Inputs, Statistics, UseGradient
from .uniform import uniform_gradients, uniform_statistics  # noqa: F401 - parts of Passes

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        'Triton is not installed, and strategy "triton" is made of its kernels; on Linux, `pip install triton`, '
        'elsewhere use strategy="auto".'
    ) from error

_MAX_OUTPUTS = 256
_MAX_WEIGHTS = 2**22  # 16 MiB in float32, for each program of the backward pass

_TILE = 4096  # elements of a plane of a block: 16 for each thread
_N_PROGRAMS = 1024  # of all samples, or one for each: several for each multiprocessor of the largest GPU
_MAX_BUFFER = 2**25  # elements of the buffer for all programs: 128 MiB in float32


def check_shapes(d_cov: int, d_inp: int, d_out: int, n_out: int) -> str | None:
    """None if the kernels serve these sizes, else a clause that says what is too large."""
    if n_out > _MAX_OUTPUTS:
        return f"n_out is {n_out}; the kernels hold all outputs of a block in registers, up to {_MAX_OUTPUTS}"
    n_weights = d_cov * d_inp * d_out * n_out
    if n_weights > _MAX_WEIGHTS:
        return (
            f"d_cov * d_inp * d_out * n_out is {n_weights}; each program of the backward pass adds up a gradient of "
            f"that size, up to {_MAX_WEIGHTS}"
        )
    return None


def check(mu_inp: Tensor, *, d_out: int, n_out: int) -> None:
    """Checks that the kernels serve these inputs, `[...icd]`, on their device.

    Raises:
        ValueError: if they do not.
    """
    if mu_inp.device.type != "cuda" and isinstance(_statistics_kernel, triton.JITFunction):
        raise ValueError(
            f'strategy "triton" runs on CUDA, and the inputs are on {mu_inp.device}. Move them there, use '
            'strategy="auto", or set TRITON_INTERPRET=1 before Triton is imported: the kernels then run, slowly.'
        )
    clause = check_shapes(*mu_inp.shape[-2:], d_out, n_out)
    if clause is not None:
        raise ValueError(f'strategy "triton" does not serve these shapes: {clause}. Use strategy="auto".')


def kernel_options(d_cov: int, d_inp: int, d_out: int, n_out: int) -> dict[str, int]:
    """The kernels' constants and how they are compiled: such that few registers spill to memory, or none."""
    block_j = max(16, triton.next_power_of_2(n_out))  # what blocks have beyond the inputs and outputs is masked
    block_i = min(128, max(16, _TILE // block_j))
    sizes = {"C": d_cov, "D": d_inp, "H": d_out, "BI": block_i, "BJ": block_j, "BD": 16}
    return {**sizes, "num_warps": 8, "num_stages": 1}


def n_kept(d_cov: int, d_inp: int) -> int:
    """See `passes.Passes`."""
    return 0


def statistics(inputs: Inputs, e_step: EStep, R: Tensor | None) -> Statistics:
    """See `passes.Passes`."""
    _, c, h, _ = e_step.scale.shape
    n_planes = c * h
    launch = _Launch(inputs, e_step, n_rows=1 + 2 * n_planes)
    R_ = None if R is None else R.contiguous()
    launch(_statistics_kernel, inputs.f_inp if R_ is None else R_, HAS_R=R is not None)
    _write_back(R, R_)

    # Chan's formula, for all programs at once.
    counts, moments = launch.partial.double().split([1, 2 * n_planes], dim=2)
    means, scatters = moments.unflatten(2, (n_planes, 2)).unbind(3)  # [n,programs,p,j], counts with p = 1
    n_used = counts.sum(1)  # [n1j]
    mean = (counts * means).sum(1) / n_used.clamp_min(torch.finfo(n_used.dtype).tiny)  # [npj]
    scatter = (scatters + counts * (means - mean[:, None]).square()).sum(1)
    mean, scatter = mean.view_as(e_step.mean), scatter.view_as(e_step.mean)
    return Statistics(n_used[:, 0], e_step.mean + mean / e_step.scale, scatter / e_step.scale.square())


def gradients(
    inputs: Inputs,
    e_step: EStep,
    statistics: Statistics,
    d_use: UseGradient,
    d_R: Tensor | None,
    d_mu_inp: Tensor,
    d_f_inp: Tensor,
) -> tuple[EStep, Tensor]:
    """See `passes.Passes`."""
    n, _, c, d = inputs.mu_inp.shape
    h, j, _ = inputs.W.shape
    dtype = inputs.mu_inp.dtype
    launch = _Launch(inputs, e_step, n_rows=1 + c * h * (d + 2))
    scale = e_step.scale

    terms = torch.stack([x.flatten(1, 2) for x in d_use.in_z(e_step)], dim=2).to(dtype)  # [np3j]
    d_x, d_f = d_mu_inp.contiguous(), d_f_inp.contiguous()
    d_R_ = inputs.f_inp if d_R is None else d_R.contiguous()
    launch(_gradients_kernel, terms, d_use.constant.to(dtype), d_R_, d_x, d_f, HAS_D_R=d_R is not None)
    _write_back(d_mu_inp, d_x)
    _write_back(d_f_inp, d_f)

    # For each plane: the gradient of the folded weights, through both uses of z; and the sums of d_z and of z d_z,
    # through the E-step's alone.
    d_log_prior, d_planes = launch.partial.sum(1, dtype=torch.float64).split([1, c * h * (d + 2)], dim=1)
    d_weights, d_sum, d_sum_z = d_planes.view(n, c, h, d + 2, j).split([d, 1, 1], dim=3)
    d_W = (scale[:, :, :, None] * d_weights).sum((0, 1)).mT  # [hjd]
    return EStep(d_log_prior[:, 0], -scale * d_sum[:, :, :, 0], d_sum_z[:, :, :, 0] / scale), d_W


def _write_back(given: Tensor | None, written: Tensor | None) -> None:
    """What a kernel wrote to a contiguous copy of `given`, if it needed one."""
    if written is not given:
        given.copy_(written)


class _Launch:
    """What both passes hand to their kernels.

    Attributes:
        partial: `[n,programs,rows,j]`, zeros: the rows that each program adds to.
    """

    def __init__(self, inputs: Inputs, e_step: EStep, n_rows: int) -> None:
        n, n_inp, c, d = inputs.mu_inp.shape
        h, n_out, _ = inputs.W.shape
        self._options = kernel_options(c, d, h, n_out)
        n_blocks = triton.cdiv(n_inp, self._options["BI"])
        n_programs = min(triton.cdiv(_N_PROGRAMS, max(1, n)), _MAX_BUFFER // max(1, n * n_rows * n_out))
        n_blocks_each = max(1, triton.cdiv(n_blocks, max(1, n_programs)))
        n_programs = max(1, triton.cdiv(n_blocks, n_blocks_each))
        self._grid = (n * n_programs,)
        self._sizes = (n_inp, n_out, n_programs, n_blocks_each)

        dtype = inputs.mu_inp.dtype
        self.partial = inputs.mu_inp.new_zeros(n, n_programs, n_rows, n_out)
        scale = e_step.scale[:, :, :, None]  # [nch1j]
        weights = torch.cat([scale * inputs.W.mT, -scale * e_step.mean[:, :, :, None]], dim=3)  # [n,c,h,d+1,j]
        tensors = (inputs.mu_inp, inputs.f_inp, inputs.centre, weights.to(dtype), e_step.log_prior.to(dtype))
        self._tensors = [x.contiguous() for x in tensors]

    def __call__(self, kernel: triton.JITFunction, *tensors: Tensor, **options: bool) -> None:
        """Runs it on the device of the inputs."""
        with torch.cuda.device_of(self.partial):
            kernel[self._grid](*self._tensors, self.partial, *tensors, *self._sizes, **options, **self._options)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels: i and j count within a block, p planes; pointers are moved to a sample or block by 64-bit numbers
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _plane(
    x_ptr, centre_ptr, weights_ptr, i, has_i, j, has_j, n_out, p,
    C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The plane `z [i,j]`."""
    weights_ptr += p * (D + 1) * n_out
    offset = tl.load(weights_ptr + D * n_out + j, mask=has_j, other=0.0)
    z = tl.broadcast_to(offset[None, :], [BI, BJ])
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        x = _x(x_ptr, centre_ptr, i, has_i, p // H, d, C, D)
        w = tl.load(weights_ptr + d[:, None] * n_out + j[None, :], mask=(d < D)[:, None] & has_j[None, :], other=0.0)
        z = tl.dot(x, w, acc=z, input_precision="ieee", out_dtype=z.dtype)
    return z


@triton.jit
def _x(x_ptr, centre_ptr, i, has_i, c, d, C: tl.constexpr, D: tl.constexpr):
    """Columns `d` of row `c` of the inputs, centred, `[i,d]`."""
    x = tl.load(x_ptr + i[:, None] * (C * D) + c * D + d[None, :], mask=has_i[:, None] & (d < D)[None, :], other=0.0)
    return x - tl.load(centre_ptr + c * D + d, mask=d < D, other=0.0)[None, :]


@triton.jit
def _softmax(log_prior, energy):
    """`R [i,j]`; an output beyond the last has a `log_prior` of -inf."""
    logits = log_prior[None, :] - energy
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return weights * (1.0 / tl.sum(weights, axis=1))[:, None]


@triton.jit
def _statistics_kernel(
    mu_inp_ptr, f_inp_ptr, centre_ptr, weights_ptr, log_prior_ptr, partial_ptr, R_ptr,
    n_inp, n_out, n_programs, n_blocks_each, HAS_R: tl.constexpr,
    C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Adds up the count of a program's inputs, and of each plane the mean and the scatter about it."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // n_programs
    first = (program % n_programs).to(tl.int32) * n_blocks_each
    i, j = tl.arange(0, BI), tl.arange(0, BJ)
    has_j = j < n_out
    centre_ptr += sample * (C * D)
    weights_ptr += sample * (C * H * (D + 1)) * n_out
    log_prior = tl.load(log_prior_ptr + sample * n_out + j, mask=has_j, other=float("-inf"))
    partial_ptr += program * (1 + 2 * C * H) * n_out + j
    count = tl.zeros([BJ], dtype=log_prior.dtype)

    for block in range(first, min(first + n_blocks_each, tl.cdiv(n_inp, BI))):
        has_i = block * BI + i < n_inp
        at = sample * n_inp + block * BI  # the block's first input, of those of all samples
        x_ptr = mu_inp_ptr + at * (C * D)
        energy = tl.zeros([BI, BJ], dtype=log_prior.dtype)
        for p in range(C * H):
            z = _plane(x_ptr, centre_ptr, weights_ptr, i, has_i, j, has_j, n_out, p, C, H, D, BI, BJ, BD)
            energy += z * z
        R = _softmax(log_prior, energy)
        if HAS_R:
            tl.store(R_ptr + at * n_out + i[:, None] * n_out + j[None, :], R, mask=has_i[:, None] & has_j[None, :])
        D_use = tl.load(f_inp_ptr + at + i, mask=has_i, other=0.0)[:, None] * R

        n_block = tl.sum(D_use, axis=0)
        total = count + n_block
        share = n_block / tl.maximum(total, 1e-30)  # a total below that weighs nothing beside the M-step's eps
        for p in range(C * H):
            z = _plane(x_ptr, centre_ptr, weights_ptr, i, has_i, j, has_j, n_out, p, C, H, D, BI, BJ, BD)
            # The scatter about the block's own mean: a scatter about any other would lose digits to their distance.
            mean = tl.sum(D_use * z, axis=0) / tl.maximum(n_block, 1e-30)
            z -= mean[None, :]
            scatter = tl.sum(D_use * z * z, axis=0)
            row = partial_ptr + (1 + 2 * p) * n_out
            mean_before = tl.load(row, mask=has_j, other=0.0)
            scatter_before = tl.load(row + n_out, mask=has_j, other=0.0)
            tl.debug_barrier()  # several threads read an element, one writes it
            distance = mean - mean_before
            tl.store(row, mean_before + distance * share, mask=has_j)
            tl.store(row + n_out, scatter_before + scatter + distance * distance * count * share, mask=has_j)
        count = total
        tl.debug_barrier()  # and others read it for the next block
    tl.store(partial_ptr, count, mask=has_j)


@triton.jit
def _gradients_kernel(
    mu_inp_ptr, f_inp_ptr, centre_ptr, weights_ptr, log_prior_ptr, partial_ptr, terms_ptr, constant_ptr, d_R_ptr,
    d_mu_inp_ptr, d_f_inp_ptr, n_inp, n_out, n_programs, n_blocks_each, HAS_D_R: tl.constexpr,
    C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of a program's inputs, and adds up those of `log_prior` and of each plane's weights."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // n_programs
    first = (program % n_programs).to(tl.int32) * n_blocks_each
    i, j = tl.arange(0, BI), tl.arange(0, BJ)
    has_j = j < n_out
    centre_ptr += sample * (C * D)
    weights_ptr += sample * (C * H * (D + 1)) * n_out
    terms_ptr += sample * (C * H * 3) * n_out
    log_prior = tl.load(log_prior_ptr + sample * n_out + j, mask=has_j, other=float("-inf"))
    constant = tl.load(constant_ptr + sample * n_out + j, mask=has_j, other=0.0)
    partial_ptr += program * (1 + C * H * (D + 2)) * n_out
    d_log_prior = tl.zeros([BJ], dtype=log_prior.dtype)

    for block in range(first, min(first + n_blocks_each, tl.cdiv(n_inp, BI))):
        has_i = block * BI + i < n_inp
        at = sample * n_inp + block * BI  # the block's first input, of those of all samples
        x_ptr, d_x_ptr = mu_inp_ptr + at * (C * D), d_mu_inp_ptr + at * (C * D)
        energy = tl.zeros([BI, BJ], dtype=log_prior.dtype)
        d_D = tl.broadcast_to(constant[None, :], [BI, BJ])
        for p in range(C * H):
            z = _plane(x_ptr, centre_ptr, weights_ptr, i, has_i, j, has_j, n_out, p, C, H, D, BI, BJ, BD)
            energy += z * z
            offset, linear, square = _terms(terms_ptr, j, has_j, n_out, p)
            d_D += (z - offset) * (linear + square * (z - offset))

        # Back through D = f R and R = softmax(logits)
        R = _softmax(log_prior, energy)
        D_use = tl.load(f_inp_ptr + at + i, mask=has_i, other=0.0)[:, None] * R
        d_f = tl.sum(R * d_D, axis=1)
        _add(d_f_inp_ptr + at + i, d_f, has_i)
        d_logits = D_use * (d_D - d_f[:, None])
        if HAS_D_R:
            at_R, has_R = i[:, None] * n_out + j[None, :], has_i[:, None] & has_j[None, :]
            d_R = tl.load(d_R_ptr + at * n_out + at_R, mask=has_R, other=0.0)
            d_logits += R * (d_R - tl.sum(R * d_R, axis=1)[:, None])
        d_log_prior += tl.sum(d_logits, axis=0)

        for p in range(C * H):
            z = _plane(x_ptr, centre_ptr, weights_ptr, i, has_i, j, has_j, n_out, p, C, H, D, BI, BJ, BD)
            d_z = -2.0 * z * d_logits  # through the E-step
            row = partial_ptr + (1 + p * (D + 2)) * n_out
            _add(row + D * n_out + j, tl.sum(d_z, axis=0), has_j)
            _add(row + (D + 1) * n_out + j, tl.sum(d_z * z, axis=0), has_j)
            offset, linear, square = _terms(terms_ptr, j, has_j, n_out, p)
            d_z += D_use * (linear + 2.0 * square * (z - offset))  # and through the M-step

            for start in range(0, D, BD):
                d = start + tl.arange(0, BD)
                at_w, has_w = d[:, None] * n_out + j[None, :], (d < D)[:, None] & has_j[None, :]
                w = tl.load(weights_ptr + p * (D + 1) * n_out + at_w, mask=has_w, other=0.0)
                d_x = tl.dot(d_z, tl.trans(w), input_precision="ieee", out_dtype=z.dtype)
                at_x, has_x = i[:, None] * (C * D) + (p // H) * D + d[None, :], has_i[:, None] & (d < D)[None, :]
                _add(d_x_ptr + at_x, d_x, has_x)
                x = _x(x_ptr, centre_ptr, i, has_i, p // H, d, C, D)
                d_w = tl.dot(tl.trans(x), d_z, input_precision="ieee", out_dtype=z.dtype)
                _add(row + at_w, d_w, has_w)
            tl.debug_barrier()  # the next plane adds to the same elements of d_x, the next block to those of d_w
    tl.store(partial_ptr + j, d_log_prior, mask=has_j)


@triton.jit
def _terms(terms_ptr, j, has_j, n_out, p):
    """A plane's part of the gradient with respect to D: its offset, linear and square coefficients, each `[1,j]`."""
    terms_ptr += 3 * p * n_out + j
    offset = tl.load(terms_ptr, mask=has_j, other=0.0)
    linear = tl.load(terms_ptr + n_out, mask=has_j, other=0.0)
    square = tl.load(terms_ptr + 2 * n_out, mask=has_j, other=0.0)
    return offset[None, :], linear[None, :], square[None, :]


@triton.jit
def _add(ptr, value, mask):
    tl.store(ptr, tl.load(ptr, mask=mask, other=0.0) + value, mask=mask)
