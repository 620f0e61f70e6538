"""The routing operation: pure functions of tensors, without parameters.

`route` checks its inputs, settles the dtype and calls a strategy. All strategies compute the same function, up to
rounding: in float32, with at most about the errors of the literal loop, and far smaller ones on inputs that are hard.

| strategy    | what it is                                | serves                                                   |
| ----------- | ----------------------------------------- | -------------------------------------------------------- |
| `reference` | the literal loop of the paper             | everything                                               |
| `moments`   | second moments of narrow inputs, streamed | weights shared by all inputs; CPU and CUDA               |
| `votes`     | planes of votes, streamed                 | weights shared by all inputs; CPU and CUDA               |
| `numba`     | fused kernels that stream                 | weights shared by all inputs; CPU, with numba installed  |
| `cuda`      | fused kernels that stream; the steps      | moderate sizes; CUDA, with Triton installed              |
|             | between two passes happen in the first    |                                                          |

`strategy="auto"` takes the first line of this table that holds:

| where                                                                                          | it takes    |
| ---------------------------------------------------------------------------------------------- | ----------- |
| `torch.export`, also for ONNX: the others are operators of this package, which nothing else has | `reference` |
| on CUDA, the kernels serve the sizes, and no process has but a share of the inputs               | `cuda`      |
| a parameter differs by input (`Routing` with `n_inp`), or the device is neither CPU nor CUDA     | `reference` |
| on the CPU, fewer than `SMALL` numbers in all votes: the loop is done before a pass is set up  | `reference` |
| on the CPU, and numba is installed: `pip install "capsule-heads[cpu]"`                           | `numba`     |
| float32, and `d_cov d_inp (d_inp + 3) / 2 + 1 <= 8 d_cov d_out`: the inputs have few moments   | `moments`   |
| otherwise (`moments` would cost float64 inputs digits)                                         | `votes`     |

A strategy asked for by name that does not serve the shapes raises an error. Second derivatives:
`reference` only, the others raise a `NotImplementedError`.

All but `reference` and `cuda` route one input that is split over processes: see `group` in `route`. "auto" then takes
what it takes for many votes elsewhere, as shares may differ in size.
"""

from __future__ import annotations

import functools
import importlib.util
import math

import torch
import torch.distributed as dist
from torch import Tensor

from .autograd import n_votes, route_in_passes
from .reference import route_reference


def _route_cuda(*tensors: Tensor, **options) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    from .cuda import route_cuda  # only here: not everyone has Triton

    return route_cuda(*tensors, **options)


STRATEGIES = {
    "reference": route_reference,
    **{name: functools.partial(route_in_passes, name) for name in ("moments", "votes", "numba")},
    "cuda": _route_cuda,
}
P_MODELS = ("gaussian", "skm")
SMALL = 250_000  # numbers in all votes, [...ijch]

__all__ = ["P_MODELS", "STRATEGIES", "check_routing_options", "route"]


def check_routing_options(*, n_iters: int, p_model: str, eps: float, strategy: str) -> None:
    """Checks the options that routing has beside its tensors.

    Raises:
        ValueError: naming the option, what was given and what was expected.
    """
    if isinstance(n_iters, bool) or not isinstance(n_iters, int) or n_iters < 1:
        raise ValueError(
            f"n_iters is {n_iters!r}; expected a whole number of iterations, 1 or more (the paper uses 3)."
        )
    if p_model not in P_MODELS:
        raise ValueError(f'p_model is {p_model!r}; expected "gaussian" or "skm" (soft k-means).')
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps!r}; expected a positive number, such as 1e-5: it keeps variances above zero.")
    if strategy not in ("auto", *STRATEGIES):
        raise ValueError(f"strategy is {strategy!r}; expected one of {', '.join(['auto', *STRATEGIES])}.")


def route(
    a_inp: Tensor,
    mu_inp: Tensor,
    W: Tensor,
    B: Tensor,
    beta_use: Tensor,
    beta_ign: Tensor,
    *,
    n_out: int,
    n_iters: int = 3,
    p_model: str = "gaussian",
    eps: float = 1e-5,
    return_R: bool = False,
    strategy: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, ...]:
    """Routes input capsules to output capsules (Heinsen, 2019, arXiv 1911.00792, section 3).

    It computes in float32, or float64 where an argument is float64, whatever autocast says and also where all arguments
    are half precision: variances near `eps` do not survive less. In the shapes, `i` counts inputs, `j` outputs, `c`
    rows of a capsule, `d` columns of an input capsule, `h` columns of an output capsule; `...` is any number of batch
    dimensions, also none. A parameter's dimension of size 1 is shared by all inputs, or all outputs.

    Args:
        a_inp: `[...i]`, input scores, as logits. `-inf` masks an input: it then changes nothing.
        mu_inp: `[...icd]`, input capsules.
        W: `[i or 1, j or 1, d, h]`, the linear part of the votes `V_ij = mu_inp_i W_ij + B_ij`.
        B: `[i or 1, j or 1, c, h]`, their constant part.
        beta_use: `[i or 1, j or 1]`, net benefit of using a unit of data.
        beta_ign: `[i or 1, j or 1]`, net cost of ignoring one.
        n_out: number of output capsules.
        n_iters: number of iterations.
        p_model: "gaussian", a mixture of Gaussians, or "skm", soft k-means.
        eps: added to counts of data and to variances.
        return_R: whether to return the routing probabilities too.
        strategy: "auto" or one of `STRATEGIES`.
        group: processes that hold the inputs together, each with a share of them, of any size, also none; None: this
            process has all. Weights, and all else, are the same in each. Outputs are those of all inputs, in every
            process, and `R` of its own. Each iteration sums statistics without `i` over the processes, twice, and its
            backward pass once more: every process has to run both. Gradients are those of the sum of the processes'
            losses: what a process gets for a parameter is its part of the gradient. So DDP, which takes the mean, gives
            the gradient of one process where all compute the same loss.

    Returns:
        `a_out [...j]` (logits), `mu_out [...jch]` (means), `sig2_out [...jch]` (variances) and, with `return_R`,
        `R [...ij]` (probabilities; each row sums to 1 over the outputs).

    Raises:
        ValueError: for an unknown option, shapes that do not fit each other, tensors on several devices, or a strategy
            that does not serve them.
        TypeError: for complex numbers, or a group that is none.
        ImportError: for a strategy, asked for by name, that needs what is not installed.
    """
    check_routing_options(n_iters=n_iters, p_model=p_model, eps=eps, strategy=strategy)
    _check_shapes(a_inp, mu_inp, W, B, beta_use, beta_ign, n_out)
    tensors = (a_inp, mu_inp, W, B, beta_use, beta_ign)
    if any(tensor.device != mu_inp.device for tensor in tensors):
        devices = (f"{name} on {tensor.device}" for name, tensor in zip(("a_inp", "mu_inp", "W", "B"), tensors))
        raise ValueError(f"There is {', '.join(devices)}; expected all tensors on one device: move them with .to().")
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if not dtype.is_floating_point:
        raise TypeError(f"Routing is of real numbers, and one of its tensors is {dtype}.")
    is_split = group is not None
    if strategy == "auto":
        strategy = _choose_strategy(mu_inp, tensors[2:], n_out, dtype, is_split)
    else:
        _check_strategy(strategy, mu_inp, tensors[2:], n_out)
    options = {"n_iters": n_iters, "p_model": p_model, "eps": eps, "return_R": return_R}
    if is_split:
        _check_group(group, strategy)
        options["group"] = group.group_name
    with torch.autocast(a_inp.device.type, enabled=False):
        *outputs, R = STRATEGIES[strategy](
            *(tensor.to(dtype) for tensor in tensors),
            n_out=n_out,
            **options,
        )
    return (*outputs, R) if return_R else tuple(outputs)


def _has_numba() -> bool:
    """Whether it is installed, without importing it."""
    return importlib.util.find_spec("numba") is not None


@functools.cache
def _has_triton() -> bool:
    """Return whether Triton is installed, without importing it: Linux alone has it."""
    return importlib.util.find_spec("triton") is not None


def _is_served_on_cuda(mu_inp: Tensor, parameters: tuple[Tensor, ...], n_out: int) -> bool:
    if mu_inp.device.type != "cuda" or not _has_triton():
        return False
    from . import cuda  # only here: not everyone has Triton

    return cuda.unserved(mu_inp, parameters, n_out) is None


def _choose_strategy(
    mu_inp: Tensor, parameters: tuple[Tensor, ...], n_out: int, dtype: torch.dtype, is_split: bool = False
) -> str:
    """The second table at the head of this file."""
    d_cov, d_inp = mu_inp.shape[-2:]
    d_out = parameters[0].shape[-1]
    if torch.compiler.is_exporting():
        return "reference"
    if not is_split and _is_served_on_cuda(mu_inp, parameters, n_out):
        return "cuda"
    if any(parameter.shape[0] > 1 for parameter in parameters) or mu_inp.device.type not in ("cpu", "cuda"):
        return "reference"
    if mu_inp.device.type == "cpu" and not is_split and n_votes(mu_inp, n_out, d_out) < SMALL:
        return "reference"
    if mu_inp.device.type == "cpu" and _has_numba():
        return "numba"
    few_moments = d_cov * d_inp * (d_inp + 3) // 2 + 1 <= 8 * d_cov * d_out
    return "moments" if few_moments and dtype == torch.float32 else "votes"


def _check_strategy(strategy: str, mu_inp: Tensor, parameters: tuple[Tensor, ...], n_out: int) -> None:
    """The first table at the head of this file."""
    if strategy == "reference":
        return
    if torch.compiler.is_exporting():
        raise ValueError(
            f'strategy "{strategy}" is an operator of this package, which an exported program would need wherever it '
            'runs. Export with strategy="auto" or "reference".'
        )
    if strategy == "cuda":
        from . import cuda  # only here: not everyone has Triton

        if mu_inp.device.type != "cuda" and not cuda.is_interpreted():
            raise ValueError(
                f'strategy "cuda" runs on CUDA, and the inputs are on {mu_inp.device}. Move them there, use '
                'strategy="auto", or set TRITON_INTERPRET=1 before Triton is imported: the kernels then run, slowly.'
            )
        clause = cuda.unserved(mu_inp, parameters, n_out)
        if clause is not None:
            raise ValueError(f'strategy "cuda" does not serve these inputs: {clause}. Use strategy="auto".')
        return
    n_inp = max(parameter.shape[0] for parameter in parameters)
    if n_inp > 1:
        raise ValueError(
            f'strategy "{strategy}" needs weights that all inputs share; these are different for each of {n_inp} '
            'inputs. Use strategy="auto" or "reference".'
        )
    if mu_inp.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f'strategy "{strategy}" runs on CPU and CUDA; the inputs are on {mu_inp.device.type}. '
            'Use strategy="auto" or "reference".'
        )
    if strategy == "numba":
        if mu_inp.device.type != "cpu":
            raise ValueError(
                f'strategy "numba" runs on the CPU, and the inputs are on {mu_inp.device}. Use strategy="auto".'
            )
        if not _has_numba():
            raise ImportError(
                'strategy "numba" is made of kernels that numba compiles, and numba is not installed: '
                '`pip install "capsule-heads[cpu]"`, or use strategy="auto".'
            )


def _check_group(group: dist.ProcessGroup, strategy: str) -> None:
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is {group!r}; expected a process group, such as torch.distributed.group.WORLD, or None where this "
            "process has all inputs."
        )
    if strategy in ("reference", "cuda"):
        raise ValueError(
            f'Only "moments", "votes" and "numba" route inputs split over processes, and "{strategy}" does not; they '
            'need weights that all inputs share, on CPU or CUDA. Use strategy="auto" with such weights (`Routing` '
            "without n_inp), or leave group out, with all inputs in each process."
        )


def _check_shapes(
    a_inp: Tensor, mu_inp: Tensor, W: Tensor, B: Tensor, beta_use: Tensor, beta_ign: Tensor, n_out: int
) -> None:
    if n_out < 1:
        raise ValueError(f"n_out is {n_out}; expected at least 1.")
    if mu_inp.ndim < 3 or mu_inp.shape[:-2] != a_inp.shape:
        raise ValueError(
            f"a_inp has shape {tuple(a_inp.shape)} and mu_inp {tuple(mu_inp.shape)}; expected scores [..., n_inp] and "
            "capsules [..., n_inp, d_cov, d_inp] with the same leading dimensions."
        )
    n_inp, d_cov, d_inp = mu_inp.shape[-3:]
    for name, parameter, trailing in (
        ("W", W, (d_inp, W.shape[-1])),
        ("B", B, (d_cov, W.shape[-1])),
        ("beta_use", beta_use, ()),
        ("beta_ign", beta_ign, ()),
    ):
        shape = tuple(parameter.shape)
        fits = len(shape) == 2 + len(trailing) and shape[0] in (1, n_inp) and shape[1] in (1, n_out)
        if not fits or shape[2:] != trailing:
            raise ValueError(
                f"{name} has shape {shape}, which does not fit mu_inp {tuple(mu_inp.shape)} and n_out={n_out}; "
                f"expected [{n_inp} or 1, {n_out} or 1{''.join(f', {size}' for size in trailing)}]."
            )
