"""The passes over the inputs that a streaming strategy provides. README.md says what they add up, and why."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from . import uniform
from .terms import EStep, Inputs, Statistics, UseGradient


class Passes(ABC):
    """One pass over the inputs for an iteration, and one for its backward pass."""

    def n_kept(self, d_cov: int, d_inp: int) -> int:
        """Return the size `k` of `Statistics.kept`."""
        return 0

    def uniform_statistics(self, inputs: Inputs) -> tuple[Statistics, Tensor]:
        """Return the statistics of the first iteration, and what its backward pass needs, `[n,c,d,d+1]`."""
        return uniform.uniform_statistics(inputs)

    def uniform_gradients(
        self, inputs: Inputs, moments: Tensor, d_use: UseGradient, d_mu_inp: Tensor, d_f_inp: Tensor
    ) -> Tensor:
        """Add to `d_mu_inp [n,i,c,d]` and `d_f_inp [n,i]`, and return the gradient of `W [h,j,d]`, float64.

        This is called after all calls of `gradients`.
        """
        return uniform.uniform_gradients(inputs, moments, d_use, d_mu_inp, d_f_inp)

    @abstractmethod
    def statistics(self, inputs: Inputs, e_step: EStep, R: Tensor | None) -> Statistics:
        """Return the statistics of `D_ij = f_i R_ij` in an iteration, and write `R [n,i,j]` if it is given."""

    @abstractmethod
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
        """Add to `d_mu_inp [n,i,c,d]` and `d_f_inp [n,i]`, and return the gradients of `e_step` and `W`."""
