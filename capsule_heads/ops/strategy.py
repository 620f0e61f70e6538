"""The interface that every strategy implements, and the description of a call that it may serve."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

IN_EXPORTS = "is an operator of this package, and an exported program would need the package wherever it runs"
IN_GROUPS = "does not route inputs split over processes"


@dataclass
class Call:
    """The properties of one call of `route` that decide which strategies serve it.

    Attributes:
        mu_inp: `[...icd]`, input capsules.
        parameters: `W`, `B`, `beta_use` and `beta_ign`; see `route`.
        n_out: number of output capsules.
        dtype: dtype of the computation.
        is_split: whether a group of processes holds the inputs together.
    """

    mu_inp: Tensor
    parameters: tuple[Tensor, ...]
    n_out: int
    dtype: torch.dtype = torch.float32
    is_split: bool = False

    @property
    def d_out(self) -> int:
        """Return the number of columns of an output capsule."""
        return self.parameters[0].shape[-1]

    @property
    def n_own(self) -> int:
        """Return the number of inputs that have parameters of their own; 1 if all inputs share all parameters."""
        return max(parameter.shape[0] for parameter in self.parameters)

    @property
    def n_votes(self) -> int:
        """Return the size of the tensor of all votes, `[...ijch]`."""
        return n_votes(self.mu_inp, self.n_out, self.d_out)


class Strategy(ABC):
    """One way to compute `route`. All compute the same function, up to rounding.

    To add a strategy, write a file with an object of a subclass, and add it to `routing.STRATEGIES`.

    Attributes:
        name: its name as an argument of `route`.
    """

    name: str

    def missing(self) -> str | None:
        """Return None, or a clause about a library that is not installed and how to install it."""
        return None

    @abstractmethod
    def unserved(self, call: Call) -> str | None:
        """Return None if the strategy serves a call, else the reason, as a clause that follows the strategy's name.

        A reason may be the device, parameters of each input's own, sizes, a group of processes, `torch.export`, or a
        library that `missing` names.
        """

    @abstractmethod
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
        """Route a call that the strategy serves.

        Args:
            a_inp: as in `routing.route`, like all others but `group`. All tensors have one dtype, float32 or float64.
            mu_inp: see there.
            W: see there.
            B: see there.
            beta_use: see there.
            beta_ign: see there.
            n_out: see there.
            n_iters: see there.
            p_model: see there.
            eps: see there.
            return_R: see there.
            group: the name of the processes that hold the inputs together; None for this process alone.

        Returns:
            `a_out`, `mu_out`, `sig2_out`, and `R` or None.
        """


def n_votes(mu_inp: Tensor, n_out: int, d_out: int) -> int:
    """Return the size of the tensor of all votes, `[...ijch]`."""
    return mu_inp.numel() // mu_inp.shape[-1] * n_out * d_out


def is_installed(library: str) -> bool:
    """Return whether a library is installed, without importing it."""
    return importlib.util.find_spec(library) is not None
