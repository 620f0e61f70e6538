"""The routing layer: the parameters of routing, their initialisation, and a call of `ops.route`."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checks import check_size, plain, shown
from .ops import check_routing_options, route


class Routing(nn.Module):
    """Routes `n_inp` capsules of `d_cov x d_inp` to `n_out` capsules of `d_cov x d_out` (Heinsen, 2019).

    Without `n_inp`, one set of weights serves any number of inputs. Without `n_out`, the caller passes the number of
    outputs at each call. In the shapes of parameters, `i` counts inputs and `j` outputs, and both are 1 where one set
    is shared. `c`, `d` and `h` are the sizes `d_cov`, `d_inp` and `d_out`. `W [ijdh]` is normal with standard deviation
    `1 / d_inp`. `B [ijch]`, `beta_use [ij]` and `beta_ign [ij]` are zeros. `B_brk [1ch]`, also zeros, exists only if
    `n_out` is variable, and lets the outputs differ.

    Args:
        d_cov: rows of a capsule, the same for inputs and outputs.
        d_inp: columns of an input capsule.
        d_out: columns of an output capsule.
        n_inp: number of inputs, each with weights of its own; None for any number with shared weights.
        n_out: number of outputs, each with weights of its own; None to pass it at each call.
        n_iters: iterations of the algorithm.
        single_beta: whether to use `beta_use` as `beta_ign` too; the layer then has no `beta_ign`.
        p_model: "gaussian" or "skm" (soft k-means).
        eps: added to counts of data and to variances.
        strategy: how to compute the routing, "auto" or one of `ops.STRATEGIES`; all compute the same function.

    Raises:
        ValueError: If a size is not a positive whole number, or an option is unknown.

    Example:
        >>> routing = Routing(d_cov=4, d_inp=4, d_out=4, n_inp=100, n_out=10)
        >>> a_out, mu_out, sig2_out = routing(torch.randn(100), torch.randn(100, 4, 4))
    """

    def __init__(
        self,
        d_cov: int,
        d_inp: int,
        d_out: int,
        n_inp: int | None = None,
        n_out: int | None = None,
        n_iters: int = 3,
        single_beta: bool = False,
        p_model: str = "gaussian",
        eps: float = 1e-5,
        strategy: str = "auto",
    ) -> None:
        super().__init__()
        d_cov, d_inp, d_out, n_inp, n_out, n_iters, eps = map(plain, (d_cov, d_inp, d_out, n_inp, n_out, n_iters, eps))
        for name, size in (("d_cov", d_cov), ("d_inp", d_inp), ("d_out", d_out)):
            check_size(name, size)
        for name, number in (("n_inp", n_inp), ("n_out", n_out)):
            check_size(name, number, or_none="variable")
        if not isinstance(single_beta, bool):
            raise ValueError(f"single_beta is {shown(single_beta)}; expected True or False.")
        check_routing_options(n_iters=n_iters, p_model=p_model, eps=eps, strategy=strategy)
        self.d_cov, self.d_inp, self.d_out = d_cov, d_inp, d_out
        self.n_inp, self.n_out = n_inp, n_out
        self.n_iters, self.single_beta, self.p_model, self.eps = n_iters, single_beta, p_model, eps
        self.strategy = strategy

        i, j = n_inp or 1, n_out or 1
        self.W = nn.Parameter(torch.empty(i, j, d_inp, d_out))
        self.B = nn.Parameter(torch.empty(i, j, d_cov, d_out))
        self.B_brk = nn.Parameter(torch.empty(1, d_cov, d_out)) if n_out is None else None
        self.beta_use = nn.Parameter(torch.empty(i, j))
        self.beta_ign = None if single_beta else nn.Parameter(torch.empty(i, j))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw `W` again and set every other parameter to zero."""
        nn.init.normal_(self.W, std=1.0 / self.d_inp)
        for parameter in (self.B, self.B_brk, self.beta_use, self.beta_ign):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def credits(self, a_inp: Tensor, R: Tensor) -> Tensor:
        """Return what each input adds to each output's score: the benefit of data used, less the cost of data ignored.

        Args:
            a_inp: `[...i]`, input scores, as logits.
            R: `[...ij]`, the routing probabilities that `forward` returns for these scores.

        Returns:
            Credits `[...ij]`, in logits. Their sum over `i` is `a_out [...j]`, up to rounding.
        """
        f_inp = a_inp.to(R.dtype).sigmoid().unsqueeze(-1)  # [...i1]
        D_use = f_inp * R
        beta_ign = self.beta_use if self.beta_ign is None else self.beta_ign
        return self.beta_use * D_use - beta_ign * (f_inp - D_use)

    def forward(
        self,
        a_inp: Tensor,
        mu_inp: Tensor,
        n_out: int | None = None,
        return_R: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, ...]:
        """Route inputs to outputs.

        Args:
            a_inp: `[...i]`, input scores, as logits; `-inf` masks an input.
            mu_inp: `[...icd]`, input capsules.
            n_out: number of outputs, only if it was not fixed at construction; by default the number of inputs.
            return_R: whether to return the routing probabilities too.
            group: processes that each hold some of the inputs, as in `ops.route`; `n_out` then has no default.

        Returns:
            `a_out [...j]` (logits), `mu_out [...jch]` (means), `sig2_out [...jch]` (variances) and, with `return_R`,
            `R [...ij]` (probabilities), in float32 or wider.

        Raises:
            ValueError: If shapes do not fit the layer, or `n_out` is passed although it is fixed.
            TypeError: If an input is not a tensor, or complex.
        """
        if not isinstance(a_inp, Tensor) or not isinstance(mu_inp, Tensor):
            raise TypeError(f"a_inp is {type(a_inp).__name__} and mu_inp {type(mu_inp).__name__}; expected tensors.")
        if mu_inp.ndim < 3 or mu_inp.shape[-2:] != (self.d_cov, self.d_inp):
            raise ValueError(
                f"mu_inp has shape {tuple(mu_inp.shape)}; this layer expects [..., n_inp, d_cov={self.d_cov}, "
                f"d_inp={self.d_inp}]."
            )
        n_inp = mu_inp.shape[-3]
        if self.n_inp is not None and n_inp != self.n_inp:
            raise ValueError(
                f"mu_inp has {n_inp} capsules; this layer was built for n_inp={self.n_inp}. Leave n_inp out at "
                "construction to route any number with shared weights."
            )
        if self.n_out is not None and n_out is not None:
            raise ValueError(
                f"n_out={n_out} was passed to a layer built for n_out={self.n_out}. Leave it out of the call, or leave "
                "it out at construction to choose it at each call."
            )
        if group is not None and self.n_out is None and n_out is None:
            raise ValueError(
                "n_out is None; expected the number of outputs, as no process of a group has all the inputs that the "
                "default counts."
            )
        n_out = self.n_out or (n_inp if n_out is None else plain(n_out))
        if isinstance(n_out, bool) or not isinstance(n_out, (int, torch.SymInt)) or n_out < 1:
            raise ValueError(f"n_out is {shown(n_out)}; expected a whole number, at least 1.")
        return route(
            a_inp,
            mu_inp,
            self.W,
            self._biases(n_out),
            self.beta_use,
            self.beta_use if self.beta_ign is None else self.beta_ign,
            n_out=n_out,
            n_iters=self.n_iters,
            p_model=self.p_model,
            eps=self.eps,
            return_R=return_R,
            strategy=self.strategy,
            group=group,
        )

    def _biases(self, n_out: int) -> Tensor:
        if self.B_brk is None:
            return self.B
        # Outputs that share every weight would all be alike. A bias that differs along j breaks the symmetry.
        # It is float32, as in the original, so a float64 layer agrees with the original to the last digit.
        position = torch.linspace(-1.0, 1.0, n_out, dtype=torch.float32, device=self.B.device)  # [j]
        return self.B + self.B_brk * position[:, None, None]

    def extra_repr(self) -> str:
        """Return the constructor's arguments, for `print(layer)`."""
        names = ("d_cov", "d_inp", "d_out", "n_inp", "n_out", "n_iters", "single_beta", "p_model", "eps", "strategy")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
