"""Strategy "cuda": Triton kernels, one launch per iteration. README.md explains how they divide the work."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autograd import NAMESPACE, no_second_derivative
from .strategy import IN_EXPORTS, IN_GROUPS, Call, Strategy, is_installed

logger = logging.getLogger(__name__)

MAX_COLUMNS = 1024  # n_out * d_out, each rounded up to a power of two; a block with more does not fit into registers
MAX_ROWS = 16  # d_cov
MAX_OWN = 16384  # numbers in the votes, for inputs with weights of their own

_TILE = 4096  # numbers of a block in float32
_TILE_OF_W = 8192  # numbers of the weights that a block is multiplied with
_N_WARPS = 8
_BLOCK = 64  # numbers that a program sums
_MARK = "compiled"  # name of a file in Triton's cache
_MAX_BUFFER = 2**25  # numbers in the buffer for all programs' gradients of W: 128 MiB in float32


class Cuda(Strategy):
    """Routing by the kernels in `cuda_kernels`.

    Computing second derivatives raises a `NotImplementedError`.
    """

    name = "cuda"

    def missing(self) -> str | None:
        """Return None, or what to install."""
        if is_installed("triton"):
            return None
        return "is made of kernels that Triton compiles, and Triton is not installed: on Linux, `pip install triton`"

    def unserved(self, call: Call) -> str | None:
        """Return None if the strategy serves a call, else the reason."""
        if torch.compiler.is_exporting():
            return IN_EXPORTS
        missing = self.missing()
        if missing is not None:
            return missing
        if call.mu_inp.device.type != "cuda" and not is_interpreted():
            return (
                f"runs on CUDA, and the inputs are on {call.mu_inp.device} (its kernels run there, slowly, with "
                "TRITON_INTERPRET=1 set before Triton is imported)"
            )
        return IN_GROUPS if call.is_split else unserved_sizes(call)

    def route(
        self,
        a_inp: Tensor,
        mu_inp: Tensor,
        W: Tensor,
        B: Tensor,
        beta_use: Tensor,
        beta_ign: Tensor,
        *,
        n_out: int,
        n_iters: int,
        p_model: str,
        eps: float,
        return_R: bool,
        group: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Route in few launches; see `Strategy.route`."""
        parameters = (
            x if x.shape[1] == n_out else x.expand(-1, n_out, *x.shape[2:]) for x in (W, B, beta_use, beta_ign)
        )
        options = (n_iters, p_model, float(eps), return_R)
        a_out, mu_out, sig2_out, R = _Route.apply(options, a_inp, mu_inp, *parameters)
        return a_out, mu_out, sig2_out, R if return_R else None


def _kernels() -> ModuleType:
    """Return the kernels. They are imported here, as that needs Triton."""
    from . import cuda_kernels

    return cuda_kernels


def is_interpreted() -> bool:
    """Return whether Triton interprets its kernels, on the CPU (TRITON_INTERPRET=1)."""
    kernels = _kernels()
    return not isinstance(kernels.statistics_kernel, kernels.triton.JITFunction)


class Sizes(NamedTuple):
    """Sizes of a routing, and of the blocks that the kernels cut it into.

    Attributes:
        C: rows of a capsule; D: columns of an input; J: outputs; H: columns of an output.
        BI: inputs of a block; BC, BJ, BH: as C, J and H, rounded up to a power of two.
        BD: columns of the inputs that are multiplied at a time.
        BP: rows of sums that are merged at a time.
    """

    C: int
    D: int
    J: int
    H: int
    BI: int
    BC: int
    BD: int
    BJ: int
    BH: int
    BP: int

    @property
    def N(self) -> int:
        """Return the number of columns of a block of wide inputs, and of all small tensors."""
        return self.BJ * self.BH

    @property
    def is_narrow(self) -> bool:
        """Return whether the kernels for narrow inputs serve these sizes. They hold each number of a vote by itself."""
        return self.D < 16 and self.C * self.H <= 16 and self.C * self.D <= 32

    @property
    def rows_of_program(self) -> int:
        """Return the number of rows of sums that a program writes."""
        return self.BI if self.is_narrow else 1

    @classmethod
    @functools.cache
    def of(cls, d_cov: int, d_inp: int, d_out: int, n_out: int, is_double: bool) -> Sizes:
        """Choose blocks such that few registers spill to memory, or none."""
        tile = _TILE // 4 if is_double else _TILE
        BC, BH = _power(d_cov), _power(d_out)
        BJ = max(_power(n_out), 16 // BH, 1)  # a matrix product takes at least 16 columns
        N = BJ * BH
        sizes = cls(d_cov, d_inp, n_out, d_out, 1, BC, _power(d_inp), BJ, BH, max(1, tile // (BC * N)))
        if sizes.is_narrow:
            # Each thread has one input and one output. Merging twice as many rows at a time was a quarter slower.
            return sizes._replace(BI=max(1, 32 * _N_WARPS // BJ), BP=max(1, sizes.BP // 2))
        BI = max(16 // BC, 1, min(128, tile // N) // BC)
        return sizes._replace(BI=BI, BD=max(16, min(64, _power(d_inp), _TILE_OF_W // N)))


def _power(n: int) -> int:
    """Return the smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()


def unserved_sizes(call: Call) -> str | None:
    """Return None if the kernels serve these sizes, else a clause that says what is too large."""
    n_inp, d_cov, _ = call.mu_inp.shape[-3:]
    n_out, d_out = call.n_out, call.d_out
    n_columns = _power(n_out) * _power(d_out)
    if d_cov > MAX_ROWS:
        return f"does not serve these inputs: d_cov is {d_cov}, and the kernels hold up to {MAX_ROWS} rows of a capsule"
    if n_columns > MAX_COLUMNS:
        return (
            f"does not serve these inputs: n_out={n_out} outputs of d_out={d_out} columns are {n_columns} numbers, "
            f"each rounded up to a power of two, and the kernels hold up to {MAX_COLUMNS}"
        )
    n_votes = _power(n_inp) * _power(d_cov) * n_columns
    if call.n_own > 1 and n_votes > MAX_OWN:
        return (
            f"does not serve these inputs: the votes of inputs with weights of their own are {n_votes} numbers, "
            f"each size rounded up to a power of two, and the kernels hold up to {MAX_OWN}"
        )
    if call.mu_inp.numel() == 0:
        return "does not serve these inputs: they are empty"
    return None


class _Route(torch.autograd.Function):
    """`forward` and `backward`, or `own_forward` and `own_backward`, on tensors with any batch dimensions."""

    @staticmethod
    def forward(ctx: Any, options: tuple[int, str, float, bool], *tensors: Tensor) -> tuple[Tensor, ...]:
        a_inp, mu_inp, *parameters = (_aligned(x) for x in tensors)
        batch, (n_inp, d_cov, d_inp) = mu_inp.shape[:-3], mu_inp.shape[-3:]
        if len(batch) != 1:
            n = math.prod(batch)
            a_inp, mu_inp = a_inp.view(n, n_inp), mu_inp.view(n, n_inp, d_cov, d_inp)
        is_own = any(parameter.shape[0] > 1 for parameter in parameters)
        run = _direction(own_forward if is_own else forward)
        results = run(a_inp, mu_inp, *parameters, *options)
        ctx.save_for_backward(a_inp, mu_inp, *parameters, *results[4:])
        ctx.options, ctx.batch, ctx.is_own = options, batch, is_own
        ctx.set_materialize_grads(False)
        if len(batch) == 1:
            return tuple(results[:4])
        return (*(x.view(*batch, *x.shape[1:]) for x in results[:3]), results[3].view(*batch, n_inp, -1))

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        _, p_model, eps, return_R = ctx.options
        d_outputs = (*d_outputs[:3], d_outputs[3] if return_R else None)
        aligned = (None if x is None else _aligned(x) for x in d_outputs)
        run = _direction(own_backward if ctx.is_own else backward)
        d_a_inp, d_mu_inp, *d_parameters = run(*aligned, *ctx.saved_tensors, p_model, eps)
        if len(ctx.batch) != 1:
            d_a_inp, d_mu_inp = (x.view(*ctx.batch, *x.shape[1:]) for x in (d_a_inp, d_mu_inp))
        return None, d_a_inp, d_mu_inp, *d_parameters


def _aligned(x: Tensor) -> Tensor:
    """Return the tensor contiguous and aligned to 16 bytes, as the kernels are compiled for such tensors."""
    x = x.contiguous()
    if torch.compiler.is_compiling() or x.data_ptr() % 16 == 0:
        return x
    return x.clone()


# ---------------------------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------------------------


class Launcher:
    """Launches a kernel with the same constants, on tensors of one dtype and device.

    At each launch, Triton examines all arguments to find the kernel that it compiled for their kinds. That takes longer
    than the launch. Here the kinds never change, as numbers are not specialised and tensors are aligned.
    """

    def __init__(self, name: str, **options: Any) -> None:
        self.kernel, self.options = getattr(_kernels(), name), options
        self._compiled: Any = None
        self._constants: tuple[Any, ...] = ()

    def __call__(self, n_programs: int, *arguments: Tensor | int) -> None:
        """Launch the kernel. Everything that the strategy runs on the GPU goes through here."""
        grid = (n_programs, 1, 1)
        if self._compiled is not None:
            self._compiled[grid](*arguments, *self._constants)
        elif is_interpreted():
            self.kernel[grid](*arguments, **self.options)
        else:
            with self._compiling(arguments):
                self._compiled = self.kernel[grid](*arguments, **self.options)
            self._constants = tuple(self.options[name] for name in self.kernel.arg_names[len(arguments) :])

    @contextlib.contextmanager
    def _compiling(self, arguments: Sequence[Tensor | int]) -> Iterator[None]:
        """Log that kernels are compiled if Triton's cache has no mark for this one, and then leave a mark."""
        from triton import __version__
        from triton.runtime.cache import get_cache_manager

        kinds = [str(x.dtype) if isinstance(x, Tensor) else "int" for x in arguments]
        about = (__version__, self.kernel.cache_key, sorted(self.options.items()), kinds)
        key = hashlib.sha256(repr((*about, torch.cuda.get_device_capability())).encode()).hexdigest()
        mark = None
        with contextlib.suppress(OSError):  # without a cache each process compiles
            mark = get_cache_manager(key)
        if mark is not None and mark.get_file(_MARK) is not None:
            yield
            return
        _say_that_kernels_are_compiled()
        yield
        if mark is not None:
            with contextlib.suppress(OSError):
                mark.put("", _MARK)


@functools.cache  # once in a process
def _say_that_kernels_are_compiled() -> None:
    logger.warning(
        "Compiling the kernels of routing for sizes like these, once on this machine: the first step takes up to 2 "
        "minutes."
    )


@functools.cache
def _launcher(name: str, about: Any, dtype: torch.dtype, device: torch.device, *flags: bool) -> Launcher:
    """Return the launcher of a kernel for the calls that `about` describes; see `_OPTIONS`."""
    return Launcher(name, **_OPTIONS[name](about, *flags))


def _direction(run: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Return a direction or, only if needed, its operator, which takes the host longer than a launch."""
    return _OPERATORS[run] if torch.compiler.is_compiling() or torch.is_grad_enabled() else run


def _on_device(run: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Run a direction with its tensors' device as the current one, on which Triton launches."""

    @functools.wraps(run)
    def wrapped(*arguments: Any) -> list[Tensor]:
        device = arguments[5].device  # a tensor of both directions
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return run(*arguments)
        with torch.cuda.device(device):
            return run(*arguments)

    return wrapped


# ---------------------------------------------------------------------------------------------------------------------
# Weights that all inputs share
# ---------------------------------------------------------------------------------------------------------------------


class _Shared(NamedTuple):
    """The sizes and options that are constants in the kernels of a call."""

    sizes: Sizes
    n_iters: int
    p_model: str
    eps: float
    is_double: bool

    def some(self, names: str) -> dict[str, int]:
        """Return some of the sizes, and the number of iterations as `T`."""
        known = {**self.sizes._asdict(), "T": self.n_iters}
        return {name: known[name] for name in names.split()}

    def of_passes(self) -> dict[str, Any]:
        """Return the constants of kernels that go over all inputs."""
        # Three TF32 products are as exact as one in float32 and several times faster, but take more registers.
        precision = "ieee" if self.is_double or self.sizes.N > 256 else "tf32x3"
        constants = {"EPS": self.eps, "SKM": self.p_model == "skm", "PRECISION": precision}
        options: dict[str, Any] = {"num_warps": _N_WARPS, "num_stages": 1}
        return {**self.some("T C D J H BI BC BD BJ BH BP"), **constants, **options}


def _prepare_options(about: _Shared) -> dict[str, Any]:
    BX = min(1024, _power(about.sizes.C * about.sizes.D))
    return {**about.some("T C D J H BC BD BJ BH"), "BX": BX, "BB": max(1, _TILE // BX), "num_warps": _N_WARPS}


def _statistics_options(about: _Shared, first: bool, last: bool, has_R: bool) -> dict[str, Any]:
    return {**about.of_passes(), "FIRST": first, "LAST": last, "HAS_R": has_R, **_two_programs(not about.is_double)}


def _two_programs(is_needed: bool) -> dict[str, int]:
    """Limit registers such that a multiprocessor holds two programs; only the merge at the end spills to memory."""
    return {"maxnreg": 65536 // (2 * 32 * _N_WARPS)} if is_needed else {}


def _start_options(about: _Shared, has_a: bool, has_mu: bool, has_sig2: bool) -> dict[str, Any]:
    flags = {"HAS_A": has_a, "HAS_MU": has_mu, "HAS_SIG2": has_sig2}
    return {**about.some("T C J H BC BJ BH"), "EPS": about.eps, **flags, "num_warps": 4}


def _gradients_options(about: _Shared, first: bool, add: bool, has_d_R: bool) -> dict[str, Any]:
    flags = {"FIRST": first, "ADD": add, "HAS_D_R": has_d_R}
    if about.sizes.is_narrow:
        return {**about.of_passes(), **flags, **_two_programs(not about.is_double)}
    return {**about.of_passes(), **flags, "BP": max(1, about.sizes.BP // 2)}  # the merge has more to hold


def _parameters_options(about: _Shared) -> dict[str, Any]:
    return {**about.some("C D J H BJ BH"), "BLOCK": _BLOCK, "BP": 32, "num_warps": 4}


def _programs(mu_inp: Tensor, inputs_of_block: int, most: int) -> tuple[int, int]:
    """Return the number of programs of a sample, at most `most` for all samples together, and the blocks of each."""
    n_blocks = -(-mu_inp.shape[1] // inputs_of_block)
    n_programs = max(1, min(most // len(mu_inp), n_blocks))
    n_blocks_each = -(-n_blocks // n_programs)
    return -(-n_blocks // n_blocks_each), n_blocks_each


def _programs_of_gradients(mu_inp: Tensor, s: Sizes) -> tuple[int, int]:
    """Return the result of `_programs` for a backward pass, where a multiprocessor holds one program of wide inputs."""
    most = _n_programs(mu_inp.device) // (1 if s.is_narrow else 2)
    return _programs(mu_inp, s.BI, min(most, _MAX_BUFFER // (s.D * s.N * s.rows_of_program)))


@functools.cache
def _n_programs(device: torch.device) -> int:
    """Return how many programs keep all multiprocessors busy; a few in the interpreter."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 6


def _new_outputs(mu_inp: Tensor, W: Tensor, return_R: bool) -> list[Tensor]:
    n, n_inp, d_cov, _ = mu_inp.shape
    _, n_out, _, d_out = W.shape
    new = mu_inp.new_empty
    R = new(n, n_inp, n_out) if return_R else new(0)
    return [new(n, n_out), new(n, n_out, d_cov, d_out), new(n, n_out, d_cov, d_out), R]


def _new_results(mu_inp: Tensor, W: Tensor, n_iters: int, return_R: bool) -> list[Tensor]:
    """Allocate the results of `forward`."""
    n, _, d_cov, d_inp = mu_inp.shape
    s = Sizes.of(d_cov, d_inp, W.shape[-1], W.shape[1], mu_inp.dtype == torch.float64)
    new = mu_inp.new_empty
    n_rows = max(16, s.BD)
    return [
        *_new_outputs(mu_inp, W, return_R),
        new(-(-d_inp // n_rows) * n_rows, s.N),
        new(n, d_cov, d_inp),
        new(n, n_iters - 1, 2 * d_cov + 1, s.N),
        new(n, n_iters * (1 + 2 * d_cov) + d_cov + 1, s.N, dtype=torch.float64),
        mu_inp.new_zeros(n, dtype=torch.int32),
    ]


@_on_device
def forward(
    a_inp: Tensor, mu_inp: Tensor, W: Tensor, B: Tensor, beta_use: Tensor, beta_ign: Tensor,
    n_iters: int, p_model: str, eps: float, return_R: bool,
) -> list[Tensor]:  # fmt: skip
    """Route.

    Args:
        a_inp: `[n,i]`. All tensors are contiguous and have one dtype.
        mu_inp: `[n,i,c,d]`.
        W: `[1,j,d,h]`.
        B: `[1,j,c,h]`.
        beta_use: `[1,j]`.
        beta_ign: `[1,j]`.
        n_iters: as in `routing.route`, like the options after it.
        p_model: see there.
        eps: see there.
        return_R: see there.

    Returns:
        `a_out [n,j]`, `mu_out` and `sig2_out [n,j,c,h]`, and `R [n,i,j]` (empty unless requested). The remaining
        results are for `backward`: packed weights, centre, E-steps, state, and counters, which every merge resets to 0.
    """
    n, n_inp, d_cov, d_inp = mu_inp.shape
    is_double = mu_inp.dtype == torch.float64
    s = Sizes.of(d_cov, d_inp, W.shape[-1], W.shape[1], is_double)
    about, kind = _Shared(s, n_iters, p_model, eps, is_double), (mu_inp.dtype, mu_inp.device)
    results = _new_results(mu_inp, W, n_iters, return_R)
    a_out, mu_out, sig2_out, R, packed, centre, e_steps, state, counters = results

    prepare = _launcher("prepare_kernel", about, *kind)
    n_programs, n_blocks_each = _programs(mu_inp, prepare.options["BB"], _n_programs(mu_inp.device))
    partial = state.new_empty(n * n_programs, d_cov * d_inp + 1)
    read = (a_inp, mu_inp, W, B, packed, partial, counters, centre, state)
    prepare(n * n_programs + len(packed) // 16, *read, n_inp, n, n_programs, n_blocks_each)

    n_programs, n_blocks_each = _programs(mu_inp, s.BI, _n_programs(mu_inp.device))
    partial = mu_inp.new_empty(n * n_programs * s.rows_of_program, 1 + 2 * d_cov, s.N)
    tensors = (a_inp, mu_inp, centre, packed, e_steps, partial, counters, state, beta_use, beta_ign)
    name = "narrow_statistics_kernel" if s.is_narrow else "statistics_kernel"
    for t in range(n_iters):
        is_last = t == n_iters - 1
        launch = _launcher(name, about, *kind, t == 0, is_last, return_R and is_last)
        launch(n * n_programs, *tensors, a_out, mu_out, sig2_out, R, n_inp, n_programs, n_blocks_each, t)
    return results


@_on_device
def backward(
    d_a_out: Tensor | None, d_mu_out: Tensor | None, d_sig2_out: Tensor | None, d_R: Tensor | None,
    a_inp: Tensor, mu_inp: Tensor, W: Tensor, B: Tensor, beta_use: Tensor, beta_ign: Tensor,
    packed: Tensor, centre: Tensor, e_steps: Tensor, state: Tensor, counters: Tensor, p_model: str, eps: float,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of `forward`'s six tensors, from those of its first four results, contiguous or None."""
    n, n_inp, d_cov, d_inp = mu_inp.shape
    n_iters = e_steps.shape[1] + 1
    is_double = mu_inp.dtype == torch.float64
    s = Sizes.of(d_cov, d_inp, W.shape[-1], W.shape[1], is_double)
    about, kind = _Shared(s, n_iters, p_model, eps, is_double), (mu_inp.dtype, mu_inp.device)
    new = mu_inp.new_empty
    use, sums = new(n, 3 * d_cov + 1, s.N), state.new_empty(n, d_cov + 3, s.N)
    d_a_inp, d_mu_inp = torch.empty_like(a_inp), torch.empty_like(mu_inp)
    d_parameters = [torch.empty_like(x) for x in (W, B, beta_use, beta_ign)]
    n_programs, n_blocks_each = _programs_of_gradients(mu_inp, s)
    n_rows = n * n_programs * s.rows_of_program
    partial, parts_of_d_W = new(n_rows, 1 + 2 * d_cov, s.N), new(n_rows, d_inp, s.N)

    d_outputs = (d_a_out, d_mu_out, d_sig2_out)
    start = _launcher("start_backward_kernel", about, *kind, *(x is not None for x in d_outputs))
    given = (use if x is None else x for x in d_outputs)
    start(n, *given, state, beta_use, beta_ign, use, sums)

    tensors = (d_mu_inp, d_a_inp, parts_of_d_W, partial, counters, state, beta_use, beta_ign, sums)
    name = "narrow_gradients_kernel" if s.is_narrow else "gradients_kernel"
    for t in reversed(range(n_iters)):
        is_last = t == n_iters - 1
        d_R_here = d_R if is_last else None
        launch = _launcher(name, about, *kind, t == 0, not is_last, d_R_here is not None)
        inputs = (a_inp, mu_inp, centre, packed, e_steps, use, use if d_R_here is None else d_R_here)
        launch(n * n_programs, *inputs, *tensors, n_inp, n_programs, n_blocks_each, t)
    n_blocks = -(-d_inp * s.N // _BLOCK) + -(-(d_cov + 2) * s.N // _BLOCK)
    _launcher("parameters_kernel", about, *kind)(n_blocks, parts_of_d_W, sums, *d_parameters, n_rows, n)
    return [d_a_inp, d_mu_inp, *d_parameters]


# ---------------------------------------------------------------------------------------------------------------------
# Weights of each input's own
# ---------------------------------------------------------------------------------------------------------------------


class _Own(NamedTuple):
    """The constants in the kernels of a call: sizes, which parameters differ between inputs, and options."""

    n_inp: int
    d_cov: int
    d_inp: int
    n_out: int
    d_out: int
    own: tuple[bool, ...]
    n_iters: int
    p_model: str
    eps: float

    @classmethod
    def of(cls, mu_inp: Tensor, parameters: Sequence[Tensor], n_iters: int, p_model: str, eps: float) -> _Own:
        """Return the constants for a call's tensors and options."""
        _, n_out, _, d_out = parameters[0].shape
        own = tuple(x.shape[0] > 1 for x in parameters)
        n_inp, d_cov, d_inp = mu_inp.shape[1:]
        return cls(n_inp, d_cov, d_inp, n_out, d_out, own, n_iters, p_model, eps)

    def constants(self) -> dict[str, Any]:
        """Return the constants of both directions."""
        blocks = {
            "BI": _power(self.n_inp),
            "BC": _power(self.d_cov),
            "BJ": _power(self.n_out),
            "BH": _power(self.d_out),
        }
        n_warps = min(16, max(4, math.prod(blocks.values()) // 512))
        return {
            **{"N_INP": self.n_inp, "C": self.d_cov, "D": self.d_inp, "J": self.n_out, "H": self.d_out, **blocks},
            **dict(zip(("OWN_W", "OWN_B", "OWN_USE", "OWN_IGN"), map(int, self.own))),
            **{"T": self.n_iters, "EPS": self.eps, "SKM": self.p_model == "skm", "num_warps": n_warps},
        }


def _own_forward_options(about: _Own, has_R: bool) -> dict[str, Any]:
    return {**about.constants(), "HAS_R": has_R}


def _own_backward_options(about: _Own, *has: bool) -> dict[str, Any]:
    return {**about.constants(), **dict(zip(("HAS_A", "HAS_MU", "HAS_SIG2", "HAS_D_R"), has))}


def _sum_options(about: _Own) -> dict[str, Any]:
    return {"BLOCK": _BLOCK, "BP": 32, "num_warps": 4}


def _new_own_results(mu_inp: Tensor, W: Tensor, n_iters: int, return_R: bool) -> list[Tensor]:
    """Allocate the results of `own_forward`."""
    n_columns = _power(W.shape[1]) * _power(W.shape[3])
    state = mu_inp.new_empty(len(mu_inp), n_iters, 1 + 2 * mu_inp.shape[2], n_columns)
    return [*_new_outputs(mu_inp, W, return_R), state]


@_on_device
def own_forward(
    a_inp: Tensor, mu_inp: Tensor, W: Tensor, B: Tensor, beta_use: Tensor, beta_ign: Tensor,
    n_iters: int, p_model: str, eps: float, return_R: bool,
) -> list[Tensor]:  # fmt: skip
    """Route as `forward` does, with parameters `[i or 1,j,...]`. `own_backward` needs only the state of iterations."""
    parameters = (W, B, beta_use, beta_ign)
    about = _Own.of(mu_inp, parameters, n_iters, p_model, eps)
    *outputs, R, state = _new_own_results(mu_inp, W, n_iters, return_R)
    launch = _launcher("own_forward_kernel", about, mu_inp.dtype, mu_inp.device, return_R)
    launch(len(mu_inp), a_inp, mu_inp, *parameters, state, *outputs, R)
    return [*outputs, R, state]


@_on_device
def own_backward(
    d_a_out: Tensor | None, d_mu_out: Tensor | None, d_sig2_out: Tensor | None, d_R: Tensor | None,
    a_inp: Tensor, mu_inp: Tensor, W: Tensor, B: Tensor, beta_use: Tensor, beta_ign: Tensor, state: Tensor,
    p_model: str, eps: float,
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of `own_forward`'s six tensors, from those of its first four results."""
    n, n_inp = a_inp.shape
    parameters = (W, B, beta_use, beta_ign)
    about, kind = _Own.of(mu_inp, parameters, state.shape[1], p_model, eps), (mu_inp.dtype, mu_inp.device)
    d_a_inp, d_mu_inp = torch.empty_like(a_inp), torch.empty_like(mu_inp)
    d_parameters = [mu_inp.new_empty(n_inp, *x.shape[1:]) for x in parameters]
    n_numbers = [x.numel() for x in d_parameters]
    parts = mu_inp.new_empty(n, sum(n_numbers))
    d_outputs = (d_a_out, d_mu_out, d_sig2_out, d_R)
    launch = _launcher("own_backward_kernel", about, *kind, *(x is not None for x in d_outputs))
    given = (state if x is None else x for x in d_outputs)
    launch(n, *given, a_inp, mu_inp, *parameters, state, d_a_inp, d_mu_inp, parts)
    n_blocks = -(-sum(n_numbers) // _BLOCK)
    _launcher("sum_kernel", about, *kind)(n_blocks, parts, *d_parameters, n, *n_numbers[:3])
    d_parameters = [x if x.shape == p.shape else x.sum(0, keepdim=True) for x, p in zip(d_parameters, parameters)]
    return [d_a_inp, d_mu_inp, *d_parameters]


_OPTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "prepare_kernel": _prepare_options,
    "statistics_kernel": _statistics_options,
    "narrow_statistics_kernel": _statistics_options,
    "start_backward_kernel": _start_options,
    "gradients_kernel": _gradients_options,
    "narrow_gradients_kernel": _gradients_options,
    "parameters_kernel": _parameters_options,
    "own_forward_kernel": _own_forward_options,
    "own_backward_kernel": _own_backward_options,
    "sum_kernel": _sum_options,
}


# ---------------------------------------------------------------------------------------------------------------------
# As operators
# ---------------------------------------------------------------------------------------------------------------------


def _operator(name: str, run: Callable[..., list[Tensor]], fake: Callable[..., list[Tensor]]) -> Callable:
    operator = torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=())
    operator.register_fake(fake)
    operator.register_autograd(no_second_derivative)  # never used by a forward direction, as `_Route` has its own
    return operator


def _fake(new_results: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    def fake(
        a_inp: Tensor, mu_inp: Tensor, W: Tensor, B: Tensor, beta_use: Tensor, beta_ign: Tensor,
        n_iters: int, p_model: str, eps: float, return_R: bool,
    ) -> list[Tensor]:  # fmt: skip
        return new_results(mu_inp, W, n_iters, return_R)

    return fake


def _fake_backward(
    d_a_out: Tensor | None, d_mu_out: Tensor | None, d_sig2_out: Tensor | None, d_R: Tensor | None, *arguments: Any
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(x) for x in arguments[:6]]


# Operators that `torch.compile` does not break up. They also refuse second derivatives.
_OPERATORS = {
    forward: _operator("route_cuda", forward, _fake(_new_results)),
    backward: _operator("route_cuda_backward", backward, _fake_backward),
    own_forward: _operator("route_own_cuda", own_forward, _fake(_new_own_results)),
    own_backward: _operator("route_own_cuda_backward", own_backward, _fake_backward),
}
