"""The paper's text head."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .base import option, register
from .inputs import TokenHead
from .routing import RoutingHead, RoutingOptions

logger = logging.getLogger(__name__)


@functools.cache  # once in a process: a head is built more than once
def _warn_of_one_iteration() -> None:
    logger.warning(
        "n_iters is 1, so class scores do not depend on the hidden states, as the first iteration weights all votes "
        "alike; expected 2 or more (the paper uses 3), unless the head is a control."
    )


@dataclass(frozen=True)
class TokenDepthOptions(RoutingOptions):
    """The options of `TokenDepthHead`."""

    d_inp: int = option(64, "Size of the capsules that hidden states become.")
    d_cap: int = option(2, "Columns of the pose of part and class capsules.")


@register("token_depth")
class TokenDepthHead(TokenHead, RoutingHead):
    """The paper's text head: every token at every layer is a capsule, routed to parts, routed to classes.

    A learned embedding of the layer is added to the hidden states. An affine map, swish and layer normalisation then
    make each token at each layer a capsule of `1 x d_inp`, with the logit of the token's mask as its score. These
    capsules are routed to `n_parts` part capsules of `1 x d_cap`. The parts are routed to `n_out` output capsules of
    `1 x d_cap`, whose scores are the logits (Heinsen, 2019, section 4.2). Hidden states of several sizes, as in
    hierarchical image models, have one affine map and normalisation per size.

    Args:
        hidden_sizes: size of each hidden state.
        n_out: number of output capsules; None to stop at the parts, which are then the output.
        **options: fields of `TokenDepthOptions`.
    """

    title = "A routing-capsule head"
    Options = TokenDepthOptions
    options: TokenDepthOptions

    def __init__(self, *, hidden_sizes: Sequence[int], n_out: int | None, **options: Any) -> None:
        super().__init__(hidden_sizes=hidden_sizes, n_out=n_out, **options)
        if self.options.n_iters == 1:
            _warn_of_one_iteration()
        self.detect_parts = self.make_detectors(self.options.d_inp)
        self.routings = self.make_routings(1, self.options.d_inp, self.options.d_cap)
