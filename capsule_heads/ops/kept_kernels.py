"""The kernels of strategy "kept": all iterations of a sample in one loop, on one thread, without the GIL.

Vector lanes run over the outputs `j`. Votes have the dtype of the call. All else is float64, for which small calls have
time. In the shapes `p` counts the rows and columns of an output capsule.
"""

from __future__ import annotations

import numpy as np

from .cpu_kernels import _float_of_bits, _jit_exact, _jit_sums

# Rows of the results that are kept of an iteration, `[2+2p,j]`: scores, counts, means, variances.
A_OUT, N_USED, FIRST_MEAN = 0, 1, 2


@_jit_exact  # the two parts of log 2 must not be added before they are subtracted
def _exp(x: float) -> float:
    """Return `exp(x)` for `x <= 0`, or 0 where that is almost 0, by a polynomial, which can be vectorised."""
    y = max(x, -650.0)
    n = np.int32(y * 1.4426950408889634 - 0.5)  # rounded towards zero, as y is at most 0
    r = (y - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10
    p = 1.0 / 6227020800.0
    p = p * r + 1.0 / 479001600.0
    p = p * r + 1.0 / 39916800.0
    p = p * r + 1.0 / 3628800.0
    p = p * r + 1.0 / 362880.0
    p = p * r + 1.0 / 40320.0
    p = p * r + 1.0 / 5040.0
    p = p * r + 1.0 / 720.0
    p = p * r + 1.0 / 120.0
    p = p * r + 1.0 / 24.0
    p = p * r + 1.0 / 6.0
    p = p * r + 0.5
    p = p * (r * r) + r + 1.0
    bits = (np.int64(n) + 1023) << 52
    return p * _float_of_bits(bits) if x > -640.0 else 0.0  # type: ignore[call-arg]  # see there


@_jit_sums
def _routing_probabilities(
    R: np.ndarray, V: np.ndarray, prior: np.ndarray, mean: np.ndarray, half_precision: np.ndarray
) -> None:
    """Compute an input's `R [j]` from its votes `[p,j]`, log priors `[j]`, means and `1 / (2 variance)`, `[p,j]`."""
    n_p, n_j = V.shape
    for j in range(n_j):
        R[j] = prior[j]
    for p in range(n_p):
        for j in range(n_j):
            v = V[p, j] - mean[p, j]
            R[j] -= v * v * half_precision[p, j]
    top = R[0]
    for j in range(n_j):
        top = max(top, R[j])
    for j in range(n_j):
        R[j] = _exp(R[j] - top)
    total = 0.0
    for j in range(n_j):
        total += R[j]
    scale = 1.0 / total
    for j in range(n_j):
        R[j] *= scale


@_jit_exact
def _e_step(
    kept: np.ndarray, is_gaussian: bool, prior: np.ndarray, mean: np.ndarray, half_precision: np.ndarray
) -> None:
    """Compute the next E-step's parameters from the kept results of an iteration, `[2+2p,j]`."""
    n_p, n_j = mean.shape
    for j in range(n_j):
        a = kept[A_OUT, j]
        prior[j] = min(a, 0.0) - np.log1p(np.exp(-abs(a)))
    for p in range(n_p):
        for j in range(n_j):
            mean[p, j] = kept[FIRST_MEAN + p, j]
            half_precision[p, j] = 1.0
            if is_gaussian:
                variance = kept[FIRST_MEAN + n_p + p, j]
                prior[j] -= 0.5 * np.log(variance)
                half_precision[p, j] = 0.5 / variance


@_jit_sums
def forward(
    V: np.ndarray,
    f_inp: np.ndarray,
    beta_use: np.ndarray,
    beta_ign: np.ndarray,
    is_gaussian: bool,
    eps: float,
    kept: np.ndarray,
    R: np.ndarray,
    wants_R: bool,
    first: int,
    last: int,
) -> None:
    """Route samples `first` to `last`.

    Args:
        V: `[n,i,p,j]`, votes.
        f_inp: `[n,i]`, float64.
        beta_use: `[i or 1,j]`, float64.
        beta_ign: `[i or 1,j]`, float64.
        is_gaussian: whether the mixture is of Gaussians.
        eps: as in `routing.route`.
        kept: `[iterations,n,2+2p,j]`, float64, to write to.
        R: `[iterations-1,n,i,j]`, float64, to write to, for all iterations but the first.
        wants_R: whether to compute `R` of masked inputs too, which change nothing.
        first: the first sample.
        last: the sample after the last one.
    """
    n_i, n_p, n_j = V.shape[1:]
    has_own = beta_use.shape[0] > 1
    a_out, n_used = np.empty(n_j), np.empty(n_j)
    linear, square = np.empty((n_p, n_j)), np.empty((n_p, n_j))
    prior, mean, half_precision = np.empty(n_j), np.zeros((n_p, n_j)), np.empty((n_p, n_j))
    uniform = np.full(n_j, 1.0 / n_j)
    for s in range(first, last):
        mean[:] = 0.0
        for i in range(n_i):  # sums are of differences from a number nearby, so squares lose no digits
            if f_inp[s, i] > 0.0:
                mean[:] = V[s, i]
                break
        for t in range(kept.shape[0]):
            a_out[:], n_used[:], linear[:], square[:] = 0.0, 0.0, 0.0, 0.0
            for i in range(n_i):
                f = f_inp[s, i]
                if t == 0:
                    R_i = uniform
                else:
                    R_i = R[t - 1, s, i]
                    if f > 0.0 or wants_R:
                        _routing_probabilities(R_i, V[s, i], prior, mean, half_precision)
                    else:
                        R_i[:] = 0.0
                if f == 0.0:
                    continue
                b = i if has_own else 0
                for j in range(n_j):
                    D = f * R_i[j]
                    n_used[j] += D
                    a_out[j] += beta_use[b, j] * D - beta_ign[b, j] * (f - D)
                for p in range(n_p):
                    for j in range(n_j):
                        v = V[s, i, p, j] - mean[p, j]
                        D_v = f * R_i[j] * v
                        linear[p, j] += D_v
                        square[p, j] += D_v * v
            for j in range(n_j):
                kept[t, s, A_OUT, j], kept[t, s, N_USED, j] = a_out[j], n_used[j]
            for p in range(n_p):
                for j in range(n_j):
                    count = n_used[j] + eps
                    # eps draws the mean to zero, away from the mean of the differences
                    moved = (linear[p, j] - eps * mean[p, j]) / count
                    scatter = square[p, j] - moved * (2.0 * linear[p, j] - moved * n_used[j])
                    kept[t, s, FIRST_MEAN + p, j] = mean[p, j] + moved
                    kept[t, s, FIRST_MEAN + n_p + p, j] = max(scatter, 0.0) / count + eps
            _e_step(kept[t, s], is_gaussian, prior, mean, half_precision)


@_jit_sums
def backward(
    V: np.ndarray,
    f_inp: np.ndarray,
    beta_use: np.ndarray,
    beta_ign: np.ndarray,
    is_gaussian: bool,
    eps: float,
    kept: np.ndarray,
    R: np.ndarray,
    d_kept: np.ndarray,
    d_R: np.ndarray,
    d_V: np.ndarray,
    d_f_inp: np.ndarray,
    d_beta_use: np.ndarray,
    d_beta_ign: np.ndarray,
    first: int,
    last: int,
) -> None:
    """Go back through `forward`, whose arguments are the first eight.

    Args:
        V: see there.
        f_inp: see there.
        beta_use: see there.
        beta_ign: see there.
        is_gaussian: see there.
        eps: see there.
        kept: see there.
        R: see there.
        d_kept: `[n,2+2p,j]`, float64, the gradient of the last iteration's results. It is overwritten, and its row of
            counts is not read.
        d_R: `[n,i,j]`, float64, the gradient of the last `R`; empty for none.
        d_V: `[n,i,p,j]`, to write to.
        d_f_inp: `[n,i]`, float64, zeros, to add to.
        d_beta_use: `[n,i or 1,j]`, float64, zeros, to add to.
        d_beta_ign: `[n,i or 1,j]`, float64, zeros, to add to.
        first: the first sample.
        last: the sample after the last one.
    """
    n_i, n_p, n_j = V.shape[1:]
    has_own = beta_use.shape[0] > 1
    d_votes = np.empty((n_i, n_p, n_j))
    d_D, d_logits, uniform = np.empty(n_j), np.empty(n_j), np.full(n_j, 1.0 / n_j)
    constant, linear, square = np.empty(n_j), np.empty((n_p, n_j)), np.empty((n_p, n_j))
    prior, mean, half_precision = np.empty(n_j), np.empty((n_p, n_j)), np.empty((n_p, n_j))
    mean_now = np.empty((n_p, n_j))
    for s in range(first, last):
        d_votes[:] = 0.0
        d_a, d_mean, d_variance = d_kept[s, A_OUT], d_kept[s, FIRST_MEAN:], d_kept[s, FIRST_MEAN + n_p :]
        for t in range(kept.shape[0] - 1, -1, -1):
            constant[:] = 0.0
            for p in range(n_p):
                for j in range(n_j):
                    count = kept[t, s, N_USED, j] + eps
                    mean_now[p, j] = kept[t, s, FIRST_MEAN + p, j]
                    g = d_variance[p, j]
                    # The sum of squares is about the mean, which is not quite the mean vote.
                    linear[p, j] = (d_mean[p, j] - 2.0 * g * eps * mean_now[p, j] / count) / count
                    square[p, j] = g / count
                    constant[j] -= square[p, j] * (kept[t, s, FIRST_MEAN + n_p + p, j] - eps)
            has_d_R = t > 0 and t == kept.shape[0] - 1 and d_R.shape[0] > 0
            if t > 0:
                _e_step(kept[t - 1, s], is_gaussian, prior, mean, half_precision)
            d_a_before, d_mean_before, d_variance_before = np.zeros(n_j), np.zeros((n_p, n_j)), np.zeros((n_p, n_j))
            for i in range(n_i):
                f = f_inp[s, i]
                if f == 0.0 and not has_d_R:
                    continue
                b = i if has_own else 0
                R_i = R[t - 1, s, i] if t > 0 else uniform
                for j in range(n_j):
                    d_D[j] = constant[j] + (beta_use[b, j] + beta_ign[b, j]) * d_a[j]
                for p in range(n_p):
                    for j in range(n_j):
                        v = V[s, i, p, j] - mean_now[p, j]
                        d_D[j] += v * (linear[p, j] + square[p, j] * v)
                        d_votes[i, p, j] += f * R_i[j] * (linear[p, j] + 2.0 * square[p, j] * v)
                d_f = 0.0
                for j in range(n_j):
                    D = f * R_i[j]
                    d_f += R_i[j] * d_D[j] - beta_ign[b, j] * d_a[j]
                    d_beta_use[s, b, j] += D * d_a[j]
                    d_beta_ign[s, b, j] -= (f - D) * d_a[j]
                d_f_inp[s, i] += d_f
                if t == 0:
                    continue
                total = 0.0
                for j in range(n_j):
                    d_logits[j] = R_i[j] * (f * d_D[j])
                if has_d_R:
                    for j in range(n_j):
                        d_logits[j] += R_i[j] * d_R[s, i, j]
                for j in range(n_j):
                    total += d_logits[j]
                for j in range(n_j):
                    d_logits[j] -= R_i[j] * total
                    d_a_before[j] += d_logits[j]
                for p in range(n_p):
                    for j in range(n_j):
                        v = V[s, i, p, j] - mean[p, j]
                        x = 2.0 * half_precision[p, j] * v
                        d_votes[i, p, j] -= d_logits[j] * x
                        d_mean_before[p, j] += d_logits[j] * x
                        d_variance_before[p, j] += d_logits[j] * (0.5 * x * x - half_precision[p, j])
            if t > 0:
                for j in range(n_j):
                    a = kept[t - 1, s, A_OUT, j]
                    d_a[j] = d_a_before[j] / (1.0 + np.exp(a))
                for p in range(n_p):
                    for j in range(n_j):
                        d_mean[p, j] = d_mean_before[p, j]
                        d_variance[p, j] = d_variance_before[p, j] if is_gaussian else 0.0
        for i in range(n_i):
            for p in range(n_p):
                for j in range(n_j):
                    d_V[s, i, p, j] = d_votes[i, p, j]
