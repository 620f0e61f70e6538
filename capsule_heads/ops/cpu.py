"""Strategy "cpu": fused kernels for the CPU, compiled by numba. README.md explains how they cut the work.

The first call for a dtype takes about half a minute to compile forward and backward. Compiled kernels are kept on disk
if a directory can be written to.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import uniform
from .autograd import StreamingStrategy
from .blocks import workspace
from .strategy import Call, is_installed
from .terms import EStep, Inputs, Statistics, UseGradient
from .threads import run_on_threads

_N_CHUNKS = 16  # parts of the work, the same for any number of threads, as sums depend on it
MAX_KEPT = 2**25  # most bytes of votes that are kept
# Inputs in a tile. With more, less fits in the first-level cache; with fewer, vectors are short beside their loops.
_MAX_TILE = 512
_TILE_BYTES = 2**20  # half of a second-level cache
NARROW = 8  # largest d_inp for which votes are cheaper to make again than to keep

logger = logging.getLogger(__name__)


class Cpu(StreamingStrategy):
    """Routing by the kernels in `cpu_kernels`."""

    name = "cpu"

    def missing(self) -> str | None:
        """Return None, or what to install."""
        return missing_numba()

    def unserved(self, call: Call) -> str | None:
        """Return None if the strategy serves a call, else the reason."""
        if call.mu_inp.device.type != "cpu":
            return f"runs on the CPU, and the inputs are on {call.mu_inp.device}"
        return super().unserved(call)

    def needs_double(self, n_votes: int, p_model: str, is_split: bool) -> bool:
        """Return whether to compute float32 inputs in float64.

        Nothing scales the distances of soft k-means, so the rounding of large distances decides between outputs.
        """
        return p_model == "skm"

    def uniform_statistics(self, inputs: Inputs) -> tuple[Statistics, Tensor]:
        """Add up statistics of the first iteration; see `Passes`."""
        direction = _Direction.of(inputs)
        if direction.keeps_votes:  # a pass over kept votes is less work than second moments
            return _statistics(inputs, None, None), uniform.no_moments(inputs)
        if direction.is_narrow:
            moments = direction.uniform_moments()
            return uniform.statistics_of(inputs, moments), moments
        return uniform.uniform_statistics(inputs)

    def uniform_gradients(
        self, inputs: Inputs, moments: Tensor, d_use: UseGradient, d_mu_inp: Tensor, d_f_inp: Tensor
    ) -> Tensor:
        """Go back through `uniform_statistics`; see `Passes`."""
        direction = _Direction.of(inputs)
        if direction.keeps_votes:
            direction.gradients(None, d_use, None, d_mu_inp, d_f_inp)
            return direction.gradients_of_votes(d_mu_inp)  # for all iterations, as this one is differentiated last
        if direction.is_narrow:
            constant, half, d_W = uniform.quadratic_form(inputs, moments, d_use)
            direction.uniform_gradients(constant, half, d_mu_inp, d_f_inp)
            return d_W
        return uniform.uniform_gradients(inputs, moments, d_use, d_mu_inp, d_f_inp)

    def statistics(self, inputs: Inputs, e_step: EStep, R: Tensor | None) -> Statistics:
        """Add up statistics; see `Passes`."""
        return _statistics(inputs, e_step, R)

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
        direction = _Direction.of(inputs)
        sums, d_W = direction.gradients(e_step, d_use, d_R, d_mu_inp, d_f_inp)
        sums, scale = direction.per_sample(sums), e_step.scale
        first, second = (x.reshape(scale.shape) for x in sums[:, 1:].chunk(2, dim=1))
        return EStep(sums[:, 0], 2.0 * scale.square() * first, -2.0 * scale * second), d_W


@functools.cache
def _kernels() -> ModuleType:
    """Return the kernels. They are imported here, as that needs numba."""
    from . import cpu_kernels

    say_compiling(cpu_kernels, cpu_kernels.statistics)
    return cpu_kernels


def missing_numba() -> str | None:
    """Return None, or a clause that says how to install numba if it is missing."""
    if is_installed("numba"):
        return None
    return 'is made of kernels that numba compiles, and numba is not installed: `pip install "capsule-heads[cpu]"`'


def say_compiling(kernels: ModuleType, one: Any) -> None:
    """Log that kernels are about to be compiled, unless this machine has compiled them before.

    Args:
        kernels: the module of the kernels.
        one: one of the kernels.
    """
    folder = one.stats.cache_path  # None if no directory can be written to
    name = kernels.__name__.rpartition(".")[2]
    if folder is None or not any(Path(folder).glob(f"{name}.*.nbi")):
        logger.warning("Compiling the kernels of routing, once on this machine: the first step takes 20 to 60 seconds.")


def _statistics(inputs: Inputs, e_step: EStep | None, R: Tensor | None) -> Statistics:
    """Add up statistics; without an `e_step`, the statistics of the first iteration."""
    direction = _Direction.of(inputs)
    sums = direction.statistics(e_step, R)
    counts, means, scatters = sums[:, :1], *sums[:, 1:].chunk(2, dim=1)
    if len(sums) != len(inputs.mu_inp):  # Chan's formula, for all segments of a sample at once
        n_used = direction.per_sample(counts)
        mean = direction.per_sample(counts * means) / n_used.clamp_min(torch.finfo(n_used.dtype).tiny)
        scatters = direction.per_sample(scatters + counts * (means - mean[direction.plan.samples]).square())
        counts, means = n_used, mean
    means, scatters = (x.unflatten(1, (inputs.mu_inp.shape[2], -1)) for x in (means, scatters))  # [nchj]
    return Statistics(counts[:, 0], means, scatters)


class _Plan(NamedTuple):
    """The division of inputs into tiles, and of tiles into chunks. A segment is a chunk's part of a sample.

    Attributes:
        tiles: `[tiles,4]`, sample, first input, count and segment of each tile.
        chunks: `[chunks+1]`, the first tile of each chunk, and the end.
        samples: `[segments]`, the sample of each segment.
        firsts: `[samples]`, the first segment of each sample.
    """

    tiles: np.ndarray
    chunks: np.ndarray
    samples: Tensor
    firsts: np.ndarray


@functools.lru_cache(maxsize=64)
def _plan(n_samples: int, n_inp: int, tile_size: int) -> _Plan:
    n_tiles = -(-n_inp // tile_size)  # of a sample
    size = -(-n_inp // max(1, n_tiles))
    sample, tile = np.divmod(np.arange(n_samples * n_tiles), max(1, n_tiles))
    chunks = np.arange(_N_CHUNKS + 1) * len(tile) // _N_CHUNKS
    starts = np.isin(np.arange(len(tile)), chunks) | (tile == 0)  # segments
    counts = np.minimum(size, n_inp - tile * size)
    tiles = np.stack([sample, tile * size, counts, np.cumsum(starts) - 1], axis=1)
    samples = sample[starts]
    return _Plan(tiles, chunks, torch.from_numpy(samples), np.searchsorted(samples, np.arange(n_samples)))


class _Direction:
    """Data and buffers that all passes of a call in one direction share, forward or backward.

    Attributes:
        is_narrow: whether votes are cheaper to make again than to keep.
        keeps_votes: whether votes are made once for all passes.
        plan: how inputs are cut into tiles and chunks.
    """

    def __init__(self, inputs: Inputs) -> None:
        n, i, c, d = inputs.mu_inp.shape
        h, j, _ = inputs.W.shape
        self._dtype = inputs.mu_inp.dtype
        n_rows = -(-h * j // 4) * 4  # rows of the weights, padded as their columns are
        self.is_narrow = d <= NARROW
        n_planes = 4 if self.is_narrow else c * n_rows
        n_bytes = (n_planes + 2 * j + 2 * c * d) * inputs.mu_inp.element_size()
        tile_size = min(_MAX_TILE, max(16, _TILE_BYTES // n_bytes // 16 * 16))
        self.plan = _plan(n, i, tile_size)
        lanes = (-(-int(self.plan.tiles[:, 2].max(initial=0)) // 16) + 1) * 16

        self._sizes = (n, c, h, j, d)
        self._weights = inputs.W.new_zeros(n_rows, -(-d // 4) * 4)
        self._weights[: h * j, :d] = inputs.W.transpose(0, 1).flatten(0, 1)
        tensors = (inputs.mu_inp.contiguous(), inputs.f_inp.contiguous(), inputs.centre[:, 0].contiguous())
        self._inputs = (*(x.numpy() for x in tensors), self._weights.numpy())
        self._scratch = (lanes, n_planes)
        votes_shape = (len(self.plan.tiles), c * n_rows, lanes)
        self.keeps_votes = not self.is_narrow and math.prod(votes_shape) * inputs.mu_inp.element_size() <= MAX_KEPT
        nothing = np.empty((0, 0, 0), self._inputs[0].dtype)
        self._nothing = self._votes = self._d_votes = nothing
        if self.keeps_votes:
            self._votes = workspace.like("votes", inputs.mu_inp, votes_shape).numpy()
        self._has_votes = False

    @classmethod
    def of(cls, inputs: Inputs) -> _Direction:
        """Return the direction that belongs to these inputs."""
        if cls not in inputs.memo:
            inputs.memo[cls] = cls(inputs)
        return inputs.memo[cls]

    def uniform_moments(self) -> Tensor:
        """Return the moments of the inputs, `[n,c,d,d+1]`, float64."""
        _, c, _, _, d = self._sizes
        moments = torch.zeros(len(self.plan.samples), c, d, d + 1, dtype=torch.float64)
        self._run(_kernels().uniform_moments, moments.numpy())
        return self.per_sample(moments)

    def uniform_gradients(self, constant: Tensor, half: Tensor, d_mu_inp: Tensor, d_f_inp: Tensor) -> None:
        """Add to `d_mu_inp` and `d_f_inp`; see `cpu_kernels.uniform_gradients`."""
        self._run(_kernels().uniform_gradients, *(x.numpy() for x in (constant, half, d_mu_inp, d_f_inp)))

    def statistics(self, e_step: EStep | None, R: Tensor | None) -> Tensor:
        """Return counts, means and scatters, `[segments,1+2p,j]`, float64. Write `R [n,i,j]` if it is given.

        Without an `e_step`, do the first iteration.
        """
        sums = self._new_sums()
        self._run(
            _kernels().statistics,
            self._votes,
            self._scratch[1],
            e_step is None,
            self._e_step(e_step),
            not self._has_votes,
            self._nothing if R is None else R.numpy(),
            sums.numpy(),
        )
        self._has_votes = self.keeps_votes
        return sums

    def gradients(
        self, e_step: EStep | None, d_use: UseGradient, d_R: Tensor | None, d_mu_inp: Tensor, d_f_inp: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add to `d_f_inp` and, unless votes and their gradient are kept, to `d_mu_inp`.

        Returns:
            Sums `[segments,1+2p,j]`, float64, see `cpu_kernels.gradients`, and the gradient of `W` (0 if votes are
            kept).
        """
        sums = self._new_sums()
        d_W = torch.zeros(0, 0, 0, dtype=torch.float64) if self.keeps_votes else self._new_d_W()
        has_d_votes = len(self._d_votes) > 0
        if self.keeps_votes and not has_d_votes:
            self._d_votes = workspace.like("d_votes", self._weights, self._votes.shape).numpy()
        constant, linear, square, mean = d_use
        self._run(
            _kernels().gradients,
            self._votes,
            self._scratch[1],
            e_step is None,
            self._e_step(e_step),
            not self._has_votes,
            self._packed(constant, mean, linear, square),
            self._nothing if d_R is None else d_R.contiguous().numpy(),
            self._d_votes,
            has_d_votes,
            d_mu_inp.numpy(),
            d_f_inp.numpy(),
            d_W.numpy(),
            sums.numpy(),
        )
        self._has_votes = self.keeps_votes
        return sums, d_W.sum() if self.keeps_votes else self._unpadded(d_W)

    def gradients_of_votes(self, d_mu_inp: Tensor) -> Tensor:
        """Add the gradient through the kept votes to `d_mu_inp`, and return the gradient of `W`."""
        d_W = self._new_d_W()
        self._run(_kernels().gradients_of_kept, self._d_votes, d_mu_inp.numpy(), d_W.numpy())
        return self._unpadded(d_W)

    def per_sample(self, x: Tensor) -> Tensor:
        """Sum `[segments,...]` over the segments of each sample, to `[n,...]`."""
        n = len(self._inputs[0])
        if len(x) in (0, n):
            return x.new_zeros(n, *x.shape[1:]) if len(x) == 0 else x
        return torch.from_numpy(np.add.reduceat(x.numpy(), self.plan.firsts, axis=0))

    def _run(self, kernel: Callable[..., None], *arguments: object) -> None:
        """Run a kernel on all chunks, on as many threads as torch would use."""
        n_threads = max(1, min(torch.get_num_threads(), len(self.plan.tiles)))
        plan = (self.plan.tiles, self.plan.chunks, self._scratch[0])

        def run(thread: int) -> None:
            kernel(self._inputs, plan, (thread, n_threads), *arguments)

        with torch.profiler.record_function(f"capsule_heads::{kernel.__name__}"):  # else unknown to torch's profiler
            run_on_threads(run, n_threads)

    def _e_step(self, e_step: EStep | None) -> np.ndarray:
        """Pack an E-step as in `cpu_kernels`, `[n,2+3p,j]`, with priors less the largest: large logits lose digits."""
        if e_step is None:
            n, c, h, j, _ = self._sizes
            return torch.zeros(n, 2 + 3 * c * h, j, dtype=self._dtype).numpy()
        log_prior, mean, scale = e_step
        log_prior = log_prior - log_prior.amax(1, keepdim=True)
        return self._packed(
            log_prior, mean, scale, scale - scale.to(self._dtype), log_prior - log_prior.to(self._dtype)
        )

    def _packed(self, *terms: Tensor) -> np.ndarray:
        """Pack `[n,j]` and `[n,c,h,j]` as `[n,rows,j]`, of the dtype of the inputs."""
        return torch.cat([x[:, None] if x.ndim == 2 else x.flatten(1, 2) for x in terms], dim=1).to(self._dtype).numpy()

    def _new_sums(self) -> Tensor:
        _, c, h, j, _ = self._sizes
        return torch.zeros(len(self.plan.samples), 1 + 2 * c * h, j, dtype=torch.float64)

    def _new_d_W(self) -> Tensor:
        return torch.zeros(_N_CHUNKS, *self._weights.shape, dtype=torch.float64)

    def _unpadded(self, d_W: Tensor) -> Tensor:
        """Sum `[chunks,q,d]` to `[h,j,d]`."""
        _, _, h, j, d = self._sizes
        return d_W.sum(0)[: h * j, :d].unflatten(0, (j, h)).transpose(0, 1)
