"""The kernels of strategy "cpu": one fused loop over tiles of inputs for each pass, on one thread, without the GIL.

README.md explains tiles and chunks. Rows in scratch memory are planes `[i]`. The planes `u_ijch = (x W)_ijch` come in
blocks of four, in the order `q = (j, h)` for each `c`. They are kept from an earlier pass, or made from the inputs by
products of small blocks in registers. Sums within a tile have the dtype of the inputs. Sums over tiles are float64.

In the shapes `q` counts outputs and their columns, padded to a multiple of four like `d`, and `p` counts `c` and `h`.
`T` is the largest number of inputs in a tile, plus padding. numba keeps compiled code until this file changes, so all
functions that the passes call have to be in this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

try:  # without it, transformers would refuse a checkpoint's code if numba is not installed
    import numba
    from numba.extending import intrinsic, overload
except ImportError as error:
    raise ImportError(
        'numba is not installed, and strategy "cpu" needs it: `pip install "capsule-heads[cpu]"`, or '
        'use strategy="auto".'
    ) from error


_Function = TypeVar("_Function", bound=Callable[..., Any])
_Inputs = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_PlanOfTiles = tuple[np.ndarray, np.ndarray, int]


def _jit(*fastmath: str) -> Callable[[_Function], _Function]:
    """Compile a function when it is first called.

    Args:
        fastmath: liberties that the compiler may take with numbers. Infinities stay exact.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(fastmath)}

    def decorate(function: _Function) -> _Function:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # neither the directory of this file nor the user's cache can be written to
            return numba.njit(**options)(function)

    return decorate


_jit_sums = _jit("contract", "nsz", "reassoc")  # sums may be reordered, as they would else not be vectorised
_jit_exact = _jit("contract")


# ---------------------------------------------------------------------------------------------------------------------
# exp without a library: numba's own exp is a call for each number, and is not vectorised
# ---------------------------------------------------------------------------------------------------------------------


@intrinsic
def _float_of_bits(typing_context: Any, bits: Any) -> tuple[Any, Callable[..., Any]]:
    """Return the number that has these bits. numba passes the context."""
    result = numba.float32 if bits == numba.int32 else numba.float64

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(result))

    return result(bits), codegen


@_jit_exact  # the two parts of log 2 must not be added before they are subtracted
def _exp32(x: np.float32) -> np.float32:
    y = max(x, np.float32(-80.0))
    n = np.int32(y * np.float32(1.4426950408889634) - np.float32(0.5))  # rounded towards zero, as y is at most 0
    r = y - np.float32(n) * np.float32(0.693359375)
    r = r + np.float32(n) * np.float32(2.12194440e-4)
    p = np.float32(1 / 5040) * r + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * (r * r) + r + np.float32(1.0)
    bits = np.int32((n + 127) << 23)
    # Zero well above the smallest normal number: processors are slow with smaller numbers and their products
    return p * _float_of_bits(bits) if x > np.float32(-78.0) else np.float32(0.0)  # type: ignore[call-arg]  # see there


@_jit_exact
def _exp64(x: float) -> float:
    return np.exp(x) if x > -640.0 else 0.0


def _exp(x: float) -> Any:
    """Return `exp(x)` for `x <= 0`, or 0 where that is almost 0. Only compiled code calls this."""


@overload(_exp)
def _(x) -> Callable[[Any], Any]:  # type: ignore[no-untyped-def]  # numba compares annotations with a lambda's
    return (lambda x: _exp32(x)) if x == numba.float32 else (lambda x: _exp64(x))


# ---------------------------------------------------------------------------------------------------------------------
# Products with a block of four planes. Sixteen factors stay in registers while lanes run over the inputs.
# Here and below, rows are indexed and not taken as arrays: counting the references to each array would take long.
# ---------------------------------------------------------------------------------------------------------------------


@_jit_sums
def _product(planes: np.ndarray, at: int, W: np.ndarray, q: int, x: np.ndarray, c: int, width: int) -> None:
    """Compute `planes [at:at+4] = W [q:q+4] x [c]`."""
    for d in range(0, W.shape[1], 4):
        w00, w01, w02, w03 = W[q, d], W[q, d + 1], W[q, d + 2], W[q, d + 3]
        w10, w11, w12, w13 = W[q + 1, d], W[q + 1, d + 1], W[q + 1, d + 2], W[q + 1, d + 3]
        w20, w21, w22, w23 = W[q + 2, d], W[q + 2, d + 1], W[q + 2, d + 2], W[q + 2, d + 3]
        w30, w31, w32, w33 = W[q + 3, d], W[q + 3, d + 1], W[q + 3, d + 2], W[q + 3, d + 3]
        if d == 0:
            for i in range(width):
                a0, a1, a2, a3 = x[c, d, i], x[c, d + 1, i], x[c, d + 2, i], x[c, d + 3, i]
                planes[at, i] = w00 * a0 + w01 * a1 + w02 * a2 + w03 * a3
                planes[at + 1, i] = w10 * a0 + w11 * a1 + w12 * a2 + w13 * a3
                planes[at + 2, i] = w20 * a0 + w21 * a1 + w22 * a2 + w23 * a3
                planes[at + 3, i] = w30 * a0 + w31 * a1 + w32 * a2 + w33 * a3
        else:
            for i in range(width):
                a0, a1, a2, a3 = x[c, d, i], x[c, d + 1, i], x[c, d + 2, i], x[c, d + 3, i]
                planes[at, i] += w00 * a0 + w01 * a1 + w02 * a2 + w03 * a3
                planes[at + 1, i] += w10 * a0 + w11 * a1 + w12 * a2 + w13 * a3
                planes[at + 2, i] += w20 * a0 + w21 * a1 + w22 * a2 + w23 * a3
                planes[at + 3, i] += w30 * a0 + w31 * a1 + w32 * a2 + w33 * a3


@_jit_sums
def _product_backward(
    d_planes: np.ndarray,
    at: int,
    W: np.ndarray,
    q: int,
    x: np.ndarray,
    c: int,
    d_W: np.ndarray,
    d_x: np.ndarray,
    width: int,
) -> None:
    """Add `W [q:q+4]^T g` to `d_x [c]`, and `g x [c]^T` to `d_W [q:q+4]`, float64, with `g = d_planes [at:at+4]`."""
    zero = x.dtype.type(0)
    for d in range(0, W.shape[1], 4):
        w00, w01, w02, w03 = W[q, d], W[q, d + 1], W[q, d + 2], W[q, d + 3]
        w10, w11, w12, w13 = W[q + 1, d], W[q + 1, d + 1], W[q + 1, d + 2], W[q + 1, d + 3]
        w20, w21, w22, w23 = W[q + 2, d], W[q + 2, d + 1], W[q + 2, d + 2], W[q + 2, d + 3]
        w30, w31, w32, w33 = W[q + 3, d], W[q + 3, d + 1], W[q + 3, d + 2], W[q + 3, d + 3]
        for i in range(width):
            b0, b1, b2, b3 = d_planes[at, i], d_planes[at + 1, i], d_planes[at + 2, i], d_planes[at + 3, i]
            d_x[c, d, i] += w00 * b0 + w10 * b1 + w20 * b2 + w30 * b3
            d_x[c, d + 1, i] += w01 * b0 + w11 * b1 + w21 * b2 + w31 * b3
            d_x[c, d + 2, i] += w02 * b0 + w12 * b1 + w22 * b2 + w32 * b3
            d_x[c, d + 3, i] += w03 * b0 + w13 * b1 + w23 * b2 + w33 * b3
        for k in range(0, 4, 2):  # two rows at a time, as AVX2 has registers for no more sums
            s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = zero
            for i in range(width):
                a0, a1, a2, a3 = x[c, d, i], x[c, d + 1, i], x[c, d + 2, i], x[c, d + 3, i]
                b0, b1 = d_planes[at + k, i], d_planes[at + k + 1, i]
                s00, s01, s02, s03 = s00 + b0 * a0, s01 + b0 * a1, s02 + b0 * a2, s03 + b0 * a3
                s10, s11, s12, s13 = s10 + b1 * a0, s11 + b1 * a1, s12 + b1 * a2, s13 + b1 * a3
            p = q + k
            d_W[p, d], d_W[p, d + 1] = d_W[p, d] + s00, d_W[p, d + 1] + s01
            d_W[p, d + 2], d_W[p, d + 3] = d_W[p, d + 2] + s02, d_W[p, d + 3] + s03
            d_W[p + 1, d], d_W[p + 1, d + 1] = d_W[p + 1, d] + s10, d_W[p + 1, d + 1] + s11
            d_W[p + 1, d + 2], d_W[p + 1, d + 3] = d_W[p + 1, d + 2] + s12, d_W[p + 1, d + 3] + s13


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a pass over a tile
# ---------------------------------------------------------------------------------------------------------------------


@_jit_sums
def _load(
    x: np.ndarray,
    f_tile: np.ndarray,
    mu_inp: np.ndarray,
    f_inp: np.ndarray,
    centre: np.ndarray,
    first: int,
    count: int,
    width: int,
) -> None:
    """Load a tile's centred inputs `x [c,d,T]` and their `f_tile [T]`, and fill the last vectors with zeros."""
    for c in range(centre.shape[0]):
        for d in range(centre.shape[1]):
            middle = centre[c, d]
            for i in range(count):
                x[c, d, i] = mu_inp[first + i, c, d] - middle
            for i in range(count, width):
                x[c, d, i] = 0
    for i in range(count):
        f_tile[i] = f_inp[first + i]
    for i in range(count, width):
        f_tile[i] = 0


@_jit_sums
def _e_step(
    weights: np.ndarray,
    d_D: np.ndarray,
    planes: np.ndarray,
    x: np.ndarray,
    W: np.ndarray,
    uniform: bool,
    e_step: np.ndarray,
    d_use: np.ndarray,
    compute: bool,
    width: int,
) -> None:
    """Compute `R` as `weights [j,T]`; with rows in `d_use` also the gradient of `D`; with `compute` also the planes."""
    n_c, n_q, n_out = x.shape[0], W.shape[0], weights.shape[0]
    n_p = e_step.shape[0] // 3
    n_h = n_p // n_c
    group = 4 if n_h % 4 == 0 else 2 if n_h % 2 == 0 else 1  # planes of one output at a time
    for j in range(n_out):
        # A constant for all outputs changes nothing. It brings a typical energy near zero, where rounding loses least.
        for i in range(width):
            weights[j, i] = -0.5 * n_p
        if len(d_use):
            for i in range(width):
                d_D[j, i] = d_use[0, j]
    for c in range(n_c):
        for q in range(0, n_q, 4):
            at = c * n_q + q if len(planes) == n_c * n_q else 0
            if compute:
                _product(planes, at, W, q, x, c, width)
            if not uniform:
                for k in range(0, min(4, n_out * n_h - q), group):
                    j, p = (q + k) // n_h, 1 + c * n_h + (q + k) % n_h
                    _add_energy(weights, j, planes, at + k, group, e_step, p, n_p, width)
            if len(d_use):
                for k in range(min(4, n_out * n_h - q)):
                    j, p = (q + k) // n_h, 1 + c * n_h + (q + k) % n_h
                    mean, linear, square = d_use[p, j], d_use[p + n_p, j], d_use[p + 2 * n_p, j]
                    for i in range(width):
                        v = planes[at + k, i] - mean
                        d_D[j, i] += v * (linear + square * v)
    if uniform:
        weights[:, :width] = weights.dtype.type(1) / n_out
    else:
        _softmax(weights, e_step, width)


@_jit_exact
def _add_energy(
    energy: np.ndarray,
    j: int,
    planes: np.ndarray,
    at: int,
    group: int,
    e_step: np.ndarray,
    p: int,
    n_p: int,
    width: int,
) -> None:
    """Add `z^2` with `z = scale (u - mean)`, for one, two or four planes at once to save steps through memory."""
    m0, s0, r0 = e_step[p, j], e_step[p + n_p, j], e_step[p + 2 * n_p, j]
    if group == 1:
        for i in range(width):
            y0 = planes[at, i] - m0
            z0 = s0 * y0 + r0 * y0
            energy[j, i] += z0 * z0
        return
    m1, s1, r1 = e_step[p + 1, j], e_step[p + 1 + n_p, j], e_step[p + 1 + 2 * n_p, j]
    if group == 2:
        for i in range(width):
            y0, y1 = planes[at, i] - m0, planes[at + 1, i] - m1
            z0, z1 = s0 * y0 + r0 * y0, s1 * y1 + r1 * y1
            energy[j, i] += z0 * z0 + z1 * z1
        return
    m2, s2, r2 = e_step[p + 2, j], e_step[p + 2 + n_p, j], e_step[p + 2 + 2 * n_p, j]
    m3, s3, r3 = e_step[p + 3, j], e_step[p + 3 + n_p, j], e_step[p + 3 + 2 * n_p, j]
    for i in range(width):
        y0, y1, y2, y3 = planes[at, i] - m0, planes[at + 1, i] - m1, planes[at + 2, i] - m2, planes[at + 3, i] - m3
        z0, z1, z2, z3 = s0 * y0 + r0 * y0, s1 * y1 + r1 * y1, s2 * y2 + r2 * y2, s3 * y3 + r3 * y3
        energy[j, i] += (z0 * z0 + z1 * z1) + (z2 * z2 + z3 * z3)


@_jit_sums
def _softmax(weights: np.ndarray, e_step: np.ndarray, width: int) -> None:
    """Compute `softmax_j( log_prior_j - energy_j )`, in the memory of the energies, `weights [j,T]`."""
    n_out = weights.shape[0]
    total, top = np.empty_like(weights[0]), np.empty_like(weights[0])
    one = weights.dtype.type(1)
    for i in range(width):
        total[i] = 0
        top[i] = e_step[0, 0] - weights[0, i]
    for j in range(1, n_out):
        prior = e_step[0, j]
        for i in range(width):
            top[i] = max(top[i], prior - weights[j, i])
    for j in range(n_out):
        prior, factor = e_step[0, j], one + e_step[-1, j]
        for i in range(width):
            weight = _exp(prior - weights[j, i] - top[i]) * factor
            weights[j, i] = weight
            total[i] += weight
    for i in range(width):
        total[i] = one / total[i]
    for j in range(n_out):
        for i in range(width):
            weights[j, i] *= total[i]


@_jit_sums
def _moments(
    D: np.ndarray, j: int, planes: np.ndarray, at: int, middle: float, n_used: float, width: int
) -> tuple[float, float]:
    """Return the distance of a plane's mean from `middle`, and the scatter about the mean."""
    zero = planes.dtype.type(0)
    first, second = zero, zero
    for i in range(width):
        v = planes[at, i] - middle
        D_v = D[j, i] * v
        first += D_v
        second += D_v * v
    if not n_used > zero:
        return zero, zero
    distance = first / n_used
    scatter = second - first * distance
    if not scatter + scatter >= second:  # the difference has lost digits, so sum again about the mean
        scatter = zero
        for i in range(width):
            v = planes[at, i] - middle - distance
            scatter += D[j, i] * (v * v)
    return distance, scatter


# ---------------------------------------------------------------------------------------------------------------------
# Passes
#
# Arguments of all passes, or of most:
#     inputs: `mu_inp [n,i,c,d]`, `f_inp [n,i]`, `centre [n,c,d]` and `W [q,d]`, padded.
#     plan: `tiles [tiles,4]` (sample, first input, count, segment), `chunks` (first tile of each, and the end), `T`.
#     share: the chunks of this call, as the first one and the step from each to the next.
#     kept: `[tiles,c*q,T]`, the planes of all tiles; empty if planes are not kept.
#     n_scratch: number of planes that scratch memory holds if planes are not kept: all, or four, computed twice.
#     uniform: whether it is the first iteration, in which all logits are 0.
#     e_step: `[n,2+3p,j]`: `log_prior`, means, scales, and the rounding errors of scales and of `log_prior`. The latter
#         is the same for all inputs, and would not average out.
# ---------------------------------------------------------------------------------------------------------------------


@_jit_sums
def statistics(
    inputs: _Inputs,
    plan: _PlanOfTiles,
    share: tuple[int, int],
    kept: np.ndarray,
    n_scratch: int,
    uniform: bool,
    e_step: np.ndarray,
    fill: bool,
    R: np.ndarray,
    sums: np.ndarray,
) -> None:
    """Do a pass for the M-step.

    Beside the arguments of all passes:
        fill: whether to compute `kept`, rather than read it.
        R: `[n,i,j]` to write to, or empty.
        sums: `[segments,1+2p,j]`, float64, zeros: counts, means and scatters are written here.
    """
    mu_inp, f_inp, centre, W = inputs
    tiles, chunks, T = plan
    n_c, n_q, n_out, n_p = mu_inp.shape[2], W.shape[0], e_step.shape[2], e_step.shape[1] // 3
    n_h = n_p // n_c
    x, scratch = np.zeros((n_c, W.shape[1], T), mu_inp.dtype), np.zeros((n_scratch, T), mu_inp.dtype)
    D, f, n_used = np.empty((n_out, T), mu_inp.dtype), np.empty(T, mu_inp.dtype), np.empty(n_out, mu_inp.dtype)
    for chunk in range(share[0], len(chunks) - 1, share[1]):
        for tile in range(chunks[chunk], chunks[chunk + 1]):
            n, first, count, segment = tiles[tile]
            width = (count + 15) // 16 * 16
            planes = kept[tile] if len(kept) else scratch
            _load(x, f, mu_inp[n], f_inp[n], centre[n], first, count, width)
            _e_step(D, D, planes, x, W, uniform, e_step[n], e_step[n, :0], fill or len(kept) == 0, width)
            if len(R):
                for i in range(count):
                    for j in range(n_out):
                        R[n, first + i, j] = D[j, i]
            for j in range(n_out):
                total = mu_inp.dtype.type(0)
                for i in range(width):
                    D[j, i] *= f[i]
                    total += D[j, i]
                n_used[j] = total
                sums[segment, 0, j] += total
            for c in range(n_c):
                for q in range(0, n_q, 4):
                    at = c * n_q + q if len(planes) == n_c * n_q else 0
                    if len(planes) < n_c * n_q:
                        _product(planes, at, W, q, x, c, width)
                    for k in range(min(4, n_out * n_h - q)):
                        j, p = (q + k) // n_h, 1 + c * n_h + (q + k) % n_h
                        middle = e_step[n, p, j]
                        distance, scatter = _moments(D, j, planes, at + k, middle, n_used[j], width)
                        _merge(sums, segment, p, n_p, j, n_used[j], np.float64(middle) + distance, scatter)


@_jit_sums
def _merge(
    sums: np.ndarray, segment: int, p: int, n_p: int, j: int, n_used: float, mean: float, scatter: float
) -> None:
    """Merge a tile's mean and scatter into `sums`, whose count already includes the tile."""
    if n_used > 0:
        count = sums[segment, 0, j]
        distance, fraction = mean - sums[segment, p, j], n_used / count
        sums[segment, p + n_p, j] += scatter + distance * distance * (count - n_used) * fraction
        sums[segment, p, j] += distance * fraction


@_jit_sums
def gradients(
    inputs: _Inputs,
    plan: _PlanOfTiles,
    share: tuple[int, int],
    kept: np.ndarray,
    n_scratch: int,
    uniform: bool,
    e_step: np.ndarray,
    fill: bool,
    d_use: np.ndarray,
    d_R: np.ndarray,
    d_kept: np.ndarray,
    add: bool,
    d_mu_inp: np.ndarray,
    d_f_inp: np.ndarray,
    d_W: np.ndarray,
    sums: np.ndarray,
) -> None:
    """Go back through `statistics`.

    Beside the arguments of all passes:
        d_use: `[n,1+3p,j]`: constant, means, `linear` and `square`.
        d_R: `[n,i,j]`, or empty.
        d_kept: like `kept`, the gradient of the kept planes, instead of the gradients of the inputs and `W`.
        add: whether to add to `d_kept`, rather than write it.
        d_mu_inp: `[n,i,c,d]`, added to.
        d_f_inp: `[n,i]`, added to.
        d_W: `[chunks,q,d]`, float64, added to.
        sums: `[segments,1+2p,j]`, float64, zeros. `sum_i g`, `sum_i g y` and `sum_i g y^2` are written here, where `g`
            is the gradient of a logit and `y = u - mean`.
    """
    mu_inp, f_inp, centre, W = inputs
    tiles, chunks, T = plan
    n_c, n_q, n_out = mu_inp.shape[2], W.shape[0], e_step.shape[2]
    x, scratch = np.zeros((n_c, W.shape[1], T), mu_inp.dtype), np.zeros((n_scratch, T), mu_inp.dtype)
    d_x, d_block = np.zeros_like(x), np.zeros((4, T), mu_inp.dtype)
    D, d_D, f = np.empty((n_out, T), mu_inp.dtype), np.empty((n_out, T), mu_inp.dtype), np.empty(T, mu_inp.dtype)
    for chunk in range(share[0], len(chunks) - 1, share[1]):
        for tile in range(chunks[chunk], chunks[chunk + 1]):
            n, first, count, segment = tiles[tile]
            width = (count + 15) // 16 * 16
            planes = kept[tile] if len(kept) else scratch
            _load(x, f, mu_inp[n], f_inp[n], centre[n], first, count, width)
            _e_step(D, d_D, planes, x, W, uniform, e_step[n], d_use[n], fill or len(kept) == 0, width)
            _softmax_backward(D, d_D, f, d_f_inp[n], d_R[n] if len(d_R) else d_R[:0, 0], first, count, width)
            for j in range(n_out):
                total = mu_inp.dtype.type(0)
                for i in range(width):
                    total += d_D[j, i]
                sums[segment, 0, j] += total
            for c in range(n_c):
                d_x[c, :, :width] = 0
                for q in range(0, n_q, 4):
                    at = c * n_q + q if len(planes) == n_c * n_q else 0
                    if len(planes) < n_c * n_q:
                        _product(planes, at, W, q, x, c, width)
                    _block_backward(d_block, planes, at, D, d_D, e_step, d_use, n, n_c, c, q, sums, segment, width)
                    if len(kept) and add:
                        for k in range(4):
                            for i in range(width):
                                d_kept[tile, at + k, i] += d_block[k, i]
                    elif len(kept):
                        d_kept[tile, at : at + 4, :width] = d_block[:, :width]
                    else:
                        _product_backward(d_block, 0, W, q, x, c, d_W[chunk], d_x, width)
            if len(kept) == 0:
                _store(d_mu_inp[n], d_x, first, count)


@_jit_sums
def gradients_of_kept(
    inputs: _Inputs,
    plan: _PlanOfTiles,
    share: tuple[int, int],
    d_kept: np.ndarray,
    d_mu_inp: np.ndarray,
    d_W: np.ndarray,
) -> None:
    """Add to the gradients of the inputs and the weights, from the gradient of the kept planes."""
    mu_inp, f_inp, centre, W = inputs
    tiles, chunks, T = plan
    n_c, n_q = mu_inp.shape[2], W.shape[0]
    x, f = np.zeros((n_c, W.shape[1], T), mu_inp.dtype), np.empty(T, mu_inp.dtype)
    d_x = np.zeros_like(x)
    for chunk in range(share[0], len(chunks) - 1, share[1]):
        for tile in range(chunks[chunk], chunks[chunk + 1]):
            n, first, count, _ = tiles[tile]
            width = (count + 15) // 16 * 16
            _load(x, f, mu_inp[n], f_inp[n], centre[n], first, count, width)
            for c in range(n_c):
                d_x[c, :, :width] = 0
                for q in range(0, n_q, 4):
                    _product_backward(d_kept[tile], c * n_q + q, W, q, x, c, d_W[chunk], d_x, width)
            _store(d_mu_inp[n], d_x, first, count)


@_jit_sums
def uniform_moments(inputs: _Inputs, plan: _PlanOfTiles, share: tuple[int, int], moments: np.ndarray) -> None:
    """Add `sum_i f_i x_ic x_ic^T`, and `sum_i f_i x_ic` in the last column, to `moments [segments,c,d,d+1]`, float64.

    This is for narrow inputs, as it makes one pass over a tile for each of these sums.
    """
    mu_inp, f_inp, centre, _ = inputs
    tiles, chunks, T = plan
    n_c, n_d = mu_inp.shape[2:]
    x, f, f_x = np.zeros((n_c, n_d, T), mu_inp.dtype), np.empty(T, mu_inp.dtype), np.empty(T)
    for chunk in range(share[0], len(chunks) - 1, share[1]):
        for tile in range(chunks[chunk], chunks[chunk + 1]):
            n, first, count, segment = tiles[tile]
            _load(x, f, mu_inp[n], f_inp[n], centre[n], first, count, count)
            for c in range(n_c):
                for d in range(n_d):
                    total = 0.0
                    for i in range(count):
                        f_x[i] = np.float64(f[i]) * np.float64(x[c, d, i])
                        total += f_x[i]
                    moments[segment, c, d, n_d] += total
                    for e in range(d + 1):
                        total = 0.0
                        for i in range(count):
                            total += f_x[i] * np.float64(x[c, e, i])
                        moments[segment, c, d, e] += total
                        if e < d:
                            moments[segment, c, e, d] += total


@_jit_sums
def uniform_gradients(
    inputs: _Inputs,
    plan: _PlanOfTiles,
    share: tuple[int, int],
    constant: np.ndarray,
    half: np.ndarray,
    d_mu_inp: np.ndarray,
    d_f_inp: np.ndarray,
) -> None:
    """Go back through the first iteration, in which `D_ij` has the same gradient for all `j`, quadratic in `x_i`.

    Beside the arguments of all passes:
        constant: `[n]`, the constant term of this gradient.
        half: `[n,c,d+1,d]`, the matrix of its quadratic form and, in the last row, half its linear term.
        d_mu_inp: `[n,i,c,d]`, added to.
        d_f_inp: `[n,i]`, added to.
    """
    mu_inp, f_inp, centre, _ = inputs
    tiles, chunks, T = plan
    n_c, n_d = mu_inp.shape[2:]
    x, d_x = np.zeros((n_c, n_d, T), mu_inp.dtype), np.zeros((n_c, n_d, T), mu_inp.dtype)
    f, d_f = np.empty(T, mu_inp.dtype), np.empty(T, mu_inp.dtype)
    for chunk in range(share[0], len(chunks) - 1, share[1]):
        for tile in range(chunks[chunk], chunks[chunk + 1]):
            n, first, count, _ = tiles[tile]
            _load(x, f, mu_inp[n], f_inp[n], centre[n], first, count, count)
            d_f[:count] = constant[n]
            for c in range(n_c):
                for d in range(n_d):
                    linear = half[n, c, n_d, d]
                    d_x[c, d, :count] = linear
                    for e in range(n_d):
                        factor = half[n, c, e, d]
                        for i in range(count):
                            d_x[c, d, i] += factor * x[c, e, i]
                    for i in range(count):
                        d_f[i] += (d_x[c, d, i] + linear) * x[c, d, i]
                        d_x[c, d, i] *= f[i] + f[i]
            for i in range(count):
                d_f_inp[n, first + i] += d_f[i]
            _store(d_mu_inp[n], d_x, first, count)


@_jit_sums
def _store(d_mu_inp: np.ndarray, d_x: np.ndarray, first: int, count: int) -> None:
    for i in range(count):
        for c in range(d_mu_inp.shape[1]):
            for d in range(d_mu_inp.shape[2]):
                d_mu_inp[first + i, c, d] += d_x[c, d, i]


@_jit_sums
def _softmax_backward(
    D: np.ndarray,
    d_D: np.ndarray,
    f: np.ndarray,
    d_f_inp: np.ndarray,
    d_R: np.ndarray,
    first: int,
    count: int,
    width: int,
) -> None:
    """Compute `D = f R` from `R`, and the gradient of the logits from that of `D`, both in place."""
    dot, dot_R = np.zeros_like(f), np.zeros_like(f)
    for j in range(len(D)):
        for i in range(width):
            dot[i] += D[j, i] * d_D[j, i]
    for i in range(count):
        d_f_inp[first + i] += dot[i]
    if len(d_R):
        for i in range(count):
            for j in range(len(D)):
                dot_R[i] += D[j, i] * d_R[first + i, j]
    for j in range(len(D)):
        for i in range(width):
            d_D[j, i] = f[i] * (d_D[j, i] - dot[i])
        if len(d_R):
            for i in range(count):
                d_D[j, i] += d_R[first + i, j] - dot_R[i]
        for i in range(width):
            d_D[j, i] *= D[j, i]
            D[j, i] *= f[i]


@_jit_sums
def _block_backward(
    d_block: np.ndarray,
    planes: np.ndarray,
    at: int,
    D: np.ndarray,
    d_logits: np.ndarray,
    e_step: np.ndarray,
    d_use: np.ndarray,
    n: int,
    n_c: int,
    c: int,
    q: int,
    sums: np.ndarray,
    segment: int,
    width: int,
) -> None:
    """Compute the gradient of a block of planes: through the M-step and through the E-step."""
    n_p, n_out = e_step.shape[1] // 3, len(D)
    n_h = n_p // n_c
    for k in range(4):
        if q + k >= n_out * n_h:
            for i in range(width):
                d_block[k, i] = 0
            continue
        j, p = (q + k) // n_h, 1 + c * n_h + (q + k) % n_h
        middle, scale = e_step[n, p, j], e_step[n, p + n_p, j]
        mean, linear, square = d_use[n, p, j], d_use[n, p + n_p, j], d_use[n, p + 2 * n_p, j]
        square += square
        scale = (scale + scale) * scale
        first = second = D.dtype.type(0)
        for i in range(width):
            u = planes[at + k, i]
            y = u - middle
            g_y = d_logits[j, i] * y
            first += g_y
            second += g_y * y
            d_block[k, i] = D[j, i] * (linear + square * (u - mean)) - scale * g_y
        sums[segment, p, j] += first
        sums[segment, p + n_p, j] += second
