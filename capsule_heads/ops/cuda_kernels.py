"""The kernels of strategy "cuda", in Triton: the work of each program, and of the last program of a sample.

A program goes over some blocks of one sample's inputs, one after another, and writes its sums to rows of its own. The
program of a sample that finishes last merges the rows of all its programs in float64, in a fixed order, and does the
M-step on the result. So an iteration is one launch, no program waits for another, and no bit changes from run to run.

A block is a matrix with a row for each row `c` of each input, `i * BC + c`, and a column for each number of a vote,
`n = j * BH + h`. `BI`, `BJ`, `BC` and `BH` are powers of two: rows and columns beyond the real ones are zero. Votes are
`u + bias` with `u = (mu_inp - centre) W`, as in `streaming`, whose names these kernels use.

Small tensors are laid out in rows of `N = BJ * BH` numbers, a number for each column. A row with a number for each
output has them in its first `BJ` places:

| tensor    | of                | rows                                                                            |
| --------- | ----------------- | ------------------------------------------------------------------------------- |
| `e_steps` | iterations but 1  | `mean` (C), `scale` (C), `log_prior`                                            |
| `state`   | all iterations    | `n_used`, `mean` (C), `scatter` (C); at the end `bias` (C), `total`; float64    |
| `use`     | one M-step        | `linear` (C), `square` (C), `mean` (C), `constant`                              |
| `sums`    | all M-steps       | `d_bias` (C), `d_beta_use`, `d_beta_ign`, `d_total`; float64                    |
| `partial` | a program's block | statistics as above, or sums of `d_logits`, of `d_z` (C) and of `d_z z` (C)     |

Two kinds of kernels go over all inputs. The kernels for wide inputs make the votes of a block as a matrix product. In
the kernels for narrow inputs (`narrow_...`) a block is a matrix `[BI,BJ]` for each `c` and `h`. A thread then has all
numbers of its inputs and outputs, and does its own sums over inputs.
"""

try:  # without it, transformers would refuse a checkpoint's code if Triton is not installed
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        'Triton is not installed, and strategy "cuda" needs it: on Linux, `pip install triton`, or use strategy="auto".'
    ) from error

# ---------------------------------------------------------------------------------------------------------------------
# Parts of kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _sigmoid(x):
    """Return the sigmoid without overflow for either sign, exact in float64 too."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _per_input(x, BI: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr):
    """Repeat `[BI,BJ]` for the rows and columns of a block: `[BI,BC,N]`."""
    return tl.reshape(tl.broadcast_to(x[:, None, :, None], [BI, BC, BJ, BH]), [BI, BC, BJ * BH])


@triton.jit
def _sum_planes(x, BI: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr):
    """Sum `[BI,BC,N]` over `c` and `h`: `[BI,BJ]`."""
    return tl.sum(tl.sum(tl.reshape(x, [BI, BC, BJ, BH]), axis=3), axis=1)


@triton.jit
def _load_rows(ptr, first, C: tl.constexpr, BC: tl.constexpr, N: tl.constexpr):
    """Load rows `first` to `first + C`, `[BC,N]`."""
    c, n = tl.arange(0, BC)[:, None], tl.arange(0, N)[None, :]
    return tl.load(ptr + (first + c) * N + n, mask=c < C, other=0.0)


@triton.jit
def _store_rows(ptr, first, x, C: tl.constexpr, BC: tl.constexpr, N: tl.constexpr):
    c, n = tl.arange(0, BC)[:, None], tl.arange(0, N)[None, :]
    tl.store(ptr + (first + c) * N + n, x.to(ptr.dtype.element_ty), mask=c < C)


@triton.jit
def _load_x(
    mu_ptr, centre_ptr, block, n_inp, start, C: tl.constexpr, D: tl.constexpr,
    BI: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Load columns `start` to `start + BD` of a block's inputs, less their centre: `[BI * BC, BD]`."""
    row = tl.arange(0, BI * BC)
    i, c, d = block * BI + row // BC, row % BC, start + tl.arange(0, BD)
    has_c = (c < C)[:, None] & (d < D)[None, :]
    x = tl.load(mu_ptr + (i * C + c)[:, None] * D + d[None, :], mask=has_c & (i < n_inp)[:, None], other=0.0)
    return x - tl.load(centre_ptr + c[:, None] * D + d[None, :], mask=has_c, other=0.0)


@triton.jit
def _load_W(W_ptr, start, N: tl.constexpr, BD: tl.constexpr):
    """Load rows `start` to `start + BD` of the packed weights, which are zero beyond the real ones: `[BD,N]`."""
    return tl.load(W_ptr + (start + tl.arange(0, BD))[:, None] * N + tl.arange(0, N)[None, :])


@triton.jit
def _votes(
    mu_ptr, centre_ptr, W_ptr, block, n_inp, C: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    BI: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Make the block `u`, `[BI,BC,N]`."""
    u = tl.zeros([BI * BC, N], dtype=mu_ptr.dtype.element_ty)
    for start in range(0, D, BD):
        x = _load_x(mu_ptr, centre_ptr, block, n_inp, start, C, D, BI, BC, BD)
        u = tl.dot(x, _load_W(W_ptr, start, N, BD), acc=u, input_precision=PRECISION, out_dtype=u.dtype)
    return tl.reshape(u, [BI, BC, N])


@triton.jit
def _load_f(a_ptr, block, n_inp, BI: tl.constexpr):
    """Load the sigmoids of a block's scores, `[BI]`, 0 beyond the last."""
    i = block * BI + tl.arange(0, BI)
    return _sigmoid(tl.load(a_ptr + i, mask=i < n_inp, other=float("-inf")))


@triton.jit
def _probabilities(energy, log_prior_ptr, J: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, FIRST: tl.constexpr):
    """Compute `R [BI,BJ]` of the E-step, 0 beyond the last output; uniform in the first iteration."""
    j = tl.arange(0, BJ)
    if FIRST:
        uniform = tl.where(j < J, 1.0, 0.0).to(energy.dtype) / J
        R = tl.broadcast_to(uniform[None, :], [BI, BJ])
    else:
        log_prior = tl.load(log_prior_ptr + j, mask=j < J, other=float("-inf"))
        logits = log_prior[None, :] - energy
        weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        R = weights * (1.0 / tl.sum(weights, axis=1))[:, None]
    return R


@triton.jit
def _is_last(counter_ptr, n_programs):
    """Return whether all other programs of the sample have written their sums, and if so reset the counter to 0."""
    tl.debug_barrier()  # every thread has written
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == n_programs - 1
    tl.debug_barrier()
    if is_last:
        tl.store(counter_ptr, 0)
    return is_last


@triton.jit
def _merged(count, mean, scatter, other_count, other_mean, other_scatter):
    """Merge two counts `[N]`, means and scatters about them `[BC,N]` by Chan's formula."""
    total = count + other_count
    fraction = (other_count / tl.maximum(total, 1e-30))[None, :]  # a total below 1e-30 is nothing beside eps
    distance = other_mean - mean
    return (
        total,
        mean + distance * fraction,
        scatter + other_scatter + distance * distance * count[None, :] * fraction,
    )


@triton.jit
def _merge_programs(row_ptr, n_programs, C: tl.constexpr, BC: tl.constexpr, N: tl.constexpr, BP: tl.constexpr):
    """Merge the statistics of a sample's programs in float64: counts `[N]`, means and scatters `[BC,N]`."""
    ROW: tl.constexpr = (1 + 2 * C) * N
    n, p, c = tl.arange(0, N), tl.arange(0, BP), tl.arange(0, BC)
    count = tl.zeros([N], dtype=tl.float64)
    mean, scatter = tl.zeros([BC, N], dtype=tl.float64), tl.zeros([BC, N], dtype=tl.float64)
    for start in range(0, n_programs, BP):
        has_p = start + p < n_programs
        has = has_p[:, None, None] & (c < C)[None, :, None]
        at = row_ptr + (start + p)[:, None] * ROW + n[None, :]
        at_c = row_ptr + (start + p)[:, None, None] * ROW + c[None, :, None] * N + n[None, None, :]
        counts = tl.load(at, mask=has_p[:, None], other=0.0, cache_modifier=".cg").to(tl.float64)
        means = tl.load(at_c + N, mask=has, other=0.0, cache_modifier=".cg").to(tl.float64)
        scatters = tl.load(at_c + (1 + C) * N, mask=has, other=0.0, cache_modifier=".cg").to(tl.float64)
        count_of_all = tl.sum(counts, axis=0)
        mean_of_all = tl.sum(counts[:, None, :] * means, axis=0) / tl.maximum(count_of_all, 1e-300)[None, :]
        distance = means - mean_of_all[None, :, :]
        scatter_of_all = tl.sum(scatters + counts[:, None, :] * distance * distance, axis=0)
        count, mean, scatter = _merged(count, mean, scatter, count_of_all, mean_of_all, scatter_of_all)
    return count, mean, scatter


@triton.jit
def _sum_programs(
    row_ptr, n_programs, C: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr
):  # fmt: skip
    """Sum the rows of a sample's programs in float64: `[N]`, with a number for each output, and two of `[BC,N]`."""
    N: tl.constexpr = BJ * BH
    ROW: tl.constexpr = (1 + 2 * C) * N
    n, p, c = tl.arange(0, N), tl.arange(0, BP), tl.arange(0, BC)
    of_outputs = tl.zeros([N], dtype=tl.float64)
    first, second = tl.zeros([BC, N], dtype=tl.float64), tl.zeros([BC, N], dtype=tl.float64)
    for start in range(0, n_programs, BP):
        has_p = start + p < n_programs
        has = has_p[:, None, None] & (c < C)[None, :, None]
        at = row_ptr + (start + p)[:, None] * ROW + n[None, :] // BH
        at_c = row_ptr + (start + p)[:, None, None] * ROW + c[None, :, None] * N + n[None, None, :]
        of_outputs += tl.sum(tl.load(at, mask=has_p[:, None], other=0.0, cache_modifier=".cg").to(tl.float64), axis=0)
        first += tl.sum(tl.load(at_c + N, mask=has, other=0.0, cache_modifier=".cg").to(tl.float64), axis=0)
        second += tl.sum(tl.load(at_c + (1 + C) * N, mask=has, other=0.0, cache_modifier=".cg").to(tl.float64), axis=0)
    return of_outputs, first, second


@triton.jit
def _columns(J: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr):
    """Return the output and the `h` of each column, `[N]`, and which rows and columns are real, `[BC,N]`."""
    n = tl.arange(0, BJ * BH)
    j, h = n // BH, n % BH
    is_real = (tl.arange(0, BC) < C)[:, None] & ((j < J) & (h < H))[None, :]
    return j, h, is_real


@triton.jit
def _m_step(
    n_used, mean, scatter, total, bias, beta_use, beta_ign, EPS: tl.constexpr,
):  # fmt: skip
    """Do the M-step of `streaming.MStep`; float64, all `[BC,N]` or, where there is no `c` and `h`, `[N]`.

    Returns:
        `a_out`, `count`, `mu_out`, `gap`, the mean about the centre, the sum of squares about it, `sig2_out`.
    """
    count = n_used + EPS
    a_out = beta_use * n_used - beta_ign * (total - n_used)
    vote = mean + bias
    mu_out = n_used[None, :] * vote / count[None, :]
    gap = EPS * vote / count[None, :]
    squares = scatter + n_used[None, :] * gap * gap
    return a_out, count, mu_out, gap, mean - gap, squares, squares / count[None, :] + EPS


@triton.jit
def _load_m_step(state_ptr, beta_use_ptr, beta_ign_ptr, t, T: tl.constexpr, J: tl.constexpr, C: tl.constexpr,
                 BC: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr):  # fmt: skip
    """Load what the M-step of iteration `t` reads: `n_used`, `mean`, `scatter`, `total`, `bias`, betas; float64."""
    N: tl.constexpr = BJ * BH
    j = tl.arange(0, N) // BH
    row = t * (1 + 2 * C)
    n_used = tl.load(state_ptr + row * N + j)
    mean, scatter = _load_rows(state_ptr, row + 1, C, BC, N), _load_rows(state_ptr, row + 1 + C, C, BC, N)
    bias = _load_rows(state_ptr, T * (1 + 2 * C), C, BC, N)
    total = tl.load(state_ptr + (T * (1 + 2 * C) + C) * N)
    beta_use = tl.load(beta_use_ptr + j, mask=j < J, other=0.0).to(tl.float64)
    beta_ign = tl.load(beta_ign_ptr + j, mask=j < J, other=0.0).to(tl.float64)
    return n_used, mean, scatter, total, bias, beta_use, beta_ign


@triton.jit
def _log_prior(a_out, sig2_out, is_real, J: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr, SKM: tl.constexpr):
    """Return the E-step's log prior, `[BJ]`, less the largest, as logits far from zero lose digits."""
    a_out = tl.max(tl.reshape(a_out, [BJ, BH]), axis=1)  # the same in all columns of an output
    log_prior = tl.minimum(a_out, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(a_out)))
    if not SKM:  # the paper's log-softmax adds a constant to each input's logits, which the softmax removes
        log_variance = tl.sum(tl.where(is_real, tl.log(sig2_out), 0.0), axis=0)
        log_prior -= 0.5 * tl.sum(tl.reshape(log_variance, [BJ, BH]), axis=1)
    log_prior = tl.where(tl.arange(0, BJ) < J, log_prior, float("-inf"))
    return log_prior - tl.max(log_prior, axis=0)


@triton.jit
def _use_gradient(
    d_a_out, d_mean, d_sig2_out, d_mu_out, n_used, mean, scatter, total, bias, beta_use, beta_ign, use_ptr, sums_ptr,
    C: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr, EPS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Write the gradient of `D` to `use`, and add the gradients of the M-step's other inputs to `sums`.

    See `streaming.MStep.backward`.
    """
    N: tl.constexpr = BJ * BH
    _, count, _, gap, mean, squares, _ = _m_step(n_used, mean, scatter, total, bias, beta_use, beta_ign, EPS)
    square = d_sig2_out / count[None, :]
    d_mean -= 2.0 * square * n_used[None, :] * gap
    linear = (d_mean + d_mu_out) / count[None, :]
    of_squares = tl.sum(tl.reshape(tl.sum(square * squares / count[None, :], axis=0), [BJ, BH]), axis=1)
    # A number for each output is the same in all columns of the output, and is taken from the first of them.
    n, j = tl.arange(0, N), tl.arange(0, BJ)
    of_a_out = tl.max(tl.reshape((beta_use + beta_ign) * d_a_out, [BJ, BH]), axis=1)
    _store_rows(use_ptr, 0, linear, C, BC, N)
    _store_rows(use_ptr, C, square, C, BC, N)
    _store_rows(use_ptr, 2 * C, mean, C, BC, N)
    tl.store(use_ptr + 3 * C * N + j, (of_a_out - of_squares).to(use_ptr.dtype.element_ty))

    d_bias = (n_used[None, :] * d_mu_out - EPS * d_mean) / count[None, :]
    is_first = n % BH == 0
    d_beta_use, d_beta_ign = d_a_out * n_used, d_a_out * (n_used - total)
    d_total = -tl.sum(tl.where(is_first, beta_ign * d_a_out, 0.0), axis=0)
    if ADD:
        d_bias += _load_rows(sums_ptr, 0, C, BC, N)
        d_beta_use += tl.load(sums_ptr + C * N + n // BH, mask=is_first, other=0.0)
        d_beta_ign += tl.load(sums_ptr + (C + 1) * N + n // BH, mask=is_first, other=0.0)
        d_total += tl.load(sums_ptr + (C + 2) * N)
        tl.debug_barrier()  # several threads read a number, one writes it
    _store_rows(sums_ptr, 0, d_bias, C, BC, N)
    tl.store(sums_ptr + C * N + n // BH, d_beta_use, mask=is_first)
    tl.store(sums_ptr + (C + 1) * N + n // BH, d_beta_ign, mask=is_first)
    tl.store(sums_ptr + (C + 2) * N, d_total)


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n_inp", "n_samples", "n_programs", "n_blocks_each"])
def prepare_kernel(
    a_ptr, mu_ptr, W_ptr, B_ptr, packed_ptr, partial_ptr, counter_ptr, centre_ptr, state_ptr,
    n_inp, n_samples, n_programs, n_blocks_each,
    T: tl.constexpr, C: tl.constexpr, D: tl.constexpr, J: tl.constexpr, H: tl.constexpr,
    BC: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr, BX: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Pack `W` to `[D,N]`, and compute each sample's `total`, `centre [C,D]` and `bias [C,N]`, `centre W + B`.

    The outputs do not depend on the centre, so it need not be exact.
    """
    N: tl.constexpr = BJ * BH
    CD: tl.constexpr = C * D
    program = tl.program_id(0)
    j, h, _ = _columns(J, H, C, BJ, BH, BC)
    if program >= n_samples * n_programs:  # programs beyond those of samples pack 16 rows of W each
        d = (program - n_samples * n_programs) * 16 + tl.arange(0, 16)
        has = (d < D)[:, None] & ((j < J) & (h < H))[None, :]
        W = tl.load(W_ptr + (j * D * H + h)[None, :] + d[:, None] * H, mask=has, other=0.0)
        tl.store(packed_ptr + d[:, None] * N + tl.arange(0, N)[None, :], W)
    else:
        sample = (program // n_programs).to(tl.int64)
        first = (program % n_programs) * n_blocks_each * BB
        a_ptr += sample * n_inp
        mu_ptr += sample * n_inp * CD
        row_ptr = partial_ptr + program.to(tl.int64) * (CD + 1)
        end = tl.minimum(first + n_blocks_each * BB, n_inp)
        own_total = tl.zeros([BB], dtype=tl.float64)
        for column in tl.static_range(0, CD, BX):
            x = column + tl.arange(0, BX)
            weighted = tl.zeros([BB, BX], dtype=mu_ptr.dtype.element_ty)
            for block in range(first, end, BB):
                i = block + tl.arange(0, BB)
                f = _sigmoid(tl.load(a_ptr + i, mask=i < end, other=float("-inf")))
                mask = (i < end)[:, None] & (x < CD)[None, :]
                weighted += f[:, None] * tl.load(mu_ptr + i[:, None] * CD + x[None, :], mask=mask, other=0.0)
                if column == 0:
                    own_total += f.to(tl.float64)
            tl.store(row_ptr + x, tl.sum(weighted.to(tl.float64), axis=0), mask=x < CD)
        tl.store(row_ptr + CD, tl.sum(own_total, axis=0))

        if _is_last(counter_ptr + sample, n_programs):
            row_ptr = partial_ptr + sample * n_programs * (CD + 1)
            total = tl.zeros([1], dtype=tl.float64)
            p = tl.arange(0, BB)
            for start in range(0, n_programs, BB):
                has_p = start + p < n_programs
                of_p = tl.load(row_ptr + (start + p) * (CD + 1) + CD, mask=has_p, other=0.0, cache_modifier=".cg")
                total += tl.sum(of_p, axis=0)
            total = tl.sum(total, axis=0)
            state_ptr += (sample * (T * (1 + 2 * C) + C + 1) + T * (1 + 2 * C)) * N
            tl.store(state_ptr + C * N, total)
            for column in tl.static_range(0, CD, BX):
                x = column + tl.arange(0, BX)
                weighted_sum = tl.zeros([BX], dtype=tl.float64)
                for start in range(0, n_programs, BB):
                    mask = (start + p < n_programs)[:, None] & (x < CD)[None, :]
                    at = row_ptr + (start + p)[:, None] * (CD + 1) + x[None, :]
                    weighted_sum += tl.sum(tl.load(at, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
                centre = weighted_sum / tl.maximum(total, 1e-300)
                tl.store(centre_ptr + sample * CD + x, centre.to(centre_ptr.dtype.element_ty), mask=x < CD)
            tl.debug_barrier()  # other threads read it

            for c in tl.static_range(C):
                bias = tl.load(B_ptr + j * C * H + c * H + h, mask=(j < J) & (h < H), other=0.0).to(tl.float64)
                for start in range(0, D, 16):
                    d = start + tl.arange(0, 16)
                    has = (d < D)[:, None] & ((j < J) & (h < H))[None, :]
                    W = tl.load(W_ptr + (j * D * H + h)[None, :] + d[:, None] * H, mask=has, other=0.0)
                    of_c = tl.load(centre_ptr + sample * CD + c * D + d, mask=d < D, other=0.0)
                    bias += tl.sum(of_c.to(tl.float64)[:, None] * W.to(tl.float64), axis=0)
                tl.store(state_ptr + c * N + tl.arange(0, N), bias)


@triton.jit
def _finish_statistics(
    row_ptr, n_rows, e_ptr, state_ptr, beta_use_ptr, beta_ign_ptr, a_out_ptr, mu_out_ptr, sig2_out_ptr, sample, t,
    T: tl.constexpr, C: tl.constexpr, J: tl.constexpr, H: tl.constexpr,
    BC: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr,
    EPS: tl.constexpr, SKM: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Merge a sample's rows and do the M-step; then write the next E-step's parameters, or the outputs."""
    N: tl.constexpr = BJ * BH
    dtype = a_out_ptr.dtype.element_ty
    j, h, is_real = _columns(J, H, C, BJ, BH, BC)
    n_used, mean, scatter = _merge_programs(row_ptr, n_rows, C, BC, N, BP)
    if not FIRST:  # from z back to u
        row = (t - 1) * (2 * C + 1)
        scale = tl.where(is_real, _load_rows(e_ptr, row + C, C, BC, N), 1.0).to(tl.float64)
        mean = _load_rows(e_ptr, row, C, BC, N).to(tl.float64) + mean / scale
        scatter = scatter / (scale * scale)
    mean, scatter = tl.where(is_real, mean, 0.0), tl.where(is_real, scatter, 0.0)
    row = t * (1 + 2 * C)
    tl.store(state_ptr + row * N + j, n_used, mask=h == 0)
    _store_rows(state_ptr, row + 1, mean, C, BC, N)
    _store_rows(state_ptr, row + 1 + C, scatter, C, BC, N)
    tl.debug_barrier()  # other threads read it
    _, _, _, total, bias, beta_use, beta_ign = _load_m_step(
        state_ptr, beta_use_ptr, beta_ign_ptr, t, T, J, C, BC, BJ, BH
    )
    a_out, _, mu_out, _, mean_, _, sig2_out = _m_step(n_used, mean, scatter, total, bias, beta_use, beta_ign, EPS)
    if LAST:
        at_out = sample * (J * C * H) + (j * C * H + h)[None, :] + tl.arange(0, BC)[:, None] * H
        tl.store(a_out_ptr + sample * J + j, a_out.to(dtype), mask=(h == 0) & (j < J))
        tl.store(mu_out_ptr + at_out, mu_out.to(dtype), mask=is_real)
        tl.store(sig2_out_ptr + at_out, sig2_out.to(dtype), mask=is_real)
    else:
        row = t * (2 * C + 1)
        next_scale = tl.where(is_real, 1.0, 0.0).to(tl.float64)
        if not SKM:
            next_scale = tl.where(is_real, 1.0 / tl.sqrt(2.0 * sig2_out), 0.0)
        log_prior = _log_prior(a_out, sig2_out, is_real, J, BJ, BH, SKM)
        _store_rows(e_ptr, row, tl.where(is_real, mean_, 0.0), C, BC, N)
        _store_rows(e_ptr, row + C, next_scale, C, BC, N)
        tl.store(e_ptr + (row + 2 * C) * N + tl.arange(0, BJ), log_prior.to(dtype))


@triton.jit(do_not_specialize=["n_inp", "n_programs", "n_blocks_each", "t"])
def statistics_kernel(
    a_ptr, mu_ptr, centre_ptr, W_ptr, e_ptr, partial_ptr, counter_ptr, state_ptr, beta_use_ptr, beta_ign_ptr,
    a_out_ptr, mu_out_ptr, sig2_out_ptr, R_ptr, n_inp, n_programs, n_blocks_each, t,
    T: tl.constexpr, C: tl.constexpr, D: tl.constexpr, J: tl.constexpr, H: tl.constexpr,
    BI: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr,
    EPS: tl.constexpr, SKM: tl.constexpr, PRECISION: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, HAS_R: tl.constexpr,
):  # fmt: skip
    """Do an iteration: its E-step, statistics and M-step."""
    N: tl.constexpr = BJ * BH
    ROWS: tl.constexpr = 1 + 2 * C
    program = tl.program_id(0)
    sample = (program // n_programs).to(tl.int64)
    first = (program % n_programs) * n_blocks_each
    a_ptr += sample * n_inp
    mu_ptr += sample * n_inp * (C * D)
    R_ptr += sample * n_inp * J
    centre_ptr += sample * (C * D)
    e_ptr += sample * ((T - 1) * (2 * C + 1) * N)
    own_e_ptr = e_ptr + (t - 1) * ((2 * C + 1) * N)
    dtype = mu_ptr.dtype.element_ty

    count = tl.zeros([N], dtype=dtype)
    mean, scatter = tl.zeros([BC, N], dtype=dtype), tl.zeros([BC, N], dtype=dtype)
    for block in range(first, tl.minimum(first + n_blocks_each, tl.cdiv(n_inp, BI))):
        u = _votes(mu_ptr, centre_ptr, W_ptr, block, n_inp, C, D, N, BI, BC, BD, PRECISION)
        if FIRST:
            z = u
        else:
            e_mean = _load_rows(own_e_ptr, 0, C, BC, N)
            scale = _load_rows(own_e_ptr, C, C, BC, N)
            z = (u - e_mean[None, :, :]) * scale[None, :, :]
        R = _probabilities(_sum_planes(z * z, BI, BC, BJ, BH), own_e_ptr + 2 * C * N, J, BI, BJ, FIRST)
        if HAS_R:
            i, jj = block * BI + tl.arange(0, BI), tl.arange(0, BJ)
            tl.store(R_ptr + i[:, None] * J + jj[None, :], R, mask=(i < n_inp)[:, None] & (jj < J)[None, :])
        D_use = _per_input(_load_f(a_ptr, block, n_inp, BI)[:, None] * R, BI, BC, BJ, BH)

        # The scatter is about the block's own mean: about another, it would lose digits to the distance of the means.
        n_block = tl.max(tl.sum(D_use, axis=0), axis=0)  # the same for each c
        own_mean = tl.sum(D_use * z, axis=0) / tl.maximum(n_block, 1e-30)[None, :]
        distance = z - own_mean[None, :, :]
        own_scatter = tl.sum(D_use * distance * distance, axis=0)
        count, mean, scatter = _merged(count, mean, scatter, n_block, own_mean, own_scatter)

    row_ptr = partial_ptr + program.to(tl.int64) * (ROWS * N)
    tl.store(row_ptr + tl.arange(0, N), count)
    _store_rows(row_ptr, 1, mean, C, BC, N)
    _store_rows(row_ptr, 1 + C, scatter, C, BC, N)
    if _is_last(counter_ptr + sample, n_programs):
        _finish_statistics(
            partial_ptr + sample * n_programs * (ROWS * N), n_programs, e_ptr,
            state_ptr + sample * ((T * ROWS + C + 1) * N), beta_use_ptr, beta_ign_ptr,
            a_out_ptr, mu_out_ptr, sig2_out_ptr, sample, t, T, C, J, H, BC, BJ, BH, BP, EPS, SKM, FIRST, LAST,
        )  # fmt: skip


@triton.jit
def _narrow_inputs(mu_ptr, centre_ptr, i, n_inp, C: tl.constexpr, D: tl.constexpr, BJ: tl.constexpr):
    """Load the numbers of the inputs `i [BI]`, less their centre: a tuple of `[BI,BJ]`, row after row.

    Each thread loads what it needs, though its neighbours load the same, as handing numbers on would take a barrier.
    """
    at = tl.broadcast_to(i[:, None] * (C * D), [i.shape[0], BJ])
    x = ()
    for q in tl.static_range(C * D):
        number = tl.load(mu_ptr + at + q, mask=at < n_inp * (C * D), other=0.0) - tl.load(centre_ptr + q)
        x = x + (number,)  # noqa: RUF005 - Triton has no unpacking
    return x


@triton.jit
def _narrow_weights(W_ptr, D: tl.constexpr, H: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr):
    """Load the numbers of the weights, a tuple of `[BI,BJ]`, row after row."""
    W = ()
    for q in tl.static_range(D * H):
        W = W + (_of_plane(W_ptr, q // H, q % H, BI, BJ, BH),)  # noqa: RUF005
    return W


@triton.jit
def _narrow_votes(x, W, C: tl.constexpr, D: tl.constexpr, H: tl.constexpr):
    """Make planes of votes, a tuple of `[BI,BJ]` in the order `(c, h)`."""
    u = ()
    for p in tl.static_range(C * H):
        plane = x[(p // H) * D] * W[p % H]
        for d in tl.static_range(1, D):
            plane += x[(p // H) * D + d] * W[d * H + p % H]
        u = u + (plane,)  # noqa: RUF005
    return u


@triton.jit
def _of_plane(ptr, row, h, BI: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr):
    """Load the numbers of a plane's row, the same for each input: `[BI,BJ]`."""
    at = tl.broadcast_to(tl.arange(0, BJ)[None, :] * BH + h, [BI, BJ])
    return tl.load(ptr + row * (BJ * BH) + at)


@triton.jit
def _zero_planes(n: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, dtype: tl.constexpr):
    planes = ()
    for _ in tl.static_range(n):
        planes = planes + (tl.zeros([BI, BJ], dtype=dtype),)  # noqa: RUF005
    return planes


@triton.jit(do_not_specialize=["n_inp", "n_programs", "n_blocks_each", "t"])
def narrow_statistics_kernel(
    a_ptr, mu_ptr, centre_ptr, W_ptr, e_ptr, partial_ptr, counter_ptr, state_ptr, beta_use_ptr, beta_ign_ptr,
    a_out_ptr, mu_out_ptr, sig2_out_ptr, R_ptr, n_inp, n_programs, n_blocks_each, t,
    T: tl.constexpr, C: tl.constexpr, D: tl.constexpr, J: tl.constexpr, H: tl.constexpr,
    BI: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr,
    EPS: tl.constexpr, SKM: tl.constexpr, PRECISION: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, HAS_R: tl.constexpr,
):  # fmt: skip
    """Do an iteration as `statistics_kernel` does. Each of a block's `BI` inputs has rows of its own in `partial`."""
    N: tl.constexpr = BJ * BH
    ROWS: tl.constexpr = 1 + 2 * C
    program = tl.program_id(0)
    sample = (program // n_programs).to(tl.int64)
    first = (program % n_programs) * n_blocks_each
    a_ptr += sample * n_inp
    mu_ptr += sample * n_inp * (C * D)
    R_ptr += sample * n_inp * J
    centre_ptr += sample * (C * D)
    e_ptr += sample * ((T - 1) * (2 * C + 1) * N)
    own_e_ptr = e_ptr + (t - 1) * ((2 * C + 1) * N)
    j = tl.arange(0, BJ)
    dtype = mu_ptr.dtype.element_ty

    count = tl.zeros([BI, BJ], dtype=dtype)
    mean, scatter = _zero_planes(C * H, BI, BJ, dtype), _zero_planes(C * H, BI, BJ, dtype)
    for block in range(first, tl.minimum(first + n_blocks_each, tl.cdiv(n_inp, BI))):
        i = block * BI + tl.arange(0, BI)
        x, W = _narrow_inputs(mu_ptr, centre_ptr, i, n_inp, C, D, BJ), _narrow_weights(W_ptr, D, H, BI, BJ, BH)
        u = _narrow_votes(x, W, C, D, H)
        energy = tl.zeros([BI, BJ], dtype=dtype)
        z = ()
        for p in tl.static_range(C * H):
            if FIRST:
                plane = u[p]
            else:
                plane = u[p] - _of_plane(own_e_ptr, p // H, p % H, BI, BJ, BH)
                plane *= _of_plane(own_e_ptr, C + p // H, p % H, BI, BJ, BH)
                energy += plane * plane
            z = z + (plane,)  # noqa: RUF005
        R = _probabilities(energy, own_e_ptr + 2 * C * N, J, BI, BJ, FIRST)
        if HAS_R:
            tl.store(R_ptr + i[:, None] * J + j[None, :], R, mask=(i < n_inp)[:, None] & (j < J)[None, :])
        D_use = _load_f(a_ptr, block, n_inp, BI)[:, None] * R

        # Each number is merged by itself: nothing is summed over inputs before the end.
        count += D_use
        fraction = D_use / tl.maximum(count, 1e-30)
        new_mean, new_scatter = (), ()
        for p in tl.static_range(C * H):
            distance = z[p] - mean[p]
            new_mean = new_mean + (mean[p] + distance * fraction,)  # noqa: RUF005
            new_scatter = new_scatter + (scatter[p] + D_use * distance * (z[p] - new_mean[p]),)  # noqa: RUF005
        mean, scatter = new_mean, new_scatter

    row = program.to(tl.int64) * BI + tl.arange(0, BI)
    at = partial_ptr + row[:, None] * (ROWS * N) + j[None, :] * BH
    for h in tl.static_range(BH):
        tl.store(at + h, count)
    for p in tl.static_range(C * H):
        tl.store(at + (1 + p // H) * N + p % H, mean[p])
        tl.store(at + (1 + C + p // H) * N + p % H, scatter[p])
    if _is_last(counter_ptr + sample, n_programs):
        _finish_statistics(
            partial_ptr + sample * n_programs * (BI * ROWS * N), n_programs * BI, e_ptr,
            state_ptr + sample * ((T * ROWS + C + 1) * N), beta_use_ptr, beta_ign_ptr,
            a_out_ptr, mu_out_ptr, sig2_out_ptr, sample, t, T, C, J, H, BC, BJ, BH, BP, EPS, SKM, FIRST, LAST,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def start_backward_kernel(
    d_a_out_ptr, d_mu_out_ptr, d_sig2_out_ptr, state_ptr, beta_use_ptr, beta_ign_ptr, use_ptr, sums_ptr,
    T: tl.constexpr, C: tl.constexpr, J: tl.constexpr, H: tl.constexpr,
    BC: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr, EPS: tl.constexpr,
    HAS_A: tl.constexpr, HAS_MU: tl.constexpr, HAS_SIG2: tl.constexpr,
):  # fmt: skip
    """Go back through the last M-step, from the gradients of the outputs."""
    N: tl.constexpr = BJ * BH
    sample = tl.program_id(0).to(tl.int64)
    j, h, is_real = _columns(J, H, C, BJ, BH, BC)
    at_out = sample * (J * C * H) + (j * C * H + h)[None, :] + tl.arange(0, BC)[:, None] * H
    d_a_out = tl.zeros([N], dtype=tl.float64)
    d_mu_out = tl.zeros([BC, N], dtype=tl.float64)
    d_sig2_out = tl.zeros([BC, N], dtype=tl.float64)
    if HAS_A:
        d_a_out += tl.load(d_a_out_ptr + sample * J + j, mask=j < J, other=0.0)
    if HAS_MU:
        d_mu_out += tl.load(d_mu_out_ptr + at_out, mask=is_real, other=0.0)
    if HAS_SIG2:
        d_sig2_out += tl.load(d_sig2_out_ptr + at_out, mask=is_real, other=0.0)
    n_used, mean, scatter, total, bias, beta_use, beta_ign = _load_m_step(
        state_ptr + sample * ((T * (1 + 2 * C) + C + 1) * N), beta_use_ptr, beta_ign_ptr, T - 1, T, J, C, BC, BJ, BH
    )
    _use_gradient(
        d_a_out, tl.zeros([BC, N], dtype=tl.float64), d_sig2_out, d_mu_out,
        n_used, mean, scatter, total, bias, beta_use, beta_ign,
        use_ptr + sample * (3 * C + 1) * N, sums_ptr + sample * (C + 3) * N, C, BC, BJ, BH, EPS, False,
    )  # fmt: skip


@triton.jit
def _finish_gradients(
    row_ptr, n_rows, e_ptr, state_ptr, beta_use_ptr, beta_ign_ptr, use_ptr, sums_ptr, t,
    T: tl.constexpr, C: tl.constexpr, J: tl.constexpr, H: tl.constexpr,
    BC: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr, EPS: tl.constexpr, SKM: tl.constexpr,
):  # fmt: skip
    """Sum a sample's rows, and go back through the E-step of iteration `t` and the M-step before it."""
    N: tl.constexpr = BJ * BH
    _, _, is_real = _columns(J, H, C, BJ, BH, BC)
    d_log_prior, sum_d_z, sum_d_z_z = _sum_programs(row_ptr, n_rows, C, BC, BJ, BH, BP)
    scale = tl.where(is_real, _load_rows(e_ptr, C, C, BC, N), 1.0).to(tl.float64)
    d_mean = tl.where(is_real, -scale * sum_d_z, 0.0)
    n_used, mean, scatter, total, bias, beta_use, beta_ign = _load_m_step(
        state_ptr, beta_use_ptr, beta_ign_ptr, t - 1, T, J, C, BC, BJ, BH
    )
    a_out, _, _, _, _, _, sig2_out = _m_step(n_used, mean, scatter, total, bias, beta_use, beta_ign, EPS)
    d_sig2_out = tl.zeros([BC, N], dtype=tl.float64)
    if not SKM:  # sum_d_z_z is the gradient of the scale times the scale
        d_sig2_out = tl.where(is_real, -0.5 * (d_log_prior[None, :] + sum_d_z_z) / sig2_out, 0.0)
    _use_gradient(
        d_log_prior * _sigmoid(-a_out), d_mean, d_sig2_out, tl.zeros([BC, N], dtype=tl.float64),
        n_used, mean, scatter, total, bias, beta_use, beta_ign, use_ptr, sums_ptr, C, BC, BJ, BH, EPS, True,
    )  # fmt: skip


@triton.jit
def _store_d_f(
    d_f_ptr, sums_ptr, i, n_inp, f, d_f, C: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """Add to the gradient of the scores' sigmoids; in the first iteration, which comes last, make it the scores'."""
    if ADD:
        d_f += tl.load(d_f_ptr + i, mask=i < n_inp, other=0.0)
    if FIRST:
        d_f = (d_f + tl.load(sums_ptr + (C + 2) * N).to(d_f.dtype)) * f * (1.0 - f)
    tl.store(d_f_ptr + i, d_f, mask=i < n_inp)


@triton.jit
def _through_softmax(
    R, d_D, d_f, D_use, d_R_ptr, i, n_inp, J: tl.constexpr, BJ: tl.constexpr, HAS_D_R: tl.constexpr
):  # fmt: skip
    """Return the gradient of the logits, `[BI,BJ]`, from those of `D = f R` and, if `R` is an output, of `R`."""
    d_logits = D_use * (d_D - d_f[:, None])
    if HAS_D_R:
        j = tl.arange(0, BJ)
        has_R = (i < n_inp)[:, None] & (j < J)[None, :]
        d_R = tl.load(d_R_ptr + i[:, None] * J + j[None, :], mask=has_R, other=0.0)
        d_logits += R * (d_R - tl.sum(R * d_R, axis=1)[:, None])
    return d_logits


@triton.jit
def _d_W_of_bias(centre_ptr, sums_ptr, start, C: tl.constexpr, D: tl.constexpr, N: tl.constexpr, BD: tl.constexpr):
    """Return what the gradient of `bias = centre W + B` adds to that of `W`, rows `start` to `start + BD`."""
    d = start + tl.arange(0, BD)
    d_W = tl.zeros([BD, N], dtype=centre_ptr.dtype.element_ty)
    for c in tl.static_range(C):
        centre = tl.load(centre_ptr + c * D + d, mask=d < D, other=0.0)
        d_W += centre[:, None] * tl.load(sums_ptr + c * N + tl.arange(0, N)).to(d_W.dtype)[None, :]
    return d_W


@triton.jit(do_not_specialize=["n_inp", "n_programs", "n_blocks_each", "t"])
def gradients_kernel(
    a_ptr, mu_ptr, centre_ptr, W_ptr, e_ptr, use_ptr, d_R_ptr, d_mu_ptr, d_f_ptr, d_W_ptr, partial_ptr, counter_ptr,
    state_ptr, beta_use_ptr, beta_ign_ptr, sums_ptr, n_inp, n_programs, n_blocks_each, t,
    T: tl.constexpr, C: tl.constexpr, D: tl.constexpr, J: tl.constexpr, H: tl.constexpr,
    BI: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr,
    EPS: tl.constexpr, SKM: tl.constexpr, PRECISION: tl.constexpr,
    FIRST: tl.constexpr, ADD: tl.constexpr, HAS_D_R: tl.constexpr,
):  # fmt: skip
    """Go back through an iteration and the M-step before it, which leaves the `use` of the iteration before.

    This writes the gradients of the inputs and of their scores' sigmoids, and each program's part of the gradient of
    `W`. With `ADD`, it adds to them. In the first iteration the gradient of the sigmoids becomes that of the scores.
    """
    N: tl.constexpr = BJ * BH
    ROWS: tl.constexpr = 1 + 2 * C
    ONE_CHUNK: tl.constexpr = D <= BD
    program = tl.program_id(0)
    sample = (program // n_programs).to(tl.int64)
    first = (program % n_programs) * n_blocks_each
    a_ptr += sample * n_inp
    d_f_ptr += sample * n_inp
    mu_ptr += sample * n_inp * (C * D)
    d_mu_ptr += sample * n_inp * (C * D)
    d_R_ptr += sample * n_inp * J
    centre_ptr += sample * (C * D)
    e_ptr += (sample * (T - 1) + t - 1) * ((2 * C + 1) * N)
    use_ptr += sample * ((3 * C + 1) * N)
    sums_ptr += sample * ((C + 3) * N)
    d_W_ptr += program.to(tl.int64) * (D * N)
    dtype = mu_ptr.dtype.element_ty
    row, jj, d = tl.arange(0, BI * BC), tl.arange(0, BJ), tl.arange(0, BD)
    n = tl.arange(0, N)

    d_log_prior = tl.zeros([BJ], dtype=dtype)
    sum_d_z, sum_d_z_z = tl.zeros([BC, N], dtype=dtype), tl.zeros([BC, N], dtype=dtype)
    d_W = tl.zeros([BD, N], dtype=dtype)
    for block in range(first, tl.minimum(first + n_blocks_each, tl.cdiv(n_inp, BI))):
        i = block * BI + tl.arange(0, BI)
        f = _load_f(a_ptr, block, n_inp, BI)
        has_row = (row % BC < C) & (block * BI + row // BC < n_inp)
        at_row = (block * BI + row // BC) * C + row % BC
        if ONE_CHUNK:  # all that is read of the inputs is read at once, so the GPU waits only once
            has_x = has_row[:, None] & (d < D)[None, :]
            x = _load_x(mu_ptr, centre_ptr, block, n_inp, 0, C, D, BI, BC, BD)
            d_x = tl.zeros([BI * BC, BD], dtype=dtype)
            if ADD:
                d_x = tl.load(d_mu_ptr + at_row[:, None] * D + d[None, :], mask=has_x, other=0.0)
            u = tl.dot(x, _load_W(W_ptr, 0, N, BD), input_precision=PRECISION, out_dtype=dtype)
            u = tl.reshape(u, [BI, BC, N])
        else:
            u = _votes(mu_ptr, centre_ptr, W_ptr, block, n_inp, C, D, N, BI, BC, BD, PRECISION)
        # Numbers of a column are loaded where they are used: held from block to block, they would not fit in registers.
        use_mean = _load_rows(use_ptr, 2 * C, C, BC, N)
        linear = _load_rows(use_ptr, 0, C, BC, N)
        square = _load_rows(use_ptr, C, C, BC, N)
        v = u - use_mean[None, :, :]
        constant = tl.load(use_ptr + 3 * C * N + jj, mask=jj < J, other=0.0)
        d_D = constant[None, :] + _sum_planes(v * (linear[None, :, :] + square[None, :, :] * v), BI, BC, BJ, BH)
        d_u = linear[None, :, :] + 2.0 * square[None, :, :] * v
        if FIRST:
            z = u
        else:
            e_mean = _load_rows(e_ptr, 0, C, BC, N)
            scale = _load_rows(e_ptr, C, C, BC, N)
            z = (u - e_mean[None, :, :]) * scale[None, :, :]
        R = _probabilities(_sum_planes(z * z, BI, BC, BJ, BH), e_ptr + 2 * C * N, J, BI, BJ, FIRST)

        # Back through D = f R and R = softmax(logits), to u by way of the M-step and of the E-step
        D_use = f[:, None] * R
        d_f = tl.sum(R * d_D, axis=1)
        d_u *= _per_input(D_use, BI, BC, BJ, BH)
        if not FIRST:
            d_logits = _through_softmax(R, d_D, d_f, D_use, d_R_ptr, i, n_inp, J, BJ, HAS_D_R)
            d_log_prior += tl.sum(d_logits, axis=0)
            d_z = -2.0 * z * _per_input(d_logits, BI, BC, BJ, BH)
            sum_d_z += tl.sum(d_z, axis=0)
            sum_d_z_z += tl.sum(d_z * z, axis=0)
            d_u += scale[None, :, :] * d_z
        _store_d_f(d_f_ptr, sums_ptr, i, n_inp, f, d_f, C, N, FIRST, ADD)

        d_u = tl.reshape(d_u, [BI * BC, N])
        if ONE_CHUNK:
            W = tl.trans(_load_W(W_ptr, 0, N, BD))
            d_x = tl.dot(d_u, W, acc=d_x, input_precision=PRECISION, out_dtype=dtype)
            tl.store(d_mu_ptr + at_row[:, None] * D + d[None, :], d_x, mask=has_x)
            d_W = tl.dot(tl.trans(x), d_u, acc=d_W, input_precision=PRECISION, out_dtype=dtype)
        else:
            for start in range(0, D, BD):
                of_x = tl.dot(d_u, tl.trans(_load_W(W_ptr, start, N, BD)), input_precision=PRECISION, out_dtype=dtype)
                at_x = d_mu_ptr + at_row[:, None] * D + (start + d)[None, :]
                has_of_x = has_row[:, None] & (start + d < D)[None, :]
                if ADD:
                    of_x += tl.load(at_x, mask=has_of_x, other=0.0)
                tl.store(at_x, of_x, mask=has_of_x)
                of_inputs = _load_x(mu_ptr, centre_ptr, block, n_inp, start, C, D, BI, BC, BD)
                of_W = tl.dot(tl.trans(of_inputs), d_u, input_precision=PRECISION, out_dtype=dtype)
                at_W = d_W_ptr + (start + d)[:, None] * N + n[None, :]
                has_W = (start + d < D)[:, None]
                if ADD or block > first:
                    of_W += tl.load(at_W, mask=has_W, other=0.0)
                tl.store(at_W, of_W, mask=has_W)
        if not ONE_CHUNK:
            tl.debug_barrier()  # the next block adds to the same rows of d_W

    if FIRST:
        with_bias = program % n_programs == 0  # once for each sample
        if ONE_CHUNK:
            if with_bias:
                d_W += _d_W_of_bias(centre_ptr, sums_ptr, 0, C, D, N, BD)
        elif with_bias:
            for start in range(0, D, BD):
                at_W = d_W_ptr + (start + d)[:, None] * N + n[None, :]
                has_W = (start + d < D)[:, None]
                of_bias = _d_W_of_bias(centre_ptr, sums_ptr, start, C, D, N, BD)
                tl.store(at_W, of_bias + tl.load(at_W, mask=has_W, other=0.0), mask=has_W)
    if ONE_CHUNK:
        at_W = d_W_ptr + d[:, None] * N + n[None, :]
        if ADD:
            d_W += tl.load(at_W, mask=(d < D)[:, None], other=0.0)
        tl.store(at_W, d_W, mask=(d < D)[:, None])

    if not FIRST:
        row_ptr = partial_ptr + program.to(tl.int64) * (ROWS * N)
        tl.store(row_ptr + jj, d_log_prior)
        _store_rows(row_ptr, 1, sum_d_z, C, BC, N)
        _store_rows(row_ptr, 1 + C, sum_d_z_z, C, BC, N)
        if _is_last(counter_ptr + sample, n_programs):
            _finish_gradients(
                partial_ptr + sample * n_programs * (ROWS * N), n_programs, e_ptr,
                state_ptr + sample * ((T * ROWS + C + 1) * N), beta_use_ptr, beta_ign_ptr, use_ptr, sums_ptr, t,
                T, C, J, H, BC, BJ, BH, BP, EPS, SKM,
            )  # fmt: skip


@triton.jit
def _add_4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit(do_not_specialize=["n_inp", "n_programs", "n_blocks_each", "t"])
def narrow_gradients_kernel(
    a_ptr, mu_ptr, centre_ptr, W_ptr, e_ptr, use_ptr, d_R_ptr, d_mu_ptr, d_f_ptr, d_W_ptr, partial_ptr, counter_ptr,
    state_ptr, beta_use_ptr, beta_ign_ptr, sums_ptr, n_inp, n_programs, n_blocks_each, t,
    T: tl.constexpr, C: tl.constexpr, D: tl.constexpr, J: tl.constexpr, H: tl.constexpr,
    BI: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr, BP: tl.constexpr,
    EPS: tl.constexpr, SKM: tl.constexpr, PRECISION: tl.constexpr,
    FIRST: tl.constexpr, ADD: tl.constexpr, HAS_D_R: tl.constexpr,
):  # fmt: skip
    """Go back as `gradients_kernel` does. Each of a block's `BI` inputs has rows of its own in `partial` and `d_W`."""
    N: tl.constexpr = BJ * BH
    ROWS: tl.constexpr = 1 + 2 * C
    program = tl.program_id(0)
    sample = (program // n_programs).to(tl.int64)
    first = (program % n_programs) * n_blocks_each
    a_ptr += sample * n_inp
    d_f_ptr += sample * n_inp
    mu_ptr += sample * n_inp * (C * D)
    d_mu_ptr += sample * n_inp * (C * D)
    d_R_ptr += sample * n_inp * J
    centre_ptr += sample * (C * D)
    e_ptr += (sample * (T - 1) + t - 1) * ((2 * C + 1) * N)
    use_ptr += sample * ((3 * C + 1) * N)
    sums_ptr += sample * ((C + 3) * N)
    dtype = mu_ptr.dtype.element_ty
    j = tl.arange(0, BJ)

    d_log_prior = tl.zeros([BI, BJ], dtype=dtype)
    sum_d_z, sum_d_z_z = _zero_planes(C * H, BI, BJ, dtype), _zero_planes(C * H, BI, BJ, dtype)
    d_W = _zero_planes(D * H, BI, BJ, dtype)
    for block in range(first, tl.minimum(first + n_blocks_each, tl.cdiv(n_inp, BI))):
        i = block * BI + tl.arange(0, BI)
        f = _load_f(a_ptr, block, n_inp, BI)
        x, W = _narrow_inputs(mu_ptr, centre_ptr, i, n_inp, C, D, BJ), _narrow_weights(W_ptr, D, H, BI, BJ, BH)
        u = _narrow_votes(x, W, C, D, H)
        d_D = tl.broadcast_to(tl.load(use_ptr + 3 * C * N + j, mask=j < J, other=0.0)[None, :], [BI, BJ])
        energy = tl.zeros([BI, BJ], dtype=dtype)
        for p in tl.static_range(C * H):
            v = u[p] - _of_plane(use_ptr, 2 * C + p // H, p % H, BI, BJ, BH)
            d_D += v * (
                _of_plane(use_ptr, p // H, p % H, BI, BJ, BH) + _of_plane(use_ptr, C + p // H, p % H, BI, BJ, BH) * v
            )
            if not FIRST:
                z = u[p] - _of_plane(e_ptr, p // H, p % H, BI, BJ, BH)
                z *= _of_plane(e_ptr, C + p // H, p % H, BI, BJ, BH)
                energy += z * z
        R = _probabilities(energy, e_ptr + 2 * C * N, J, BI, BJ, FIRST)
        D_use = f[:, None] * R
        d_f = tl.sum(R * d_D, axis=1)
        if FIRST:
            d_logits = energy
        else:
            d_logits = _through_softmax(R, d_D, d_f, D_use, d_R_ptr, i, n_inp, J, BJ, HAS_D_R)
            d_log_prior += d_logits
        _store_d_f(d_f_ptr, sums_ptr, i, n_inp, f, d_f, C, N, FIRST, ADD)

        new_sum, new_sum_z, d_u = (), (), ()
        for p in tl.static_range(C * H):
            v = u[p] - _of_plane(use_ptr, 2 * C + p // H, p % H, BI, BJ, BH)
            linear, square = (
                _of_plane(use_ptr, p // H, p % H, BI, BJ, BH),
                _of_plane(use_ptr, C + p // H, p % H, BI, BJ, BH),
            )
            plane = D_use * (linear + 2.0 * square * v)
            if not FIRST:
                scale = _of_plane(e_ptr, C + p // H, p % H, BI, BJ, BH)
                z = (u[p] - _of_plane(e_ptr, p // H, p % H, BI, BJ, BH)) * scale
                d_z = -2.0 * z * d_logits
                new_sum = new_sum + (sum_d_z[p] + d_z,)  # noqa: RUF005
                new_sum_z = new_sum_z + (sum_d_z_z[p] + d_z * z,)  # noqa: RUF005
                plane += scale * d_z
            d_u = d_u + (plane,)  # noqa: RUF005
        if not FIRST:
            sum_d_z, sum_d_z_z = new_sum, new_sum_z

        new_d_W = ()
        for q in tl.static_range(D * H):
            of_W = d_W[q]
            for c in tl.static_range(C):
                of_W += x[c * D + q // H] * d_u[c * H + q % H]
            new_d_W = new_d_W + (of_W,)  # noqa: RUF005
        d_W = new_d_W
        for c in tl.static_range(C):
            for start in tl.static_range(0, D, 4):  # four sums over outputs at a time share their barriers
                of_x = _zero_planes(4, BI, BJ, dtype)
                products = ()
                for k in tl.static_range(4):
                    of_column = of_x[k]
                    if start + k < D:
                        for h in tl.static_range(H):
                            of_column += d_u[c * H + h] * W[(start + k) * H + h]
                    products = products + (of_column,)  # noqa: RUF005
                d_x = tl.reduce((products[0], products[1], products[2], products[3]), 1, _add_4)
                for k in tl.static_range(4):
                    if start + k < D:
                        at_x = d_mu_ptr + (i * C + c) * D + start + k
                        of_column = d_x[k]
                        if ADD:
                            of_column += tl.load(at_x, mask=i < n_inp, other=0.0)
                        tl.store(at_x, of_column, mask=i < n_inp)

    lane = tl.arange(0, BI)
    d_W_ptr += (program.to(tl.int64) * BI + lane[:, None]) * (D * N) + j[None, :] * BH
    for q in tl.static_range(D * H):
        at_W = d_W_ptr + (q // H) * N + q % H
        of_W = d_W[q]
        if ADD:
            of_W += tl.load(at_W)
        if FIRST:
            # bias = centre W + B, once for each sample
            of_bias = tl.zeros([BI, BJ], dtype=dtype)
            for c in tl.static_range(C):
                d_bias = _of_plane(sums_ptr, c, q % H, BI, BJ, BH).to(dtype)
                of_bias += tl.load(centre_ptr + c * D + q // H) * d_bias
            of_W += tl.where((program % n_programs == 0) & (lane == 0)[:, None], of_bias, 0.0)
        tl.store(at_W, of_W)

    if not FIRST:
        row = program.to(tl.int64) * BI + lane
        at = partial_ptr + row[:, None] * (ROWS * N) + j[None, :]
        tl.store(at, d_log_prior)
        at += j[None, :] * (BH - 1)
        for p in tl.static_range(C * H):
            tl.store(at + (1 + p // H) * N + p % H, sum_d_z[p])
            tl.store(at + (1 + C + p // H) * N + p % H, sum_d_z_z[p])
        if _is_last(counter_ptr + sample, n_programs):
            _finish_gradients(
                partial_ptr + sample * n_programs * (BI * ROWS * N), n_programs * BI, e_ptr,
                state_ptr + sample * ((T * ROWS + C + 1) * N), beta_use_ptr, beta_ign_ptr, use_ptr, sums_ptr, t,
                T, C, J, H, BC, BJ, BH, BP, EPS, SKM,
            )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "n_samples"])
def parameters_kernel(
    d_W_ptr, sums_ptr, W_ptr, B_ptr, beta_use_ptr, beta_ign_ptr, n_rows, n_samples,
    C: tl.constexpr, D: tl.constexpr, J: tl.constexpr, H: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr,
    BLOCK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the parameters: sums over programs, or samples, in float64."""
    N: tl.constexpr = BJ * BH
    N_BLOCKS: tl.constexpr = (D * N + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    p = tl.arange(0, BP)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    if program < N_BLOCKS:
        x = program * BLOCK + tl.arange(0, BLOCK)
        for start in range(0, n_rows, BP):
            mask = (start + p < n_rows)[:, None] & (x < D * N)[None, :]
            at = d_W_ptr + (start + p).to(tl.int64)[:, None] * (D * N) + x[None, :]
            total += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float64), axis=0)
        d, j, h = x // N, x % N // BH, x % BH
        has = (x < D * N) & (j < J) & (h < H)
        tl.store(W_ptr + (j * D + d) * H + h, total.to(W_ptr.dtype.element_ty), mask=has)
    else:
        x = (program - N_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        for start in range(0, n_samples, BP):
            mask = (start + p < n_samples)[:, None] & (x < (C + 2) * N)[None, :]
            at = sums_ptr + (start + p).to(tl.int64)[:, None] * ((C + 3) * N) + x[None, :]
            total += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
        row, n = x // N, x % N
        j, h = n // BH, n % BH
        of = total.to(B_ptr.dtype.element_ty)
        tl.store(B_ptr + (j * C + row) * H + h, of, mask=(row < C) & (j < J) & (h < H))
        tl.store(beta_use_ptr + n, of, mask=(row == C) & (n < J))
        tl.store(beta_ign_ptr + n, of, mask=(row == C + 1) & (n < J))


# ---------------------------------------------------------------------------------------------------------------------
# Weights of each input's own: inputs are few, and one program has all inputs of a sample and keeps their votes
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _own_places(
    J: tl.constexpr, H: tl.constexpr, C: tl.constexpr, N_INP: tl.constexpr,
    BI: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Return the indices of the votes `[BI,BC,N]` in `[i,j,c,h]`, and which of them are real."""
    j, h, is_real = _columns(J, H, C, BJ, BH, BC)
    i, c = tl.arange(0, BI), tl.arange(0, BC)
    at = ((i[:, None, None] * J + j[None, None, :]) * C + c[None, :, None]) * H + h[None, None, :]
    return at, is_real[None, :, :] & (i < N_INP)[:, None, None]


@triton.jit
def _own_votes(
    mu_ptr, W_ptr, B_ptr, OWN_W: tl.constexpr, OWN_B: tl.constexpr,
    N_INP: tl.constexpr, C: tl.constexpr, D: tl.constexpr, J: tl.constexpr, H: tl.constexpr,
    BI: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Make the votes, `[BI,BC,N]`, zero where they are not real. A parameter is of each input's own, or shared."""
    j, h, _ = _columns(J, H, C, BJ, BH, BC)
    i, c = tl.arange(0, BI), tl.arange(0, BC)
    at, has = _own_places(J, H, C, N_INP, BI, BC, BJ, BH)
    V = tl.load(B_ptr + (at if OWN_B else at - i[:, None, None] * (J * C * H)), mask=has, other=0.0)
    has_i = (i < N_INP)[:, None]
    for d in range(D):
        mu = tl.load(mu_ptr + (i[:, None] * C + c[None, :]) * D + d, mask=has_i & (c < C)[None, :], other=0.0)
        at_W = (i[:, None] * (J * OWN_W) + j[None, :]) * (D * H) + d * H + h[None, :]
        W = tl.load(W_ptr + at_W, mask=has_i & ((j < J) & (h < H))[None, :], other=0.0)
        V += mu[:, :, None] * W[:, None, :]
    return V


@triton.jit
def _own_probabilities(
    V, a_out, mu, sig2, J: tl.constexpr, H: tl.constexpr, C: tl.constexpr, SKM: tl.constexpr,
    BI: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Do the E-step: `R [BI,BJ]`, 0 beyond the last output."""
    _, _, is_real = _columns(J, H, C, BJ, BH, BC)
    distance = V - mu[None, :, :]
    logits = tl.minimum(a_out, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(a_out)))
    if SKM:
        logits = logits[None, :] - _sum_planes(distance * distance, BI, BC, BJ, BH)
    else:
        log_sigma = tl.where(is_real, 0.5 * tl.log(sig2), 0.0)
        logits -= tl.sum(_sum_planes(log_sigma[None, :, :], 1, BC, BJ, BH), axis=0)
        logits = logits[None, :] - _sum_planes(distance * distance / (2.0 * sig2)[None, :, :], BI, BC, BJ, BH)
    logits = tl.where((tl.arange(0, BJ) < J)[None, :], logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _own_betas(
    beta_use_ptr, beta_ign_ptr, OWN_USE: tl.constexpr, OWN_IGN: tl.constexpr, N_INP: tl.constexpr, J: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Load both betas, `[BI,BJ]`."""
    i, j = tl.arange(0, BI)[:, None], tl.arange(0, BJ)[None, :]
    has = (i < N_INP) & (j < J)
    beta_use = tl.load(beta_use_ptr + i * (J * OWN_USE) + j, mask=has, other=0.0)
    return beta_use, tl.load(beta_ign_ptr + i * (J * OWN_IGN) + j, mask=has, other=0.0)


@triton.jit
def own_forward_kernel(
    a_ptr, mu_ptr, W_ptr, B_ptr, beta_use_ptr, beta_ign_ptr, state_ptr, a_out_ptr, mu_out_ptr, sig2_out_ptr, R_ptr,
    N_INP: tl.constexpr, C: tl.constexpr, D: tl.constexpr, J: tl.constexpr, H: tl.constexpr,
    BI: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr,
    OWN_W: tl.constexpr, OWN_B: tl.constexpr, OWN_USE: tl.constexpr, OWN_IGN: tl.constexpr,
    T: tl.constexpr, EPS: tl.constexpr, SKM: tl.constexpr, HAS_R: tl.constexpr,
):  # fmt: skip
    """Route a sample as the literal loop does; `state` keeps `a_out`, `mu` and `sig2` of every iteration."""
    N: tl.constexpr = BJ * BH
    sample = tl.program_id(0).to(tl.int64)
    state_ptr += sample * (T * (1 + 2 * C) * N)
    i, jj = tl.arange(0, BI), tl.arange(0, BJ)
    j, h, is_real = _columns(J, H, C, BJ, BH, BC)
    f = _sigmoid(tl.load(a_ptr + sample * N_INP + i, mask=i < N_INP, other=float("-inf")))
    V = _own_votes(mu_ptr + sample * (N_INP * C * D), W_ptr, B_ptr, OWN_W, OWN_B, N_INP, C, D, J, H, BI, BC, BJ, BH)
    beta_use, beta_ign = _own_betas(beta_use_ptr, beta_ign_ptr, OWN_USE, OWN_IGN, N_INP, J, BI, BJ)
    R = tl.broadcast_to((tl.where(jj < J, 1.0, 0.0).to(V.dtype) / J)[None, :], [BI, BJ])
    for t in range(T):
        if HAS_R:  # the R of the last iteration stays
            at_R = R_ptr + (sample * N_INP + i)[:, None] * J + jj[None, :]
            tl.store(at_R, R, mask=(i < N_INP)[:, None] & (jj < J)[None, :])
        D_use = f[:, None] * R
        a_out = tl.sum(beta_use * D_use - beta_ign * (f[:, None] - D_use), axis=0)
        weights = _per_input(D_use, BI, BC, BJ, BH)
        count = tl.max(tl.sum(weights, axis=0), axis=0) + EPS  # [N], the same for each c
        mu = tl.sum(weights * V, axis=0) / count[None, :]
        distance = V - mu[None, :, :]
        sig2 = tl.sum(weights * distance * distance, axis=0) / count[None, :] + EPS
        tl.store(state_ptr + jj, a_out)
        _store_rows(state_ptr, 1, mu, C, BC, N)
        _store_rows(state_ptr, 1 + C, sig2, C, BC, N)
        state_ptr += (1 + 2 * C) * N
        at_out = sample * (J * C * H) + (j * C * H + h)[None, :] + tl.arange(0, BC)[:, None] * H
        if t == T - 1:
            tl.store(a_out_ptr + sample * J + jj, a_out, mask=jj < J)
            tl.store(mu_out_ptr + at_out, mu, mask=is_real)
            tl.store(sig2_out_ptr + at_out, sig2, mask=is_real)
        R = _own_probabilities(V, a_out, mu, sig2, J, H, C, SKM, BI, BC, BJ, BH)


@triton.jit
def own_backward_kernel(
    d_a_out_ptr, d_mu_out_ptr, d_sig2_out_ptr, d_R_ptr, a_ptr, mu_ptr, W_ptr, B_ptr, beta_use_ptr, beta_ign_ptr,
    state_ptr, d_a_ptr, d_mu_ptr, parts_ptr,
    N_INP: tl.constexpr, C: tl.constexpr, D: tl.constexpr, J: tl.constexpr, H: tl.constexpr,
    BI: tl.constexpr, BC: tl.constexpr, BJ: tl.constexpr, BH: tl.constexpr,
    OWN_W: tl.constexpr, OWN_B: tl.constexpr, OWN_USE: tl.constexpr, OWN_IGN: tl.constexpr,
    T: tl.constexpr, EPS: tl.constexpr, SKM: tl.constexpr,
    HAS_A: tl.constexpr, HAS_MU: tl.constexpr, HAS_SIG2: tl.constexpr, HAS_D_R: tl.constexpr,
):  # fmt: skip
    """Go back through all iterations of a sample, and write its part of each parameter's gradient to `parts`."""
    N: tl.constexpr = BJ * BH
    sample = tl.program_id(0).to(tl.int64)
    state_ptr += sample * (T * (1 + 2 * C) * N)
    i, jj, c = tl.arange(0, BI), tl.arange(0, BJ), tl.arange(0, BC)
    j, h, is_real = _columns(J, H, C, BJ, BH, BC)
    mu_ptr += sample * (N_INP * C * D)
    f = _sigmoid(tl.load(a_ptr + sample * N_INP + i, mask=i < N_INP, other=float("-inf")))
    V = _own_votes(mu_ptr, W_ptr, B_ptr, OWN_W, OWN_B, N_INP, C, D, J, H, BI, BC, BJ, BH)
    beta_use, beta_ign = _own_betas(beta_use_ptr, beta_ign_ptr, OWN_USE, OWN_IGN, N_INP, J, BI, BJ)
    uniform = (tl.where(jj < J, 1.0, 0.0).to(V.dtype) / J)[None, :]

    at_out = sample * (J * C * H) + (j * C * H + h)[None, :] + c[:, None] * H
    d_a_out = tl.zeros([BJ], dtype=V.dtype)
    d_mu, d_sig2 = tl.zeros([BC, N], dtype=V.dtype), tl.zeros([BC, N], dtype=V.dtype)
    d_R = tl.zeros([BI, BJ], dtype=V.dtype)
    has_R = (i < N_INP)[:, None] & (jj < J)[None, :]
    if HAS_A:
        d_a_out += tl.load(d_a_out_ptr + sample * J + jj, mask=jj < J, other=0.0)
    if HAS_MU:
        d_mu += tl.load(d_mu_out_ptr + at_out, mask=is_real, other=0.0)
    if HAS_SIG2:
        d_sig2 += tl.load(d_sig2_out_ptr + at_out, mask=is_real, other=0.0)
    if HAS_D_R:
        d_R += tl.load(d_R_ptr + (sample * N_INP + i)[:, None] * J + jj[None, :], mask=has_R, other=0.0)

    d_V = tl.zeros([BI, BC, N], dtype=V.dtype)
    d_f = tl.zeros([BI], dtype=V.dtype)
    d_beta_use, d_beta_ign = tl.zeros([BI, BJ], dtype=V.dtype), tl.zeros([BI, BJ], dtype=V.dtype)
    for back in range(T):
        t = T - 1 - back
        own_ptr = state_ptr + t * ((1 + 2 * C) * N)
        before_ptr = state_ptr + tl.maximum(t - 1, 0) * ((1 + 2 * C) * N)
        mu, sig2 = _load_rows(own_ptr, 1, C, BC, N), _load_rows(own_ptr, 1 + C, C, BC, N)
        a_before = tl.load(before_ptr + jj)
        mu_before = _load_rows(before_ptr, 1, C, BC, N)
        sig2_before = tl.where(is_real, _load_rows(before_ptr, 1 + C, C, BC, N), 1.0)
        R = _own_probabilities(V, a_before, mu_before, sig2_before, J, H, C, SKM, BI, BC, BJ, BH)
        R = tl.where(t > 0, R, uniform)

        # The M-step. The scatter is about the mean, so moving the mean changes it only by a term with eps.
        D_use = f[:, None] * R
        weights = _per_input(D_use, BI, BC, BJ, BH)
        count = tl.max(tl.sum(weights, axis=0), axis=0) + EPS
        square = d_sig2 / count[None, :]
        linear = (d_mu - 2.0 * square * EPS * mu) / count[None, :]
        distance = V - mu[None, :, :]
        slope = linear[None, :, :] + square[None, :, :] * distance
        of_vote = distance * slope - (square * tl.where(is_real, sig2 - EPS, 0.0))[None, :, :]
        d_D = (beta_use + beta_ign) * d_a_out[None, :] + _sum_planes(of_vote, BI, BC, BJ, BH)
        d_V += weights * (slope + square[None, :, :] * distance)
        d_f += tl.sum(R * d_D - beta_ign * d_a_out[None, :], axis=1)
        d_beta_use += d_a_out[None, :] * D_use
        d_beta_ign += d_a_out[None, :] * (D_use - f[:, None])

        # The E-step, which the first iteration does not have
        d_probability = f[:, None] * d_D + d_R
        d_logits = R * (d_probability - tl.sum(R * d_probability, axis=1)[:, None])
        d_logits = tl.where(t > 0, d_logits, 0.0)
        d_R = tl.zeros([BI, BJ], dtype=V.dtype)  # only the R of the last iteration is an output
        of_distance = _per_input(d_logits, BI, BC, BJ, BH)
        distance = V - mu_before[None, :, :]
        if SKM:
            of_mean = 2.0 * of_distance * distance
            d_sig2 = tl.zeros([BC, N], dtype=V.dtype)
        else:
            of_mean = of_distance * distance / sig2_before[None, :, :]
            of_variance = tl.sum(of_mean * distance, axis=0) - tl.sum(of_distance, axis=0)
            d_sig2 = tl.where(is_real, 0.5 * of_variance / sig2_before, 0.0)
        d_V -= of_mean
        d_mu = tl.sum(of_mean, axis=0)
        d_a_out = tl.sum(d_logits, axis=0) * _sigmoid(-a_before)

    tl.store(d_a_ptr + sample * N_INP + i, d_f * f * (1.0 - f), mask=i < N_INP)
    parts_ptr += sample * (N_INP * J * (D * H + C * H + 2))
    has_i = (i < N_INP)[:, None]
    for d in range(D):
        at_mu = (i[:, None] * C + c[None, :]) * D + d
        has_mu = has_i & (c < C)[None, :]
        at_W = (i[:, None] * J + j[None, :]) * (D * H) + d * H + h[None, :]
        has_W = has_i & ((j < J) & (h < H))[None, :]
        mu = tl.load(mu_ptr + at_mu, mask=has_mu, other=0.0)
        tl.store(parts_ptr + at_W, tl.sum(mu[:, :, None] * d_V, axis=1), mask=has_W)
        W = tl.load(W_ptr + at_W - (0 if OWN_W else i[:, None] * (J * D * H)), mask=has_W, other=0.0)
        tl.store(d_mu_ptr + sample * (N_INP * C * D) + at_mu, tl.sum(d_V * W[:, None, :], axis=2), mask=has_mu)
    at, has = _own_places(J, H, C, N_INP, BI, BC, BJ, BH)
    tl.store(parts_ptr + N_INP * J * D * H + at, d_V, mask=has)
    at_beta = parts_ptr + N_INP * J * (D * H + C * H) + i[:, None] * J + jj[None, :]
    tl.store(at_beta, d_beta_use, mask=has_R)
    tl.store(at_beta + N_INP * J, d_beta_ign, mask=has_R)


@triton.jit(do_not_specialize=["n_samples", "n_of_W", "n_of_B", "n_of_beta"])
def sum_kernel(
    parts_ptr, W_ptr, B_ptr, beta_use_ptr, beta_ign_ptr, n_samples, n_of_W, n_of_B, n_of_beta,
    BLOCK: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Sum the samples' parts of the parameters' gradients, in float64."""
    x, p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BP)
    n_numbers = n_of_W + n_of_B + 2 * n_of_beta
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, n_samples, BP):
        mask = (start + p < n_samples)[:, None] & (x < n_numbers)[None, :]
        at = parts_ptr + (start + p).to(tl.int64)[:, None] * n_numbers + x[None, :]
        total += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float64), axis=0)
    of = total.to(W_ptr.dtype.element_ty)
    tl.store(W_ptr + x, of, mask=x < n_of_W)
    x -= n_of_W
    tl.store(B_ptr + x, of, mask=(x >= 0) & (x < n_of_B))
    x -= n_of_B
    tl.store(beta_use_ptr + x, of, mask=(x >= 0) & (x < n_of_beta))
    x -= n_of_beta
    tl.store(beta_ign_ptr + x, of, mask=(x >= 0) & (x < n_of_beta))
