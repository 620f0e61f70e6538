"""The base of heads that route: their options, and the path of the inputs through one routing after another."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..layers import Routing
from ..ops import P_MODELS, check_routing_options
from .base import Head, HeadOptions, HeadOutput, Mix, option


@dataclass(frozen=True)
class RoutingOptions(HeadOptions):
    """The options of a head that routes; a subclass adds the sizes."""

    n_parts: int = option(64, "Number of part capsules.")
    n_iters: int = option(3, "Iterations of each routing.")
    p_model: str = option("gaussian", "Model of the votes: gaussian, or skm (soft k-means).", choices=P_MODELS)
    single_beta: bool = option(False, "One beta for using and for ignoring data, instead of two.")
    eps: float = option(1e-5, "Number added to counts of data and to variances in routing.")
    strategy: str = option(
        "auto", "Strategy that computes the routing to the parts: auto, or the name of one.", describes=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_routing_options(n_iters=self.n_iters, p_model=self.p_model, eps=self.eps, strategy=self.strategy)


class RoutingHead(Head, abc.ABC):
    """A head that routes its inputs to parts and, unless it stops there, the parts to output capsules.

    A subclass builds `routings` with `make_routings`, and computes the inputs of the first routing in `detect`.

    Attributes:
        routings: the routing to the parts and, unless `n_out` is None, the routing from the parts to the outputs.
        pose_shape: rows and columns of the pose of an output capsule.
    """

    has_parts = True
    explains = ("parts", "tokens")
    options: RoutingOptions
    routings: nn.ModuleList
    pose_shape: tuple[int, int]

    def make_routings(self, d_cov: int, d_inp: int, d_cap: int) -> nn.ModuleList:
        """Return the routing from inputs `d_cov x d_inp` to parts `d_cov x d_cap`, and the routing to the outputs.

        The strategy in the options is for the first routing, which does almost all the work. The second routing, where
        each part has weights of its own, uses "auto".
        """
        self.pose_shape = d_cov, d_cap
        o = self.options
        options: dict[str, Any] = {
            "n_iters": o.n_iters,
            "p_model": o.p_model,
            "single_beta": o.single_beta,
            "eps": o.eps,
        }
        routings = [Routing(d_cov, d_inp, d_cap, n_out=o.n_parts, strategy=o.strategy, **options)]
        if self.n_out is not None:
            routings.append(Routing(d_cov, d_cap, d_cap, o.n_parts, self.n_out, **options))
        return nn.ModuleList(routings)

    @abc.abstractmethod
    def detect(
        self, hidden_states: Sequence[Tensor], masks: Sequence[Tensor], mix: Mix | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the inputs of the first routing.

        Args:
            hidden_states: as in `forward`.
            masks: one per layer.
            mix: as in `forward`.

        Returns:
            Scores `[batch, n_inp]`, as logits, and poses `[batch, n_inp, d_cov, d_inp]`.
        """

    @abc.abstractmethod
    def split_by_layer(self, values: Tensor, n_tokens: Sequence[int]) -> list[Tensor]:
        """Split values of the inputs of the first routing by layer and token.

        Args:
            values: `[batch, n_inp, ...]`.
            n_tokens: number of tokens of each layer.

        Returns:
            Per layer `[batch, tokens, ...]`, the sum over a token's inputs at that layer.
        """

    def score(
        self,
        hidden_states: Sequence[Tensor],
        masks: Sequence[Tensor],
        return_routing_probabilities: bool,
        mix: Mix | None,
    ) -> HeadOutput:
        """Route; see `Head.score`."""
        a, x = self.detect(hidden_states, masks, mix)
        probabilities: list[Tensor] = []
        sig2: Tensor | None = None
        for routing in self.routings:
            a, x, sig2, *R = routing(a, x, return_R=return_routing_probabilities)
            probabilities += R
        return HeadOutput(a, x, sig2, tuple(probabilities) if return_routing_probabilities else None)
